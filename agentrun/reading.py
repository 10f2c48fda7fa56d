"""Reading a session: from stored records to events, in which nothing is missing without saying so."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

import anyio
import msgspec

from agentrun import wire
from agentrun.broker import Kind, Record, SessionLog, Tail
from agentrun.errors import BrokerError, InvalidInput, SessionGone
from agentrun.history import History
from agentrun.snapshot import CARRIERS, Hole, snapshot_for

__all__ = ["Event", "Fold", "Reader", "ends_of", "follow", "load_history", "read_to_end"]

_PAGE = 1000
_FIRST = 100
"""Records of the first page, so that the first event comes soon."""
_LASTING = 10_000
"""Records read at a time where deltas are left out; what a broker read too much for a page is read again."""
_AHEAD = 50
"""Records read at a time while looking for what a hole held; the answer is seldom far."""
_AT_ONCE = 100
"""Sessions' ends that are looked up side by side."""
_BETWEEN_CHUNKS = 64
"""Inputs that are allowed for between the pieces of one event."""
_LAG = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
"""Pauses, in seconds, after which a broker's replica that lags behind is asked again."""


class _Names(msgspec.Struct):
    type: str = ""
    turn: str | None = None


_names = msgspec.json.Decoder(_Names)


def _names_of(raw: bytes) -> _Names:
    try:
        return _names.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _Names()


def _decode(raw: bytes) -> wire.AnyEvent:
    """Return the event; what cannot be decoded is passed on like an unknown one, so that no record stops a reader."""
    try:
        return wire.decode(raw)
    except InvalidInput:
        return wire.UnknownEvent(_names_of(raw).type, raw)


def _sent(raw: bytes) -> wire.AnyEvent:
    """Return what a sender appended. Anyone may: an owner's event in such a record is a forgery and says nothing."""
    try:
        event = wire.decode(raw)
    except InvalidInput:
        return wire.UnknownEvent("", raw)  # of whatever type it says it is
    return event if isinstance(event, (*wire.InputEvent.__args__, wire.UnknownEvent)) else wire.UnknownEvent("", raw)


class Event(msgspec.Struct, gc=False, eq=False):
    """One event of a session.

    Attributes:
        offset: Its place in the session. ``events(after=event.offset)`` goes on right behind it. An event stored in
            pieces stands at its last piece, a `Snapshot` or `Gap` at the last offset it stands for.
        raw: Its JSON as stored, with fields this version does not know.
        time: When it was stored, in seconds since the epoch by the broker's clock.
        cursor: A hint for the broker, to be given back with ``after=event.offset``; 0 if there is none.
        decoded: The event as `data` gives it, once it was asked for.
    """

    # Never part of a cycle: with many kept, the garbage collector would look at them for 100 ms at a time.
    offset: int
    raw: bytes
    time: float = 0.0
    cursor: int = 0
    decoded: wire.AnyEvent | None = None

    @property
    def data(self) -> wire.AnyEvent:
        """The event, decoded on first use. Of an unknown type, or not decodable: `UnknownEvent`."""
        if self.decoded is None:
            self.decoded = _decode(self.raw)
        return self.decoded

    @property
    def type(self) -> str:
        """The event's type, such as ``text.delta``; empty if it has none."""
        return self.data.type

    @property
    def unusable(self) -> bool:
        """Whether it stands where anyone may append, and is no input: junk, or a forgery. It says nothing."""
        data = self.decoded
        return isinstance(data, wire.UnknownEvent) and not data.type

    @property
    def turn(self) -> str | None:
        """The turn it belongs to, if any."""
        data = self.data
        if isinstance(data, wire.UnknownEvent):
            return _names_of(self.raw).turn
        return getattr(data, "turn", None) or None

    def __repr__(self) -> str:
        return f"Event({self.offset}, {self.raw[:200]!r})"


