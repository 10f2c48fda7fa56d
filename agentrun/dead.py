"""Turns that gave up: on a list of their own, so that they are found without reading the sessions they are in.

The reserved session ``agentrun--dead`` of the namespace is that list. A worker appends to it *before* it appends the
turn's own end: if it dies in between, the list has an entry too many, which whoever reads it sees by looking at the
turn's session. Entries are settled by further records. All records are of kind CANCEL, so that no worker is given one.
Their pending list has the offset of the first record that may still hold an open entry: a reader begins there, whatever
was settled before. When much was settled behind it, the open entries are copied to the end and reading begins at the
copies; the pending list then also has the last copy's offset.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b
from itertools import islice
from typing import Literal, NamedTuple

import anyio
import msgspec
from msgspec import Struct

from agentrun import wire
from agentrun.broker import Entry, Kind, Pending, Record, SessionLog, Tail
from agentrun.errors import AgentrunError, BrokerError, Conflict, InvalidInput, Unavailable
from agentrun.history import History, TurnView
from agentrun.inputs import Input, append_input
from agentrun.reading import Reader

__all__ = ["SESSION", "DeadLetters", "DeadTurn", "entry_of", "find", "send_again", "settle"]

SESSION = "agentrun--dead"

PATIENCE = 2.0
"""Seconds the end of a turn waits for its entry to be stored."""
LONGEST = 1000
"""Records behind the last copies of open entries from which on they are copied again (of many, one for each entry)."""
CERTAIN = 600.0
"""Seconds after which an entry whose turn is not to be found is taken off: no replica lags that long."""

_PAGE = 1000
_BATCH = 100
"""Entries in a record: 40 kB as a rule, and never 400."""
_AT_ONCE = 20
"""Sessions that are looked at side by side."""
_MOST = 20_000
"""Entries a worker keeps while they cannot be stored."""
_LONGEST_MESSAGE = 500
_LONGEST_ID = 128
_TRIES = 5
_APPEND = 10.0

log = logging.getLogger("agentrun.dead")


class DeadTurn(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A turn that gave up, and why.

    Attributes:
        session: Its session.
        turn: Its id. Of an input that is no turn, and was rejected as that, ``@`` and its offset.
        agent: Whom it was for.
        offset: Where its request stands in the session; 0 where that was trimmed.
        code: As its `TurnFailed` or `InputRejected` has it.
        message: Why, cut to 500 characters.
        attempts: How many were charged.
        time: When it gave up, in seconds since the epoch by its worker's clock.
        after: The session's end before the turn's own.
    """

    session: str
    turn: str
    agent: str = ""
    offset: int = 0
    code: str = ""
    message: str = ""
    attempts: int = 0
    time: float = 0.0
    after: int = 0

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from all others."""
        return self.session, self.turn


class _Record(Struct, tag_field="type", tag="dead", omit_defaults=True):
    # What it settles comes before what it adds.
    settled: list[tuple[str, str]] = []
    turns: list[DeadTurn] = []


_decoder = msgspec.json.Decoder(_Record)


def entry_of(
    session: str, event: wire.OutputEvent, *, view: TurnView | None, record: Record, after: int
) -> DeadTurn | None:
    """Return the entry for what a worker is about to append instead of running a turn; None if it belongs on no list.

    Args:
        session: The session's id.
        event: What ends a turn, or rejects an input.
        view: The turn, if the event is about one.
        record: The leased input.
        after: The session's end, as an offset.
    """
    match event:
        case wire.TurnFailed(turn=turn, turn_offset=offset, error=error):
            pass
        case wire.InputRejected(offset=offset, code="not_an_input" as code, reason=reason):
            turn, error = f"@{offset}", wire.ErrorInfo(code, reason)
        case _:
            return None
    return DeadTurn(
        session=session,
        turn=turn,
        agent=(view.agent if view is not None else "") or record.agent or "",
        offset=offset,
        code=error.code,
        message=error.message[:_LONGEST_MESSAGE],
        attempts=0 if view is None else view.charged,
        time=time.time(),
        after=after,
    )


# ------------------------------------------------------------------------------------------------------ writing it


class _Letter(NamedTuple):
    dead: DeadTurn
    stored: anyio.Event


class DeadLetters:
    """A worker's way to the list: whatever waits goes into the next record, so that few appends meet there.

    Args:
        log: The broker's log.
    """

    def __init__(self, log: SessionLog) -> None:
        self._log = log
        self._waiting: deque[_Letter] = deque()
        self._bell = anyio.Event()

    async def report(self, dead: DeadTurn) -> None:
        """Put a turn on the list; return once it is there, but after `PATIENCE` seconds at the latest.

        What took longer is logged, and tried on while `run` runs.
        """
        if len(self._waiting) >= _MOST:
            log.error("%s: %d wait before it", _missing(dead), _MOST)
            return
        letter = _Letter(dead, anyio.Event())
        self._waiting.append(letter)
        self._bell.set()
        with anyio.move_on_after(PATIENCE):
            await letter.stored.wait()
            return
        log.warning(
            "turn %s of session %s gave up, and is not on the list of dead turns after %g s: it ends without waiting "
            "longer, and the list is tried on",
            dead.turn,
            dead.session,
            PATIENCE,
        )

    async def run(self) -> None:
        """Store what is reported, for ever."""
        try:
            while True:
                while not self._waiting:
                    self._bell = anyio.Event()
                    await self._bell.wait()
                await self._store()
        finally:
            for letter in self._waiting:
                log.error("%s: the worker ends", _missing(letter.dead))

    async def _store(self) -> None:
        count, body = next(_records([letter.dead for letter in islice(self._waiting, _BATCH)]))
        try:
            await _append(self._log, body)
        except Unavailable as error:
            log.debug("dead turns cannot be stored now: %s", error)
            await anyio.sleep(0.25 + random.random())  # noqa: S311 - spreads workers, no secret
            return
        except AgentrunError as error:
            for letter in islice(self._waiting, count):
                log.error("%s: %s", _missing(letter.dead), error)
        for _ in range(count):
            self._waiting.popleft().stored.set()


def _missing(dead: DeadTurn) -> str:
    return f"turn {dead.turn} of session {dead.session} gave up, and is missing from the list of dead turns"


def _records(turns: Sequence[DeadTurn]) -> Iterator[tuple[int, bytes]]:
    """Cut entries into records, each with how many it holds."""
    for begin in range(0, len(turns), _BATCH):
        part = list(turns[begin : begin + _BATCH])
        yield len(part), msgspec.json.encode(_Record(turns=part))


async def _append(log: SessionLog, body: bytes, timeout: float = _APPEND) -> Tail:
    async def plan(tail: Tail) -> Input:
        return Input(body, pending=tail.pending or Pending().add(tail.next))

    tail = await append_input(log, SESSION, plan, timeout=timeout)
    assert tail is not None
    return tail


# ------------------------------------------------------------------------------------------------------ reading it


async def find(
    log: SessionLog, *, session: str | None = None, turn: str | None = None, agent: str | None = None
) -> AsyncGenerator[DeadTurn]:
    """The turns that gave up and were not settled, the oldest first. Each costs a look into its session."""
    opened = await _read(log, await log.last(SESSION))
    gone: list[tuple[str, str]] = []
    asked = [
        dead
        for dead in sorted(opened.values(), key=lambda dead: dead.time)
        if (session is None or dead.session == session)
        and (turn is None or dead.turn == turn)
        and (agent is None or dead.agent == agent)
    ]
    for begin in range(0, len(asked), _AT_ONCE):
        for dead, state in await _judge(log, asked[begin : begin + _AT_ONCE]):
            if state == "dead":
                yield dead
            elif state == "gone" and dead.time < time.time() - CERTAIN:
                gone.append(dead.key)
    if gone:
        # Else they would be looked up again each time. Who may only read leaves them.
        with suppress(BrokerError):
            await settle(log, gone, timeout=PATIENCE)


async def count(log: SessionLog) -> int:
    """Return how many turns are on the list, without a look into their sessions.

    So it counts turns as well that `find` will leave out: those that were replaced, or deleted with their session,
    since it was last asked.

    Raises:
        Unavailable: The broker does not answer.
    """
    return len(await _read(log, await log.last(SESSION)))


async def _read(log: SessionLog, tail: Tail) -> dict[tuple[str, str], DeadTurn]:
    """The open entries up to ``tail``."""
    opened: dict[tuple[str, str], DeadTurn] = {}
    after = tail.pending[0].offset - 1 if tail.pending else tail.offset
    while after < tail.offset:
        records = await log.read(SESSION, after=after, deltas=False, limit=_PAGE)
        for record in records:
            if record.offset <= tail.offset:
                _take(record, opened)
        if not records:
            break
        after = records[-1].offset
    return opened


def _take(record: Record, opened: dict[tuple[str, str], DeadTurn]) -> None:
    try:
        found = _decoder.decode(record.body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        log.warning("offset %d of session %s is not about dead turns", record.offset, SESSION)
        return
    for key in found.settled:
        opened.pop(key, None)
    for dead in found.turns:
        opened.setdefault(dead.key, dead)


State = Literal["dead", "open", "gone"]
"""``open``: its worker died between the entry and the turn's end, and the turn goes on. ``gone``: nobody waits for it:
it ended in another way after all, was replaced since, or its session was deleted."""


class _Since(NamedTuple):
    """What a session holds from a dead turn's request on."""

    history: History
    rejected: bool
    begins: int
    """The offset of the first record there; 0 if there is none."""


