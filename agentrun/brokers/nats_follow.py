"""Following a session: what is stored, then what comes, without loss or duplicate at the seam.

The live side is the stream's republish: stored records only, but droppable. So a live record is delivered only when it
is exactly the next one; anything else is answered by reading the stream again from the last record delivered.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Self

import anyio
from nats.aio.subscription import Subscription

from agentrun.bell import Bell, Ear
from agentrun.broker import Record
from agentrun.brokers.nats_layout import Route, Stored, stored_of
from agentrun.brokers.nats_link import Link, Msg, NotConnected, log
from agentrun.brokers.nats_read import Place, Reader
from agentrun.errors import SessionGone, Unavailable

PAGE = 500
BUFFER = 2048
BUFFER_BYTES = 8 << 20
IDLE = 2.0
"""Seconds of silence after which the end is looked up: a lost last message leaves no gap to see."""
IDLE_MOST = 60.0
"""What that grows to, doubled at each look, while the session has nothing pending.

A turn that is under way ends in a record that nothing follows: that one must be found soon. In a session without work
the next record is a request, and what its turn appends shows that the request was lost. So only a lost request that no
worker takes, and a session's deletion, may be told that late. 5,000 idle sessions cost 83 gets a second, not 2,500.
"""


class Follower:
    """An async iterator over lists of records, and its own context manager."""

    def __init__(
        self, reader: Reader, link: Link, route: Route, session: str, after: int, cursor: int, deltas: bool
    ) -> None:
        self._reader = reader
        self._link = link
        self._route = route
        self._session = session
        self._after = after
        self._hint = cursor
        self._deltas = deltas
        self._next: int = 0
        """The sequence from which on nothing was delivered; 0: not searched yet."""
        self._known: int = 0
        """The offset of the session's record before it. Where the offset asked for is still to come, that is less."""
        self._behind = True
        """Whether the stream must be read before live records can be trusted."""
        self._existed = False
        self._idle = IDLE
        self._buffer: deque[Stored] = deque()
        self._bytes = 0
        self._bell = Bell()
        self._ear = Ear(self._bell)
        self._subscriptions: list[Subscription] = []

    async def __aenter__(self) -> Self:
        filters = [f"{self._route.live}.>"]
        if not self._deltas:
            filters = [f"{self._route.live}.in.>", f"{self._route.live}.out.turn"]
        self._link.on_reconnect.add(self._reread)
        for subject in filters:
            self._subscriptions.append(await self._link.listen(subject, self._on_live))
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._link.on_reconnect.discard(self._reread)
        self._ear.close()
        for subscription in self._subscriptions:
            await self._link.unsubscribe(subscription)

    def __aiter__(self) -> Self:
        return self

    def _reread(self) -> None:
        self._idle = IDLE
        self._behind = True
        self._buffer.clear()
        self._bytes = 0
        self._bell.ring()

    def _on_live(self, msg: Msg) -> None:
        if len(self._buffer) >= BUFFER or self._bytes > BUFFER_BYTES or msg.headers is None:
            self._reread()
            return
        self._buffer.append(stored_of(msg.headers, msg.data))
        self._bytes += len(msg.data)
        self._bell.ring()

    async def __anext__(self) -> Sequence[Record]:
        while True:
            try:
                records = await self._step()
            except (Unavailable, NotConnected) as error:
                if self._link.client.is_closed:
                    raise
                log.debug("following %s: %s", self._session, error)
                self._behind = True
                await anyio.sleep(0.25)
                continue
            if records:
                self._after = records[-1].offset
                self._existed = True
                self._idle = IDLE
                return records

    async def _step(self) -> Sequence[Record]:
        if self._behind:
            async with self._reader.catching_up(self._route):
                return await self._catch_up()
        if records := self._drain():
            return records
        if self._behind:
            return ()
        if not await self._ear.wait(self._idle * random.uniform(0.8, 1.2)):  # noqa: S311
            await self._look()
        return ()

    async def _catch_up(self) -> Sequence[Record]:
        if not self._deltas and await self._has_all():
            return ()
        place = Place(self._next, self._known)
        if self._next == 0:
            place = await self._reader.start(self._route, self._after, self._hint)
        # Set before reading: what is announced meanwhile is read once more rather than missed.
        self._behind = False
        try:
            page = await self._reader.page(self._route, place, PAGE, deltas=self._deltas)
        except BaseException:
            self._behind = True
            raise
        self._next, self._known = page.next
        self._behind = self._behind or not page.complete
        records = [r for r in page.records if r.offset > self._after]
        if not records and page.records and self._existed:
            raise SessionGone(f"session {self._session} was deleted and began anew")
        return records

    async def _has_all(self) -> bool:
        """Whether the session's end, one get, shows that nothing is missing; so it is as a rule for who just wrote."""
        self._behind = False
        try:
            newest = await self._reader.newest(self._route, leader=True)
        except BaseException:
            self._behind = True
            raise
        if newest is None or self._is_missing(newest):
            self._behind = True
            return False
        if newest.seq >= self._next:
            self._next, self._known = newest.seq + 1, newest.offset
        self._existed = True
        return True

    def _is_missing(self, newest: Stored) -> bool:
        """Whether something that was not delivered may be stored up to ``newest``."""
        if self._deltas:
            return newest.seq >= self._next
        record = newest.record()
        return record.kept is None or not record.kept <= self._after <= record.offset

    def _is_next(self, stored: Stored, after: int) -> bool:
        if self._deltas:
            return stored.offset == after + 1
        before = stored.kept_before
        return before is not None and before <= after < stored.offset

    def _drain(self) -> Sequence[Record]:
        records: list[Record] = []
        after = self._after
        if not self._deltas and len(self._buffer) > 1:
            # Two subscriptions do not keep their common order.
            self._buffer = deque(sorted(self._buffer, key=lambda stored: stored.seq))
        while self._buffer:
            stored = self._buffer.popleft()
            self._bytes -= len(stored.body)
            if stored.seq < self._next:
                continue
            if stored.offset <= after and not self._existed:
                self._next, self._known = stored.seq + 1, stored.offset  # the offset asked for is still to come
                continue
            if not self._is_next(stored, after):
                self._behind = True
                break
            records.append(stored.record())
            after = self._known = stored.offset
            self._next = stored.seq + 1
        return records

    async def _look(self) -> None:
        newest = await self._reader.newest(self._route)
        if newest is None and self._existed:
            newest = await self._reader.newest(self._route, leader=True)
            if newest is None:
                await self._reader.confirm(self._route)
                raise SessionGone(f"session {self._session} was deleted")
        if newest is not None and self._is_missing(newest):
            self._behind = True
        busy = newest is not None and newest.record().pending
        self._idle = IDLE if busy else min(2 * self._idle, IDLE_MOST)
