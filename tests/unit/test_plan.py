"""The decision over a leased input, case by case: no broker, no clock, no agent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from agentrun import wire
from agentrun.broker import Kind, Pending, Record
from agentrun.history import History
from agentrun.plan import Action, Drop, HandBack, Run, Write, decide, input_of, settles

NOW = 1000.0


class Session:
    """A session's records, folded as they are added."""

    def __init__(self) -> None:
        self.history = History()
        self.records: dict[int, Record] = {}
        self.pending = Pending()
        self.next = 1

    def input(self, event: wire.InputEvent | bytes, *, kind: Kind = Kind.TURN, agent: str = "a") -> int:
        offset = self.next
        self.next += 1
        body = event if isinstance(event, bytes) else wire.encode(event)
        self.records[offset] = Record(offset, kind, body, agent=agent if kind is Kind.TURN else None)
        if not isinstance(event, bytes):
            self.history.apply(offset, event, time=NOW)
        if kind is Kind.TURN:
            self.pending = self.pending.add(offset, wakes=isinstance(event, (wire.TurnAnswer, wire.TurnCancel)))
        return offset

    def turn(self, id: str, **fields: Any) -> int:
        return self.input(wire.TurnRequested(turn=id, agent="a", input="x", **fields))

    def interrupt(self, id: str, on_busy: wire.OnBusy = "interrupt") -> int:
        offset = self.turn(id, on_busy=on_busy)
        self.pending = Pending((*self.pending[:-1], self.pending[-1]._replace(flag="w")))
        return offset

    def answer(self, id: str, request: str = "q", value: Any = True) -> int:
        return self.input(wire.TurnAnswer(turn=id, request=request, value=value))

    def out(self, event: wire.OutputEvent, change: Callable[[Pending], Pending] = lambda p: p) -> int:
        offset = self.next
        self.next += 1
        self.history.apply(offset, event, time=NOW)
        self.pending = change(self.pending)
        return offset

    def start(self, id: str, at: int) -> None:
        attempt = self.history.turns[id].attempt + 1
        self.out(wire.TurnStarted(turn=id, attempt=attempt, worker="w", lease="l"), lambda p: p.claim(at))

    def suspend(self, id: str, until: float | None = None) -> None:
        attempt = self.history.turns[id].attempt
        self.out(wire.InputRequired(turn=id, attempt=attempt, request="q", kind="approval"))
        event = wire.TurnSuspended(turn=id, attempt=attempt, requests=["q"], message=wire.Message(), until=until)
        self.out(event, Pending.park)

    def retry(self, id: str, after: float) -> None:
        attempt = self.history.turns[id].attempt
        error = wire.ErrorInfo("agent_error", "ValueError: boom", retryable=True)
        self.out(wire.TurnRetrying(turn=id, attempt=attempt, error=error, after=after), Pending.park)

    def decide(self, offset: int, *, now: float = NOW, max_attempts: int = 5) -> Action:
        return decide(self.history, self.pending, self.records[offset], now=now, max_attempts=max_attempts)


@pytest.fixture
def s() -> Session:
    return Session()


def written(action: Action, kind: type[Any]) -> Any:
    assert isinstance(action, Write)
    assert isinstance(action.event, kind)
    return action.event


def test_a_new_turn_runs(s: Session) -> None:
    at = s.turn("t1")
    action = s.decide(at)
    assert isinstance(action, Run)
    assert action.turn.id == "t1"


def test_what_is_settled_is_dropped_and_what_is_early_is_handed_back(s: Session) -> None:
    first, second = s.turn("t1"), s.turn("t2")
    assert s.decide(second) == HandBack(0.0)
    s.pending = s.pending.settle(first)
    assert s.decide(first) == Drop()
    assert isinstance(s.decide(second), Run)


def test_a_turn_whose_worker_died_runs_again_until_its_attempts_are_used_up(s: Session) -> None:
    at = s.turn("t1")
    s.start("t1", at)
    assert isinstance(s.decide(at, max_attempts=2), Run)
    s.start("t1", at)
    end = written(s.decide(at, max_attempts=2), wire.TurnFailed)
    assert (end.error.code, end.attempt, end.turn_offset) == ("max_attempts", 2, at)
    assert "its workers died" in end.error.message


def test_the_reason_of_the_last_failure_is_in_the_end(s: Session) -> None:
    at = s.turn("t1")
    s.start("t1", at)
    s.retry("t1", 1.0)
    end = written(s.decide(at, now=NOW + 2, max_attempts=1), wire.TurnFailed)
    assert "boom" in end.error.message


def test_attempts_handed_back_or_suspended_are_not_charged(s: Session) -> None:
    at = s.turn("t1")
    for _ in range(3):
        s.start("t1", at)
        s.out(wire.TurnReleased(turn="t1", attempt=s.history.turns["t1"].attempt), Pending.release)
    assert isinstance(s.decide(at, max_attempts=1), Run)