async def _judge(log: SessionLog, turns: Sequence[DeadTurn]) -> list[tuple[DeadTurn, State]]:
    states: dict[tuple[str, str], State] = {}
    failures: list[AgentrunError] = []

    async def look(dead: DeadTurn) -> None:
        try:
            states[dead.key] = _state(dead, await _since(log, dead))
        except AgentrunError as error:  # raised below, not wrapped in a group
            failures.append(error)
            group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for dead in turns:
            group.start_soon(look, dead)
    if failures:
        raise failures[0]
    return [(dead, states[dead.key]) for dead in turns]


async def _since(log: SessionLog, dead: DeadTurn) -> _Since:
    reader = Reader(log, dead.session, after=dead.offset - 1 if dead.offset else dead.after, holes=False)
    history, rejected, begins = History(), False, 0
    while records := await log.read(dead.session, after=reader.offset, deltas=False, limit=_PAGE):
        begins = begins or records[0].offset
        for event in await reader.take(records):
            history.apply(event.offset, event.data, time=event.time)
            rejected = rejected or (isinstance(event.data, wire.InputRejected) and event.data.offset == dead.offset)
        if len(records) < _PAGE:
            break
    return _Since(history, rejected, begins)


def _state(dead: DeadTurn, since: _Since) -> State:
    view = since.history.turns.get(dead.turn)
    if view is None:
        if since.rejected and dead.turn.startswith("@"):
            return "dead"
        return "open" if dead.offset and since.begins == dead.offset else "gone"
    if not view.ended:
        return "open"
    return "dead" if view.state == "failed" and _replaced(view, since.history) is None else "gone"


