"""Expired deltas: what a reader is given in place of a hole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from session_logs import CONTENT, OTHER, Log, is_delta, sessions

from agentrun import wire
from agentrun.history import History, TurnView
from agentrun.snapshot import CARRIERS, snapshot_for
from agentrun.wire import DataPart, Message, Part, ReasoningPart, TextPart, ToolPart

thorough = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def thin(log: Log, expired: int) -> Log:
    """The log without its oldest ``expired`` deltas."""
    gone = [offset for offset, event in log if is_delta(event)][:expired]
    return [(offset, event) for offset, event in log if offset not in gone]


def filled(log: Log) -> Log:
    """What a reader gives out for a thinned log."""
    out: Log = []
    last = 0
    for index, (offset, event) in enumerate(log):
        if offset > last + 1:
            hole = (last + 1, offset - 1)
            out.append((hole[1], snapshot_for(hole, log[index:]) or wire.Gap(from_=hole[0], to=hole[1])))
        out.append((offset, event))
        last = offset
    return out


def next_carrier(log: Log, offset: int, turn: str) -> tuple[int, Message | None] | None:
    return next(
        ((o, e.message) for o, e in log if o > offset and isinstance(e, CARRIERS) and e.turn == turn and e.attempt),
        None,
    )


def folds(log: Log, given_out: Log) -> Iterator[tuple[int, TurnView, TurnView]]:
    """Each turn at each record that is given out: as the whole log tells it, and as what is given out does."""
    full, history = History(), History()
    whole = iter(log)
    for offset, event in given_out:
        while full.offset < offset:
            full.apply(*next(whole))
        history.apply(offset, event)
        for view in full.turns.values():
            yield offset, view, history.turns[view.id]


def holes_between(log: Log, thinned: Log, first: int, last: int) -> bool:
    there = {offset for offset, _ in thinned}
    return any(first < offset < last and offset not in there for offset, _ in log)


@thorough
@given(sessions(CONTENT + OTHER), st.integers(0, 60))
def test_a_thinned_log_with_snapshots_folds_to_the_same(log: Log, expired: int) -> None:
    thinned = thin(log, expired)
    for offset, whole, seen in folds(log, filled(thinned)):
        if seen.message == whole.message or seen.incomplete:
            continue
        note(f"offset {offset}: {seen.message} for {whole.message}")
        # Where a further hole follows before the carrier, its text may be there already: never less, never for good.
        carrier = next_carrier(log, offset, whole.id)
        assert carrier is not None
        assert holes_between(log, thinned, offset, carrier[0])
        if not whole._own:
            # The attempt has said nothing yet, and its first words show early.
            continue
        assert seen.message.text.startswith(whole.message.text)
        assert carrier[1] is not None
        assert carrier[1].text.startswith(seen.message.text)


@thorough
@given(sessions(), st.integers(0, 60))
def test_what_snapshots_leave_open_is_mended_by_the_records_that_follow(log: Log, expired: int) -> None:
    thinned = thin(log, expired)
    last_hole = max((offset for offset, _ in log[:] if offset not in dict(thinned)), default=0)
    for offset, whole, seen in folds(log, filled(thinned)):
        assert (seen.state, seen.attempt, seen.charged) == (whole.state, whole.attempt, whole.charged)
        if seen.message == whole.message or seen.incomplete:
            continue
        note(f"offset {offset}: {seen.message} for {whole.message}")
        carrier = next_carrier(log, offset, whole.id)
        assert carrier is not None, "nothing will mend it"
        if not known(whole.message) and not seen._own:
            # All that the attempt has said is what no snapshot knows: what the one before it said is still shown.
            continue
        assert offset < last_hole or known(whole.message) == known(seen.message)


def known(message: Message) -> list[Part]:
    """The message without what the last snapshot may not know: a call whose input is not in yet, replaceable data."""
    return [
        part
        for part in message.parts
        if not (isinstance(part, ToolPart) and part.input is wire.UNSET)
        and not (isinstance(part, wire.DataPart) and part.id is not None)
    ]


@thorough
@given(sessions(), st.integers(0, 60))
def test_a_gap_is_given_only_where_nothing_is_carried(log: Log, expired: int) -> None:
    full = History()
    whole = iter(log)
    for _, event in filled(thin(log, expired)):
        if not isinstance(event, wire.Gap):
            continue
        while full.offset < event.to:
            full.apply(*next(whole))
        (turn,) = (view for view in full.turns.values() if view.last_out == event.to)
        carrier = next_carrier(log, event.to, turn.id)
        assert carrier is None or carrier[1] is None or not carrier[1].parts


@thorough
@given(sessions(), st.integers(1, 60), st.data())
def test_records_behind_the_carrier_change_nothing(log: Log, expired: int, data: st.DataObject) -> None:
    thinned = thin(log, expired)
    numbers = [offset for offset, _ in thinned]
    starts = [i for i in range(1, len(numbers)) if numbers[i] > numbers[i - 1] + 1]
    if not starts:
        return
    start = data.draw(st.sampled_from(starts))
    hole = (numbers[start - 1] + 1, numbers[start] - 1)
    found = [snapshot_for(hole, thinned[start:end]) for end in range(start, len(thinned) + 1)]
    told = [item for item in found if item is not None]
    assert found == [None] * (len(found) - len(told)) + told
    assert all(item == told[0] and (item.from_, item.to) == hole for item in told)


def started(attempt: int, message: Message | None = None) -> wire.TurnStarted:
    return wire.TurnStarted(turn="t", attempt=attempt, worker="w", lease="l", message=message)


def completed(*parts: Part, attempt: int = 1) -> wire.TurnCompleted:
    return wire.TurnCompleted(turn="t", attempt=attempt, turn_offset=1, message=Message(parts=list(parts)))


def text(piece: str, attempt: int = 1) -> wire.TextDelta:
    return wire.TextDelta(turn="t", attempt=attempt, text=piece)


def snapshot(hole: tuple[int, int], *parts: Part, attempt: int = 1) -> wire.Snapshot:
    return wire.Snapshot(turn="t", attempt=attempt, from_=hole[0], to=hole[1], message=Message(parts=list(parts)))


def gap(hole: tuple[int, int]) -> wire.Gap:
    return wire.Gap(from_=hole[0], to=hole[1])


def call(name: str, **more: object) -> ToolPart:
    return ToolPart(name, "tool", {"a": 1}, **more)


def test_what_the_records_after_a_hole_add_is_taken_away() -> None:
    following = [(5, text("lo ")), (6, text("world")), (7, completed(TextPart("Hello world")))]
    assert snapshot_for((3, 4), following) == snapshot((3, 4), TextPart("Hel"))


def test_tools_results_data_and_sources_are_taken_away() -> None:
    following: Log = [
        (5, wire.ToolCall(turn="t", attempt=1, call="c", name="tool", input={"a": 1})),
        (6, wire.ToolResult(turn="t", attempt=1, call="c", output=1)),
        (7, wire.Data(turn="t", attempt=1, name="d", id="x", data=1)),
        (8, wire.Data(turn="t", attempt=1, name="d", id="x", data=2)),
        (9, wire.Source(turn="t", attempt=1, url="u")),
        (10, wire.File(turn="t", attempt=1, url="f", media_type="m")),
        (11, wire.ReasoningDelta(turn="t", attempt=1, text="hm")),
    ]
    parts: list[Part] = [
        TextPart("Hel"),
        call("c", output=1),
        DataPart("d", 2, "x"),
        wire.SourcePart("u"),
        wire.FilePart("f", "m"),
        ReasoningPart("hm"),
    ]
    assert snapshot_for((3, 4), [*following, (12, completed(*parts))]) == snapshot((3, 4), TextPart("Hel"))


def test_a_result_is_taken_from_a_call_made_before_the_hole() -> None:
    following: Log = [
        (5, wire.ToolResult(turn="t", attempt=1, call="c", error="no")),
        (6, completed(call("c", error="no"))),
    ]
    assert snapshot_for((4, 4), following) == snapshot((4, 4), call("c"))


def test_a_tool_call_divides_the_text_of_two_holes() -> None:
    """Records that stay lie between two holes; what the second one held is known by where it stands."""
    result: Log = [(5, wire.ToolCall(turn="t", attempt=1, call="c", name="tool", input={"a": 1}))]
    following: Log = [*result, (8, completed(TextPart("one"), call("c"), TextPart("two")))]
    assert snapshot_for((3, 4), following) == snapshot((3, 4), TextPart("one"))
    assert snapshot_for((6, 7), following[1:]) == snapshot((6, 7), TextPart("one"), call("c"), TextPart("two"))


def test_an_input_between_two_holes_does_not_divide_their_text() -> None:
    following: Log = [(5, wire.TurnCancel(turn="t")), (8, completed(TextPart("one two")))]
    assert snapshot_for((3, 4), following) == snapshot((3, 4), TextPart("one two"))


def test_the_next_attempt_carries_what_the_one_before_left() -> None:
    left = Message(parts=[TextPart("Hel")])
    assert snapshot_for((3, 900), [(901, started(2, left))]) == snapshot((3, 900), TextPart("Hel"))
    assert snapshot_for((3, 4), [(5, text("l")), (6, started(2, left))]) == snapshot((3, 4), TextPart("He"))


@pytest.mark.parametrize("carrier", ["suspended", "checkpoint"])
def test_suspension_and_checkpoint_carry_the_message(carrier: str) -> None:
    message = Message(parts=[TextPart("Hello")])
    event = (
        wire.TurnSuspended(turn="t", attempt=1, requests=["r"], message=message)
        if carrier == "suspended"
        else wire.TurnCheckpoint(turn="t", attempt=1, message=message)
    )
    assert snapshot_for((3, 4), [(5, text("lo")), (6, event)]) == snapshot((3, 4), TextPart("Hel"))


def test_a_carrier_in_chunks_is_joined() -> None:
    event = completed(TextPart("x" * 2000))
    bodies = wire.split(event, 1000)
    assert len(bodies) > 2
    following = [(5 + i, wire.decode(body)) for i, body in enumerate(bodies)]
    assert snapshot_for((3, 4), following) == snapshot((3, 4), TextPart("x" * 2000))
    assert snapshot_for((3, 4), following[:-1]) is None


def test_a_turn_that_never_ran_says_nothing_about_the_hole() -> None:
    following: Log = [
        (5, wire.TurnCancelled(turn="queued", turn_offset=2, attempt=0)),
        (6, wire.InputRejected(turn="other", offset=4, code="c", reason="r")),
        (7, completed(TextPart("Hello"))),
    ]
    assert snapshot_for((3, 4), following[:2]) is None
    assert snapshot_for((3, 4), following) == snapshot((3, 4), TextPart("Hello"))


@pytest.mark.parametrize(
    "following",
    [
        [(5, started(2))],
        [(5, started(2, Message()))],
        [(5, started(1))],
        [(5, completed())],
        [(5, text("something else")), (6, completed(TextPart("Hello")))],
        [(5, wire.Source(turn="t", attempt=1, url="u")), (6, completed(TextPart("Hello")))],
        [(5, wire.ToolResult(turn="t", attempt=1, call="c")), (6, completed(TextPart("Hello")))],
    ],
)
def test_a_gap_where_the_next_message_does_not_tell(following: Log) -> None:
    assert snapshot_for((3, 4), following) == gap((3, 4))


def test_a_beginning_that_is_missing_is_a_gap_at_once() -> None:
    assert snapshot_for((1, 4), []) == wire.Gap(from_=1, to=4, reason="trimmed")
