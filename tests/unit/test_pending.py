"""The list of a session's unsettled inputs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrun.broker import Entry, Pending
from agentrun.errors import InvalidInput


def pending(text: str) -> Pending:
    return Pending.parse(text)


@st.composite
def reachable(draw: st.DrawFn) -> Pending:
    """A list as senders and owners make it, from an empty one."""
    now = Pending()
    for offset in range(1, draw(st.integers(1, 12))):
        match draw(st.sampled_from(["add", "add", "wake", "claim", "park", "release", "settle"])):
            case "add":
                now = now.add(offset)
            case "wake" if now.parked:
                now = now.add(offset, wakes=True)
            case "claim" if now:
                now = now.claim(draw(st.sampled_from([e.offset for e in now if now.ready(e.offset)])))
            case "park" if now.running:
                now = now.park()
            case "release" if now.running:
                now = now.release()
            case "settle" if now:
                now = now.settle(draw(st.sampled_from([e.offset for e in now])))
            case _:
                pass
    return now


@given(reachable())
def test_the_text_form_holds_all(now: Pending) -> None:
    assert Pending.parse(str(now)) == now


def test_the_text_form() -> None:
    assert pending("13p,15,17w") == (Entry(13, "p"), Entry(15), Entry(17, "w"))
    assert str(Pending((Entry(13, "p"), Entry(15), Entry(17, "w")))) == "13p,15,17w"
    assert pending("") == Pending()


@pytest.mark.parametrize("text", ["a", "1x", "1,p", "1;2", "1,,b"])
def test_what_is_no_such_list(text: str) -> None:
    with pytest.raises(InvalidInput, match="not a list of pending inputs"):
        pending(text)


@given(reachable())
def test_only_the_head_runs_or_is_parked(now: Pending) -> None:
    assert all(e.flag not in ("a", "p") for e in now[1:])
    assert len({e.offset for e in now}) == len(now)
    assert not (now.running and now.parked)
    assert now.head == (now[0] if now else None)


@given(reachable())
def test_the_head_is_ready_and_a_waker_while_it_is_parked(now: Pending) -> None:
    wakers = [e.offset for e in now[1:] if e.flag == "w"] if now.parked else []
    assert [e.offset for e in now if now.ready(e.offset)] == ([now[0].offset] if now else []) + wakers
    assert not now.ready(1000)


@given(reachable(), st.data())
def test_a_claim_makes_the_input_the_running_head_and_keeps_the_others_in_order(
    now: Pending, data: st.DataObject
) -> None:
    offsets = [e.offset for e in now]
    offset = data.draw(st.sampled_from([*offsets, 1000]))
    if not now.ready(offset):
        with pytest.raises(InvalidInput, match=f"input {offset} cannot be claimed"):
            now.claim(offset)
        return
    claimed = now.claim(offset)
    assert claimed.running
    assert claimed[0].offset == offset
    # A waker stands for the parked head from now on, which is gone.
    assert claimed[1:] == tuple(e for e in now[1:] if e.offset != offset)
    assert claimed.claim(offset) == claimed


def test_a_waker_takes_the_place_of_the_parked_head() -> None:
    parked = pending("13a,15").park().add(17, wakes=True)
    assert str(parked) == "13p,15,17w"
    assert (parked.ready(13), parked.ready(15), parked.ready(17)) == (True, False, True)
    claimed = parked.claim(17)
    assert str(claimed) == "17a,15"
    assert str(claimed.park()) == "17p,15"
    assert str(claimed.release()) == "17,15"
    assert str(claimed.settle(17)) == "15"


def test_the_head_may_be_claimed_itself_while_it_is_parked() -> None:
    assert str(pending("13p,17w").claim(13)) == "13a,17w"


def test_nothing_wakes_a_head_that_is_not_parked() -> None:
    assert not pending("13a,17w").ready(17)
    assert not pending("13,17w").ready(17)


@given(reachable(), st.sets(st.integers(1, 12)))
def test_settling_takes_out_these_and_no_others(now: Pending, offsets: set[int]) -> None:
    left = now.settle(*offsets)
    assert left == tuple(e for e in now if e.offset not in offsets)
    assert all(offset not in left for offset in offsets)
    assert all(e.offset in left for e in now if e.offset not in offsets)


@given(reachable())
def test_a_change_leaves_the_old_value_as_it_was(now: Pending) -> None:
    before = tuple(now)
    now.add(1000)
    now.settle(*(e.offset for e in now))
    if now:
        now.claim(now[0].offset)
        now.park()
        now.release()
    assert tuple(now) == before
