"""Following a session: what is stored, then what comes, without loss or duplicate at the seam.

Each record is published as it is stored, to whoever listens then. So a live record is delivered only when it is exactly
the next one; anything else is answered by reading the session from the last record delivered.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Self

import anyio

from agentrun.bell import Bell, Ear
from agentrun.broker import Record
from agentrun.brokers.valkey_channels import Subscriber
from agentrun.brokers.valkey_core import Core, Stored
from agentrun.brokers.valkey_link import log
from agentrun.brokers.valkey_read import page
from agentrun.errors import RecordsLost, Unavailable

PAGE = 500
BUFFER = 2048
BUFFER_BYTES = 8 << 20
BEGIN = 1.0
"""Seconds to wait for the subscription before reading without it."""
IDLE = 5.0
"""Seconds of silence after which the session is read again: a lost last message leaves no gap to see."""
IDLE_MOST = 60.0
"""What that grows to, doubled at each look that finds nothing, while the session has nothing pending."""

_OURS = 10**15
"""Above it are this broker's cursors; a hint from another one, before the session moved here, is of no use."""


class Follower:
    """An async iterator over lists of records, and its own context manager."""

    def __init__(self, core: Core, session: str, after: int, cursor: int, deltas: bool) -> None:
        core.place(session)
        self._core = core
        self._session = session
        self._after = after
        self._cursor = cursor if cursor > _OURS else 0
        """That of the record at ``after``: what was delivered last, or a hint."""
        self._first = 0
        """When the session began, once that is known."""
        self._deltas = deltas
        self._behind = True
        """Whether the session must be read before live records can be trusted."""
        self._listening = False
        self._busy = True
        self._idle = IDLE
        self._buffer: deque[bytes] = deque()
        self._bytes = 0
        self._bell = Bell()
        self._ear = Ear(self._bell)
        self._subscriber = Subscriber(self._on_live, self._on_begin)
        kinds = ("events", "deltas") if deltas else ("events",)
        self._channels = [f"{core.topics}{kind}:{session}" for kind in kinds]

    async def __aenter__(self) -> Self:
        # In the end the last one is in force, and then all are.
        for channel in self._channels:
            self._core.live.add(channel, self._subscriber)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._ear.close()
        for channel in self._channels:
            self._core.live.remove(channel, self._subscriber)

    def __aiter__(self) -> Self:
        return self

    def _on_begin(self) -> None:
        self._listening = True
        self._reread()

    def _reread(self) -> None:
        self._idle = IDLE
        self._behind = True
        self._buffer.clear()
        self._bytes = 0
        self._bell.ring()

    def _on_live(self, data: bytes) -> None:
        if not data or len(self._buffer) >= BUFFER or self._bytes > BUFFER_BYTES:
            self._reread()
            return
        self._buffer.append(data)
        self._bytes += len(data)
        self._bell.ring()

    async def __anext__(self) -> Sequence[Record]:
        if not self._listening:
            await self._ear.wait(BEGIN)
            self._listening = True
        while True:
            try:
                records = await self._step()
            except Unavailable as error:
                log.debug("following %s: %s", self._session, error)
                self._behind = True
                await anyio.sleep(0.25)
                continue
            if records:
                self._after, self._cursor = records[-1].offset, records[-1].cursor
                if not self._first and records[0].offset == 1:
                    self._first = records[0].cursor
                self._busy = bool(records[-1].pending)
                self._idle = IDLE
                return records

    async def _step(self) -> Sequence[Record]:
        if self._behind:
            return await self._catch_up()
        if records := self._drain():
            return records
        if self._behind:
            return ()
        if not await self._ear.wait(self._idle * random.uniform(0.8, 1.2)):  # noqa: S311
            self._behind = True
            self._idle = IDLE if self._busy else min(2 * self._idle, IDLE_MOST)
        return ()

    async def _catch_up(self) -> Sequence[Record]:
        # Set before reading: what is published meanwhile is read once more rather than missed.
        self._behind = False
        try:
            found = await page(
                self._core,
                self._session,
                after=self._after,
                deltas=self._deltas,
                limit=PAGE,
                cursor=self._cursor,
                first=self._first,
            )
        except RecordsLost as error:
            log.error("%s", error)
            raise
        except BaseException:
            self._behind = True
            raise
        self._first = found.first
        self._behind = self._behind or not found.complete
        return [stored.record for stored in found.records]

    def _is_next(self, stored: Stored, after: int) -> bool:
        if self._deltas:
            return stored.record.offset == after + 1
        return stored.kept_before <= after < stored.record.offset

    def _drain(self) -> Sequence[Record]:
        records: list[Record] = []
        after, cursor = self._after, self._cursor
        while self._buffer:
            data = self._buffer.popleft()
            self._bytes -= len(data)
            stored = Stored.parse(data)
            if stored.record.offset <= after and (not cursor or stored.record.cursor <= cursor):
                continue  # it was read, or the offset asked for is still to come
            if not self._is_next(stored, after):
                self._behind = True
                break
            records.append(stored.record)
            after, cursor = stored.record.offset, stored.record.cursor
        return records