def test_a_retry_waits_for_its_time_but_not_past_the_deadline(s: Session) -> None:
    at = s.turn("t1", deadline=NOW + 20)
    s.start("t1", at)
    s.retry("t1", 10.0)
    assert s.decide(at, now=NOW + 4) == HandBack(6.0)
    assert isinstance(s.decide(at, now=NOW + 9.99), Run)
    s.start("t1", at)
    s.retry("t1", 100.0)
    assert s.decide(at, now=NOW + 4) == HandBack(16.0)
    assert written(s.decide(at, now=NOW + 20), wire.TurnExpired).reason == "its deadline passed"


def test_a_stopped_turn_ends_before_anything_runs(s: Session) -> None:
    first, second = s.turn("t1"), s.turn("t2")
    s.input(wire.TurnCancel(turn="t2", by="me", reason="why"), kind=Kind.CANCEL)
    action = s.decide(first)
    end = written(action, wire.TurnCancelled)
    assert (end.turn, end.by, end.reason, end.rolled_back) == ("t2", "me", "why", False)
    assert isinstance(action, Write)
    assert action.settles == (second,)


def test_stops_of_all_end_one_after_the_other(s: Session) -> None:
    at = [s.turn(f"t{n}") for n in range(3)]
    s.input(wire.TurnCancel(all=True), kind=Kind.CANCEL)
    later = s.turn("t9")
    ended: list[str] = []
    for _ in range(3):
        action = s.decide(s.pending[0].offset)
        assert isinstance(action, Write)
        s.out(action.event, lambda p, gone=action.settles: p.settle(*gone))
        ended.append(action.event.turn)
    assert ended == ["t0", "t1", "t2"]
    assert s.decide(at[2]) == Drop()
    assert isinstance(s.decide(later), Run)


@pytest.mark.parametrize(("policy", "rolled_back"), [("interrupt", False), ("rollback", True)])
def test_a_parked_turn_gives_way_to_one_that_interrupts(s: Session, policy: Any, rolled_back: bool) -> None:
    at = s.turn("t1")
    s.start("t1", at)
    s.suspend("t1")
    new = s.interrupt("t2", policy)
    action = s.decide(new)
    end = written(action, wire.TurnCancelled)
    assert (end.turn, end.by, end.reason, end.rolled_back) == ("t1", "t2", policy, rolled_back)
    assert isinstance(action, Write)
    s.out(end, lambda p: p.settle(*action.settles))
    assert isinstance(s.decide(new), Run)


def test_a_suspended_turn_waits_for_its_answer(s: Session) -> None:
    at = s.turn("t1")
    s.start("t1", at)
    s.suspend("t1")
    assert s.decide(at) == Drop()
    answer = s.answer("t1")
    action = s.decide(answer)
    assert isinstance(action, Run)
    assert action.turn.id == "t1"


def test_an_answer_brings_its_turn_on_and_not_what_was_settled_when_it_was_suspended(s: Session) -> None:
    at = s.turn("t1")
    s.start("t1", at)
    s.suspend("t1")
    answer = s.answer("t1")
    assert s.decide(at) == Drop(), "a second delivery of the request, whose message may be settled"
    assert isinstance(s.decide(answer), Run)
    s.start("t1", answer)
    assert s.decide(at) == Drop()
    assert isinstance(s.decide(answer), Run)


def test_what_expires_a_suspended_turn_waits_for_its_answer_to_be_judged(s: Session) -> None:
    at = s.turn("t1")
    s.start("t1", at)
    s.suspend("t1", until=NOW + 10)
    answer = s.answer("t1")
    assert s.decide(at, now=NOW + 4) == HandBack(6.0)
    assert s.decide(at, now=NOW + 11) == HandBack(1.0)
    assert isinstance(s.decide(answer, now=NOW + 11), Run)


def test_a_suspended_turn_expires_when_nobody_answers_in_time(s: Session) -> None:
    at = s.turn("t1")
    s.start("t1", at)
    s.suspend("t1", until=NOW + 10)
    assert s.decide(at, now=NOW + 4) == HandBack(6.0)
    action = s.decide(at, now=NOW + 10)
    assert written(action, wire.TurnExpired).reason == "nobody answered in time"
    assert isinstance(action, Write)
    assert action.settles == (at,)


@pytest.mark.parametrize(
    ("turn", "request_id", "value", "code"),
    [
        ("t1", "q", "perhaps", "invalid_answer"),
        ("t1", "other", True, "not_waiting"),
        ("t9", "q", True, "not_waiting"),
    ],
)
def test_an_answer_that_cannot_be_used_is_refused(
    s: Session, turn: str, request_id: str, value: Any, code: str
) -> None:
    at = s.turn("t1")
    s.start("t1", at)
    s.suspend("t1")
    wrong = s.answer(turn, request_id, value)
    action = s.decide(wrong)
    event = written(action, wire.InputRejected)
    assert (event.offset, event.code) == (wrong, code)
    assert isinstance(action, Write)
    s.out(event, lambda p: p.settle(*action.settles))
    assert s.decide(wrong) == Drop()
    assert isinstance(s.decide(s.answer("t1")), Run)


