"""A model provider for tests and demonstrations: the OpenAI chat-completions API, scripted, on a local port.

::

    async with FakeOpenAI() as fake:
        fake.script(Text("Let me see. "), Call("add", {"a": 1, "b": 2}), usage=(10, 5))
        fake.script(Text("It is 3.", delay=0.02))
        ...                                  # point a client at fake.url
        assert fake.requests[0].body["model"] == "m"

One `FakeOpenAI.script` answers one request, in order; without a script the last user message is echoed word by word.
As a program: ``python -m agentrun.testing.openai_server --port 0`` prints its URL and serves until it is stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from contextlib import AsyncExitStack, suppress
from typing import Any, Protocol, Self, cast

import anyio
from anyio.abc import SocketAttribute, SocketStream
from msgspec import Struct

from agentrun.testing.steps import Call, Drop, Fail, Pause, Refuse, Stall, Step, Text, Thought, words

__all__ = [
    "Answer",
    "Call",
    "Disconnect",
    "Drop",
    "Fail",
    "FakeOpenAI",
    "Pause",
    "Refuse",
    "Request",
    "Stall",
    "Step",
    "Text",
    "Thought",
]


class Request(Struct):
    """A request as it came."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at: float = 0.0


class Disconnect(Struct):
    """A client that went away before its response was complete.

    ``request`` is the index in `FakeOpenAI.requests`, ``tokens`` how many words it was sent, ``at`` the monotonic time.
    """

    request: int
    tokens: int
    at: float


class Answer(Protocol):
    """One answer, as `agentrun.testing.Script` has it."""

    @property
    def steps(self) -> tuple[Step, ...]:
        """What to send, in order."""
        ...

    @property
    def usage(self) -> tuple[int, int] | None:
        """Prompt and completion tokens; None: count words."""
        ...


class _Script(Struct):
    steps: tuple[Step, ...]
    finish_reason: str | None = None
    usage: tuple[int, int] | None = None


class FakeOpenAI:
    """The provider; an async context manager that serves while it is open.

    Args:
        host: Where to listen.
        port: 0 takes a free one.
        delay: Seconds between the words of the echo that answers unscripted requests.

    Attributes:
        requests: What came, in order.
        disconnects: Who went away early, in order.
    """

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0, delay: float = 0.0) -> None:
        self._host, self._port, self._delay = host, port, delay
        self._scripts: deque[_Script] = deque()
        self._changed = anyio.Event()
        self._stack = AsyncExitStack()
        self.requests: list[Request] = []
        self.disconnects: list[Disconnect] = []

    @property
    def url(self) -> str:
        """The API's base: what clients call ``api_base`` or ``base_url``."""
        return f"http://{self._host}:{self._port}/v1"

    def script(self, *steps: Step, finish_reason: str | None = None, usage: tuple[int, int] | None = None) -> None:
        """Queue the answer to one request.

        Args:
            steps: What to send, in order.
            finish_reason: Default is ``tool_calls`` with a `Call`, else ``stop``.
            usage: Prompt and completion tokens; counted in words by default.
        """
        self._scripts.append(_Script(steps, finish_reason, usage))

    def play(self, *scripts: Answer) -> None:
        """Queue the answers to as many requests, such as `agentrun.testing.Script`."""
        for script in scripts:
            self.script(*script.steps, usage=script.usage)

    async def requested(self, count: int = 1) -> None:
        """Wait until ``count`` requests have come."""
        while len(self.requests) < count:
            await self._changed.wait()

    async def disconnected(self, count: int = 1) -> None:
        """Wait until ``count`` clients have gone away early."""
        while len(self.disconnects) < count:
            await self._changed.wait()

    async def __aenter__(self) -> Self:
        listener = await anyio.create_tcp_listener(local_host=self._host, local_port=self._port)
        self._port = listener.extra(SocketAttribute.local_port)  # noqa: S610 - not an ORM
        await self._stack.__aenter__()
        await self._stack.enter_async_context(listener)
        tasks = await self._stack.enter_async_context(anyio.create_task_group())
        self._stack.callback(tasks.cancel_scope.cancel)
        tasks.start_soon(listener.serve, self._connection)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def _connection(self, stream: SocketStream) -> None:
        async with stream:
            wire = _Wire(stream)
            while (request := await wire.request()) is not None:
                self.requests.append(request)
                index = len(self.requests) - 1
                self._notify()
                answer = _Answer(wire, request, index)
                whole = await wire.while_connected(answer.send, self._script_for(request))
                if not whole:
                    self.disconnects.append(Disconnect(index, answer.tokens, time.monotonic()))
                    self._notify()
                if not whole or wire.broken:
                    return

    def _script_for(self, request: Request) -> _Script:
        if not request.path.endswith("/chat/completions"):
            return _Script((Refuse(404, f"no such path: {request.path}"),))
        if self._scripts:
            return self._scripts.popleft()
        users = [m for m in request.body.get("messages", []) if m.get("role") == "user"]
        return _Script((Text(_content(users[-1]) if users else "", delay=self._delay),))


