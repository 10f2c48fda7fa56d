"""Moving sessions from one broker to another: as lines of JSON, with their offsets, holes and pending turns (D29).

::

    async for line in export_session(source, "s-42"):
        file.write(line)

    async for moved in import_sessions(target, lines):
        print(moved.session, moved.records)

A session is a header line and a line for each record. Importing stores every record at its own offset, so that a reader
goes on from the offset it has. Turns that wait, or are suspended, go on at the target once all of their session is
there; until then an entry that no input stands for is the head of the session's pending list, and nothing is leased.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable

import msgspec
from msgspec import Struct, structs

from agentrun import dead, wire
from agentrun.broker import Broker, BrokerAdmin, Entry, Kind, Pending, Record, SessionLog, Tail
from agentrun.errors import (
    Conflict,
    Duplicate,
    InvalidInput,
    Misconfigured,
    SessionBusy,
    SessionExists,
    SessionGone,
)
from agentrun.reading import Fold
from agentrun.wire import check_id

__all__ = ["RESERVED", "Moved", "all_sessions", "export_session", "import_sessions"]

RESERVED = ("agentrun--revoked", dead.SESSION)
"""Sessions in which agentrun keeps what is no conversation: tokens that were revoked, turns that gave up."""

_VERSION = 1
_PAGE = 100
"""Records read at a time; a record may have a megabyte."""
_ALL = 1 << 40
_HELD = Entry(0)
"""The head while a session is being imported: there is no input at offset 0, so no input is ready."""


class _Header(Struct, frozen=True, kw_only=True, tag_field="line", tag="session", omit_defaults=True):
    """What a session's lines begin with."""

    session: str
    end: int
    """The offset of the last record."""
    pending: str = ""
    """What is pending after it."""
    time: float
    """When it was exported, by the clock of the broker it came from, in seconds since the epoch."""
    broker: str = ""
    version: int = _VERSION


class _Line(Struct, frozen=True, kw_only=True, tag_field="line", tag="record", omit_defaults=True):
    """A record. Its body is text if it is UTF-8, and else base64."""

    offset: int
    kind: Kind
    time: float = 0.0
    pending: str = ""
    agent: str | None = None
    body: str | None = None
    base64: bytes | None = None

    @property
    def data(self) -> bytes:
        return self.base64 or b"" if self.body is None else self.body.encode()


_decoder = msgspec.json.Decoder(_Header | _Line)
_encode = msgspec.json.Encoder().encode


class Moved(Struct, frozen=True):
    """What became of one session of an import.

    Attributes:
        session: Its id.
        records: How many records were stored now.
        known: How many records of the export were there before.
        refused: Why it was left as it was, if it was.
    """

    session: str
    records: int
    known: int
    refused: SessionExists | None = None


# ------------------------------------------------------------------------------------------------------------ export


async def all_sessions(broker: Broker) -> list[str]:
    """Return the names of the sessions that hold an input, and of the reserved ones that hold anything.

    Raises:
        Misconfigured: The broker cannot list its sessions.
        Unavailable: It does not answer.
    """
    if not isinstance(broker, BrokerAdmin):
        raise Misconfigured("this broker cannot list its sessions: name them")
    names = await broker.sessions(limit=_ALL)
    reserved = [name for name in RESERVED if (await broker.log.last(name, fresh=True)).offset]
    return [*reserved, *sorted(set(names).difference(reserved))]


async def export_session(broker: Broker, session: str, *, force: bool = False) -> AsyncGenerator[bytes]:
    """The session as it is now, as lines of JSON, each with its newline.

    Args:
        broker: Where it is.
        session: Its id.
        force: Take a session also from a worker that runs it. Its turn is then handed over first, as from a dead
            worker: ``turn.lost`` is stored, by which a worker that lives is fenced off.

    Raises:
        SessionBusy: Before the first line: a worker runs a turn of it, or its own import has not ended.
        SessionGone: It has no records. Behind the first line: it was deleted meanwhile, and the lines are of no use.
        Unavailable: The broker does not answer.
    """
    log = broker.log
    tail = await log.last(check_id("a session's id", session), fresh=True)
    if tail.offset == 0:
        raise SessionGone(f"session {session} has no records")
    if tail.pending.head == _HELD:
        raise SessionBusy(f"session {session} is only half imported: import all of it first")
    if tail.pending.running:
        if not force:
            raise SessionBusy(
                f"a worker runs a turn of session {session}: let it end, or drain the workers (SIGTERM); "
                "if none is left, --force takes the turn from the one that died"
            )
        tail = await _hand_over(log, session, tail)
    yield _line(
        _Header(
            session=session,
            end=tail.offset,
            pending=str(tail.pending),
            time=broker.now(),
            broker=broker.capabilities.name,
        )
    )
    after = cursor = 0
    while after < tail.offset and (records := await log.read(session, after=after, limit=_PAGE)):
        after = records[-1].offset
        for record in records:
            if record.offset <= tail.offset:
                yield _line(_line_of(record))
                cursor = record.cursor
    if cursor != tail.cursor:
        raise SessionGone(f"session {session} was deleted or trimmed while it was exported: export again")


