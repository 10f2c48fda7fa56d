"""Appending as the owner of a session: offsets, the fence as the worker sees it, and ack-clocked batching."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable

import anyio

from agentrun.broker import Kind, Pending, Record, SessionLog, Tail
from agentrun.errors import Conflict, Fenced, SessionGone, Unavailable
from agentrun.message import MessageBuilder
from agentrun.wire import (
    Data,
    Message,
    OutputEvent,
    ReasoningDelta,
    TextDelta,
    ToolInputDelta,
    ToolProgress,
    TurnCheckpoint,
    split,
)

Change = Callable[[Pending], Pending]

_TEXT_LIMIT = 32_768
"""Characters merged into one record: six bytes each at the worst, far below any broker's limit."""


def kind_of(event: OutputEvent) -> Kind:
    """Return whether the event expires early (DELTA) or stays (EVENT)."""
    if isinstance(event, (TextDelta, ReasoningDelta, ToolInputDelta, ToolProgress)):
        return Kind.DELTA
    if isinstance(event, Data) and event.transient:
        return Kind.DELTA
    return Kind.EVENT


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
        self._in_flight: bytes | None = None

    async def append(self, body: bytes, kind: Kind, change: Change | None = None) -> Tail:
        """Store one record; an input that came in between is reported and stepped over.

        While the broker is away this waits for it, however long: the session's owner is whoever appends first then.

        Raises:
            Fenced: Somebody else has appended as the owner, or the session was deleted.
        """
        self._in_flight = body
        pause = 0.05
        try:
            while True:
                pending = change(self.tail.pending) if change else self.tail.pending
                try:
                    self.tail = await self._log.append(self._session, body, kind=kind, after=self.tail, pending=pending)
                    return self.tail
                except Conflict:
                    if await self._catch_up(body):
                        return self.tail
                except SessionGone as error:
                    raise Fenced(str(error)) from error
                except Unavailable:
                    await anyio.sleep(pause * (0.5 + random.random()))  # noqa: S311 - spreads retries, no secret
                    pause = min(pause * 2, 1.0)
        finally:
            self._in_flight = None

    async def _catch_up(self, body: bytes) -> bool:
        """Read what came since our last record; return whether our own is among it."""
        known = self.tail.offset
        records: list[Record] = []
        pause = 0.002
        while not records:
            try:
                records = list(await self._log.read(self._session, after=known))
                if not records:
                    if (await self._log.last(self._session)).offset < known:
                        raise Fenced(f"session {self._session} was deleted")
                    # The broker refused us for a record that its replica does not show yet.
                    await anyio.sleep(pause)
                    pause = min(pause * 2, 0.25)
            except Unavailable:
                await anyio.sleep(0.25)
        stored = False
        for record in records:
            if record.kind.input:
                self.observe(record)
            elif record.body == body and not stored:
                # An append whose outcome could not be found out earlier had been stored after all.
                stored = True
            else:
                raise Fenced(f"session {self._session} was taken over at offset {record.offset}")
            self.tail = record.tail
        return stored

    def observe(self, record: Record) -> bool:
        """Take note of a record seen by another way; return False if it shows that we are superseded."""
        if record.kind.input:
            if record.offset > self._seen:
                self._seen = record.offset
                self._on_input(record)
            return True
        return record.offset <= self.tail.offset or record.body == self._in_flight


class Pacer:
    """Aligns the appends of a busy worker to a common tick, so that they share system calls; idle, it does nothing.

    Args:
        tick: Seconds; 0 switches it off.
        above: Appends per second from which the worker counts as busy.
    """

    _WINDOW = 0.25

    def __init__(self, tick: float, above: int) -> None:
        self._tick = tick
        self._above = above * self._WINDOW
        self._count = 0
        self._window_end = 0.0
        self._busy = False

    def delay(self, now: float) -> float:
        """Count one append and return how long it should wait, in seconds."""
        if now >= self._window_end:
            self._busy = self._count > self._above and self._tick > 0
            self._count = 0
            self._window_end = now + self._WINDOW
        self._count += 1
        return self._tick - now % self._tick if self._busy else 0.0


class _Slot:
    """What one append will hold: merged text, or one event."""

    __slots__ = ("change", "count", "event", "pieces", "reasoning", "size")

    def __init__(self, event: OutputEvent | None = None, change: Change | None = None) -> None:
        self.event = event
        self.change = change
        self.pieces: list[str] = []
        self.reasoning = False
        self.count = 0
        self.size = 0