class _Wire:
    """One HTTP/1.1 connection."""

    def __init__(self, stream: SocketStream) -> None:
        self.stream = stream
        self.broken = False
        self._buffer = bytearray()

    async def _fill(self) -> bool:
        try:
            self._buffer += await self.stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            return False
        return True

    async def request(self) -> Request | None:
        """The next request, or None when the client is done."""
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if not await self._fill():
                return None
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        total = end + 4 + int(headers.get("content-length", "0"))
        while len(self._buffer) < total:
            if not await self._fill():
                return None
        body = bytes(self._buffer[end + 4 : total])
        del self._buffer[:total]
        return Request(first.split(" ")[1], headers, json.loads(body) if body else {}, time.monotonic())

    async def while_connected(self, send: Any, script: _Script) -> bool:
        """Run ``send(script)``; return False if the client went away before it had ended."""
        gone = False

        async def watch(scope: anyio.CancelScope) -> None:
            nonlocal gone
            while await self._fill():
                pass
            gone = True
            scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch, tasks.cancel_scope)
            try:
                await send(script)
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                gone = True
            tasks.cancel_scope.cancel()
        return not gone

    async def head(self, status: int, headers: dict[str, str]) -> None:
        lines = [f"HTTP/1.1 {status} {'OK' if status == 200 else 'Error'}", *(f"{k}: {v}" for k, v in headers.items())]
        await self.stream.send("\r\n".join([*lines, "", ""]).encode())

    async def json(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        extra = {"content-type": "application/json", "content-length": str(len(data)), **(headers or {})}
        await self.head(status, extra)
        await self.stream.send(data)

    async def chunk(self, data: bytes) -> None:
        await self.stream.send(b"%x\r\n%s\r\n" % (len(data), data))


class _Answer:
    """The answer to one request."""

    def __init__(self, wire: _Wire, request: Request, index: int) -> None:
        self._wire = wire
        self._request = request
        self._id = f"chatcmpl-{index}"
        self._calls = 0
        self.tokens = 0

    async def send(self, script: _Script) -> None:
        steps = script.steps
        if steps and isinstance(steps[0], Pause | Stall):
            await self._step(steps[0])
            steps = steps[1:]
        if steps and isinstance(refuse := steps[0], Refuse):
            kind = "server_error" if refuse.status >= 500 else "invalid_request_error"
            error = {"message": refuse.message, "type": kind, "code": refuse.code, "param": None}
            await self._wire.json(refuse.status, {"error": error}, refuse.headers)
        elif self._request.body.get("stream"):
            await self._stream(steps, script)
        else:
            await self._wire.json(200, self._whole(steps, script))

    async def _stream(self, steps: tuple[Step, ...], script: _Script) -> None:
        await self._wire.head(200, {"content-type": "text/event-stream; charset=utf-8", "transfer-encoding": "chunked"})
        await self._delta({"role": "assistant", "content": ""})
        for step in steps:
            if not await self._step(step):
                return
        await self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": self._finish(script)}]})
        options: dict[str, Any] = self._request.body.get("stream_options") or {}
        if options.get("include_usage"):
            await self._event({"choices": [], "usage": self._usage(script)})
        await self._wire.chunk(b"data: [DONE]\n\n")
        await self._wire.stream.send(b"0\r\n\r\n")

    async def _step(self, step: Step) -> bool:
        """Send one step; return False if the response ends here."""
        match step:
            case Text() | Thought():
                for word in words(step.text):
                    await anyio.sleep(step.delay)
                    await self._delta({"content" if isinstance(step, Text) else "reasoning_content": word})
                    self.tokens += 1
            case Call():
                for delta in self._call_deltas(step):
                    await self._delta({"tool_calls": [delta]})
            case Pause():
                await anyio.sleep(step.seconds)
            case Stall():
                await anyio.sleep_forever()
            case Fail():
                error = {"message": step.message, "type": step.type, "code": step.code}
                await self._wire.chunk(f"data: {json.dumps({'error': error})}\n\n".encode())
                await self._wire.stream.send(b"0\r\n\r\n")
                return False
            case Drop():
                if step.clean:
                    await self._wire.stream.send(b"0\r\n\r\n")
                self._wire.broken = True
                return False
            case Refuse():
                raise ValueError("Refuse must be the first step of its script, or follow a Pause")
        return True

    def _call_deltas(self, call: Call) -> list[dict[str, Any]]:
        index, self._calls = self._calls, self._calls + 1
        text = _arguments(call)
        size = max(1, -(-len(text) // call.pieces))
        first = {"index": index, "id": _call_id(call, index), "type": "function"}
        deltas: list[dict[str, Any]] = [{**first, "function": {"name": call.name, "arguments": ""}}]
        deltas += [
            {"index": index, "function": {"arguments": text[at : at + size]}} for at in range(0, len(text), size)
        ]
        return deltas

    def _whole(self, steps: tuple[Step, ...], script: _Script) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": None}
        if text := "".join(s.text for s in steps if isinstance(s, Text)):
            message["content"] = text
        if thought := "".join(s.text for s in steps if isinstance(s, Thought)):
            message["reasoning_content"] = thought
        if calls := [s for s in steps if isinstance(s, Call)]:
            message["tool_calls"] = [
                {"id": _call_id(c, i), "type": "function", "function": {"name": c.name, "arguments": _arguments(c)}}
                for i, c in enumerate(calls)
            ]
        self.tokens = len(words(text))
        choice = {"index": 0, "message": message, "finish_reason": self._finish(script)}
        return {**self._envelope("chat.completion"), "choices": [choice], "usage": self._usage(script)}

    def _finish(self, script: _Script) -> str:
        calls = any(isinstance(step, Call) for step in script.steps)
        return script.finish_reason or ("tool_calls" if calls else "stop")

    def _usage(self, script: _Script) -> dict[str, int]:
        asked = sum(len(words(_content(m))) for m in self._request.body.get("messages", []))
        prompt, completion = script.usage or (asked, self.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _envelope(self, kind: str) -> dict[str, Any]:
        model = self._request.body.get("model", "fake")
        return {"id": self._id, "object": kind, "created": int(time.time()), "model": model}

    async def _delta(self, delta: dict[str, Any]) -> None:
        await self._event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})

    async def _event(self, body: dict[str, Any]) -> None:
        await self._wire.chunk(f"data: {json.dumps({**self._envelope('chat.completion.chunk'), **body})}\n\n".encode())


def _arguments(call: Call) -> str:
    return call.arguments if isinstance(call.arguments, str) else json.dumps(call.arguments)


def _call_id(call: Call, index: int) -> str:
    return call.id or f"call_{index}"


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        parts = cast("list[dict[str, Any]]", content)
        return "".join(str(part.get("text", "")) for part in parts)
    return content if isinstance(content, str) else ""


async def _main(host: str, port: int, delay: float) -> None:
    async with FakeOpenAI(host=host, port=port, delay=delay) as fake:
        print(fake.url, flush=True)  # noqa: T201 - what the program is asked for
        await anyio.sleep_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A fake OpenAI-compatible provider that echoes.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.02, help="seconds between words")
    options = parser.parse_args()
    with suppress(KeyboardInterrupt):
        anyio.run(_main, options.host, options.port, options.delay)
