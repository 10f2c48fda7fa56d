"""The litellm adapter, through the real litellm, against a provider that speaks the real protocol."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest

from agentrun.adapters.litellm import CONTINUE, load, stream
from agentrun.agent import Context, Item, agent
from agentrun.errors import AuthorSignal, Fail, InvalidInput, LeaseLost, Retry
from agentrun.message import MessageBuilder
from agentrun.testing.openai_server import Call, Drop, FakeOpenAI, Pause, Refuse, Stall, Text, Thought
from agentrun.testing.openai_server import Fail as StreamError
from agentrun.wire import (
    InputRequired,
    Message,
    OutputEvent,
    ReasoningDelta,
    ReasoningPart,
    TextDelta,
    TextPart,
    ToolCall,
    ToolInputDelta,
    ToolPart,
    ToolResult,
    TurnRequested,
    Usage,
)

# litellm 1.106 reads these from instances of its models, which pydantic 2.11 deprecated; as an error it would be taken
# for one of the provider's.
pytestmark = pytest.mark.filterwarnings(r"ignore:Accessing the 'model_(computed_)?fields' attribute:DeprecationWarning")


class Port:
    """Folds what is appended. A question waits until it has an answer; ``stuck`` holds every append up."""

    stopping = False

    def __init__(self, partial: Message | None = None, answers: dict[str, Any] | None = None) -> None:
        self.events: list[OutputEvent] = []
        self.questions: list[InputRequired] = []
        self.answers = answers or {}
        self.stuck = False
        self._message = MessageBuilder(partial)

    @property
    def message(self) -> Message:
        return self._message.message

    async def emit(self, event: OutputEvent) -> None:
        if self.stuck:
            await anyio.sleep_forever()
        self.events.append(event)
        self._message.apply(event)

    async def ask(self, question: InputRequired, hold: float | None) -> Any:
        self.questions.append(question)
        if question.request not in self.answers:
            await anyio.sleep_forever()
        return self.answers[question.request]

    async def take_steering(self) -> list[TurnRequested]:
        return []

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    load()


@pytest.fixture
async def fake() -> AsyncIterator[FakeOpenAI]:
    async with FakeOpenAI() as server:
        yield server


def context(port: Port, *, partial: Message | None = None, attempt: int = 1) -> Context:
    request = TurnRequested(turn="t1", agent="a", input="hello")
    messages = [{"role": "user", "content": "hello"}]
    return Context(port, session="s1", attempt=attempt, request=request, messages=messages, partial=partial)


async def run(
    fake: FakeOpenAI, port: Port | None = None, *, partial: Message | None = None, attempt: int = 1, **options: Any
) -> tuple[Port, Context]:
    port = port or Port(partial)
    ctx = context(port, partial=partial, attempt=attempt)

    @agent(resume=True)
    async def subject(ctx: Context) -> AsyncIterator[Item]:
        async for item in stream(ctx, model="openai/m", api_base=fake.url, api_key="k", **options):
            yield item

    await subject.run(ctx)
    return port, ctx


async def until(ready: Callable[[], bool]) -> None:
    while not ready():  # noqa: ASYNC110 - what is waited for is told by nobody
        await anyio.sleep(0.005)


def sent(fake: FakeOpenAI, request: int = -1) -> list[dict[str, Any]]:
    return fake.requests[request].body["messages"]


# ------------------------------------------------------------------------------------------------------ one call


async def test_text_usage_and_finish_reason(fake: FakeOpenAI) -> None:
    fake.script(Text("It is a fine day."), usage=(11, 5))
    port, ctx = await run(fake, system="Be brief.", temperature=0.5)
    assert [e.text for e in port.of(TextDelta)] == ["It ", "is ", "a ", "fine ", "day."]
    assert (ctx.usage, ctx.finish_reason) == (Usage(input_tokens=11, output_tokens=5), "stop")
    assert sent(fake) == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    body = fake.requests[0].body
    assert (body["model"], body["temperature"], body["stream_options"]) == ("m", 0.5, {"include_usage": True})
    assert "tools" not in body


async def test_plain_messages_yield_items(fake: FakeOpenAI) -> None:
    messages = [{"role": "user", "content": "one two"}]
    items = [i async for i in stream(messages, model="openai/m", api_base=fake.url, api_key="k")]
    assert items == ["one ", "two", Usage(input_tokens=2, output_tokens=2)]
    assert messages == [{"role": "user", "content": "one two"}]


async def test_reasoning_comes_apart_from_text(fake: FakeOpenAI) -> None:
    fake.script(Thought("let me see"), Text("yes"))
    port, _ = await run(fake)
    assert port.message.parts == [ReasoningPart("let me see"), TextPart("yes")]
    assert len(port.of(ReasoningDelta)) == 3


@pytest.mark.parametrize("reason", ["length", "content_filter"])
async def test_the_finish_reason_is_the_providers(fake: FakeOpenAI, reason: str) -> None:
    fake.script(Text("cut"), finish_reason=reason)
    _, ctx = await run(fake)
    assert ctx.finish_reason == reason


async def test_the_model_may_be_named_by_the_environment(fake: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGENTRUN_MODEL", raising=False)
    with pytest.raises(InvalidInput, match="AGENTRUN_MODEL"):
        await anext(stream([{"role": "user", "content": "x"}]))
    monkeypatch.setenv("AGENTRUN_MODEL", "openai/by-env")
    assert await anext(stream([{"role": "user", "content": "x"}], api_base=fake.url, api_key="k")) == "x"
    assert fake.requests[0].body["model"] == "by-env"


# --------------------------------------------------------------------------------------------------------- tools


def add(a: int, b: int = 1) -> int:
    """Add two numbers."""
    return a + b


async def test_a_tool_is_called_and_its_result_given_back(fake: FakeOpenAI) -> None:
    fake.script(Text("Let me see. "), Call("add", {"a": 2, "b": 3}, id="c1"), usage=(10, 4))
    fake.script(Text("It is 5."), usage=(20, 3))
    port, ctx = await run(fake, tools=[add])
    assert port.message.parts == [
        TextPart("Let me see. "),
        ToolPart("c1", "add", {"a": 2, "b": 3}, 5),
        TextPart("It is 5."),
    ]
    deltas = port.of(ToolInputDelta)
    assert json.loads("".join(d.text for d in deltas)) == {"a": 2, "b": 3}
    assert len(deltas) == 4
    assert {(d.call, d.name) for d in deltas} == {("c1", "add")}
    assert (ctx.usage, ctx.finish_reason) == (Usage(input_tokens=30, output_tokens=7), "stop")
    assert fake.requests[0].body["tools"][0]["function"]["name"] == "add"
    # Nothing of what litellm is told for itself goes to the provider.
    assert set(fake.requests[0].body) == {"model", "messages", "stream", "stream_options", "tools"}
    assistant, result = sent(fake)[1:]
    assert assistant["content"] == "Let me see. "
    assert [(c["id"], c["function"]["name"]) for c in assistant["tool_calls"]] == [("c1", "add")]
    assert json.loads(assistant["tool_calls"][0]["function"]["arguments"]) == {"a": 2, "b": 3}
    assert result == {"role": "tool", "tool_call_id": "c1", "content": "5"}


async def test_parallel_calls_run_side_by_side_sync_and_async(fake: FakeOpenAI) -> None:
    meet = threading.Barrier(2)

    def one() -> str:
        meet.wait(5)
        return "text stays text"

    async def two() -> dict[str, list[int]]:
        await anyio.to_thread.run_sync(meet.wait, 5)
        return {"as": [1, 2]}

    fake.script(Call("one", id="c1"), Call("two", id="c2"))
    fake.script(Text("done"))
    port, _ = await run(fake, tools=[one, two])
    assert {e.call: e.output for e in port.of(ToolResult)} == {"c1": "text stays text", "c2": {"as": [1, 2]}}
    assert [(m["tool_call_id"], m["content"]) for m in sent(fake)[2:]] == [
        ("c1", "text stays text"),
        ("c2", '{"as": [1, 2]}'),
    ]


async def test_what_goes_wrong_with_a_call_is_told_to_the_model(fake: FakeOpenAI) -> None:
    async def breaks() -> None:
        raise RuntimeError("no disk")

    def odd() -> object:
        return object()

    fake.script(
        Call("add", {"a": "many"}, id="c1"),
        Call("add", '{"a": 1', id="c2"),
        Call("subtract", {"a": 1}, id="c3"),
        Call("breaks", "", id="c4"),
        Call("add", {"a": 1, "c": 2}, id="c5"),
        Call("odd", {}, id="c6"),
        Call("add", {"a": "1"}, id="c7"),
    )
    fake.script(Text("sorry"))
    port, ctx = await run(fake, tools=[add, breaks, odd])
    by_call = {e.call: e for e in port.of(ToolResult)}
    assert "`$.a`" in by_call["c1"].error
    assert "not valid JSON" in by_call["c2"].error
    assert "no tool 'subtract'" in by_call["c3"].error
    assert by_call["c4"].error == "RuntimeError: no disk"
    assert "unknown field `c`" in by_call["c5"].error
    assert "object" in by_call["c6"].error
    assert (by_call["c7"].output, by_call["c7"].error) == (2, None)
    assert port.of(ToolCall)[1].input == '{"a": 1'
    assert sent(fake)[1]["tool_calls"][1]["function"]["arguments"] == "{}"
    told = {m["tool_call_id"]: m["content"] for m in sent(fake)[2:]}
    assert told["c4"] == "Error: RuntimeError: no disk"
    assert ctx.finish_reason == "stop"


@pytest.mark.parametrize("error", [Retry("later", after=3), Fail("never"), LeaseLost("gone")])
async def test_an_authors_word_in_a_tool_ends_the_attempt(fake: FakeOpenAI, error: Exception) -> None:
    ended: list[str] = []

    async def decide() -> None:
        raise error

    async def other() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("other")

    fake.script(Call("other", id="c1"), Call("decide", id="c2"))
    with pytest.raises(type(error)) as raised:
        await run(fake, tools=[decide, other])
    assert raised.value is error
    assert ended == ["other"]
    assert len(fake.requests) == 1


async def test_a_tool_gets_the_context_and_asks_about_its_own_call(fake: FakeOpenAI) -> None:
    async def deploy(ctx: Context, where: str) -> str:
        approved = await ctx.approve(f"to {where}?")
        again = await ctx.ask("sure?")
        await ctx.emit(Usage(input_tokens=100))
        return f"{ctx.session} {approved} {again}"

    port = Port(answers={"c_1": True, "c_1-2": "yes"})
    fake.script(Call("deploy", {"where": "here"}, id="c.1"), usage=(1, 1))
    fake.script(Text("ok"), usage=(1, 1))
    _, ctx = await run(fake, port, tools=[deploy])
    assert port.of(ToolResult)[0].output == "s1 True yes"
    assert [(q.request, q.call) for q in port.questions] == [("c_1", "c.1"), ("c_1-2", "c.1")]
    assert list(fake.requests[0].body["tools"][0]["function"]["parameters"]["properties"]) == ["where"]
    assert ctx.usage == Usage(input_tokens=102, output_tokens=2)


async def test_a_result_is_kept_though_another_call_of_its_step_never_ends(fake: FakeOpenAI) -> None:
    async def forever(ctx: Context) -> None:
        await ctx.approve("?")

    fake.script(Call("add", {"a": 1}, id="c1"), Call("forever", id="c2"))
    port = Port()
    with anyio.move_on_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: run(fake, port, tools=[add, forever]))
            await until(lambda: bool(port.of(ToolResult) and port.questions))
            group.cancel_scope.cancel()
    assert [(e.call, e.output) for e in port.of(ToolResult)] == [("c1", 2)]


async def test_call_ids_that_repeat_or_are_missing_are_made_unique(fake: FakeOpenAI) -> None:
    for _ in range(2):
        fake.script(Call("add", {"a": 1}, id="same"))
    fake.script(Text("ok"))
    port, _ = await run(fake, tools=[add])
    assert [e.call for e in port.of(ToolResult)] == ["same", "same-2"]
    assert [m["tool_call_id"] for m in sent(fake) if m["role"] == "tool"] == ["same", "same-2"]


async def test_the_loop_ends_after_max_steps(fake: FakeOpenAI) -> None:
    for i in range(5):
        fake.script(Call("add", {"a": i}, id=f"c{i}"))
    port, ctx = await run(fake, tools=[add], max_steps=3)
    assert (len(fake.requests), len(port.of(ToolResult)), ctx.finish_reason) == (3, 3, "max_steps")


# -------------------------------------------------------------------------------------------------------- resume


CALL = ToolPart("c1", "add", {"a": 1, "b": 1})


async def test_a_broken_off_text_is_gone_on_from(fake: FakeOpenAI) -> None:
    fake.script(Text("day."))
    port, _ = await run(fake, partial=Message(parts=[ReasoningPart("hm"), TextPart("It is a fine ")]), attempt=2)
    assert port.message.text == "It is a fine day."
    assert sent(fake)[1:] == [
        {"role": "assistant", "content": "It is a fine "},
        {"role": "user", "content": CONTINUE},
    ]


async def test_an_open_call_is_run_and_its_result_given_to_the_model(fake: FakeOpenAI) -> None:
    fake.script(Text("It is 2."))
    port, _ = await run(fake, partial=Message(parts=[TextPart("See: "), CALL]), attempt=2, tools=[add])
    assert port.message.parts == [
        TextPart("See: "),
        ToolPart("c1", "add", {"a": 1, "b": 1}, 2),
        TextPart("It is 2."),
    ]
    assert [m["role"] for m in sent(fake)] == ["user", "assistant", "tool"]
    assert sent(fake)[-1]["content"] == "2"


async def test_a_settled_call_is_not_run_again(fake: FakeOpenAI) -> None:
    def never() -> None:
        raise AssertionError("was run again")

    fake.script(Text("ok"))
    partial = Message(
        parts=[ToolPart("c0", "never", {}, "done"), ToolPart("c2", "never", {}, error="broke"), CALL],
    )
    port, _ = await run(fake, partial=partial, attempt=2, tools=[never, add])
    assert [e.call for e in port.of(ToolResult)] == ["c1"]
    assert [m["content"] for m in sent(fake) if m["role"] == "tool"] == ["done", "Error: broke", "2"]


async def test_a_call_torn_in_writing_is_closed_and_kept_from_the_model(fake: FakeOpenAI) -> None:
    fake.script(Call("add", {"a": 1}, id="c1"))
    fake.script(Text("ok"))
    partial = Message(parts=[TextPart("See: "), ToolPart("c1", "add", input_text='{"a')])
    port, _ = await run(fake, partial=partial, attempt=2, tools=[add])
    torn, again = port.of(ToolResult)
    assert (torn.call, torn.error) == ("c1", "interrupted before the call was complete")
    assert (again.call, again.output) == ("c1-2", 2)
    assert sent(fake, 0)[1:] == [{"role": "assistant", "content": "See: "}, {"role": "user", "content": CONTINUE}]


async def test_a_suspended_approval_goes_on_when_it_is_answered(fake: FakeOpenAI) -> None:
    async def deploy(ctx: Context) -> str:
        return "deployed" if await ctx.approve("?") else "denied"

    fake.script(Call("deploy", id="c1"))
    first = Port()
    with anyio.move_on_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: run(fake, first, tools=[deploy]))
            await until(lambda: bool(first.questions))
            group.cancel_scope.cancel()
    fake.script(Text("All done."))
    second = Port(first.message, answers={"c1": True})
    await run(fake, second, partial=first.message, attempt=2, tools=[deploy])
    assert second.message.parts == [ToolPart("c1", "deploy", {}, "deployed"), TextPart("All done.")]
    assert len(fake.requests) == 2


async def test_restart_and_agents_that_do_not_resume_ask_afresh(fake: FakeOpenAI) -> None:
    partial = Message(parts=[TextPart("It is")])
    await run(fake, partial=partial, attempt=2, resume="restart")
    port = Port()
    ctx = context(port, partial=partial, attempt=2)

    @agent
    async def plain(ctx: Context) -> AsyncIterator[Item]:
        async for item in stream(ctx, model="openai/m", api_base=fake.url, api_key="k"):
            yield item

    await plain.run(ctx)
    assert sent(fake, 0) == sent(fake, 1) == [{"role": "user", "content": "hello"}]
    assert port.message.text == "hello"


# ---------------------------------------------------------------------------------------------------------- stop


async def cancelled_when(fake: FakeOpenAI, ready: Callable[[Port], bool], port: Port, **options: Any) -> float:
    """Run, cancel when ready; return the seconds until the provider saw the connection close."""
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: run(fake, port, **options))
            await until(lambda: ready(port))
            cancelled = time.monotonic()
            group.cancel_scope.cancel()
        await fake.disconnected()
    return fake.disconnects[0].at - cancelled


async def test_a_stop_before_the_headers_closes_the_connection(fake: FakeOpenAI) -> None:
    fake.script(Stall())
    assert await cancelled_when(fake, lambda _: bool(fake.requests), Port()) < 1
    assert fake.disconnects[0].tokens == 0


async def test_a_stop_before_the_first_chunk_closes_the_connection(fake: FakeOpenAI) -> None:
    fake.script(Pause(0), Stall())
    seen = time.monotonic()
    assert await cancelled_when(fake, lambda _: bool(fake.requests) and time.monotonic() - seen > 0.2, Port()) < 1


async def test_a_stop_in_the_middle_closes_the_connection(fake: FakeOpenAI) -> None:
    fake.script(Text("a b c d e f " * 1000, delay=0.005))
    assert await cancelled_when(fake, lambda port: len(port.events) >= 5, Port()) < 1
    assert 5 <= fake.disconnects[0].tokens < 1000


async def test_a_stop_while_an_append_is_held_up_closes_the_connection(fake: FakeOpenAI) -> None:
    # The generator is at its yield then: it is the agent's generator being closed that must close the connection.
    fake.script(Text("a b c "), Stall())
    port = Port()
    port.stuck = True
    started = time.monotonic()
    assert await cancelled_when(fake, lambda _: bool(fake.requests) and time.monotonic() - started > 0.3, port) < 1


async def test_a_stop_inside_a_tool_cancels_it(fake: FakeOpenAI) -> None:
    ended: list[bool] = []

    async def wait() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(True)

    fake.script(Call("wait", id="c1"))
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            port = Port()
            group.start_soon(lambda: run(fake, port, tools=[wait]))
            await until(lambda: bool(port.of(ToolCall)))
            await anyio.sleep(0.05)
            group.cancel_scope.cancel()
    assert ended == [True]
    assert port.of(ToolResult) == []


async def test_iteration_given_up_by_its_consumer_closes_the_connection(fake: FakeOpenAI) -> None:
    fake.script(Text("a b c "), Stall())
    items = stream([{"role": "user", "content": "x"}], model="openai/m", api_base=fake.url, api_key="k")
    assert await anext(items) == "a "
    await items.aclose()
    with anyio.fail_after(20):
        await fake.disconnected()
    assert fake.disconnects[0].request == 0


# -------------------------------------------------------------------------------------------------------- errors


async def raised_by(fake: FakeOpenAI, **options: Any) -> tuple[AuthorSignal, Port]:
    port = Port()
    with pytest.raises(AuthorSignal) as raised:
        await run(fake, port, **options)
    return raised.value, port


@pytest.mark.parametrize(
    ("status", "headers", "after"),
    [
        (429, {"retry-after": "7"}, 7.0),
        (429, {}, 2.0),
        (503, {"retry-after": "1.5"}, 1.5),
        (500, {}, 2.0),
        (408, {}, 2.0),
        (409, {}, 2.0),
        (429, {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        (429, {"retry-after": "soon"}, 2.0),
    ],
)
async def test_what_passes_is_tried_again(fake: FakeOpenAI, status: int, headers: dict[str, str], after: float) -> None:
    fake.script(Refuse(status, headers=headers))
    signal, _ = await raised_by(fake, attempt=2)
    assert isinstance(signal, Retry)
    assert signal.after == after
    assert len(fake.requests) == 1, "litellm retried by itself"


@pytest.mark.parametrize(
    ("refuse", "code"),
    [
        (Refuse(401, "bad key"), "authentication"),
        (Refuse(403, "not yours"), "permission"),
        (Refuse(404, "no such model"), "not_found"),
        (Refuse(400, "bad field"), "bad_request"),
        (Refuse(422, "bad field"), "bad_request"),
        (
            Refuse(400, "This model's maximum context length is 10 tokens.", code="context_length_exceeded"),
            "context_window",
        ),
        (
            Refuse(400, "Your request was rejected as a result of our safety system.", code="content_policy_violation"),
            "content_policy",
        ),
    ],
)
async def test_what_does_not_pass_fails_with_its_code(
    fake: FakeOpenAI, refuse: Refuse, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.script(refuse)
    signal, _ = await raised_by(fake)
    assert isinstance(signal, Fail)
    assert signal.code == code
    assert refuse.message in str(signal)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("ending", [StreamError("overloaded"), Drop(), Drop(clean=True)])
async def test_a_stream_that_breaks_off_is_tried_again_and_what_came_is_kept(
    fake: FakeOpenAI, ending: StreamError | Drop, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.script(Text("so far "), ending)
    signal, port = await raised_by(fake)
    assert isinstance(signal, Retry)
    assert port.message.text == "so far "
    assert capsys.readouterr().out == ""


async def test_no_provider_at_all_is_tried_again(fake: FakeOpenAI) -> None:
    async with FakeOpenAI() as gone:
        pass
    signal, _ = await raised_by(gone)
    assert isinstance(signal, Retry)


@pytest.mark.parametrize("steps", [(Stall(),), (Text("a "), Stall())])
async def test_a_stall_closes_the_connection_and_is_tried_again(fake: FakeOpenAI, steps: tuple[Any, ...]) -> None:
    fake.script(*steps)
    signal, _ = await raised_by(fake, stall_timeout=0.3)
    assert isinstance(signal, Retry)
    assert "silent for 0.3 s" in str(signal)
    with anyio.fail_after(20):
        await fake.disconnected()


async def test_a_slow_stream_is_no_stall(fake: FakeOpenAI) -> None:
    fake.script(Text("a b c d ", delay=0.2))
    port, _ = await run(fake, stall_timeout=0.6)
    assert port.message.text == "a b c d "


async def test_a_mistake_in_the_call_is_not_taken_for_the_providers(fake: FakeOpenAI) -> None:
    def twin(a: int) -> int:
        return a

    with pytest.raises(InvalidInput, match="two tools are called twin"):
        await run(fake, tools=[twin, twin])
    assert fake.requests == []