def test_a_second_answer_is_refused_before_the_turn_goes_on_with_the_first(s: Session) -> None:
    at = s.turn("t1")
    s.start("t1", at)
    s.suspend("t1")
    first, second = s.answer("t1"), s.answer("t1", value=False)
    action = s.decide(first)
    assert written(action, wire.InputRejected).offset == second
    assert isinstance(action, Write)
    s.out(action.event, lambda p: p.settle(*action.settles))
    assert isinstance(s.decide(first), Run)


def test_an_answer_for_a_turn_that_has_ended_is_refused(s: Session) -> None:
    at = s.turn("t1")
    s.start("t1", at)
    s.out(wire.TurnCompleted(turn="t1", attempt=1, turn_offset=at), lambda p: p.settle(at))
    assert written(s.decide(s.answer("t1")), wire.InputRejected).code == "already_ended"


def test_a_queued_stop_for_nothing_is_refused(s: Session) -> None:
    at = s.input(wire.TurnCancel(turn="t1"))
    assert written(s.decide(at), wire.InputRejected).code == "too_late"


def test_a_stop_wakes_a_parked_turn_and_ends_with_it(s: Session) -> None:
    at = s.turn("t1")
    s.start("t1", at)
    s.suspend("t1")
    stop = s.input(wire.TurnCancel(turn="t1"))
    action = s.decide(stop)
    assert written(action, wire.TurnCancelled).turn == "t1"
    assert isinstance(action, Write)
    assert action.settles == (at, stop)


def test_an_id_used_twice_is_refused_the_second_time(s: Session) -> None:
    first = s.turn("t1")
    second = s.turn("t1")
    assert isinstance(s.decide(first), Run)
    s.pending = s.pending.settle(first)
    event = written(s.decide(second), wire.InputRejected)
    assert (event.code, event.offset, event.turn) == ("duplicate", second, "t1")


@pytest.mark.parametrize("body", [b"{", b'{"type":"text.delta","turn":"t1"}', b'{"type":"text.delta","text":"x"}'])
def test_what_is_no_input_is_refused(s: Session, body: bytes) -> None:
    at = s.input(body)
    event = written(s.decide(at), wire.InputRejected)
    assert (event.code, event.offset) == ("not_an_input", at)
    assert event.reason


def test_a_turn_without_its_request_fails_and_frees_the_session(s: Session) -> None:
    s.pending = s.pending.add(1)
    s.next = 2
    s.out(wire.TurnStarted(turn="t1", attempt=1, worker="w", lease="l"), lambda p: p.claim(1))
    s.suspend("t1")
    answer = s.answer("t1")
    action = s.decide(answer)
    assert written(action, wire.TurnFailed).error.code == "request_lost"
    assert isinstance(action, Write)
    assert s.pending.settle(*action.settles) == ()


def test_with_a_turn_end_its_answers_but_not_those_of_no_use(s: Session) -> None:
    at = s.turn("t1")
    s.start("t1", at)
    s.suspend("t1")
    good, idle, other = s.answer("t1"), s.answer("t1"), s.turn("t2")
    assert settles(s.history.turns["t1"], s.pending, s.history) == (at, good)
    assert {idle, other} < {e.offset for e in s.pending}


@pytest.mark.parametrize(
    ("event", "kind", "good"),
    [
        (wire.TurnRequested(turn="t", agent="a", input=1), Kind.TURN, True),
        (wire.TurnRequested(turn="t", agent="b", input=1), Kind.TURN, False),
        (wire.TurnRequested(turn="t", agent="a", input=1), Kind.CANCEL, False),
        (wire.TurnAnswer(turn="t", request="q", value=1), Kind.TURN, True),
        (wire.TurnAnswer(turn="t", request="q", value=1), Kind.CANCEL, False),
        (wire.TurnCancel(turn="t"), Kind.TURN, True),
        (wire.TurnCancel(turn="t"), Kind.CANCEL, True),
        (wire.TurnCompleted(turn="t", turn_offset=1), Kind.TURN, False),
        (wire.TurnCompleted(turn="t", turn_offset=1), Kind.CANCEL, False),
    ],
)
def test_which_events_have_a_place_in_which_records(event: Any, kind: Kind, good: bool) -> None:
    record = Record(1, kind, wire.encode(event), agent="a" if kind is Kind.TURN else None)
    if good:
        assert input_of(record) == event
    else:
        with pytest.raises(wire.InvalidInput):
            input_of(record)