class Publisher:
    """The one place from which an attempt's events are appended: in order, one append in flight, text merged.

    Tokens that arrive while an append is in flight, or before ``min_gap`` has passed since the last one, are merged
    into the next: at chat speed one append per token and no added delay, under load ever larger batches.

    Args:
        writer: The session, owned.
        turn: The turn's id.
        attempt: This attempt.
        message: What the attempt starts from (the earlier attempts' message when it resumes).
        pacer: Shared by all publishers of a worker.
        min_gap: Least seconds between two appends of deltas.
        buffer_events: Tokens and events that may wait; then `emit` waits.
        checkpoint_after: Seconds after which the message is stored whole.
        max_body: The broker's limit for a record, in bytes.
    """

    def __init__(
        self,
        writer: SessionWriter,
        *,
        turn: str,
        attempt: int,
        message: Message | None,
        pacer: Pacer,
        min_gap: float,
        buffer_events: int,
        checkpoint_after: float,
        max_body: int,
    ) -> None:
        self.builder = MessageBuilder(message)
        self.error: Fenced | None = None
        self.on_stored: Callable[[OutputEvent, int], None] | None = None
        self._writer = writer
        self._turn = turn
        self._attempt = attempt
        self._pacer = pacer
        self._min_gap = min_gap
        self._limit = buffer_events
        self._checkpoint_after = checkpoint_after
        self._checkpoint_at = time.monotonic() + checkpoint_after
        self._max_body = max_body
        self._slots: deque[_Slot] = deque()
        self._waiting = 0
        self._index = 0
        self._next = 0.0
        self._in_flight = False
        self._wake = anyio.Event()
        self._moved = anyio.Event()

    async def emit(self, event: OutputEvent) -> None:
        """Queue an event of the agent's; wait while the buffer is full.

        Raises:
            Fenced: The session is no longer ours.
        """
        while self._waiting >= self._limit and self.error is None:
            await self._moved.wait()
        self.put(event)

    def put(self, event: OutputEvent, change: Change | None = None) -> None:
        """Queue an event whatever the buffer holds; ``change`` edits the pending list when it is stored.

        Raises:
            Fenced: The session is no longer ours.
        """
        if self.error is not None:
            raise self.error
        if isinstance(event, (TextDelta, ReasoningDelta)):
            self._put_text(event)
        else:
            # Events about another turn (a queued one that was stopped) come with their own names.
            event.turn = event.turn or self._turn
            event.attempt = event.attempt or (self._attempt if event.turn == self._turn else 0)
            self._slots.append(_Slot(event, change))
            self._waiting += 1
        self._wake.set()

    def _put_text(self, event: TextDelta | ReasoningDelta) -> None:
        reasoning = isinstance(event, ReasoningDelta)
        text = event.text
        count = event.count
        for start in range(0, max(len(text), 1), _TEXT_LIMIT):
            piece = text if len(text) <= _TEXT_LIMIT else text[start : start + _TEXT_LIMIT]
            slot = self._slots[-1] if self._slots else None
            if (
                slot is None
                or slot.event is not None
                or slot.reasoning is not reasoning
                or slot.size + len(piece) > _TEXT_LIMIT
            ):
                slot = _Slot()
                slot.reasoning = reasoning
                self._slots.append(slot)
            slot.pieces.append(piece)
            slot.size += len(piece)
            slot.count += count
            self._waiting += count
            count = 0

    async def flush(self) -> None:
        """Wait until everything queued is stored.

        Raises:
            Fenced: The session is no longer ours.
        """
        while self._slots or self._in_flight:
            if self.error is not None:
                break
            await self._moved.wait()
        if self.error is not None:
            raise self.error

    async def reached(self, offset: int) -> None:
        """Wait until no append is in flight that may have been stored at ``offset`` without our knowing yet."""
        while self._in_flight and self._writer.tail.offset < offset and self.error is None:
            await self._moved.wait()

    async def run(self) -> None:
        """Append what is queued, for ever; ends when the session is no longer ours (``error`` says so)."""
        while True:
            while not self._slots:
                self._wake = anyio.Event()
                await self._wake.wait()
            self._in_flight = True
            try:
                await self._append_next()
            except Fenced as error:
                self.error = error
                self._slots.clear()
                return
            finally:
                self._in_flight = False
                moved, self._moved = self._moved, anyio.Event()
                moved.set()

    async def _append_next(self) -> None:
        head = self._slots[0]
        is_delta = head.event is None or kind_of(head.event) is Kind.DELTA
        if is_delta:
            now = time.monotonic()
            wait = max(self._next - now, self._pacer.delay(now))
            if wait > 0:
                await anyio.sleep(wait)
        slot = self._slots.popleft()
        event = self._event_of(slot)
        kind = Kind.DELTA if is_delta else Kind.EVENT
        bodies = split(event, self._max_body)
        if len(bodies) > 1:
            # Pieces of a delta stay: an event must not lose one of them to expiry before the others.
            kind = Kind.EVENT
        for body in bodies:
            last = body is bodies[-1]
            tail = await self._writer.append(body, kind, slot.change if last else None)
            if last:
                self._waiting -= slot.count if slot.event is None else 1
                self.builder.apply(event)
                if is_delta:
                    self._next = time.monotonic() + self._min_gap
                elif self.on_stored is not None:
                    self.on_stored(event, tail.offset)
        if is_delta and time.monotonic() >= self._checkpoint_at:
            self._checkpoint_at = time.monotonic() + self._checkpoint_after
            checkpoint = TurnCheckpoint(turn=self._turn, attempt=self._attempt, message=self.builder.message)
            self._slots.appendleft(_Slot(checkpoint))
            self._waiting += 1

    def _event_of(self, slot: _Slot) -> OutputEvent:
        if slot.event is not None:
            return slot.event
        cls = ReasoningDelta if slot.reasoning else TextDelta
        event = cls(
            turn=self._turn,
            attempt=self._attempt,
            text="".join(slot.pieces),
            index=self._index,
            count=slot.count,
        )
        self._index += slot.count
        return event
