"""Responses that stream: written straight to the server, ended cleanly, or broken off on purpose."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import AsyncExitStack, contextmanager
from typing import TypeVar

import anyio
from starlette.types import Receive, Scope, Send

from agentrun.errors import AgentrunError
from agentrun.gateway.hub import Closed, Item, Reading
from agentrun.gateway.rights import Principal
from agentrun.settings import GatewaySettings
from agentrun.telemetry.instruments import Tally

T = TypeVar("T")

__all__ = ["EVENT_STREAM", "Broken", "Stream", "Writer", "deadline_of", "pump", "while_there"]

EVENT_STREAM = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",
}
KEEP_ALIVE = b": keep-alive\n\n"


class Broken(Exception):
    """Break the connection: the client must not take what it has for all there is."""


class Writer:
    """Writes one response's body; a client that takes nothing of it for long ends the response, see `Stream`."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.last = time.monotonic()
        """When something was last written."""
        self.began = 0.0
        """When the write that is under way began; 0 while none is."""

    async def write(self, data: bytes) -> None:
        """Write, waiting for a client that is slow."""
        self.began = time.monotonic()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self.began = 0.0
        self.last = time.monotonic()


class Stream:
    """An ASGI response whose body is written by a function.

    It ends cleanly when the function returns. When that raises `Broken`, or the client takes nothing of what is sent to
    it for ``send_timeout`` seconds (up to half as long again), the connection is broken off instead. A client that goes
    away ends the function.

    Args:
        body: Writes the body.
        headers: The response's.
        settings: The gateway's.
        slow: Counts the clients that are cut off.
        opened: What the body stands on; closed when the response has ended, however it does.
    """

    def __init__(
        self,
        body: Callable[[Writer], Awaitable[None]],
        *,
        headers: Mapping[str, str],
        settings: GatewaySettings,
        slow: Tally,
        opened: AsyncExitStack | None = None,
    ) -> None:
        self._body = body
        self._opened = opened or AsyncExitStack()
        self._headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        self._timeout = settings.send_timeout
        self._slow = slow

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond, as ASGI has it."""
        async with self._opened:
            await self._respond(receive, send, has_body=scope["method"] != "HEAD")

    async def _respond(self, receive: Receive, send: Send, *, has_body: bool) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        if not has_body:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        whole = False
        async with anyio.create_task_group() as group:
            writer = Writer(send)

            def cut_off() -> None:
                self._slow.value += 1
                group.cancel_scope.cancel()

            group.start_soon(_until_gone, receive, group.cancel_scope)
            try:
                with _patience(writer, self._timeout, cut_off):
                    await self._body(writer)
                whole = True
            except Broken:
                pass  # a body left without its end is what a server breaks the connection for
            group.cancel_scope.cancel()
        if whole:
            await send({"type": "http.response.body", "body": b"", "more_body": False})


@contextmanager
def _patience(writer: Writer, seconds: float, cut_off: Callable[[], None]) -> Generator[None]:
    """Cut off when a write takes longer. A time limit for each write would cost more than the write."""
    loop = asyncio.get_running_loop()

    def look() -> None:
        nonlocal timer
        if writer.began and time.monotonic() - writer.began > seconds:
            cut_off()
        else:
            timer = loop.call_later(seconds / 2, look)

    timer = loop.call_later(seconds / 2, look)
    try:
        yield
    finally:
        timer.cancel()


async def _until_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def while_there(receive: Receive, work: Callable[[], Awaitable[T]]) -> T | None:
    """Do work that waits for long, and leave it off when the client goes away: None."""
    done: T | None = None
    failed: Exception | None = None
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            nonlocal failed
            try:
                await _until_gone(receive, group.cancel_scope)
            except Exception as error:
                failed = error  # raised in here, it would become part of a group
                group.cancel_scope.cancel()

        group.start_soon(watch)
        try:
            done = await work()
        except Exception as error:
            failed = error
        group.cancel_scope.cancel()
    if failed is not None:
        raise failed
    return done


def deadline_of(principal: Principal, seconds: float) -> float:
    """Return when a response of this client ends, on the monotonic clock.

    ``seconds`` from now, less a little at random, so that clients that came together do not come back together; at the
    latest when its token expires.
    """
    now = time.monotonic()
    end = now + seconds * random.uniform(0.9, 1.0) if seconds > 0 else float("inf")  # noqa: S311
    if principal.expires is not None:
        end = min(end, now + max(principal.expires - time.time(), 0.0))
    return end


async def pump(
    writer: Writer,
    reading: Reading,
    *,
    settings: GatewaySettings,
    deadline: float,
    over: Callable[[], bool] = lambda: False,
    pick: Callable[[Item], bool] | None = None,
) -> None:
    """Write a session's events as server-sent events until the response is to end.

    Args:
        writer: Writes.
        reading: Reads.
        settings: The gateway's.
        deadline: When to end, on the monotonic clock.
        over: Whether ``pick`` has seen the last event there is.
        pick: Which events to write; all if not given.
    """
    retry = settings.retry * random.uniform(1.0, 2.0)  # noqa: S311 - a gateway that died leaves many at once
    await writer.write(b"retry: %d\n\n" % round(retry * 1000))
    while not over():
        left = deadline - time.monotonic()
        if left <= 0:
            return
        try:
            items = await reading.next(min(left, max(writer.last + settings.keep_alive - time.monotonic(), 0.01)))
        except Closed as closed:
            await writer.write(b": %s\n\n" % closed.reason.encode())
            return
        except AgentrunError as error:
            # The client comes back with its offset, and is then told by the status.
            await writer.write(b": %s\n\n" % type(error).__name__.encode())
            return
        if pick is not None:
            items = [item for item in items if pick(item)]
        if items:
            await writer.write(b"".join([item.sse for item in items]))
            items = ()  # or a client that waits would hold on to them
        elif time.monotonic() - writer.last >= settings.keep_alive:
            await writer.write(KEEP_ALIVE)
