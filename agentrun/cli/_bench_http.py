"""The clients of ``agentrun bench gateway``: a process that reads many streams and takes little of the machine for it.

``python -m agentrun.cli._bench_http`` reads one `Job` from stdin, says on stdout how many streams are open, then what
came (of a `Job` in rounds, after each) when all have ended or a second line came, and ends with its stdin. Plain
sockets, no HTTP library: what is measured is the gateway.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import os
import struct
import sys
import time
from array import array
from typing import Literal, cast

import anyio
import msgspec
from msgspec import Struct, field

from agentrun.cli._bench_watch import Digest, TurnSeen
from agentrun.client import Event

__all__ = ["Job", "Opened", "Seen", "Stream", "main"]

_AT_ONCE = 100
_OPEN = 60.0
_READ = 1 << 18


class Job(Struct, frozen=True):
    """What to read.

    Attributes:
        port: The gateway's, on loopback.
        how: ``sse`` and ``socket`` read a turn to its end and note each word's delay, ``idle`` reads to ``until`` and
            stays, ``replay`` and ``pages`` read to ``until``.
        paths: The streams' addresses.
        until: The offset up to which something is there already.
        rounds: How often to ``replay``, or to read the ``pages``.
    """

    port: int
    how: Literal["sse", "socket", "idle", "replay", "pages"]
    paths: list[str]
    until: int = 0
    rounds: int = 1


class Opened(Struct, frozen=True):
    """How many streams are open, and why others are not."""

    streams: int
    refused: list[str] = field(default_factory=list[str])


class Seen(Struct):
    """What came, of all streams together. Times are in nanoseconds."""

    streams: int = 0
    """Those that got all they were to get, and were not broken off."""
    words: int = 0
    lost: int = 0
    doubled: int = 0
    jumps: int = 0
    as_stored: int = 0
    delays: list[int] = field(default_factory=list[int])
    first: int = 0
    whole: int = 0
    digest: str = ""


class Stream(asyncio.Protocol):
    """One connection: a response in chunks, or a socket's frames, taken apart as they come.

    Attributes:
        status: The response's first line.
        opened: It has begun, or will not.
        ended: All it was to bring came, or nothing comes any more.
        done: Whether it is the former.
        seen: The turn.
        jumps: Offsets that did not follow the one before by one.
        offset: The last.
    """

    def __init__(self, job: Job, path: str) -> None:
        self.status = ""
        self.done = False
        self.opened = anyio.Event()
        self.ended = anyio.Event()
        self.seen = TurnSeen()
        self.jumps = 0
        self.offset = int(path.rpartition("after=")[2] or 0)
        self._job = job
        self._path = path
        self._head = True
        self._wire = bytearray()
        self._body = bytearray()
        self._take_wire = self._frames if job.how == "socket" else self._chunks
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if self._job.how == "socket":
            key = base64.b64encode(os.urandom(16)).decode()
            more = f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}"
            path = self._path.partition("?")[0]
        else:
            more, path = "Accept: text/event-stream", self._path
        self._transport.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{more}\r\n\r\n".encode())

    def connection_lost(self, exc: Exception | None) -> None:
        self.opened.set()
        self.ended.set()

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        self._wire += data
        if self._head:
            head, end, rest = bytes(self._wire).partition(b"\r\n\r\n")
            if not end:
                return
            self._head = False
            self._wire = bytearray(rest)
            self._begin(head.split(b"\r\n")[0].decode())
        self._take_wire(now)

    def _begin(self, status: str) -> None:
        assert self._transport is not None
        if self._job.how == "socket":
            body = b'{"op":"read","after":%d}' % self.offset
            self._transport.write(bytes((0x81, 0x80 | len(body), 0, 0, 0, 0)) + body)
        self.status = status
        self.opened.set()

    def _chunks(self, now: int) -> None:
        wire, at = self._wire, 0
        while (line := wire.find(b"\r\n", at)) >= 0:
            size = int(wire[at:line], 16)
            if len(wire) < line + size + 4:
                break
            self._body += wire[line + 2 : line + 2 + size]
            at = line + size + 4
        del wire[:at]
        if self._body.endswith(b"\n\n"):
            body, self._body = bytes(self._body), bytearray()
            for event in body.split(b"\n\n"):
                if event.startswith(b"id: "):
                    self._take(event.partition(b"\ndata: ")[2], now)

    def _frames(self, now: int) -> None:
        wire, at = self._wire, 0
        while len(wire) - at >= 10 or (len(wire) - at >= 2 and wire[at + 1] < 126):
            size, begin = wire[at + 1], at + 2
            if size >= 126:
                form, width = ("!H", 2) if size == 126 else ("!Q", 8)
                size = int(struct.unpack_from(form, wire, begin)[0])
                begin += width
            if len(wire) < begin + size:
                break
            if wire[at] == 0x81:
                self._take(bytes(wire[begin : begin + size]), now)
            at = begin + size
        del wire[:at]

    def _take(self, item: bytes, now: int) -> None:
        event = _event_of(item)
        self.jumps += event.offset != self.offset + 1
        self.offset = event.offset
        if self._job.how == "idle":
            self.done = event.offset >= self._job.until
        else:
            self.seen.take(event, now)
            self.done = bool(self.seen.ended)
        if self.done:
            self.ended.set()

    @property
    def is_open(self) -> bool:
        """Whether the other side has not ended it."""
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        """End it."""
        if self._transport is not None:
            self._transport.abort()


class _Item(Struct):
    offset: int
    event: msgspec.Raw


_item = msgspec.json.Decoder(_Item)


def _event_of(item: bytes) -> Event:
    decoded = _item.decode(item)
    return Event(decoded.offset, bytes(decoded.event))


async def _follow(job: Job) -> None:
    """Open all streams, and read them until they have what they are to get, or are told to stop."""
    loop = asyncio.get_running_loop()
    streams = [Stream(job, path) for path in job.paths]
    limiter = anyio.Semaphore(_AT_ONCE)
    refused: list[str] = []

    async def open_one(stream: Stream) -> None:
        async with limiter:
            try:
                with anyio.move_on_after(_OPEN):
                    await loop.create_connection(lambda: stream, "127.0.0.1", job.port)
                    await (stream.ended if job.how == "idle" else stream.opened).wait()
            except OSError as error:
                stream.status = str(error)
            if stream.status.split(" ")[1:2] not in (["200"], ["101"]):
                refused.append(stream.status or "no answer")

    async with anyio.create_task_group() as group:
        for stream in streams:
            group.start_soon(open_one, stream)
    _say(Opened(len(streams) - len(refused), refused[:3]))
    async with anyio.create_task_group() as group:
        group.start_soon(_until_told, group.cancel_scope)
        if job.how != "idle":
            for stream in streams:
                await stream.ended.wait()
            group.cancel_scope.cancel()
    _say(_sum(job, streams))
    for stream in streams:
        stream.close()


async def _until_told(scope: anyio.CancelScope) -> None:
    await anyio.wait_readable(sys.stdin)
    scope.cancel()


def _sum(job: Job, streams: list[Stream]) -> Seen:
    out = Seen()
    delays = array("q")
    for stream in streams:
        out.streams += stream.done and (stream.is_open or job.how != "idle")
        out.words += stream.seen.words.seen
        out.lost += stream.seen.words.lost
        out.doubled += stream.seen.words.doubled
        out.jumps += stream.jumps
        out.as_stored += stream.seen.as_stored
        delays += stream.seen.delays
    out.delays = delays.tolist()
    return out


# ------------------------------------------------------------------------------------------------------ what is stored


async def _replay(job: Job) -> Seen:
    """Read one stream up to an offset; it is looked at when it is there, so that this does not count."""
    reader, writer = await asyncio.open_connection("127.0.0.1", job.port, limit=_READ)
    begin = time.monotonic_ns()
    writer.write(f"GET {job.paths[0]} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n".encode())
    await reader.readuntil(b"\r\n\r\n")
    wire = bytearray()
    first = 0
    last = b"\nid: %d\n" % job.until
    while (at := wire.rfind(last, max(0, len(wire) - _READ))) < 0 or not wire.endswith(b"\n\n\r\n"):
        data = await reader.read(_READ)
        if not data:
            break
        wire += data
        if not first and b"\nid: " in wire:
            first = time.monotonic_ns()
    whole = time.monotonic_ns()
    writer.close()
    body = bytearray()
    at = 0
    while (line := wire.find(b"\r\n", at)) >= 0:
        size = int(wire[at:line], 16)
        body += wire[line + 2 : line + 2 + size]
        at = line + size + 4
    items = [event.partition(b"\ndata: ")[2] for event in bytes(body).split(b"\n\n") if event.startswith(b"id: ")]
    return _checked(items, first - begin, whole - begin, job.until)


async def _pages(job: Job) -> Seen:
    """Read page after page up to an offset, on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", job.port, limit=_READ)
    begin = time.monotonic_ns()
    first = 0
    pages: list[bytes] = []
    path, _, after = job.paths[0].partition("after=")
    while int(after) < job.until:
        writer.write(f"GET {path}after={after} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        body = await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        first = first or time.monotonic_ns()
        pages.append(body)
        seen = body[len(b'{"offset":') :].partition(b",")[0].decode()
        if seen == after:
            break
        after = seen
    whole = time.monotonic_ns()
    writer.close()
    items = [bytes(item) for page in pages for item in msgspec.json.decode(page, type=_Page).events]
    return _checked(items, first - begin, whole - begin, job.until)


class _Page(Struct):
    events: list[msgspec.Raw]


def _checked(items: list[bytes], first: int, whole: int, until: int) -> Seen:
    digest = Digest()
    seen = Seen(first=first, whole=whole)
    after = 0
    for item in items:
        event = _event_of(item)
        digest.add(event)
        seen.jumps += after > 0 and event.offset != after + 1
        after = event.offset
    seen.digest = digest.text
    seen.streams = int(after == until)
    return seen


def _say(what: Opened | Seen) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(what) + b"\n")
    sys.stdout.buffer.flush()


async def _work(job: Job) -> None:
    if job.how in ("replay", "pages"):
        for _ in range(job.rounds):
            _say(await (_replay(job) if job.how == "replay" else _pages(job)))
    else:
        await _follow(job)


def main() -> None:
    """Do the job on stdin, and stay until its end so that the time this took can be read."""
    gc.disable()  # its pauses would count as the gateway's
    stdin = open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)  # noqa: SIM115 - nothing is to be read ahead
    job = msgspec.json.decode(stdin.readline(), type=Job)
    try:
        import uvloop
    except ModuleNotFoundError:
        options = {}
    else:
        options = {"use_uvloop": True}
        del uvloop
    anyio.run(_work, job, backend_options=options)
    stdin.read()


if __name__ == "__main__":
    main()
