"""From what an agent emits to appends: order, ack-clocked merging, backpressure, checkpoints."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import anyio
import msgspec

from agentrun import wire
from agentrun.broker import Kind
from agentrun.errors import Fenced, InvalidInput
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
)
from agentrun.writer import Change, SessionWriter

_TEXT_LIMIT = 32_768
"""Characters merged into one record: six bytes each at the worst, far below any broker's limit."""

_LEAST_GAP = 0.001
"""Deltas of a session are never appended faster than this: readers of its end count on it (design.md, D9)."""


def kind_of(event: OutputEvent) -> Kind:
    """Return whether the event expires early (DELTA) or stays (EVENT)."""
    if isinstance(event, (TextDelta, ReasoningDelta, ToolInputDelta, ToolProgress)):
        return Kind.DELTA
    if isinstance(event, Data) and event.transient:
        return Kind.DELTA
    return Kind.EVENT


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


_Text = TextDelta | ReasoningDelta | ToolInputDelta
"""What is merged with its like."""


class _Slot:
    """What one append will hold: merged text, or one event."""

    __slots__ = ("bodies", "call", "change", "count", "event", "kind", "name", "number", "pieces", "size", "text")

    def __init__(self, number: int) -> None:
        self.number = number
        self.count = 0
        self.kind = Kind.DELTA
        self.change: Change | None = None
        self.event: OutputEvent | None = None
        self.bodies: Sequence[bytes] = ()
        self.text: type[_Text] | None = None
        self.call = ""
        self.name = ""
        self.pieces: list[str] = []
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
        checkpoint_after: Seconds after which the message is stored whole, again and again.
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
        self.on_append: Callable[[int, int, int], None] | None = None
        """Told of each record: its tokens, its bytes, its characters of text."""
        self._writer = writer
        self._turn = turn
        self._attempt = attempt
        self._pacer = pacer
        self._min_gap = max(min_gap, _LEAST_GAP)
        self._limit = buffer_events
        self._checkpoint_after = checkpoint_after
        self._checkpoint_due = False
        self._max_body = max_body
        self._slots: deque[_Slot] = deque()
        self._waiting = 0
        self._put = 0
        self._stored = 0
        self._index = 0
        self._next = 0.0
        self._in_flight = False
        self._closed = False
        self._ended = False
        self._idle: anyio.Event | None = None
        self._moved: anyio.Event | None = None

    # ------------------------------------------------------------------------------------------------- what comes in

    async def emit(self, event: OutputEvent) -> None:
        """Queue an event of the agent's; wait while the buffer is full.

        Raises:
            Fenced: The session is no longer ours, or the attempt is over.
            InvalidInput: The event cannot be stored.
        """
        while self._waiting >= self._limit and self.error is None and not self._closed:
            await self._move()
        match event:
            case TextDelta() | ReasoningDelta():
                self._put_text(type(event), event.text, event.count)
            case ToolInputDelta():
                self._put_text(ToolInputDelta, event.text, 1, event.call, event.name)
            case _:
                self.put(msgspec.structs.replace(event, turn=self._turn, attempt=self._attempt))

    def put(self, event: OutputEvent, change: Change | None = None) -> None:
        """Queue an event whatever the buffer holds; ``change`` edits the pending list when it is stored.

        Events about another turn (a queued one that was stopped) come with their own names.

        Raises:
            Fenced: The session is no longer ours, or the attempt is over.
            InvalidInput: The event cannot be stored.
        """
        self._check_open()
        event.turn = event.turn or self._turn
        event.attempt = event.attempt or (self._attempt if event.turn == self._turn else 0)
        slot = self._new_slot()
        # Encoded now, and read again: an error meets whoever made it, and what is changed later changes nothing here.
        slot.event, slot.bodies = _encoded(event, self._max_body)
        # Pieces stay: an event must not lose one of them to expiry before the others.
        slot.kind = kind_of(event) if len(slot.bodies) == 1 else Kind.EVENT
        slot.change = change
        slot.count = 1
        self._slots.append(slot)
        self._waiting += 1
        self._wake()

    def _check_open(self) -> None:
        if self.error is not None:
            raise self.error
        if self._closed:
            raise Fenced(f"attempt {self._attempt} at turn {self._turn} is over; what it appends now is refused")

    def _put_text(self, cls: type[_Text], text: str, count: int, call: str = "", name: str = "") -> None:
        self._check_open()
        if not (isinstance(text, str) and isinstance(call, str) and isinstance(name, str) and count >= 0):  # pyright: ignore[reportUnnecessaryIsInstance] - authors err
            raise InvalidInput(f"a {cls.__name__} needs text, not {text!r} ({count} tokens, call {call!r}, {name!r})")
        size = len(text)
        slot = self._slots[-1] if self._slots else None
        if (
            slot is None
            or slot.text is not cls
            or slot.size + size > _TEXT_LIMIT
            or slot.call != call
            or (name and slot.name != name)
        ):
            # What is too long is sliced; its tokens are counted with the last slice.
            whole = max(size - 1, 0) // _TEXT_LIMIT * _TEXT_LIMIT
            for start in range(0, whole, _TEXT_LIMIT):
                self._text_slot(cls, call, name).pieces.append(text[start : start + _TEXT_LIMIT])
            slot = self._text_slot(cls, call, name)
            text = text[whole:]
        slot.pieces.append(text)
        slot.size += len(text)
        slot.count += count
        self._waiting += count
        self._wake()

    def _text_slot(self, cls: type[_Text], call: str, name: str) -> _Slot:
        slot = self._new_slot()
        slot.text, slot.call, slot.name = cls, call, name
        self._slots.append(slot)
        return slot

    def _new_slot(self) -> _Slot:
        self._put += 1
        return _Slot(self._put)

    # ------------------------------------------------------------------------------------------------ who waits for it

    async def flush(self) -> None:
        """Wait until everything queued so far is stored.

        Raises:
            Fenced: The session is no longer ours.
        """
        last = self._put
        while self._stored < last and self.error is None:
            await self._move()
        if self.error is not None:
            raise self.error

    async def close(self) -> None:
        """Refuse what is queued from now on, and wait until the rest is stored and nothing is in flight.

        Raises:
            Fenced: The session is no longer ours.
        """
        self._closed = True
        self._wake()
        while not self._ended and self.error is None:
            await self._move()
        if self.error is not None:
            raise self.error

    async def reached(self, offset: int) -> None:
        """Wait until no append is in flight that may have been stored at ``offset`` without our knowing yet."""
        while self._in_flight and self._writer.tail.offset < offset and self.error is None:
            await self._move()

    def fence(self, error: Fenced) -> None:
        """Take note that the session is no longer ours."""
        self.error = self.error or error
        self._slots.clear()
        self._ring()

    async def _move(self) -> None:
        if self._moved is None:
            self._moved = anyio.Event()
        await self._moved.wait()

    def _ring(self) -> None:
        if self._moved is not None:
            self._moved.set()
            self._moved = None

    def _wake(self) -> None:
        if self._idle is not None:
            self._idle.set()
            self._idle = None

    # ------------------------------------------------------------------------------------------------ what goes out

    async def run(self) -> None:
        """Append what is queued until `close`, or until the session is no longer ours (``error`` says so)."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._remind)
            try:
                await self._work()
            except Fenced as error:
                self.fence(error)
            self._in_flight = False
            self._ended = True
            self._ring()
            group.cancel_scope.cancel()

    async def _work(self) -> None:
        while self.error is None:
            if self._slots:
                self._in_flight = True
                await self._append_next()
                self._in_flight = False
                self._ring()
            elif self._closed:
                return
            elif self._checkpoint_due:
                await self._checkpoint()
            else:
                self._idle = anyio.Event()
                await self._idle.wait()

    async def _append_next(self) -> None:
        if self._slots[0].kind is Kind.DELTA:
            now = time.monotonic()
            wait = max(self._next - now, self._pacer.delay(now))
            if wait > 0:
                await anyio.sleep(wait)
            if self.error is not None:
                return
        slot = self._slots.popleft()
        event, bodies = (slot.event, slot.bodies) if slot.event is not None else self._text_of(slot)
        for body in bodies[:-1]:
            await self._writer.append(body, Kind.EVENT)
            if self.on_append is not None:
                self.on_append(0, len(body), 0)
        tail = await self._writer.append(bodies[-1], slot.kind, slot.change)
        if self.on_append is not None:
            self.on_append(slot.count if slot.text is not None else 0, len(bodies[-1]), slot.size)
        self._waiting -= slot.count
        self._stored = slot.number
        self.builder.apply(event)
        if slot.kind is Kind.DELTA:
            self._next = time.monotonic() + self._min_gap
            if self._checkpoint_due:
                await self._checkpoint()
        elif self.on_stored is not None:
            self.on_stored(event, tail.offset)

    def _text_of(self, slot: _Slot) -> tuple[OutputEvent, Sequence[bytes]]:
        text = "".join(slot.pieces)
        try:
            return self._encoded_text(slot, text)
        except InvalidInput:
            # A provider cut a character outside the basic plane in two. What cannot be put together again is no text.
            return self._encoded_text(slot, text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"))

    def _encoded_text(self, slot: _Slot, text: str) -> tuple[OutputEvent, Sequence[bytes]]:
        if slot.text is ToolInputDelta:
            event = ToolInputDelta(turn=self._turn, attempt=self._attempt, call=slot.call, text=text, name=slot.name)
        else:
            cls = ReasoningDelta if slot.text is ReasoningDelta else TextDelta
            event = cls(turn=self._turn, attempt=self._attempt, text=text, index=self._index, count=slot.count)
        bodies = (wire.encode(event),)
        if len(bodies[0]) > self._max_body:
            slot.kind = Kind.EVENT
            bodies = wire.split(event, self._max_body)
        if slot.text is not ToolInputDelta:
            self._index += slot.count
        return event, bodies

    async def _remind(self) -> None:
        # By the clock and not by what is said: while the session's end is young, nobody who takes it over has to
        # reckon with deltas that came after it and have expired.
        while True:
            await anyio.sleep(self._checkpoint_after)
            self._checkpoint_due = True
            self._wake()

    async def _checkpoint(self) -> None:
        self._checkpoint_due = False
        event = TurnCheckpoint(turn=self._turn, attempt=self._attempt, message=self.builder.message)
        for body in wire.split(event, self._max_body):
            await self._writer.append(body, Kind.EVENT)


def _encoded(event: OutputEvent, limit: int) -> tuple[OutputEvent, Sequence[bytes]]:
    body = wire.mend(event)
    stored = wire.decode(body)
    assert isinstance(stored, wire.OutputEvent)
    return stored, (body,) if len(body) <= limit else wire.split(stored, limit)
