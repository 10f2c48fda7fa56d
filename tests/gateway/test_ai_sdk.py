"""The AI SDK's endpoints over real HTTP: send, resume, stop, edit, regenerate, approve, take over, refuse."""

from __future__ import annotations

from typing import Any

import anyio
import httpx
import pytest

from agentrun.brokers.memory import MemoryBroker, MemoryState
from agentrun.client import Client
from agentrun.gateway import Auth, Gateway
from agentrun.gateway.server import serving
from agentrun.worker import Worker
from tests.gateway.ai_agents import both, curious, over, slow
from tests.gateway.ai_client import Reader, complete_with_approvals, complete_with_tool_calls, is_tool
from tests.gateway.ai_http import Chat, text_of, user
from tests.gateway.conftest import WORKER, Served, Site
from workers.echo import echo

COUNT = "".join(f"w{n} " for n in range(30))


def fold(chunks: list[dict[str, Any]], message: dict[str, Any] | None = None, *, resumes: bool = False) -> Reader:
    reader = Reader(message, resumes=resumes)
    reader.feed(*chunks)
    return reader


# ------------------------------------------------------------------------------------------------------------ send


async def test_a_message_and_its_answer(served: Served) -> None:
    chat = Chat(served, "s1")
    async with chat.saying("hello you", "u-1") as stream:
        await stream.rest()
        reader = chat.take(stream)
        headers = stream.response.headers
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["x-vercel-ai-ui-message-stream"] == "v1"
    assert headers["x-workflow-run-id"] == "s1~u-1"
    assert (text_of(reader.message), reader.finish) == ("hello you", "stop")
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    assert await chat.load() == [
        user("hello you", "u-1"),
        {
            "id": "msg_u-1",
            "role": "assistant",
            "parts": [{"type": "step-start"}, {"type": "text", "text": "hello you", "state": "done"}],
        },
    ]


async def test_the_conversation_is_that_of_the_log_not_that_of_the_post(served: Served) -> None:
    chat = Chat(served, "s1")
    await chat.say("one")
    chat.messages[0]["parts"][0]["text"] = "forged"
    await chat.say("two")
    history = await served.gateway.client.session("s1").history()
    assert [m["content"] for m in history.messages()] == ["one", "one", "two", "two"]


async def test_the_same_message_posted_by_two_devices_is_one_turn(served: Served) -> None:
    devices = [Chat(served, "s1"), Chat(served, "s1"), Chat(served, "s1")]
    readers: list[Reader] = []

    async def one(chat: Chat) -> None:
        readers.append(await chat.say("count 20 5", "u-1"))

    async with anyio.create_task_group() as group:
        for chat in devices:
            group.start_soon(one, chat)
    assert {text_of(reader.message) for reader in readers} == {"".join(f"w{n} " for n in range(20))}
    assert len((await served.gateway.client.session("s1").history()).turns) == 1


async def test_any_chat_id_and_any_message_id(served: Served) -> None:
    chat = Chat(served, "a/b c?ü~")
    async with chat.saying("count 30 10", "odd id/1") as stream:
        await stream.until("text-delta")
        async with Chat(served, "a/b c?ü~").resuming() as other:
            assert other.response.status_code == 200
            await other.rest()
        await stream.rest()
    assert text_of(fold(other.chunks).message) == text_of(fold(stream.chunks).message) == COUNT
    loaded = await chat.load()
    assert [m["id"] for m in loaded] == ["odd id/1", stream.chunks[0]["messageId"]]


async def test_body_fields_and_the_single_message_form(served: Served) -> None:
    body = {
        "id": "s1",
        "message": user("hi", "u-1") | {"metadata": {"mood": "good"}},
        "agent": "echo",
        "device": "phone",
        "metadata": {"page": 3},
    }
    response = await served.http.post("/api/chat", json=body)
    assert response.status_code == 200
    request = (await served.gateway.client.session("s1").history()).turns["u-1"].request
    assert request is not None
    assert (request.agent, request.device) == ("echo", "phone")
    assert request.metadata == {"page": 3, "message_id": "u-1", "ui": {"mood": "good"}}
    assert (await Chat(served, "s1").load())[0]["metadata"] == {"mood": "good"}


