"""What senders append: turns, answers and stops, each by compare-and-append."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Literal, NamedTuple, get_args

import anyio
import msgspec
from msgspec import Struct

from agentrun import wire
from agentrun.answers import check_answer
from agentrun.broker import Broker, Kind, Pending, SessionLog, Tail
from agentrun.errors import Conflict, IdTaken, InvalidInput, NoListener, NotWaiting, TurnNotFound, Unavailable
from agentrun.history import History, TurnView
from agentrun.reading import Event, Fold

_PAGE = 1000
_PATIENCE = 5
"""Conflicts after which an append pauses before it tries again."""


class Input(NamedTuple):
    """An input to append. ``agent`` is given for what may need a worker; ``wakes`` if it concerns a parked head."""

    body: bytes
    agent: str | None = None
    wakes: bool = False
    pending: Pending | None = None
    """What is pending once it is stored, where that is not what follows from the rest."""


async def append_input(
    log: SessionLog,
    session: str,
    plan: Callable[[Tail], Awaitable[Input | None]],
    *,
    timeout: float,
    dedupe: str | None = None,
) -> Tail | None:
    """Store what ``plan`` makes of the session's end, however often that moves; None if ``plan`` wants nothing stored.

    An append whose outcome is not known is tried again: ``dedupe``, or a plan that looks whether it is stored, keeps
    it from being stored twice.

    Raises:
        Duplicate: ``dedupe`` was stored before.
        TooLarge: The input is over the broker's limit.
        Unavailable: Not stored, or not known to be, within ``timeout`` seconds.
    """
    end = time.monotonic() + timeout
    tail: Tail | None = None
    sure = False
    tries = 0
    while True:
        try:
            tail = tail or await log.last(session)
            try:
                item = await plan(tail)
            except (TurnNotFound, NotWaiting):
                if sure:
                    raise
                item = None
            if item is None:
                if sure:
                    return None
                # That there is nothing to do holds only if nothing is missing in what was seen of the session.
                tail, sure = await log.last(session, fresh=True), True
                continue
            pending = tail.pending if item.agent is None else tail.pending.add(tail.next, wakes=item.wakes)
            return await log.append(
                session,
                item.body,
                kind=Kind.CANCEL if item.agent is None else Kind.TURN,
                after=tail,
                pending=pending if item.pending is None else item.pending,
                agent=item.agent,
                dedupe=dedupe,
                timeout=max(end - time.monotonic(), 0.01),
            )
        except Conflict as conflict:
            tail, sure = conflict.tail, False
            tries += 1
            pause = 0.0 if tries < _PATIENCE else 0.005
            if time.monotonic() >= end:
                raise Unavailable(
                    f"session {session} moved on {tries} times within {timeout} s, an input could not be stored: "
                    "try again"
                ) from conflict
        except Unavailable:
            tail, sure = None, False
            pause = 0.1
            if time.monotonic() + pause >= end:
                raise
        await anyio.sleep(pause * random.random())  # noqa: S311 - spreads senders, no secret


# ------------------------------------------------------------------------------------------------------------- turns


def deadline_of(deadline: float | datetime | None, now: float) -> float | None:
    """Return a deadline (seconds from now, or a time) in seconds since the epoch.

    Raises:
        InvalidInput: It has passed, or is a time without a timezone.
    """
    if deadline is None:
        return None
    if isinstance(deadline, datetime):
        if deadline.tzinfo is None:
            raise InvalidInput(f"a deadline needs a timezone: {deadline!r}")
        at = deadline.timestamp()
    else:
        at = now + deadline
    if not at > now:
        raise InvalidInput(f"the deadline has passed: {deadline!r}")
    return at


def encode_input(event: wire.InputEvent) -> bytes:
    """Return the event's JSON, after making sure that a worker can read it.

    Raises:
        InvalidInput: A field is of the wrong type, or cannot be JSON.
    """
    body = wire.encode(event)
    try:
        wire.decode(body)
    except InvalidInput as error:
        raise InvalidInput(f"this {event.type} cannot be sent: {error}") from error
    return body


def check_on_busy(policy: str) -> None:
    """Raise InvalidInput if this is no policy for a busy session."""
    if policy not in get_args(wire.OnBusy):
        raise InvalidInput(f"on_busy is one of {', '.join(get_args(wire.OnBusy))}; not {policy!r}")


async def check_same(log: SessionLog, session: str, offset: int, request: wire.TurnRequested) -> None:
    """Raise IdTaken if the turn stored at ``offset`` is not the one a sender says it sends again."""
    for record in await log.read(session, after=offset - 1, deltas=False, limit=1):
        if record.offset != offset:
            return
        stored = wire.decode(record.body)
        sent = wire.decode(encode_input(request))
        assert isinstance(sent, wire.TurnRequested)
        if not isinstance(stored, wire.TurnRequested) or (stored.agent, stored.input) != (sent.agent, sent.input):
            raise IdTaken(
                f"turn {request.turn} was sent before, at offset {offset}, with another agent or input: "
                "an id names one request, use a new one"
            )


async def sent_before(log: SessionLog, session: str, turn: str, *, after: int) -> int | None:
    """Return the offset of the turn's request if it stands behind ``after``. Reads all that lasts from there on."""
    while records := await log.read(session, after=after, deltas=False, limit=_PAGE):
        for record in records:
            if record.kind is Kind.TURN and turn.encode() in record.body:
                event = Event(record.offset, record.body).data
                if isinstance(event, wire.TurnRequested) and event.turn == turn:
                    return record.offset
        if len(records) < _PAGE:
            return None
        after = records[-1].offset
    return None


# ----------------------------------------------------------------------------------------------------------- answers


