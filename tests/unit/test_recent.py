"""What a worker keeps of the sessions it has just run."""

from __future__ import annotations

import pytest

from agentrun import wire
from agentrun.broker import Kind, Record, Tail
from agentrun.history import History
from agentrun.recent import Known, Recent, goes_on, weight


def known(weight: int = 10, cursor: int = 7) -> Known:
    return Known(History(), Tail(5, cursor=cursor), weight)


def waiting() -> History:
    history = History()
    history.apply(1, wire.TurnRequested(turn="t", agent="a", input="x"))
    return history


def test_the_least_recently_used_goes_first() -> None:
    recent = Recent(limit=30)
    for name in ("a", "b", "c"):
        recent.put(name, known())
    assert recent.get("a") is not None
    recent.put("d", known())
    assert [name for name in "abcd" if recent.get(name) is None] == ["b"]
    recent.put("e", known(25))
    assert [name for name in "abcde" if recent.get(name) is not None] == ["e"]


def test_one_that_is_too_heavy_is_not_kept() -> None:
    recent = Recent(limit=30)
    recent.put("a", known(31))
    assert recent.get("a") is None
    recent.put("a", known(30))
    assert recent.get("a") is not None


def test_what_is_put_again_weighs_once() -> None:
    recent = Recent(limit=30)
    for _ in range(10):
        recent.put("a", known(20))
    recent.put("b", known(10))
    assert recent.get("a") is not None
    recent.forget("a")
    recent.put("c", known(20))
    assert recent.get("b") is not None


def test_without_a_cursor_nobody_could_tell_whether_it_is_still_the_same_session() -> None:
    recent = Recent()
    recent.put("a", known())
    recent.put("a", known(cursor=0))
    assert recent.get("a") is None


def test_a_session_with_a_turn_under_way_is_not_kept() -> None:
    recent = Recent()
    history = waiting()
    recent.put("a", Known(history, Tail(1, cursor=1)))
    assert recent.get("a") is not None
    history.apply(2, wire.TurnStarted(turn="t", attempt=1, worker="w", lease="l"))
    recent.put("a", Known(history, Tail(2, cursor=2)))
    assert recent.get("a") is None


@pytest.mark.parametrize(("offset", "cursor", "goes"), [(5, 7, True), (5, 9, False), (6, 7, False)])
def test_it_goes_on_only_from_the_very_same_record(offset: int, cursor: int, goes: bool) -> None:
    assert goes_on(known(), Record(offset, Kind.EVENT, b"", cursor=cursor)) is goes
    assert not goes_on(known(), None)


def test_every_record_weighs_something() -> None:
    assert weight() == 0
    assert weight(b"", b"xx") == weight(b"xx") + weight(b"")
    assert weight(b"") > 0
