"""HTTP as plain as it can be: a request on a connection of its own, its answer taken as it comes.

No library, since a run has some hundred streams and its clients must take little of the machine; and since a connection
that is to be dropped is dropped, without a farewell.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager

import anyio

_HEAD = 40.0
"""Seconds an answer may take to begin: a gateway may be frozen, and would keep a client that has no limit."""
"""Seconds a gateway has to accept a connection."""
_AT_ONCE = 1 << 16
_BUFFER = 1 << 14
"""Bytes after which a reader that does not read holds the gateway up."""


class Away(Exception):
    """No outcome: nobody there, broken off, or told to come back. To be tried again."""


class Response:
    """An answer whose head has come.

    Attributes:
        status: Its status.
        headers: Its headers, by their names in small letters.
    """

    def __init__(self, head: bytes, reader: asyncio.StreamReader) -> None:
        first, *lines = head.decode("latin-1").rstrip().split("\r\n")
        self.status = int(first.split(" ")[1])
        pairs = (line.partition(":") for line in lines)
        self.headers = {name.lower(): value.strip() for name, _, value in pairs}
        self._reader = reader
        self._wire = bytearray()
        self._chunked = self.headers.get("transfer-encoding") == "chunked"
        self._left = 0 if self._chunked else int(self.headers.get("content-length", "0"))
        self._ended = False

    async def more(self) -> bytes | None:
        """The next of the body; None at its end.

        Raises:
            Away: It was broken off.
        """
        while not self._ended:
            if not self._chunked and self._left == 0:
                break
            try:
                data = await self._reader.read(_AT_ONCE)
            except OSError as error:
                raise Away(str(error)) from error
            if not data:
                raise Away("broken off in mid-answer")
            if not self._chunked:
                self._left -= len(data)
                return data
            self._wire += data
            if body := self._whole_chunks():
                return body
        return None

    async def body(self) -> bytes:
        """All of it."""
        found: list[bytes] = []
        while (data := await self.more()) is not None:
            found.append(data)
        return b"".join(found)

    def _whole_chunks(self) -> bytes:
        wire, at = self._wire, 0
        found: list[bytes] = []
        while (line := wire.find(b"\r\n", at)) >= 0:
            size = int(wire[at:line], 16)
            if len(wire) < line + size + 4:
                break
            if size == 0:
                self._ended = True
                break
            found.append(bytes(wire[line + 2 : line + 2 + size]))
            at = line + size + 4
        del wire[:at]
        return b"".join(found)


@asynccontextmanager
async def request(
    gateway: str,
    method: str,
    path: str,
    *,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    waits: float = 0.0,
) -> AsyncGenerator[Response]:
    """Ask a gateway, which may wait for so many seconds; the connection is dropped when the context ends.

    Raises:
        Away: Nobody is there, or the connection broke before the answer began.
    """
    host, _, port = gateway.removeprefix("http://").partition(":")
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}:{port}", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    writer: asyncio.StreamWriter | None = None
    try:
        try:
            with anyio.fail_after(_HEAD + waits):
                reader, writer = await asyncio.open_connection(host, int(port), limit=_BUFFER)
                writer.write("\r\n".join([*lines, "", ""]).encode() + body)
                head = await reader.readuntil(b"\r\n\r\n")
        except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
            raise Away(f"{gateway}: {error!r}") from error
        yield Response(head, reader)
    finally:
        if writer is not None:
            writer.transport.abort()
