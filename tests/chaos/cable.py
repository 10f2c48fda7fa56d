"""A TCP connection that can be cut, silenced and slowed: what a network does to processes that are well."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from typing import Self, cast

_ROOM = 1 << 20


class Cable:
    """Forwards connections to a port of this machine, on a port of its own that stays the same.

    Cut: connections are reset, and so is each new one. Silent: connections stay, nothing passes; what was sent
    meanwhile arrives once the cable is restored, as TCP does it. Slow: everything passes late, in order.

    Args:
        target: Where it leads; when that is changed, it holds for connections that are made from then on.
        port: Its own; 0: a free one.
    """

    def __init__(self, target: int, *, port: int = 0) -> None:
        self.port = port
        self.target = target
        self._server: asyncio.Server | None = None
        self._ends: set[_End] = set()
        self._down = False
        self.silent_up = False
        """Whether nothing passes towards the port."""
        self.silent_down = False
        """Whether nothing comes back from it."""
        self.latency = 0.0
        self.passed = 0
        """Bytes that came through, both ways together."""

    @property
    def connections(self) -> int:
        """How many there are now."""
        return len(self._ends) // 2

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _End(self, None), "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        self._reset()

    def cut(self) -> None:
        """Reset all connections, and every new one until `restore`."""
        self._down = True
        self._reset()

    def silence(self, *, up: bool = True, down: bool = True) -> None:
        """Let nothing pass any more, in one direction or both."""
        self.silent_up, self.silent_down = up, down
        self._pump()

    def slow(self, seconds: float) -> None:
        """Delay everything by that time, in each direction."""
        self.latency = seconds

    def restore(self) -> None:
        """Be a good cable again; what was held up arrives."""
        self._down = self.silent_up = self.silent_down = False
        self.latency = 0.0
        self._pump()

    def _reset(self) -> None:
        for end in tuple(self._ends):
            end.abort()

    def _pump(self) -> None:
        for end in tuple(self._ends):
            end.pump()

    # -------------------------------------------------------------------------------------------- used by ends

    def made(self, end: _End) -> None:
        """A client has connected."""
        if self._down:
            end.abort()
            return
        asyncio.get_running_loop().create_task(self._connect(end))

    async def _connect(self, near: _End) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: _End(self, near), "127.0.0.1", self.target)
        except OSError:
            near.abort()

    def add(self, end: _End) -> None:
        """Count an end."""
        self._ends.add(end)

    def remove(self, end: _End) -> None:
        """Count it no more."""
        self._ends.discard(end)


class _End(asyncio.Protocol):
    """One end of one connection: what it receives, it gives to the other one in time."""

    def __init__(self, cable: Cable, other: _End | None) -> None:
        self._cable = cable
        self._other = other
        self._near = other is None
        self._transport: asyncio.Transport
        self._held: deque[tuple[float, bytes]] = deque()
        """What was received, and when it is due; nothing: the end of the stream."""
        self._size = 0
        self._timer: asyncio.TimerHandle | None = None
        self._stuck = False
        """Whether the other side takes nothing at the moment."""
        self._finished = False
        """Whether this side was told that nothing more comes."""
        self._gone = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._cable.add(self)
        if self._other is None:
            self._cable.made(self)
            return
        self._other._other = self
        self._other.pump()

    def data_received(self, data: bytes) -> None:
        self._size += len(data)
        self._cable.passed += len(data)
        if self._size > _ROOM:
            self._transport.pause_reading()
        self._take(data)

    def eof_received(self) -> bool:
        self._take(b"")
        return True  # not closed before what is held has passed

    def _take(self, data: bytes) -> None:
        self._held.append((asyncio.get_running_loop().time() + self._cable.latency, data))
        self.pump()

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone = True
        self._cable.remove(self)
        self.pump()

    def abort(self) -> None:
        """Reset the connection at this end."""
        if not self._gone and not self._transport.is_closing():
            connection = self._transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._transport.abort()

    def pause_writing(self) -> None:
        if self._other is not None:
            self._other._stuck = True

    def resume_writing(self) -> None:
        if self._other is not None:
            self._other._stuck = False
            self._other.pump()

    def pump(self) -> None:
        """Pass on what is due. Whoever is behind a silent cable does not even learn of a reset."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        other = self._other
        if other is None or (self._cable.silent_up if self._near else self._cable.silent_down):
            return
        loop = asyncio.get_running_loop()
        while self._held and not self._stuck and not other._gone:
            due, data = self._held[0]
            if due > loop.time():
                self._timer = loop.call_at(due, self.pump)
                return
            self._held.popleft()
            self._size -= len(data)
            other.write(data)
        if self._gone and (other._gone or not self._held):
            other.abort()
        elif self._size <= _ROOM and not self._transport.is_closing():
            self._transport.resume_reading()

    def write(self, data: bytes) -> None:
        """Send it; nothing: send the end of the stream."""
        if self._transport.is_closing():
            return
        if data:
            self._transport.write(data)
            return
        self._finished = True
        assert self._other is not None
        if self._other._finished:
            self._transport.close()
            self._other._transport.close()
            return
        try:
            self._transport.write_eof()
        except OSError:
            # Reset by the other side, which the loop has yet to notice.
            self.abort()