async def test_files_become_content_parts(served: Served) -> None:
    file = {"type": "file", "mediaType": "image/png", "url": "data:image/png;base64,AA=="}
    other = {"type": "file", "mediaType": "application/pdf", "url": "https://a/b.pdf", "filename": "b.pdf"}
    message = {"id": "u-1", "role": "user", "parts": [file, other, {"type": "text", "text": "what is it"}]}
    await served.http.post("/api/chat", json={"id": "s1", "messages": [message]})
    request = (await served.gateway.client.session("s1").history()).turns["u-1"].request
    assert request is not None
    assert request.input == [
        {"type": "text", "text": "what is it"},
        {"type": "image_url", "image_url": {"url": file["url"], "format": "image/png"}},
        {"type": "file", "file": {"file_id": other["url"], "format": "application/pdf", "filename": "b.pdf"}},
    ]
    assert (await Chat(served, "s1").load())[0]["parts"] == [{"type": "text", "text": "what is it"}, file, other]


async def test_a_transport_without_a_chat_id_keeps_to_one_session(served: Served) -> None:
    chat = Chat(served, "unused")
    first = await chat.say("one", "first", id=None)
    assert text_of(first.message) == "one"
    async with chat.saying("two", "second", id=None) as stream:
        await stream.rest()
    assert stream.response.headers["x-workflow-run-id"] == "w_first~second"
    assert list((await served.gateway.client.session("w_first").history()).turns) == ["first", "second"]


async def test_a_message_sent_while_another_is_answered_waits_its_turn(served: Served) -> None:
    chat = Chat(served, "s1")
    async with chat.saying("count 30 10", "u-1") as first:
        await first.until("text-delta")
        async with Chat(served, "s1").saying("after", "u-2") as second:
            await first.rest()
            await second.rest()
    assert text_of(fold(first.chunks).message) == COUNT
    assert text_of(fold(second.chunks).message) == "after"


async def test_a_busy_chat_can_refuse_and_can_be_interrupted(served: Served) -> None:
    chat = Chat(served, "s1")
    async with chat.saying("count 1000 10", "u-1") as first:
        await first.until("text-delta")
        refused = await served.http.post(
            "/api/chat", json={"id": "s1", "messages": [user("x", "u-2")], "on_busy": "reject"}
        )
        assert (refused.status_code, refused.json()["code"]) == (409, "session_busy")
        async with Chat(served, "s1").saying("now", "u-3", on_busy="interrupt") as second:
            await second.rest()
        await first.rest()
    assert fold(first.chunks).finish == "interrupted"
    assert text_of(fold(second.chunks).message) == "now"


async def test_a_turn_that_fails(served: Served) -> None:
    chat = Chat(served, "s1")
    reader = await chat.say("fail")
    assert reader.error is not None
    assert "as you asked" in reader.error
    assert text_of(reader.message) == "I fail. "


# ---------------------------------------------------------------------------------------------------------- resume


async def test_nothing_to_resume(served: Served) -> None:
    for path in ("/api/chat/nobody/stream", "/api/chat/a~b/stream"):
        response = await served.http.get(path)
        assert (response.status_code, response.content) == (204, b"")
    response = await served.http.get("/api/chat/nobody/stream?startIndex=0")
    assert response.status_code == 200
    assert '{"type":"finish"}' in response.text


