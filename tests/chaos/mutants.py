"""Breaks one promise in the process that calls `break_promise`, to prove that a run finds it out.

``fence``   appends of an owner ignore the compare-and-set
``order``   an early input is taken for a ready one
``join``    a follower does not notice that live records are missing, nor that its connection was
``cancel``  a worker looks for no stored stop, neither when it leases nor while it runs
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from agentrun.broker import Entry, Kind, Pending, Tail
from agentrun.brokers.nats_follow import Follower
from agentrun.brokers.nats_hold import Delivery, Holder
from agentrun.brokers.nats_layout import EXPECTED, EXPECTED_SUBJECT, Stored
from agentrun.brokers.nats_log import NatsLog
from agentrun.history import History, TurnView

_COMPARED = re.compile(rf"({EXPECTED}|{EXPECTED_SUBJECT}): [^\r]*\r\n".encode())


def _fence() -> None:
    prepare = NatsLog._prepare

    def prepare_blindly(self: NatsLog, session: str, body: bytes, kind: Kind, *more: Any) -> Any:
        call = prepare(self, session, body, kind, *more)
        return call if kind.input else call._replace(block=_COMPARED.sub(b"", call.block))

    NatsLog._prepare = prepare_blindly


def _order() -> None:
    def verdict(self: Holder, delivery: Delivery, tail: Tail) -> str:
        return "ready" if delivery.record.offset in tail.pending else "settled"

    def claim(self: Pending, offset: int) -> Pending:
        return Pending((Entry(offset, "a"), *(e for e in self if e.offset != offset)))

    Holder._verdict = verdict
    Pending.ready = lambda self, offset: offset in self
    Pending.claim = claim


def _join() -> None:
    async def look(self: Follower) -> None:
        pass

    def is_next(self: Follower, stored: Stored, after: int) -> bool:
        return stored.offset > after

    Follower._is_next = is_next
    Follower._look = look
    Follower._reread = lambda self: None


def _cancel() -> None:
    def stopped(self: History, offset: int, event: Any) -> TurnView | None:
        return self.turns.get(event.turn or "")

    History._stopped = stopped


MUTANTS: dict[str, Callable[[], None]] = {"fence": _fence, "order": _order, "join": _join, "cancel": _cancel}


def break_promise(name: str) -> None:
    """Break it in this process, for good."""
    MUTANTS[name]()