def _line(item: _Header | _Line) -> bytes:
    return _encode(item) + b"\n"


def _line_of(record: Record) -> _Line:
    try:
        body, base64 = record.body.decode(), None
    except UnicodeDecodeError:
        body, base64 = None, record.body
    return _Line(
        offset=record.offset,
        kind=record.kind,
        time=record.time,
        pending=str(record.pending),
        agent=record.agent,
        body=body,
        base64=base64,
    )


async def _hand_over(log: SessionLog, session: str, tail: Tail) -> Tail:
    """Release the running head, as peers do for a worker that is dead; also the last offsets it was given show then."""
    history = await Fold(log, session).update(tail)
    head = tail.pending[0].offset
    view = history.at(head) or history.answered_by(head)
    if view is None:
        raise SessionBusy(f"session {session} is being run, and its log does not say which turn: let it end")
    lost = wire.TurnLost(turn=view.id, attempt=view.attempt, worker=view.worker or "", by="export")
    try:
        return await log.append(session, wire.encode(lost), kind=Kind.EVENT, after=tail, pending=tail.pending.release())
    except Conflict:
        raise SessionBusy(f"session {session} is being written to by a worker that lives: drain it (SIGTERM)") from None


# ------------------------------------------------------------------------------------------------------------ import


async def import_sessions(broker: Broker, lines: AsyncIterable[bytes]) -> AsyncGenerator[Moved]:
    """Store what `export_session` gave, and yield each session as it is done.

    Done again, after a crash in the middle or with a later export of the same session, it stores what is missing. A
    session that has other records under that name is left as it is, and yielded with the reason. No memory is kept of
    what was stored, however much that is.

    Args:
        broker: Where to. It must be set up, and nobody else may write to these sessions meanwhile.
        lines: The lines of one session after the other.

    Raises:
        InvalidInput: A line is not what is expected there; the message has its number. What stands before it is stored.
        Unavailable: The broker does not answer. Importing all of it again is right.
    """
    number = 0
    current: _Import | None = None
    async for raw in lines:
        number += 1
        if not raw.strip():
            continue
        item = _parse(number, raw)
        if isinstance(item, _Header):
            if current is not None and not current.done:
                raise InvalidInput(f"line {number}: {current.missing}")
            current = await _Import.begin(broker, item)
        elif current is None or (current.done and not current.refused):
            raise InvalidInput(f"line {number}: a session's header is expected here, not a record")
        else:
            if await current.take(number, item):
                yield current.outcome
    if current is not None and not current.done:
        raise InvalidInput(f"line {number + 1}: {current.missing}")


def _parse(number: int, raw: bytes) -> _Header | _Line:
    try:
        item = _decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidInput(
            f"line {number}: a session's header or a record is expected, as `agentrun export` writes them: {error}"
        ) from error
    try:
        Pending.parse(item.pending)
        if isinstance(item, _Header):
            check_id("a session's id", item.session)
    except InvalidInput as error:
        raise InvalidInput(f"line {number}: {error}") from error
    if isinstance(item, _Header):
        if item.version != _VERSION:
            raise InvalidInput(f"line {number}: version {item.version} of an export; this agentrun reads {_VERSION}")
        if item.end < 1:
            raise InvalidInput(f"line {number}: a session's end is an offset from 1 on, not {item.end}")
    elif (item.body is None) == (item.base64 is None):
        raise InvalidInput(f"line {number}: a record has either a body or base64")
    return item


