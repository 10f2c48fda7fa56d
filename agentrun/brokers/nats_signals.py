"""Live requests on core NATS."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

import anyio

from agentrun.broker import HANDLER_GRACE, Handler
from agentrun.brokers.nats_beat import Heartbeats
from agentrun.brokers.nats_core import Core
from agentrun.brokers.nats_link import Msg, NotConnected, log, status
from agentrun.errors import NoListener, TooLarge, Unavailable
from agentrun.wire import check_id


class NatsSignals:
    """`agentrun.broker.Signals` on core NATS."""

    def __init__(self, core: Core, beats: Heartbeats) -> None:
        self._core = core
        self._beats = beats

    def _subject(self, channel: str) -> str:
        for part in channel.split("."):
            check_id("a channel's part", part)
        return f"agentrun.{self._core.namespace}.sig.{channel}"

    @asynccontextmanager
    async def listen(self, channel: str, handler: Handler) -> AsyncGenerator[None]:
        """See `Signals.listen`. A handler that runs when the context closes may still answer, for a few seconds."""
        link = self._core.queue
        scopes: set[anyio.CancelScope] = set()

        async def answer(msg: Msg) -> None:
            with anyio.CancelScope() as scope:
                scopes.add(scope)
                try:
                    reply = await handler(msg.data)
                    if reply is not None and msg.reply:
                        with suppress(NotConnected):
                            await link.publish(msg.reply, reply)
                except Exception:
                    log.exception("a handler of channel %s failed", channel)
                finally:
                    scopes.discard(scope)

        async def on_request(msg: Msg) -> None:
            self._core.background.start_soon(answer, msg)

        subscription = await link.subscribe(self._subject(channel), on_request)
        try:
            await link.sync()
            yield
        finally:
            await link.unsubscribe(subscription)
            for scope in scopes:
                scope.deadline = anyio.current_time() + HANDLER_GRACE

    def _check(self, body: bytes) -> None:
        limit = self._core.queue.client.max_payload
        if len(body) > limit:
            raise TooLarge(len(body), limit, "request")

    async def request(self, channel: str, body: bytes, *, timeout: float) -> bytes:
        """See `Signals.request`."""
        subject = self._subject(channel)
        self._check(body)
        try:
            msg = await self._core.queue.exchange(subject, body, timeout=timeout)
        except NotConnected:
            raise Unavailable(self._core.queue.gone) from None
        if msg is None:
            raise Unavailable(f"no reply on channel {channel} within {timeout} s")
        if status(msg) == "503":
            raise NoListener(f"nobody listens on channel {channel}")
        return msg.data

    async def gather(self, channel: str, body: bytes, *, wait: float) -> list[bytes]:
        """See `Signals.gather`. Returns early only where nobody listens."""
        subject = self._subject(channel)
        self._check(body)
        try:
            replies, _ = await self._core.queue.collect(subject, body, timeout=wait)
        except NotConnected:
            raise Unavailable(self._core.queue.gone) from None
        return [msg.data for msg in replies]

    def announce(self, channel: str, body: bytes) -> None:
        """See `Signals.announce`. Sent once a queue of this connection is open."""
        self._beats.publish(self._subject(channel), body)
