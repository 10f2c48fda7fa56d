"""A chat over HTTP, as the AI SDK's transports ask."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import httpx

from tests.gateway.ai_client import Chunk, Reader
from tests.gateway.conftest import Served


class Stream:
    """A response that is being read: its chunks, and how it ends."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.chunks: list[Chunk] = []
        self.done = False
        self.broken = False
        self._lines = response.aiter_lines()

    async def next(self) -> Chunk | None:
        """The next chunk; None at the end."""
        try:
            async for line in self._lines:
                if line == "data: [DONE]":
                    self.done = True
                elif line.startswith("data: "):
                    self.chunks.append(json.loads(line[6:]))
                    return self.chunks[-1]
        except (httpx.RemoteProtocolError, httpx.ReadError):
            self.broken = True
        return None

    async def until(self, kind: str, times: int = 1) -> Chunk:
        """Read up to the chunk of this type."""
        while (chunk := await self.next()) is not None:
            times -= chunk["type"] == kind
            if times == 0:
                return chunk
        raise AssertionError(f"no {kind} among {self.chunks}")

    async def rest(self) -> Stream:
        """Read to the end."""
        while await self.next() is not None:
            pass
        return self


class Chat:
    """One chat at a gateway, as one device has it."""

    def __init__(self, served: Served, id: str, **body: Any) -> None:
        self.http = served.http
        self.id = id
        self.body = body
        self.headers = {"content-type": "application/json"}
        self.messages: list[dict[str, Any]] = []
        self.path = f"/api/chat/{quote(id, safe='')}"

    @asynccontextmanager
    async def posting(self, **body: Any) -> AsyncGenerator[Stream]:
        """POST what the device has."""
        sent = {"id": self.id, "messages": self.messages, "trigger": "submit-message", **self.body, **body}
        content = json.dumps({name: value for name, value in sent.items() if value is not None})
        async with self.http.stream("POST", "/api/chat", content=content, headers=self.headers) as response:
            if response.status_code != 200:
                raise AssertionError(f"{response.status_code} {(await response.aread()).decode()}")
            yield Stream(response)

    @asynccontextmanager
    async def saying(self, text: str, name: str | None = None, **body: Any) -> AsyncGenerator[Stream]:
        """Send a message of the user."""
        self.messages.append(user(text, name or f"u{len(self.messages)}"))
        async with self.posting(**body) as stream:
            yield stream

    async def say(self, text: str, name: str | None = None, **body: Any) -> Reader:
        """Send a message, and take the whole answer."""
        async with self.saying(text, name, **body) as stream:
            return self.take(await stream.rest())

    async def post(self, **body: Any) -> Reader:
        """POST, and take the whole answer."""
        async with self.posting(**body) as stream:
            return self.take(await stream.rest())

    def take(self, stream: Stream) -> Reader:
        """Read a response into the last message, as the client does."""
        last = self.messages[-1]
        reader = Reader(last if last["role"] == "assistant" else None)
        reader.feed(*stream.chunks)
        assert stream.done
        assert not stream.broken
        if reader.message is not None:
            self.messages = [m for m in self.messages if m["id"] != reader.message["id"]] + [reader.message]
        return reader

    @asynccontextmanager
    async def resuming(self, start: int | None = None, run: str | None = None) -> AsyncGenerator[Stream]:
        """GET the stream."""
        path = f"{self.path if run is None else '/api/chat/' + quote(run, safe='')}/stream"
        params = {} if start is None else {"startIndex": start}
        async with self.http.stream("GET", path, params=params) as response:
            yield Stream(response)

    async def resume(self, start: int | None = None, run: str | None = None) -> Stream:
        """GET the stream, and read it to its end."""
        async with self.resuming(start, run) as stream:
            return await stream.rest()

    async def stop(self) -> dict[str, Any]:
        """POST the stop."""
        response = await self.http.post(f"{self.path}/stop")
        assert response.status_code == 200, response.text
        return response.json()

    async def load(self) -> list[dict[str, Any]]:
        """GET the history."""
        response = await self.http.get(self.path)
        assert response.status_code == 200, response.text
        return response.json()["messages"]

    def answer(self, call: str, output: Any = None, *, approved: bool | None = None, error: str | None = None) -> None:
        """Do to the last message what ``addToolOutput`` and ``addToolApprovalResponse`` do."""
        for part in self.messages[-1]["parts"]:
            if part.get("toolCallId") != call:
                continue
            if approved is not None:
                part["state"] = "approval-responded"
                part["approval"] = {**part["approval"], "approved": approved}
            elif error is not None:
                part |= {"state": "output-error", "errorText": error}
            else:
                part |= {"state": "output-available", "output": output}
            return
        raise AssertionError(f"no part of {call} in {self.messages[-1]}")


def user(text: str, id: str) -> dict[str, Any]:
    return {"id": id, "role": "user", "parts": [{"type": "text", "text": text}]}


def text_of(message: dict[str, Any] | None) -> str:
    return "".join(part["text"] for part in message["parts"] if part["type"] == "text") if message else ""