async def test_whoever_comes_later_gets_the_whole_message(served: Served) -> None:
    chat = Chat(served, "s1")
    async with chat.saying("count 30 15", "u-1") as stream:
        await stream.until("text-delta", 5)
        async with Chat(served, "s1").resuming() as late, Chat(served, "s1").resuming(0) as counted:
            await late.rest()
            await counted.rest()
        await stream.rest()
    readers = [fold(stream.chunks), fold(late.chunks), fold(counted.chunks)]
    assert {text_of(reader.message) for reader in readers} == {COUNT}
    assert {reader.message["id"] for reader in readers if reader.message} == {"msg_u-1"}
    assert counted.chunks == stream.chunks
    assert len(late.chunks) < len(stream.chunks)
    partial = fold(stream.chunks[:9]).message
    assert text_of(fold(late.chunks, partial, resumes=True).message) == COUNT


async def test_an_answer_that_ended_a_moment_ago_is_still_there(served: Served) -> None:
    chat = Chat(served, "s1")
    reader = await chat.say("hello")
    stream = await chat.resume()
    assert fold(stream.chunks, reader.message, resumes=True).message == reader.message


async def test_a_dropped_response_goes_on_at_the_chunk_it_was_at(served: Served) -> None:
    chat = Chat(served, "s1")
    async with chat.saying("count 30 10", "u-1") as stream:
        await stream.until("text-delta", 4)
    run = stream.response.headers["x-workflow-run-id"]
    chunks = list(stream.chunks)
    async with chat.resuming(len(chunks), run) as second:
        await second.until("text-delta", 3)
    chunks += second.chunks
    chunks += (await chat.resume(len(chunks), run)).chunks
    assert text_of(fold(chunks).message) == COUNT
    assert chunks[-1]["type"] == "finish"
    whole = await chat.resume(0, run)
    assert whole.chunks == chunks
    beyond = await chat.resume(len(chunks) + 5, run)
    assert (beyond.chunks[-1]["type"], beyond.done) == ("finish", True)
    tail = await chat.resume(-3, run)
    assert tail.chunks == chunks[-3:]
    assert tail.response.headers["x-workflow-stream-tail-index"] == str(len(chunks) - 1)


async def test_the_gateway_shuts_down_in_mid_answer(site: Site) -> None:
    async with site.serving() as first:
        chat = Chat(first, "s1")
        async with chat.saying("count 30 20", "u-1") as stream:
            await stream.until("text-delta", 3)
            first.gateway.drain()
            await stream.rest()
        assert (stream.broken, stream.done) == (True, False)
    second = await site.gateway()
    run = stream.response.headers["x-workflow-run-id"]
    more = await Chat(second, "s1").resume(len(stream.chunks), run)
    assert text_of(fold(stream.chunks + more.chunks).message) == COUNT


async def test_a_client_that_goes_away_stops_nothing(served: Served) -> None:
    chat = Chat(served, "s1")
    async with chat.saying("count 30 5", "u-1") as stream:
        await stream.until("text-delta")
    assert (await served.gateway.client.turn("s1", "u-1").result(5)).text == COUNT


# ------------------------------------------------------------------------------------------------------------ stop


async def test_any_device_stops_for_all(served: Served) -> None:
    chat = Chat(served, "s1")
    async with chat.saying("count 1000 10", "u-1") as stream, chat.resuming() as other:
        await stream.until("text-delta", 3)
        await other.until("text-delta", 2)
        receipt = await Chat(served, "s1").stop()
        await stream.rest()
        await other.rest()
    assert receipt["status"] == "cancelled"
    for ended in (stream, other):
        assert [chunk["type"] for chunk in ended.chunks[-4:]] == ["text-end", "finish-step", "abort", "finish"]
        assert (fold(ended.chunks).finish, ended.done) == ("interrupted", True)
    assert text_of(fold(stream.chunks).message) == text_of(fold(other.chunks).message)
    counted = await chat.resume(0)
    assert counted.chunks[-1] == {"type": "finish", "finishReason": "stop"}, "all that this transport knows"
    assert (await Chat(served, "s1").stop())["status"] == "already_ended"
    assert (await Chat(served, "nobody").stop())["status"] == "not_found"


