"""What a worker does with the input it has leased: a pure decision over the session's log."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from msgspec import Struct

from agentrun import wire
from agentrun.broker import Pending, Record
from agentrun.errors import InvalidInput
from agentrun.history import History, TurnView

_CLOCK_SLACK = 0.05
"""Seconds by which the broker's timers may be early against this machine's clock."""


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
    """Return the offsets of the pending inputs that end with the turn: its request, and answers and stops for it."""
    return tuple(e.offset for e in pending if e.offset == turn.offset or history.answered_by(e.offset) is turn)


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
    for turn in history.turns.values():
        if not turn.ended and (turn.stop is not None or turn.interrupted_by is not None):
            yield turn


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
        event = wire.decode(record.body)
    except InvalidInput as error:
        return _reject(record, "undecodable", str(error))
    if (turn := next(stopped(history), None)) is not None:
        return Write(cancelled(turn), settles(turn, pending, history))
    match event:
        case wire.TurnRequested():
            turn = history.at(record.offset)
            if turn is None:
                return _reject(record, "duplicate", f"turn {event.turn} was sent before", event.turn)
        case wire.TurnAnswer():
            turn = history.answered_by(record.offset)
            if turn is None or turn.ended:
                return _reject(record, "not_waiting", f"turn {event.turn} does not wait for this answer", event.turn)
        case wire.TurnCancel():
            return _reject(record, "too_late", "there is nothing to stop", event.turn or "")
        case _:
            return _reject(record, "not_an_input", f"{event.type} is no turn, answer or stop")
    if turn.ended:
        return _reject(record, "already_ended", f"turn {turn.id} has ended", turn.id)
    return _go_on(turn, history, pending, now=now, max_attempts=max_attempts)


def _go_on(turn: TurnView, history: History, pending: Pending, *, now: float, max_attempts: int) -> Action:
    ending = settles(turn, pending, history)
    fields = terminal_fields(turn)
    deadline = turn.request.deadline if turn.request else None
    if deadline is not None and now >= deadline - _CLOCK_SLACK:
        return Write(wire.TurnExpired(**fields, reason="its deadline passed"), ending)
    if turn.state == "suspended" and not any(q.answer and not q.resumed for q in turn.questions.values()):
        until = turn.suspended_until
        if until is None:
            return Drop()
        if now < until - _CLOCK_SLACK:
            return HandBack(until - now)
        return Write(wire.TurnExpired(**fields, reason="nobody answered in time"), ending)
    if turn.state == "retrying" and turn.retry_at is not None and now < turn.retry_at - _CLOCK_SLACK:
        return HandBack(turn.retry_at - now)
    if turn.charged >= max_attempts:
        why = turn.error.message if turn.error is not None else "its workers died"
        error = wire.ErrorInfo("max_attempts", f"gave up after {turn.charged} attempts: {why}")
        return Write(wire.TurnFailed(**fields, error=error), ending)
    return Run(turn)


def _reject(record: Record, code: str, reason: str, turn: str = "") -> Write:
    return Write(wire.InputRejected(turn=turn, offset=record.offset, code=code, reason=reason), (record.offset,))