def _replaced(view: TurnView, history: History) -> str | None:
    """Who was sent in the turn's place, if that is not the retry of a dead turn before it."""
    by = history.turns.get(view.replaced_by or "")
    if by is None or by.request is None or by.request.replaces is None:
        return view.replaced_by
    retried = by.request.replaces
    return None if retried != view.id and by.id == _id_of_retry(retried) else by.id


# ----------------------------------------------------------------------------------------------------- settling it


async def settle(log: SessionLog, keys: Iterable[tuple[str, str]], *, timeout: float) -> None:
    """Take turns, by session and id, off the list. Those that are not on it are left alone.

    Raises:
        Unavailable: Not stored, or not known to be, within ``timeout`` seconds. Trying again is safe.
    """
    left = list(keys)
    while left:
        body = msgspec.json.encode(_Record(settled=left[:_BATCH]))
        left = left[_BATCH:]
        tail = await _append(log, body, timeout)
        first, last = tail.pending[0].offset, tail.pending[-1].offset
        if tail.offset - last > max(LONGEST, (last - first) * _BATCH):
            await _move(log)


async def _move(log: SessionLog) -> None:
    """Copy the open entries to the end of the list, and have it read from there on."""
    for _ in range(_TRIES):
        tail = await log.last(SESSION)
        opened = await _read(log, tail)
        bodies = list(_records(list(opened.values()))) or [(0, msgspec.json.encode(_Record()))]
        first, before = tail.next, tail.pending
        try:
            # Nothing may come in between: what another settles now must not be opened again by its copy.
            for index, (_, body) in enumerate(bodies, 1):
                pending = before
                if index == len(bodies):
                    pending = Pending(Entry(offset) for offset in sorted({first, tail.next}) if opened)
                tail = await log.append(SESSION, body, kind=Kind.CANCEL, after=tail, pending=pending)
        except Conflict:
            continue
        return