# ------------------------------------------------------------------------------------------------ edit, regenerate


async def test_an_answer_is_given_anew(served: Served) -> None:
    chat = Chat(served, "s1")
    await chat.say("one", "u-1")
    await chat.say("two", "u-2")
    old = chat.messages.pop()
    reader = await chat.post(trigger="regenerate-message", messageId=old["id"])
    assert reader.message is not None
    assert text_of(reader.message) == "two"
    assert reader.message["id"] != old["id"]
    assert [m["id"] for m in await chat.load()] == ["u-1", "msg_u-1", "u-2", reader.message["id"]]
    chat.messages.pop()
    again = await chat.post(trigger="regenerate-message", messageId=old["id"])
    assert again.message == reader.message, "posted again, it is the same turn"
    chat.messages.pop()
    anew = await chat.post(trigger="regenerate-message")
    assert anew.message is not None
    assert anew.message["id"] != reader.message["id"]


async def test_an_answer_that_is_still_coming_is_given_anew(served: Served) -> None:
    chat = Chat(served, "s1")
    async with chat.saying("count 500 10", "u-1") as first:
        await first.until("text-delta")
        async with chat.posting(trigger="regenerate-message") as second:
            await second.until("text-delta")
            await first.rest()
        await chat.stop()
    assert fold(first.chunks).finish == "interrupted"
    assert [m["id"] for m in await chat.load()] == ["u-1", second.chunks[0]["messageId"]]


async def test_an_earlier_message_is_edited(served: Served) -> None:
    chat = Chat(served, "s1")
    await chat.say("one", "u-1")
    await chat.say("two", "u-2")
    chat.messages = [user("uno", "u-1")]
    reader = await chat.post(messageId="u-1")
    assert text_of(reader.message) == "uno"
    history = await served.gateway.client.session("s1").history()
    assert [m["content"] for m in history.messages()] == ["uno", "uno"]
    assert [text_of(m) for m in await chat.load()] == ["uno", "uno"]
    await chat.say("three", "u-3")
    assert [text_of(m) for m in await chat.load()] == ["uno", "uno", "three", "three"]


async def test_what_the_gateway_never_saw_is_sent_by_a_regeneration(served: Served) -> None:
    chat = Chat(served, "s1")
    chat.messages.append(user("one", "u-1"))
    assert text_of((await chat.post(trigger="regenerate-message")).message) == "one"


# -------------------------------------------------------------------------------------------------------- approval


@pytest.mark.parametrize("hold", [30.0, 0.02], ids=["held", "suspended"])
@pytest.mark.parametrize("approved", [True, False])
@pytest.mark.parametrize("agent", ["resumes", "starts over"])
async def test_approval(site: Site, hold: float, approved: bool, agent: str) -> None:
    served = await site.gateway()
    await site.worker(over, ask_hold=hold)
    chat = Chat(served, "s1", agent="over" if agent == "starts over" else "echo")
    asked = await chat.say("approve 3 1", "u-1")
    assert asked.finish == "tool-calls"
    [part] = [part for part in asked.parts if is_tool(part)]
    assert part["state"] == "approval-requested"
    if hold < 1 and agent == "starts over":
        await until_suspended(site)
    assert [m["parts"][-1]["state"] for m in await chat.load() if m["role"] == "assistant"] == ["approval-requested"]
    chat.answer(part["toolCallId"], approved=approved)
    assert complete_with_approvals(chat.messages[-1])
    async with chat.posting(messageId=chat.messages[-1]["id"]) as stream:
        await stream.rest()
    assert stream.chunks[0] == {"type": "start", "messageId": "msg_u-1"}
    reader = chat.take(stream)
    assert reader.finish == "stop"
    assert not complete_with_approvals(reader.message or {})
    assert not complete_with_tool_calls(reader.message or {})
    text = text_of(reader.message)
    if agent == "starts over":
        attempt = 2 if hold < 1 else 1
        assert text == f"attempt {attempt}: may I? {'done' if approved else 'left alone'}"
    else:
        assert text.endswith("w0 w1 w2 " if approved else "undone. ")
    loaded = (await chat.load())[-1]
    assert text_of(loaded) == text
    run = stream.response.headers["x-workflow-run-id"]
    again = await chat.resume(0, run)
    assert again.chunks == stream.chunks
    whole = fold((await chat.resume(0)).chunks)
    assert text_of(whole.message) == text


