from __future__ import annotations

import json
from typing import Any

import anyio
import pytest

from agentrun.testing.openai_server import Call, FakeOpenAI, Refuse, Stall, Text


async def post(stream: Any, body: dict[str, Any], path: str = "/v1/chat/completions") -> None:
    data = json.dumps(body).encode()
    await stream.send(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)


async def answer(stream: Any) -> tuple[int, dict[str, Any]]:
    received = b""
    while b"\r\n\r\n" not in received:
        received += await stream.receive()
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += await stream.receive()
    return int(head.split()[1]), json.loads(body)


def ask(text: str) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}]}


async def connect(fake: FakeOpenAI) -> Any:
    return await anyio.connect_tcp("127.0.0.1", int(fake.url.split(":")[2].split("/")[0]))


async def test_requests_on_one_connection_are_answered_in_turn() -> None:
    async with FakeOpenAI() as fake, await connect(fake) as stream:
        fake.script(Refuse(429, "slow down"))
        fake.script(Text("hm "), Call("add", {"a": 1}, id="c1"), usage=(3, 4))
        await post(stream, ask("x"))
        assert await answer(stream) == (
            429,
            {"error": {"message": "slow down", "type": "invalid_request_error", "code": None, "param": None}},
        )
        await post(stream, ask("x"))
        status, body = await answer(stream)
        assert (status, body["usage"]["total_tokens"], body["choices"][0]["finish_reason"]) == (200, 7, "tool_calls")
        assert body["choices"][0]["message"] == {
            "role": "assistant",
            "content": "hm ",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
        }
        await post(stream, ask("echo  me\n"))
        assert (await answer(stream))[1]["choices"][0]["message"]["content"] == "echo  me\n"
        await post(stream, {}, path="/v1/other")
        assert (await answer(stream))[0] == 404
        assert [r.path for r in fake.requests][-1] == "/v1/other"
        assert fake.disconnects == []


@pytest.mark.parametrize("words", [0, 2])
async def test_who_goes_away_early_is_noted_with_what_was_sent(words: int) -> None:
    async with FakeOpenAI() as fake:
        fake.script(Text("w " * words), Stall())
        async with await connect(fake) as stream:
            await post(stream, {**ask("x"), "stream": True})
            received = b""
            while received.count(b'"w "') < words or b"data: " not in received:
                received += await stream.receive()
        with anyio.fail_after(20):
            await fake.disconnected()
        assert [(d.request, d.tokens) for d in fake.disconnects] == [(0, words)]