# ----------------------------------------------------------------------------------------------------- sending again


class Again(NamedTuple):
    """The request that is sent for a dead turn; ``offset`` is where it stands if it was sent before."""

    request: wire.TurnRequested
    offset: int | None


async def send_again(log: SessionLog, dead: DeadTurn) -> Again:
    """Return what to send for a dead turn.

    It takes the place of the dead turn in the conversation, unless the conversation has gone on since: what was said
    after it is not to be lost.

    Raises:
        InvalidInput: It cannot be sent again, or need not.
    """
    what = f"turn {dead.turn} of session {dead.session}"
    if dead.turn.startswith("@"):
        raise InvalidInput(f"the input at offset {dead.offset} of session {dead.session} is no turn: it can be dropped")
    since = await _since(log, dead)
    turns = since.history.turns
    view = turns.get(dead.turn)
    id = _id_of_retry(dead.turn)
    sent = turns.get(id)
    if sent is not None and sent.request is not None:
        return Again(sent.request, sent.offset)
    if view is None or view.request is None:
        raise InvalidInput(f"the request of {what} is no longer in the log: it can be dropped")
    if (state := _state(dead, since)) != "dead":
        by = _replaced(view, since.history)
        why = f"was replaced by turn {by}" if by is not None else f"is {view.state}"
        raise InvalidInput(f"{what} {why}: it {'goes on' if state == 'open' else 'can be dropped'}")
    request = msgspec.structs.replace(
        view.request,
        turn=id,
        on_busy="enqueue",
        deadline=None,
        replaces=view.id if view.replaced_by is None and not _went_on(view, turns.values()) else None,
    )
    return Again(request, None)


def _went_on(dead: TurnView, turns: Iterable[TurnView]) -> bool:
    """Whether something was said after it that is to stay: by a turn that did not give up as well."""
    codes = ("max_attempts", "agent_error", "retry", "request_lost")
    return any(
        view.offset > dead.offset
        and view.replaced_by is None
        and not (view.state == "rejected" or (view.error is not None and view.ended and view.error.code in codes))
        for view in turns
    )


def _id_of_retry(turn: str) -> str:
    match = re.fullmatch(r"(.*)-retry(\d+)", turn)
    base, number = (match[1], int(match[2]) + 1) if match else (turn, 1)
    id = f"{base}-retry{number}"
    if len(id) <= _LONGEST_ID:
        return id
    return f"{base[:90]}-{blake2b(base.encode(), digest_size=8).hexdigest()}-retry{number}"