async def until_suspended(site: Site) -> None:
    with anyio.fail_after(20):
        while (await site.client.session("s1").history()).turns["u-1"].state != "suspended":  # noqa: ASYNC110
            await anyio.sleep(0.01)


async def test_two_devices_answer_and_the_first_one_counts(served: Served) -> None:
    one, two = Chat(served, "s1"), Chat(served, "s1")
    await one.say("approve 3 1", "u-1")
    two.messages = await two.load()
    one.answer("deploy", approved=True)
    two.answer("deploy", approved=False)
    first = await one.post(messageId="msg_u-1")
    second = await two.post(messageId="msg_u-1")
    assert text_of(first.message) == text_of(second.message)
    deploy = next(part for part in second.parts if is_tool(part))
    assert (deploy["approval"]["approved"], deploy["state"]) == (True, "output-available")


async def test_a_replay_after_an_approval_begins_at_the_beginning(served: Served) -> None:
    chat = Chat(served, "s1")
    await chat.say("approve 30 10", "u-1")
    chat.answer("deploy", approved=True)
    async with chat.posting(messageId="msg_u-1") as stream:
        await stream.until("text-delta")
        late = await Chat(served, "s1").resume()
        await stream.rest()
    whole = fold(late.chunks).message
    assert text_of(whole) == text_of(chat.take(stream).message)
    assert text_of(whole).endswith("w29 ")


async def test_tools_of_the_client_choices_and_texts(site: Site) -> None:
    served = await site.gateway()
    await site.worker(curious)
    chat = Chat(served, "s1", agent="curious")
    asked = await chat.say("x", "u-1")
    assert asked.called == ["where"]
    assert asked.parts[-1]["type"] == "tool-locate"
    chat.answer("where", {"city": "Ulm"})
    assert complete_with_tool_calls(chat.messages[-1])
    await chat.post(messageId="msg_u-1")
    assert chat.messages[-1]["parts"][-1]["input"] == {"prompt": "which?", "kind": "choice", "choices": ["red", "blue"]}
    chat.answer("colour", "green")
    wrong = await served.http.post("/api/chat", json={"id": "s1", "messages": chat.messages})
    assert wrong.status_code == 422
    assert "red" in wrong.json()["detail"]
    chat.answer("colour", "red")
    await chat.post(messageId="msg_u-1")
    chat.answer("word", "abc")
    reader = await chat.post(messageId="msg_u-1")
    assert text_of(reader.message) == "at {'city': 'Ulm'} red abc"


async def test_two_questions_at_once_are_asked_in_one_response(site: Site) -> None:
    served = await site.gateway()
    await site.worker(both)
    chat = Chat(served, "s1", agent="both")
    asked = await chat.say("x", "u-1")
    assert [part["state"] for part in asked.parts if is_tool(part)] == ["approval-requested"] * 2
    chat.answer("a", approved=True)
    chat.answer("b", approved=False)
    reader = await chat.post(messageId="msg_u-1")
    assert text_of(reader.message) == "a True, b False"


async def test_one_of_two_questions_answered_leaves_the_other(site: Site) -> None:
    served = await site.gateway()
    await site.worker(both)
    chat = Chat(served, "s1", agent="both")
    await chat.say("x", "u-1")
    chat.answer("a", approved=True)
    more = await chat.post(messageId="msg_u-1")
    assert more.finish == "tool-calls"
    states = {part["toolCallId"]: part["state"] for part in more.parts if is_tool(part)}
    assert states["b"] == "approval-requested"
    chat.answer("b", approved=True)
    assert text_of((await chat.post(messageId="msg_u-1")).message) == "a True, b True"


