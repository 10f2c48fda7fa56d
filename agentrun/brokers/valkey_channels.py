"""Subscriptions: one connection for all of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import anyio
from valkey.exceptions import ResponseError

from agentrun.brokers.valkey_link import LinkOptions, NotConnected, NotSent, Wire
from agentrun.errors import Misconfigured, Unavailable

SUBSCRIBED = 5.0
"""Seconds within which a subscription must be in force."""


class Subscriber:
    """One who listens to a channel.

    Args:
        on_message: Called with each message, where it is read: it must not take long.
        on_begin: Called when messages are heard from now on: at first, and again after each loss of the connection.
    """

    __slots__ = ("on_begin", "on_message")

    def __init__(self, on_message: Callable[[bytes], None], on_begin: Callable[[], None] = lambda: None) -> None:
        self.on_message = on_message
        self.on_begin = on_begin


class Channels(Wire):
    """A connection that listens.

    Args:
        options: Where and how to connect.
        name: How the server lists this connection.
    """

    def __init__(self, options: LinkOptions, name: str) -> None:
        super().__init__(options, name)
        self._subscribers: dict[bytes, list[Subscriber]] = {}
        self._active: set[bytes] = set()
        self._pings: deque[tuple[float, asyncio.Future[None]]] = deque()

    def add(self, channel: str, subscriber: Subscriber) -> None:
        """Subscribe; in force once ``on_begin`` was called (at the latest after `sync`)."""
        name = channel.encode()
        others = self._subscribers.setdefault(name, [])
        others.append(subscriber)
        if len(others) == 1:
            if self.connected:
                self._put("SUBSCRIBE", name)
        elif name in self._active:
            subscriber.on_begin()

    def remove(self, channel: str, subscriber: Subscriber) -> None:
        """Unsubscribe; what is on its way may still come until `sync`, for other subscribers of the channel."""
        name = channel.encode()
        others = self._subscribers[name]
        others.remove(subscriber)
        if not others:
            del self._subscribers[name]
            self._active.discard(name)
            if self.connected:
                self._put("UNSUBSCRIBE", name)

    async def sync(self) -> None:
        """Return once what was added is in force and what was removed is not.

        Raises:
            Unavailable: There was no connection for some seconds.
        """
        with anyio.move_on_after(SUBSCRIBED):
            while True:
                await self.wait_connected()
                try:
                    return await self._pong()
                except NotConnected:
                    continue
        raise Unavailable(self.gone)

    async def settle(self) -> None:
        """Return once nothing comes any more for what was removed, or there is no connection."""
        with suppress(NotConnected):
            await self._pong()

    def _pong(self) -> asyncio.Future[None]:
        if not self.connected:
            raise NotSent(self.name)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pings.append((anyio.current_time(), future))
        self._put("PING")
        return future

    def _on_connected(self) -> None:
        if self._subscribers:
            self._put("SUBSCRIBE", *self._subscribers)

    def _on_lost(self) -> None:
        self._active.clear()
        pings, self._pings = self._pings, deque()
        for _, future in pings:
            if not future.done():
                future.set_exception(NotConnected(self.name))
                future.exception()  # nobody may wait for it

    def _on_reply(self, reply: Any) -> None:
        if isinstance(reply, ResponseError):
            raise Misconfigured(f"{self.options.shown} refuses to let us listen: {reply}")
        if reply == b"PONG" or reply[0] == b"pong":
            _, future = self._pings.popleft()
            if not future.done():
                future.set_result(None)
        elif reply[0] == b"message":
            for subscriber in tuple(self._subscribers.get(reply[1], ())):
                subscriber.on_message(reply[2])
        elif reply[0] == b"subscribe" and reply[1] in self._subscribers:
            self._active.add(reply[1])
            for subscriber in tuple(self._subscribers[reply[1]]):
                subscriber.on_begin()

    def _owed_since(self) -> float | None:
        return self._pings[0][0] if self._pings else None

    def _ping(self) -> None:
        self._pong()
