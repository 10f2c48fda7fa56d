"""Appending as the owner of a session: compare-and-append, and the fence as the worker sees it."""

from __future__ import annotations

import random
from collections.abc import Callable

import anyio

from agentrun.broker import Kind, Pending, Record, SessionLog, Tail
from agentrun.errors import Conflict, Fenced, SessionGone, Unavailable

Change = Callable[[Pending], Pending]

_SHORTEST = 0.002
_LONGEST = 0.25


class SessionWriter:
    """Appends to one session as its owner, from the claim to the last word.

    Args:
        log: The broker's log.
        session: The session's id.
        tail: The session's end right after the claim.
        on_input: Called once, in order, with each input found in the log on the way.
    """

    def __init__(self, log: SessionLog, session: str, tail: Tail, on_input: Callable[[Record], None]) -> None:
        self.tail = tail
        self._log = log
        self._session = session
        self._on_input = on_input
        self._seen = tail.offset
        self._lasting = tail
        """The end as of the last record that does not expire."""
        self._in_flight: bytes | None = None

    async def append(self, body: bytes, kind: Kind, change: Change | None = None) -> Tail:
        """Store one record and return its end; an input that came in between is reported and stepped over.

        While the broker is away this waits for it, however long: the session's owner is whoever appends first then.

        Raises:
            Fenced: Somebody else has appended as the owner, or the session was deleted.
        """
        while (tail := await self.try_append(body, kind, change)) is None:
            pass
        return tail

    async def try_append(self, body: bytes, kind: Kind, change: Change | None = None) -> Tail | None:
        """`append`, but give up with None where inputs came in between: they are reported, and nothing is stored."""
        self._in_flight = body
        pause = 0.05
        try:
            while True:
                pending = change(self.tail.pending) if change else self.tail.pending
                try:
                    tail = await self._log.append(self._session, body, kind=kind, after=self.tail, pending=pending)
                    return self._advance(tail)
                except Conflict as conflict:
                    return await self._catch_up(body, conflict.tail)
                except SessionGone as error:
                    raise Fenced(str(error)) from error
                except Unavailable:
                    await anyio.sleep(pause * (0.5 + random.random()))  # noqa: S311 - spreads retries, no secret
                    pause = min(pause * 2, 1.0)
        finally:
            self._in_flight = None

    async def _catch_up(self, body: bytes, end: Tail | None) -> Tail | None:
        """Take in what came since our last record; return our own record's end if it turns out to be stored."""
        if end is not None and end.offset <= self.tail.offset:
            self._go_back(end)
            return None
        for record in await self._news():
            if record.kind.input:
                self._advance(record.tail)
                self.observe(record)
            elif record.body == body:
                # An append whose outcome could not be found out earlier had been stored after all.
                return self._advance(record.tail)
            else:
                raise Fenced(f"session {self._session} was taken over at offset {record.offset}")
        return None

    async def _news(self) -> list[Record]:
        pause = _SHORTEST
        while pause < _LONGEST:
            try:
                if records := await self._log.read(self._session, after=self.tail.offset):
                    return list(records)
            except Unavailable:
                pause = _SHORTEST
                await anyio.sleep(_LONGEST)
            # The broker refused us for a record that the replica it reads from does not show yet.
            await anyio.sleep(pause)
            pause *= 2
        return []

    def _go_back(self, end: Tail) -> None:
        if (end.offset, end.cursor) not in (
            (self.tail.offset, self.tail.cursor),
            (self._lasting.offset, self._lasting.cursor),
        ):
            raise Fenced(f"session {self._session} was deleted")
        # Deltas after it have expired, or may have: the broker counts the offsets they may have had as given out.
        self.tail = end

    def _advance(self, tail: Tail) -> Tail:
        self.tail = tail
        if tail.kind is not Kind.DELTA:
            self._lasting = tail
        return tail

    def observe(self, record: Record) -> bool:
        """Take note of a record seen by another way; return False if it shows that we are superseded."""
        if record.kind.input:
            if record.offset > self._seen:
                self._seen = record.offset
                self._on_input(record)
            return True
        return record.offset <= self.tail.offset or record.body == self._in_flight