class _Import:
    """One session on its way in."""

    def __init__(self, broker: Broker, header: _Header, tail: Tail) -> None:
        self._log = broker.log
        self._max_body = broker.capabilities.max_body
        self._header = header
        self._tail = tail
        self._there = _There(broker.log, header.session) if tail.offset else None
        """What to compare with, until the first record that is not there."""
        self._offset = 0
        self._stored = 0
        self._known = 0
        self.refused: SessionExists | None = None

    @classmethod
    async def begin(cls, broker: Broker, header: _Header) -> _Import:
        """Look what is there of the session."""
        return cls(broker, header, await broker.log.last(header.session, fresh=True))

    @property
    def done(self) -> bool:
        """Whether nothing more is to come of it."""
        return self.refused is not None or self._offset == self._header.end

    @property
    def outcome(self) -> Moved:
        """What became of it."""
        return Moved(self._header.session, self._stored, self._known, self.refused)

    @property
    def missing(self) -> str:
        """What is said where its lines end too early."""
        return (
            f"session {self._header.session} ends at offset {self._header.end}, and its lines at {self._offset}: "
            "the export was cut off. Import all of it to go on"
        )

    async def take(self, number: int, line: _Line) -> bool:
        """Store the record, or see that it is there; whether this is the session's last line that matters."""
        if self.refused is not None:
            return False
        self._check(number, line)
        try:
            if not await self._is_there(line):
                await self._store(line)
            elif line.offset == self._header.end and self._tail.pending.head == _HELD:
                raise SessionExists(
                    f"a later export of session {self._header.session} is half imported here: import that one"
                )
        except SessionExists as error:
            self.refused = error
        self._offset = line.offset
        return self.done

    def _check(self, number: int, line: _Line) -> None:
        if not self._offset < line.offset <= self._header.end:
            raise InvalidInput(
                f"line {number}: offsets grow from line to line up to {self._header.end}, the header's end; "
                f"{line.offset} stands behind {self._offset}"
            )
        if (line.kind is Kind.TURN) != (line.agent is not None):
            raise InvalidInput(f"line {number}: a record {Kind.TURN} has an agent, and no other has one")
        if (size := len(line.data)) > self._max_body:
            raise InvalidInput(f"line {number}: the record has {size} bytes, this broker takes {self._max_body}")

    async def _is_there(self, line: _Line) -> bool:
        if self._there is None:
            return False
        between, record = await self._there.upto(line.offset)
        # What is missing in the export was trimmed at its source, if it stands at the beginning; else it never was.
        if between is not None and self._offset:
            raise self._differs(between.offset)
        if record is not None and (record.kind, record.agent, record.body) == (line.kind, line.agent, line.data):
            self._known += 1
            return True
        behind_the_end = line.offset >= self._tail.next
        if record is None and behind_the_end and self._known:
            self._there = None
            return False
        if record is None and not behind_the_end and line.kind is Kind.DELTA:
            return True  # it has expired here
        raise self._differs(line.offset)

    def _differs(self, offset: int) -> SessionExists:
        return SessionExists(
            f"session {self._header.session} is there already, and is another from offset {offset} on: "
            "it was left as it is. Delete it here to import this one, or leave it out"
        )

    async def _store(self, line: _Line) -> None:
        last = line.offset == self._header.end
        pending = Pending.parse(self._header.pending if last else line.pending)
        if not last:
            pending = Pending((_HELD, *pending))
        after = structs.replace(self._tail, lost=line.offset - self._tail.offset - 1)
        for key in (_key_of(line), None):
            try:
                self._tail = await self._log.append(
                    self._header.session,
                    line.data,
                    kind=line.kind,
                    after=after,
                    pending=pending,
                    agent=line.agent,
                    dedupe=key,
                )
            except Conflict as error:
                raise SessionExists(
                    f"session {self._header.session} is written to by somebody else while it is imported: "
                    "see that nobody does, delete it here and import it again"
                ) from error
            except (Duplicate, SessionGone):
                if key is None:
                    raise
                # Its worker rejected it for that, or a session of this name was deleted here not long ago.
            else:
                self._stored += 1
                return


class _There:
    """The records that are there, asked for in the order of their offsets."""

    def __init__(self, log: SessionLog, session: str) -> None:
        self._log = log
        self._session = session
        self._page: deque[Record] = deque()
        self._after = 0
        self._all = False

    async def upto(self, offset: int) -> tuple[Record | None, Record | None]:
        """A record below this offset that has not been passed yet and is no delta, and the one at it."""
        between: Record | None = None
        while True:
            while self._page and self._page[0].offset < offset:
                passed = self._page.popleft()
                between = between if passed.kind is Kind.DELTA else passed
            if self._page or self._all:
                found = bool(self._page) and self._page[0].offset == offset
                return between, self._page.popleft() if found else None
            self._page.extend(await self._log.read(self._session, after=self._after, limit=_PAGE))
            self._all = not self._page
            if self._page:
                self._after = self._page[-1].offset


def _key_of(line: _Line) -> str | None:
    """Under what key the sender had it stored, so that sending it again changes nothing here either."""
    if line.kind is not Kind.TURN:
        return None
    try:
        event = wire.decode(line.data)
        return check_id("a turn's id", event.turn) if isinstance(event, wire.TurnRequested) else None
    except InvalidInput:
        return None