class Reader:
    """Turns one session's records, fed in order, into events: pieces joined, holes named.

    Args:
        log: The broker's log.
        session: The session's id.
        after: The offset behind which reading begins.
        holes: Whether a jump in the offsets is a hole; not so where deltas are left out on purpose.
    """

    def __init__(self, log: SessionLog, session: str, *, after: int = 0, holes: bool = True) -> None:
        self.offset = after
        self._log = log
        self._session = session
        self._holes = holes
        self._pieces: list[wire.Chunk] = []

    async def take(self, records: Sequence[Record]) -> list[Event]:
        """Return the events of the next records. Reads from the log only where it meets a hole or half an event."""
        events: list[Event] = []
        for index, record in enumerate(records):
            if record.offset <= self.offset:
                continue
            if self._holes and record.offset > self.offset + 1:
                hole = (self.offset + 1, record.offset - 1)
                events.append(_stand_in(await self._fill(hole, records[index:]), record.time))
            self.offset = record.offset
            if record.kind.input:
                data = _sent(record.body)
                events.append(Event(record.offset, record.body, time=record.time, cursor=record.cursor, decoded=data))
            # The quotes of a quoted "chunk" are escaped in JSON, so this spares decoding nearly all others.
            elif b'"chunk"' not in record.body:
                events.append(Event(record.offset, record.body, time=record.time, cursor=record.cursor))
            elif event := await self._join(record):
                events.append(event)
        return events

    def end(self, tail: Tail) -> list[Event]:
        """Return what stands for records that are gone from the session's end."""
        if not self._holes or self.offset >= tail.next - 1:
            return []
        gap = wire.Gap(from_=self.offset + 1, to=tail.next - 1)
        self.offset = gap.to
        return [_stand_in(gap, tail.time)]

    async def _fill(self, hole: Hole, records: Sequence[Record]) -> wire.Snapshot | wire.Gap:
        first = await self._log.read(self._session, limit=1)
        if not first or first[0].offset > hole[1]:
            return wire.Gap(from_=hole[0], to=hole[1], reason="trimmed")
        following: list[tuple[int, wire.AnyEvent]] = []
        while records:
            following += [(r.offset, _decode(r.body)) for r in records[:_AHEAD]]
            if found := snapshot_for(hole, following):
                return found
            records = records[_AHEAD:] or await self._log.read(self._session, after=following[-1][0], limit=_AHEAD)
        return wire.Gap(from_=hole[0], to=hole[1])

    async def _join(self, record: Record) -> Event | None:
        data = _decode(record.body)
        event = Event(record.offset, record.body, time=record.time, cursor=record.cursor, decoded=data)
        if not isinstance(data, wire.Chunk):
            return event
        if data.index == 0:
            self._pieces = []
        elif not self._pieces:
            await self._look_back(record.offset, data)
        self._pieces.append(data)
        if data.index < data.total - 1:
            return None
        pieces, self._pieces = self._pieces, []
        if [p.index for p in pieces] != list(range(data.total)):
            return event  # its beginning was trimmed
        return Event(record.offset, "".join(p.data for p in pieces).encode(), time=record.time, cursor=record.cursor)

    async def _look_back(self, offset: int, chunk: wire.Chunk) -> None:
        """Fetch the pieces before ``chunk``: an input may stand between pieces, and a reader may begin behind it."""
        reach = min(offset - 1, chunk.index + _BETWEEN_CHUNKS)
        for record in await self._log.read(self._session, after=offset - 1 - reach, deltas=False, limit=reach):
            piece = _decode(record.body)
            if record.offset < offset and isinstance(piece, wire.Chunk):
                self._pieces = [*self._pieces, piece] if piece.index else [piece]


def _stand_in(event: wire.Snapshot | wire.Gap, time: float) -> Event:
    return Event(event.to, wire.encode(event), time=time, decoded=event)


async def read_to_end(log: SessionLog, session: str, *, after: int = 0) -> AsyncGenerator[Event]:
    """The events behind ``after`` up to the session's end as it is now.

    Raises:
        SessionGone: ``after`` lies beyond the session's end.
    """
    tail = await _end_after(log, session, after)
    reader = Reader(log, session, after=after)
    pauses = iter(_LAG)
    limit = _FIRST
    while reader.offset < tail.offset:
        records = await log.read(session, after=reader.offset, limit=limit)
        for event in await reader.take([r for r in records if r.offset <= tail.offset]):
            yield event
        full = len(records) == limit
        limit = _PAGE
        if not full and reader.offset < tail.offset:
            # A replica that lags, or the last deltas have expired just now.
            pause = next(pauses, None)
            if pause is None:
                break
            await anyio.sleep(pause)
    for event in reader.end(tail):
        yield event