async def test_an_answer_to_a_turn_that_was_stopped(served: Served) -> None:
    chat = Chat(served, "s1")
    await chat.say("approve 3 1", "u-1")
    await chat.stop()
    chat.answer("deploy", approved=True)
    reader = await chat.post(messageId="msg_u-1")
    assert reader.finish == "interrupted"
    assert not complete_with_approvals(reader.message or {})


async def test_a_message_without_a_question_is_not_sent_for_ever(served: Served) -> None:
    chat = Chat(served, "s1")
    await chat.say("one")
    chat.messages[-1]["parts"].append(
        {"type": "dynamic-tool", "toolName": "t", "toolCallId": "c", "state": "output-available", "output": 1}
    )
    assert complete_with_tool_calls(chat.messages[-1])
    reader = await chat.post(messageId=chat.messages[-1]["id"])
    assert not complete_with_tool_calls(reader.message or {})


# -------------------------------------------------------------------------------------------------------- takeover


async def test_a_worker_dies_and_the_next_one_starts_over(site: Site) -> None:
    served = await site.gateway()
    first = await site.worker(slow, lease=0.6)
    chat = Chat(served, "s1", agent="slow")
    async with chat.saying("30", "u-1") as stream, chat.resuming() as other:
        await stream.until("text-delta", 5)
        first.cancel()
        await site.worker(slow, lease=0.6)
        await stream.rest()
        await other.rest()
    expected = "attempt 2: " + COUNT
    assert text_of(fold(stream.chunks).message) == text_of(fold(other.chunks).message) == expected
    assert [chunk["type"] for chunk in stream.chunks].count("reset-step") == 1
    assert (await chat.resume(0)).chunks == stream.chunks


async def test_an_older_client_is_cut_off_and_reads_again(site: Site) -> None:
    served = await site.gateway(ai_version=6)
    first = await site.worker(slow, lease=0.6)
    chat = Chat(served, "s1", agent="slow")
    async with chat.saying("10", "u-1") as stream:
        await stream.until("text-delta", 5)
        first.cancel()
        await site.worker(slow, lease=0.6)
        await stream.rest()
    assert (stream.broken, stream.done) == (True, False)
    again = await chat.resume()
    reader = Reader(version=6)
    reader.feed(*again.chunks)
    assert text_of(reader.message) == "attempt 2: " + "".join(f"w{n} " for n in range(10))


async def test_a_session_that_is_deleted_says_so(served: Served) -> None:
    chat = Chat(served, "s1")
    async with chat.saying("count 1000 10", "u-1") as stream:
        await stream.until("text-delta")
        await served.gateway.client.session("s1").delete()
        await stream.rest()
    assert [chunk["type"] for chunk in stream.chunks[-2:]] == ["error", "finish"]


async def test_a_broker_that_is_away_breaks_the_response_off(served: Served) -> None:
    chat = Chat(served, "s1")
    async with chat.saying("count 1000 10", "u-1") as stream:
        await stream.until("text-delta")
        served.gateway.hub.lost = True
        served.gateway.hub.wake()
        await stream.rest()
    assert (stream.broken, stream.done) == (True, False)


