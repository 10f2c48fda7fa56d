"""Live requests on Valkey's pub/sub: the number of those who were told says whether there is a listener."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, suppress

import anyio

from agentrun.broker import HANDLER_GRACE, Handler
from agentrun.brokers.valkey_beat import Heartbeats
from agentrun.brokers.valkey_channels import Subscriber
from agentrun.brokers.valkey_core import MAX_BODY, Core
from agentrun.brokers.valkey_link import NotConnected, log
from agentrun.errors import NoListener, TooLarge, Unavailable
from agentrun.wire import check_id

_NOBODY = b"- -\n"
"""Begins a message that wants no reply."""


class ValkeySignals:
    """`agentrun.broker.Signals` on Valkey."""

    def __init__(self, core: Core, beats: Heartbeats) -> None:
        self._core = core
        self._beats = beats
        self._inbox = f"{core.topics}reply:{core.id}"
        self._asked: dict[bytes, Callable[[bytes], None]] = {}
        self._ids = itertools.count()

    def _channel(self, channel: str) -> str:
        for part in channel.split("."):
            check_id("a channel's part", part)
        return f"{self._core.topics}sig:{channel}"

    async def begin(self) -> None:
        """Be ready to hear replies.

        Raises:
            Unavailable: There is no connection.
        """
        self._core.signals.add(self._inbox, Subscriber(self._on_reply))
        await self._core.signals.sync()

    def _on_reply(self, data: bytes) -> None:
        id, _, body = data.partition(b"\n")
        if (take := self._asked.get(id)) is not None:
            take(body)

    @asynccontextmanager
    async def listen(self, channel: str, handler: Handler) -> AsyncGenerator[None]:
        """See `Signals.listen`. A handler that runs when the context closes may still answer, for a few seconds."""
        scopes: set[anyio.CancelScope] = set()

        async def answer(data: bytes) -> None:
            head, _, body = data.partition(b"\n")
            inbox, _, id = head.partition(b" ")
            with anyio.CancelScope() as scope:
                scopes.add(scope)
                try:
                    reply = await handler(body)
                    if reply is not None and inbox != b"-":
                        await self._reply(inbox, id + b"\n" + reply)
                except Exception:
                    log.exception("a handler of channel %s failed", channel)
                finally:
                    scopes.discard(scope)

        def on_request(data: bytes) -> None:
            self._core.background.start_soon(answer, data)

        name = self._channel(channel)
        subscriber = Subscriber(on_request)
        self._core.signals.add(name, subscriber)
        try:
            await self._core.signals.sync()
            yield
        finally:
            self._core.signals.remove(name, subscriber)
            for scope in scopes:
                scope.deadline = anyio.current_time() + HANDLER_GRACE
            with anyio.move_on_after(1, shield=True):
                await self._core.signals.settle()

    async def _reply(self, inbox: bytes, data: bytes) -> None:
        with suppress(NotConnected):
            await self._core.commands.call("PUBLISH", inbox, data)

    @contextmanager
    def _ask(self, take: Callable[[bytes], None]) -> Generator[bytes]:
        id = b"%x" % next(self._ids)
        self._asked[id] = take
        try:
            yield id
        finally:
            del self._asked[id]

    async def _send(self, channel: str, id: bytes, body: bytes) -> int:
        """Publish a request; return how many connections were told."""
        name = self._channel(channel)
        if len(body) > MAX_BODY:
            raise TooLarge(len(body), MAX_BODY, "request")
        try:
            return await self._core.commands.call("PUBLISH", name, b"%s %s\n%s" % (self._inbox.encode(), id, body))
        except NotConnected:
            raise Unavailable(self._core.commands.gone) from None

    async def request(self, channel: str, body: bytes, *, timeout: float) -> bytes:
        """See `Signals.request`."""
        first: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def take(reply: bytes) -> None:
            if not first.done():
                first.set_result(reply)

        with anyio.move_on_after(timeout), self._ask(take) as id:
            if await self._send(channel, id, body) == 0:
                raise NoListener(f"nobody listens on channel {channel}")
            return await first
        raise Unavailable(f"no reply on channel {channel} within {timeout} s")

    async def gather(self, channel: str, body: bytes, *, wait: float) -> list[bytes]:
        """See `Signals.gather`. Returns early only where nobody listens."""
        replies: list[bytes] = []
        with anyio.move_on_after(wait), self._ask(replies.append) as id:
            if await self._send(channel, id, body):
                await anyio.sleep_forever()
        return replies

    def announce(self, channel: str, body: bytes) -> None:
        """See `Signals.announce`. Sent once a queue of this connection is open."""
        self._beats.publish(self._channel(channel), _NOBODY + body)
