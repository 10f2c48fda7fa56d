"""What a worker does with the input it has leased: a pure decision over the session's log."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from msgspec import Struct

from agentrun import wire
from agentrun.answers import check_answer
from agentrun.broker import Kind, Pending, Record
from agentrun.errors import InvalidInput
from agentrun.history import History, TurnView

_CLOCK_SLACK = 0.05
"""Seconds by which the broker's timers may be early against this machine's clock."""


OVERDUE = "its deadline passed"
"""Why a turn expired that had not ended in the time its sender gave it."""


class Drop(Struct, frozen=True):
    """Nothing is left to do: settle the queue message."""


class HandBack(Struct, frozen=True):
    """Not yet: give the input back, to be leased again after ``delay`` seconds."""

    delay: float


class Write(Struct, frozen=True):
    """Append ``event``, settle the inputs at ``settles``, and decide again."""

    event: wire.OutputEvent
    settles: tuple[int, ...]


class Run(Struct, frozen=True):
    """Claim the session and run the agent for ``turn``."""

    turn: TurnView


Action = Drop | HandBack | Write | Run


def settles(turn: TurnView, pending: Pending, history: History) -> tuple[int, ...]:
    """Return the offsets of the pending inputs that end with the turn: its request, and answers and stops for it.

    Not among them are answers of no use: each is refused, with its reason, when it is leased.
    """
    return tuple(
        e.offset
        for e in pending
        if e.offset == turn.offset
        or (history.answered_by(e.offset) is turn and (turn.stop is not None or unfit(history, e.offset) is None))
    )


def terminal_fields(turn: TurnView) -> dict[str, Any]:
    """Return what every terminal event of the turn says."""
    return {
        "turn": turn.id,
        "attempt": turn.attempt,
        "turn_offset": turn.offset,
        "message": turn.message,
        "usage": turn.usage,
    }


def cancelled(turn: TurnView) -> wire.TurnCancelled:
    """Return the terminal event of a turn that a stored stop, or a later interrupt, ends."""
    by, reason, rolled_back = turn.interrupted_by, "interrupt", turn.rollback
    if rolled_back:
        reason = "rollback"
    if turn.stop is not None:
        by, reason, rolled_back = turn.stop.by, turn.stop.reason, False
    return wire.TurnCancelled(**terminal_fields(turn), by=by, reason=reason, rolled_back=rolled_back)


def stopped(history: History) -> Iterator[TurnView]:
    """Return the turns that are to be stopped and have not ended, in the order sent."""
    for turn in history.open:
        if not turn.ended and (turn.stop is not None or turn.interrupted_by is not None):
            yield turn


def input_of(record: Record) -> wire.InputEvent:
    """Return the event of a record that anyone may have appended.

    Raises:
        InvalidInput: It is none, or one that has no place in a record of its kind.
    """
    event = wire.decode(record.body)
    if isinstance(event, wire.TurnCancel) or (
        isinstance(event, wire.InputEvent) and record.kind is Kind.TURN and _addressed(event, record)
    ):
        return event
    raise InvalidInput(f"{event.type} is not what a record {record.kind} to agent {record.agent} may hold")


def _addressed(event: wire.InputEvent, record: Record) -> bool:
    return not isinstance(event, wire.TurnRequested) or event.agent == record.agent


def unfit(history: History, offset: int) -> tuple[str, str] | None:
    """Return why the answer at ``offset`` cannot be used, as a code and a reason; None if it can."""
    turn = history.answered_by(offset)
    if turn is None:
        return "not_waiting", "it answers a turn that this session does not have"
    question = next((q for q in turn.questions.values() if q.answer_offset == offset), None)
    if question is None:
        return "not_waiting", f"it answers a question that turn {turn.id} does not ask, or has its answer to"
    if question.resumed or question.answer is None:
        return None
    try:
        check_answer(question.event, question.answer.value)
    except InvalidInput as error:
        return "invalid_answer", str(error)
    return None


def decide(history: History, pending: Pending, record: Record, *, now: float, max_attempts: int) -> Action:
    """Return the next step of the worker that holds the lease of ``record``.

    Args:
        history: The session, folded to its end.
        pending: The unsettled inputs at its end.
        record: The leased input.
        now: Seconds since the epoch.
        max_attempts: Charged attempts after which a turn has failed.
    """
    if record.offset not in pending:
        return Drop()
    if not pending.ready(record.offset):
        return HandBack(0.0)
    try:
        event = input_of(record)
    except InvalidInput as error:
        return reject(record.offset, "not_an_input", str(error))
    if (turn := next(stopped(history), None)) is not None:
        return Write(cancelled(turn), settles(turn, pending, history))
    if (rejected := next(_useless(history, pending), None)) is not None:
        return rejected
    match event:
        case wire.TurnRequested():
            turn = history.at(record.offset)
            if turn is None:
                return reject(record.offset, "duplicate", f"turn {event.turn} was sent before", event.turn)
        case wire.TurnAnswer():
            turn = history.answered_by(record.offset)
            if turn is None or (turn.request is not None and turn.agent != record.agent):
                return reject(record.offset, "not_waiting", f"agent {record.agent} has no turn {event.turn}")
        case wire.TurnCancel():
            return reject(record.offset, "too_late", "there is nothing to stop", event.turn or "")
    if turn.ended:
        return reject(record.offset, "already_ended", f"turn {turn.id} has ended", turn.id)
    return _go_on(turn, history, pending, record.offset, now=now, max_attempts=max_attempts)


def _useless(history: History, pending: Pending) -> Iterator[Write]:
    """Return the rejections of pending answers that no turn will take."""
    for entry in pending:
        turn = history.answered_by(entry.offset)
        if turn is None or turn.ended or turn.stop is not None:
            continue
        if (fault := unfit(history, entry.offset)) is not None:
            yield reject(entry.offset, *fault, turn.id)


def _others_to_bring_on(turn: TurnView, history: History, pending: Pending, carrier: int) -> bool:
    """Whether a suspended turn that has its answer is brought on by that, and not by this carrier.

    The input that a parked head stands for does not bring it on while its waker waits: its queue message may have been
    settled when the turn was suspended, by a delivery other than this one, and then nothing would bring the turn to
    another worker should this one die.
    """
    woken = any(e.flag == "w" and e.offset != carrier and history.answered_by(e.offset) is turn for e in pending)
    return woken and carrier == pending[0].offset


def _go_on(
    turn: TurnView, history: History, pending: Pending, carrier: int, *, now: float, max_attempts: int
) -> Action:
    ending = settles(turn, pending, history)
    fields = terminal_fields(turn)
    if turn.request is None:
        error = wire.ErrorInfo("request_lost", "its request is no longer in the log")
        # Where it stood is not known either; what it held up is the head.
        return Write(wire.TurnFailed(**fields, error=error), (pending[0].offset, *ending))
    deadline = math.inf if turn.request.deadline is None else turn.request.deadline
    if now >= deadline - _CLOCK_SLACK:
        return Write(wire.TurnExpired(**fields, reason=OVERDUE), ending)
    answered = any(q.answer and not q.resumed for q in turn.questions.values())
    others = _others_to_bring_on(turn, history, pending, carrier)
    if turn.state == "suspended" and (others or not answered):
        until = turn.suspended_until
        if until is None:
            return Drop()
        if now < until - _CLOCK_SLACK:
            return HandBack(until - now)
        if answered:
            return HandBack(1.0)  # should its answer turn out to be of no use, this is what ends it
        return Write(wire.TurnExpired(**fields, reason="nobody answered in time"), ending)
    if turn.state == "retrying" and turn.retry_at is not None and now < turn.retry_at - _CLOCK_SLACK:
        return HandBack(min(turn.retry_at, deadline) - now)
    if turn.charged >= max_attempts:
        why = turn.error.message if turn.error is not None else "its workers died"
        error = wire.ErrorInfo("max_attempts", f"gave up after {turn.charged} attempts: {why}")
        return Write(wire.TurnFailed(**fields, error=error), ending)
    return Run(turn)


def reject(offset: int, code: str, reason: str, turn: str = "") -> Write:
    """Return the step that refuses the input at ``offset``."""
    return Write(wire.InputRejected(turn=turn, offset=offset, code=code, reason=reason), (offset,))