async def answer(log: SessionLog, session: str, answer: wire.TurnAnswer, *, timeout: float) -> int:
    """Store the first answer to a question and return its offset; see ``Turn.answer``."""
    fold = Fold(log, session)
    body = encode_input(answer)
    known = 0

    async def plan(tail: Tail) -> Input | None:
        nonlocal known
        view = (await fold.update(tail)).turns.get(answer.turn)
        if view is None:
            raise TurnNotFound(f"session {session} has no turn {answer.turn}")
        question = view.questions.get(answer.request)
        if question is None:
            asked = ", ".join(view.questions) or "none"
            raise NotWaiting(f"turn {answer.turn} has no question {answer.request} (its questions: {asked})")
        if question.answer is not None:
            first = question.answer
            if (first.user, msgspec.json.encode(first.value)) != (answer.user, msgspec.json.encode(answer.value)):
                raise NotWaiting(f"question {answer.request} was answered by {first.user or 'someone else'} first")
            known = question.answer_offset or 0
            return None
        if view.ended:
            raise NotWaiting(f"turn {answer.turn} has ended ({view.state}), it waits for no answer")
        check_answer(question.event, answer.value)
        return Input(body, view.agent, wakes=True)

    stored = await append_input(log, session, plan, timeout=timeout)
    return known if stored is None else stored.offset


# ------------------------------------------------------------------------------------------------------------- stops

Status = Literal["cancelled", "already_ended", "not_found", "pending"]


class Receipt(Struct, frozen=True):
    """What became of a stop.

    Attributes:
        status: ``cancelled``: it was stopped, and nothing more will come of it. ``already_ended``: it had ended, or
            ended by itself while it was being stopped. ``not_found``: there is no such turn. ``pending``: the stop is
            stored and will be obeyed, but has not been yet.
        offset: Of the record that ended the turn; of the stop itself while that is pending; 0 if there is neither.
        took: Seconds until the outcome was known.
    """

    status: Status
    offset: int
    took: float


class Stopping:
    """One stop, from the request to the receipt: live first, stored where nobody answers.

    Args:
        broker: The broker.
        session: The session's id.
        event: The stop.
        live: Seconds to wait for a running worker's answer.
        wait: Seconds after which the stop is reported as pending.
    """

    def __init__(self, broker: Broker, session: str, event: wire.TurnCancel, *, live: float, wait: float) -> None:
        self._broker = broker
        self._session = session
        self._event = event
        self._body = encode_input(event)
        self._live = live
        self._wait = wait
        self._fold = Fold(broker.log, session)
        self._began = time.monotonic()
        self._heard = False
        """Whether somebody got the live request without answering in time: the stop may have been obeyed."""
        self._targets: dict[str, TurnView] = {}

    async def run(self) -> Receipt:
        """Stop, and say what became of it.

        Raises:
            Unavailable: The broker is away: the stop was not stored.
        """
        reply = await self._ask()
        if reply is not None and not self._event.all:
            return self._receipt(reply.receipt, reply.offset)
        stop = await append_input(self._broker.log, self._session, self._plan, timeout=max(self._left(), 1.0))
        with anyio.move_on_after(self._left()):
            if not self._over():
                await self._fold.follow(self._over)
        return self._verdict(reply, self._fold.history, 0 if stop is None else stop.offset)

    async def _ask(self) -> wire.CancelReply | None:
        try:
            reply = await self._broker.signals.request(f"s.{self._session}", self._body, timeout=self._live)
            return msgspec.json.decode(reply, type=wire.CancelReply)
        except NoListener:
            return None
        except (Unavailable, msgspec.MsgspecError):
            self._heard = True
            return None

    async def _plan(self, tail: Tail) -> Input | None:
        history = await self._fold.update(tail)
        found = history.turns.values() if self._event.all else (history.turns.get(self._event.turn or ""),)
        running = [view for view in found if view is not None and not view.ended]
        self._targets.update({view.id: view for view in running})
        if not running:
            return None
        # Nobody owns a session whose head is parked: the stop must wake a worker, whichever turn it is for.
        agent = _agent_of_parked(history, tail.pending) if tail.pending.parked else None
        woken = agent is None or any(entry.flag == "w" for entry in tail.pending)
        if woken and all(view.stop is not None for view in running):
            return None
        return Input(self._body, agent, wakes=True)

    def _over(self) -> bool:
        return all(view.ended for view in self._targets.values())

    def _verdict(self, reply: wire.CancelReply | None, history: History, stored_at: int) -> Receipt:
        if not self._over():
            return self._receipt("pending", stored_at)
        stopped = [view for view in self._targets.values() if view.state == "cancelled"]
        if stopped:
            return self._receipt("cancelled", max(view.ended_at or 0 for view in stopped))
        if reply is not None:
            return self._receipt(reply.receipt, reply.offset)
        view = history.turns.get(self._event.turn or "")
        if view is None:
            ended = self._event.all and bool(history.turns)
            return self._receipt("already_ended" if ended else "not_found", 0)
        obeyed = self._heard and (view.state, view.by, view.reason) == (
            "cancelled",
            self._event.by,
            self._event.reason,
        )
        return self._receipt("cancelled" if obeyed else "already_ended", view.ended_at or 0)

    def _left(self) -> float:
        return self._began + self._wait - time.monotonic()

    def _receipt(self, status: Status, offset: int) -> Receipt:
        return Receipt(status, offset, time.monotonic() - self._began)


def _agent_of_parked(history: History, pending: Pending) -> str | None:
    head = pending[0].offset
    view = history.at(head) or history.answered_by(head)
    return view.agent or None if view is not None else None