@asynccontextmanager
async def follow(
    log: SessionLog, session: str, *, after: int = 0, deltas: bool = True, cursor: int = 0, stored: int = 0
) -> AsyncGenerator[AsyncGenerator[Event]]:
    """The events behind ``after``, stored and to come, without end.

    ``stored`` may be an offset above ``after`` that is known to have been given out.

    Raises:
        SessionGone: ``after``, or ``stored``, lies beyond the session's end.
    """
    if known := stored or after:
        await _end_after(log, session, known)
    reader = Reader(log, session, after=after, holes=deltas)
    async with log.follow(session, after=after, deltas=deltas, cursor=cursor) as batches:
        yield _events(reader, batches)


async def _events(reader: Reader, batches: AsyncIterator[Sequence[Record]]) -> AsyncGenerator[Event]:
    async for records in batches:
        for event in await reader.take(records):
            yield event


async def _end_after(log: SessionLog, session: str, after: int) -> Tail:
    if after < 0:
        raise InvalidInput(f"after is the last offset seen, 0 for none; not {after}")
    tail = await log.last(session)
    for pause in _LAG:
        if after < tail.next:
            return tail
        await anyio.sleep(pause)
        tail = await log.last(session)
    if after < tail.next:
        return tail
    tail = await log.last(session, fresh=True)
    if after < tail.next:
        return tail
    raise SessionGone(
        f"session {session} ends at offset {tail.offset}, before {after}: it was deleted since that offset was read "
        "(or the offset is another session's); read again from after=0"
    )


async def ends_of(log: SessionLog, sessions: Iterable[str]) -> dict[str, Tail]:
    """Return the ends of sessions, looked up side by side; those that have no record are left out.

    Raises:
        BrokerError: One could not be looked up.
    """
    ends: dict[str, Tail] = {}
    failures: list[BrokerError] = []
    left = iter(sessions)

    async def look() -> None:
        try:
            for session in left:
                tail = await log.last(session)
                if tail.offset:
                    ends[session] = tail
        except BrokerError as error:  # raised below, not wrapped in a group
            failures.append(error)
            group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for _ in range(_AT_ONCE):
            group.start_soon(look)
    if failures:
        raise failures[0]
    return ends


class Fold:
    """A session's history without the deltas, brought up to date on demand."""

    def __init__(self, log: SessionLog, session: str) -> None:
        self.history = History()
        self._log = log
        self._session = session
        self._reader = Reader(log, session, holes=False)

    async def update(self, tail: Tail) -> History:
        """Take in what is stored, through ``tail`` at least."""
        pauses = iter(_LAG)
        while True:
            records = await self._log.read(self._session, after=self._reader.offset, deltas=False, limit=_PAGE)
            await self._take(records)
            if len(records) == _PAGE:
                continue
            behind = tail.kind is not None and tail.kind is not Kind.DELTA and self._reader.offset < tail.offset
            if not behind or (pause := next(pauses, None)) is None:
                return self.history
            await anyio.sleep(pause)

    async def follow(self, done: Callable[[], bool]) -> None:
        """Take in records as they are stored, until ``done`` says so."""
        async with self._log.follow(self._session, after=self._reader.offset, deltas=False) as batches:
            async for records in batches:
                await self._take(records)
                if done():
                    return

    async def _take(self, records: Sequence[Record]) -> None:
        for event in await self._reader.take(records):
            self.history.apply(event.offset, event.data, time=event.time)


async def load_history(log: SessionLog, session: str) -> History:
    """Fold a session: its lasting records, and the deltas of the turn in flight behind the last message stored."""
    reader = Reader(log, session, holes=False)
    lasting: list[Event] = []
    while records := await log.read(session, after=reader.offset, deltas=False, limit=_LASTING):
        lasting += await reader.take(records)
        if len(records) < _LASTING:
            break
    last_message = max((e.offset for e in lasting if isinstance(e.data, CARRIERS)), default=0)
    history = History()
    for event in lasting:
        if event.offset <= last_message:
            history.apply(event.offset, event.data, time=event.time)
    async for event in read_to_end(log, session, after=last_message):
        history.apply(event.offset, event.data, time=event.time)
    return history