async def test_what_has_expired_is_told_whole_but_cannot_be_counted() -> None:
    state = MemoryState(lease_ttl=5.0, delta_ttl=0.3)
    async with MemoryBroker(state=state) as broker, anyio.create_task_group() as group:
        group.start_soon(Worker(broker, [echo], settings=WORKER).run)
        gateway = Gateway(Client(broker, agent="echo"), auth=Auth.insecure(), agent="echo")
        async with serving(gateway) as url, httpx.AsyncClient(base_url=url, timeout=20) as http:
            chat = Chat(Served(gateway, url, http), "s1")
            reader = await chat.say("count 30 1", "u-1")
            await anyio.sleep(0.5)
            whole = fold((await chat.resume(0, "s1~u-1")).chunks)
            assert whole.message == reader.message
            lost = await chat.resume(9, "s1~u-1")
            assert [chunk["type"] for chunk in lost.chunks] == ["error", "finish"]
            assert await chat.load() == chat.messages
        group.cancel_scope.cancel()


# --------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 400, "JSON"),
        (b"{", 400, "JSON"),
        (b"[1]", 422, "expected"),
        (b"\xff", 400, "JSON"),
        (b"[" * 100_000, 422, "expected"),
        (b"{}", 422, "nothing to answer"),
        (b'{"id":"s","messages":[]}', 422, "nothing to answer"),
        (b'{"id":"s","messages":[{"role":"user"}]}', 422, "no id"),
        (b'{"id":"s","messages":[{"role":"user","id":"1"}]}', 422, "no text"),
        (b'{"id":"s","messages":[{"role":"user","id":1}]}', 422, "expected"),
        (b'{"id":"s","messages":[{"role":"system","id":"1"}]}', 422, "role"),
        (b'{"id":"s","messages":[{"role":"user","id":"1","parts":[{"type":"text","text":5}]}]}', 422, "no text"),
        (b'{"id":"s","messages":[{"role":"user","id":"1","parts":[{"type":"file","url":"x"}]}]}', 422, "mediaType"),
        (b'{"id":"","messages":[{"role":"user","id":"1","parts":[{"type":"text","text":"x"}]}]}', 422, "chat id"),
        (b'{"message":{"role":"user","id":"1","parts":[{"type":"text","text":"x"}]}}', 422, "no id"),
        (b'{"id":"s","trigger":"x","messages":[]}', 422, "trigger"),
        (
            b'{"id":"s","agent":"a b","messages":[{"role":"user","id":"1","parts":[{"type":"text","text":"x"}]}]}',
            422,
            "agent",
        ),
        (
            b'{"id":"agentrun--revoked","messages":[{"role":"user","id":"1","parts":[{"type":"text","text":"x"}]}]}',
            404,
            "",
        ),
        (
            b'{"id":"s","messages":[{"role":"assistant","id":"1","parts":[{"toolCallId":{},"approval":7}]}]}',
            200,
            "finish",
        ),
    ],
)
async def test_what_cannot_be_used_is_refused_with_a_reason(
    served: Served, body: bytes, status: int, says: str
) -> None:
    response = await served.http.post("/api/chat", content=body)
    assert response.status_code == status, response.text
    assert says in response.text


async def test_an_id_that_is_used_again_for_another_message_is_refused(served: Served) -> None:
    await Chat(served, "s1").say("one", "u-1")
    response = await served.http.post("/api/chat", json={"id": "s1", "messages": [user("two", "u-1")]})
    assert response.status_code == 409


async def test_parameters_that_cannot_be_used(served: Served) -> None:
    for text in ("x", "1.5", "--1", "²"):
        response = await served.http.get("/api/chat/s/stream", params={"startIndex": text})
        assert response.status_code == 400
    assert (await served.http.get(f"/api/chat/{'x' * 129}/stream")).status_code == 422
    assert (await served.http.post("/api/chat/s/stop", content=b"[")).status_code == 400
    assert (await served.http.get("/api/chat/agentrun--revoked")).status_code == 404


async def test_without_a_default_the_agent_must_be_named(site: Site) -> None:
    served = await site.gateway(agent=None)
    await site.client.broker.turns.open("another")
    body = {"id": "s1", "messages": [user("hi", "u-1")]}
    assert (await served.http.post("/api/chat", json=body)).status_code == 422
    assert (await served.http.post("/api/chat?agent=echo", json=body)).status_code == 200
