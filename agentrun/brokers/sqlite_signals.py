"""Live requests between the processes of one machine: Unix datagram sockets in a directory.

Each listener has a socket there, whose name begins with a hash of its channel. A socket that nobody owns any more
refuses, so that "nobody listens" is known at once, also where a process was killed.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from hashlib import blake2b
from pathlib import Path

import anyio
from anyio.abc import ObjectReceiveStream

from agentrun.broker import HANDLER_GRACE, Handler
from agentrun.errors import Misconfigured, NoListener, TooLarge, Unavailable

MAX_REQUEST = 150_000
"""Bytes a request, an announcement or a reply may have; Linux takes about 200,000 where nothing was configured."""
_PATIENCE = 1.0
"""Seconds a full listener is waited for, once: until it takes something again it only gets what it has room for."""


class SqliteSignals:
    """`Signals` over sockets in a directory. A handler that raises ends its listener's context with that error."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._place = str(folder)
        self._fd: int | None = None
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="agentrun-signals")
        self._full: set[str] = set()

    def open(self) -> None:
        """Make the directory if need be."""
        self._folder.mkdir(exist_ok=True)
        self._fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        short = f"/proc/self/fd/{self._fd}"
        if os.path.exists(short):  # a socket's path has room for a hundred characters or so
            self._place = short

    def close(self) -> None:
        """End the thread that sends, when it has sent everything."""
        self._sender.shutdown()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    @asynccontextmanager
    async def listen(self, channel: str, handler: Handler) -> AsyncGenerator[None]:
        """See `Signals.listen`."""
        told, hear = anyio.create_memory_object_stream[bytes](float("inf"))
        async with anyio.create_task_group() as tasks:

            def heard(message: bytes) -> None:
                reply_to, _, body = message.partition(b"\n")
                if reply_to:
                    tasks.start_soon(self._answer, handler, body, reply_to.decode())
                else:
                    with suppress(anyio.BrokenResourceError):  # a handler has raised, the listening ends
                        told.send_nowait(body)

            tasks.start_soon(_hear, hear, handler)
            try:
                with told, self._inbox(_prefix(channel), heard):
                    yield
            finally:
                tasks.cancel_scope.deadline = anyio.current_time() + HANDLER_GRACE

    async def request(self, channel: str, body: bytes, *, timeout: float) -> bytes:
        """See `Signals.request`."""
        async with self._ask(channel, body) as (reached, replies):
            if not reached:
                raise NoListener(f"nobody listens on {channel!r}")
            with anyio.move_on_after(timeout):
                return await replies.receive()
        raise Unavailable(f"no reply on {channel!r} within {timeout} s")

    async def gather(self, channel: str, body: bytes, *, wait: float) -> list[bytes]:
        """See `Signals.gather`. Returns as soon as every listener has replied."""
        found: list[bytes] = []
        async with self._ask(channel, body) as (reached, replies):
            with anyio.move_on_after(wait):
                while len(found) < reached:
                    found.append(await replies.receive())
        return found

    def announce(self, channel: str, body: bytes) -> None:
        """See `Signals.announce`."""
        _check(body)
        with suppress(RuntimeError):  # closed
            self._sender.submit(self._send, channel, b"\n" + body)

    @asynccontextmanager
    async def _ask(self, channel: str, body: bytes) -> AsyncGenerator[tuple[int, ObjectReceiveStream[bytes]]]:
        _check(body)
        send, receive = anyio.create_memory_object_stream[bytes](float("inf"))
        with send, receive, self._inbox("reply", send.send_nowait) as name:
            message = name.encode() + b"\n" + body
            yield await asyncio.wrap_future(self._sender.submit(self._send, channel, message)), receive

    async def _answer(self, handler: Handler, body: bytes, reply_to: str) -> None:
        reply = await handler(body)
        if reply is not None:
            _check(reply)
            await asyncio.wrap_future(self._sender.submit(self._deliver, reply_to, reply))

    # ------------------------------------------------------------------------------------------------ sockets

    @contextmanager
    def _inbox(self, prefix: str, heard: Callable[[bytes], None]) -> Generator[str]:
        """A socket of one's own, while the context is open; its name."""
        if self._fd is None:
            raise Unavailable(f"{self._folder} is not open")
        name = f"{prefix}-{secrets.token_hex(8)}"
        path = f"{self._place}/{name}"
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
            inbox.setblocking(False)
            try:
                inbox.bind(path)
            except OSError as error:
                raise Misconfigured(f"no socket can be made at {path}: {error}") from error

            def drain() -> None:
                with suppress(BlockingIOError):
                    while True:
                        heard(inbox.recv(2 * MAX_REQUEST))

            loop.add_reader(inbox, drain)
            try:
                yield name
            finally:
                loop.remove_reader(inbox)
                with suppress(FileNotFoundError):
                    os.unlink(path)
                drain()

    def _send(self, channel: str, message: bytes) -> int:
        """Send to all listeners of the channel; return how many there are."""
        names = [name for name in os.listdir(self._place) if name.startswith(_prefix(channel))]
        return sum([self._deliver(name, message) for name in names])

    def _deliver(self, name: str, message: bytes) -> bool:
        """Send to a socket; return whether somebody owns it."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
                out.settimeout(0 if name in self._full else _PATIENCE)
                out.sendto(message, f"{self._place}/{name}")
        except (BlockingIOError, TimeoutError):
            self._full.add(name)
            return True
        except (FileNotFoundError, ConnectionRefusedError):  # closed, or its process was killed
            self._full.discard(name)
            with suppress(FileNotFoundError):
                os.unlink(f"{self._place}/{name}")  # no other will have this name
            return False
        self._full.discard(name)
        return True


def _prefix(channel: str) -> str:
    return blake2b(channel.encode(), digest_size=8).hexdigest()


def _check(body: bytes) -> None:
    if len(body) > MAX_REQUEST:
        raise TooLarge(len(body), MAX_REQUEST, "request")


async def _hear(told: ObjectReceiveStream[bytes], handler: Handler) -> None:
    async with told:
        async for body in told:
            await handler(body)
