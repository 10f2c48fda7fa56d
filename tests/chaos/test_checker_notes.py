"""The checker believes nobody: senders, workers and readers, chance, and a fleet at work. And what it counts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import cast

import anyio
import msgspec
import pytest
from anyio.abc import TaskGroup
from hypothesis import given
from hypothesis import strategies as st

from agentrun import wire
from agentrun.broker import Broker, Kind
from agentrun.client import Turn
from agentrun.testing import Settings, memory_environments
from tests.chaos import logs
from tests.chaos.agents import AGENTS, words_of
from tests.chaos.checker import Rule, check
from tests.chaos.evidence import (
    Acked,
    AnyNote,
    Began,
    Fault,
    Got,
    Joined,
    Left,
    Notebook,
    Said,
    Sent,
    Steered,
    Stopped,
    Stored,
    Unended,
    digest,
    read_notes,
)
from tests.chaos.logs import EPOCH, Log, broken, broken_in, judge, replaced, started
from tests.chaos.worker import POINTS, NotingBroker, Points
from tests.worker.fleet import LEASE, Fleet, Running, eventually, fleet_on

# ------------------------------------------------------------------------------------------------- senders and workers


def test_a_send_that_is_not_stored() -> None:
    log = logs.plain()
    assert broken(log, log.sent("t9", 3)) == {Rule.SENT}
    assert broken(log, Sent(session="nowhere", turn="t1", offset=1, on_busy="enqueue", text="hello")) == {Rule.SENT}


def test_a_send_that_is_stored_elsewhere_than_a_second_try_was_told() -> None:
    log = logs.plain()
    assert broken(log, log.sent("t1", 2)) == {Rule.SENT}


def test_a_send_that_is_stored_with_another_text() -> None:
    log = logs.plain()
    assert broken(log, log.sent("t1", 1, "count 3  0")) == {Rule.SENT}


def test_a_send_that_is_stored_twice() -> None:
    log = logs.plain()
    request = log.records[0]
    log.records.append(request)
    assert broken(log) == {Rule.SENT}


def test_an_acknowledged_record_that_is_not_stored() -> None:
    log = logs.plain()
    beyond = Acked(worker="a-1", session="plain", offset=log.end + 1, hash="0123456789abcdef")
    another = Acked(worker="a-1", session="plain", offset=3, hash="0123456789abcdef")
    elsewhere = Acked(worker="a-1", session="nowhere", offset=1, hash="0123456789abcdef")
    for note in (beyond, another, elsewhere):
        assert broken(log, note) == {Rule.ACKED}


# -------------------------------------------------------------------------------------------------------------- stops


def stopped(log: Log, turn: str, status: str, offset: int, at: float = 900.0) -> set[Rule]:
    return broken(log, Stopped(session=log.name, turn=turn, status=status, offset=offset, took=0.1, at=at))


@pytest.mark.parametrize(
    ("turn", "status", "offset"),
    [
        ("t1", "cancelled", 8),  # another turn's end
        ("t1", "cancelled", 9),
        ("t3", "cancelled", 15),  # it completed
        ("t9", "cancelled", 10),
        ("", "cancelled", 15),
        ("t3", "already_ended", 14),
        ("t9", "already_ended", 0),
        ("t9", "pending", 7),
        ("t1", "not_found", 0),
    ],
)
def test_a_receipt_that_is_not_true(turn: str, status: str, offset: int) -> None:
    assert stopped(logs.cancelled(), turn, status, offset) == {Rule.STOP}


def test_a_stop_of_a_turn_that_has_not_ended() -> None:
    assert stopped(started(), "t1", "already_ended", 2) == {Rule.STOP, Rule.ENDS}
    assert stopped(started(), "t1", "cancelled", 2) == {Rule.STOP, Rule.ENDS}
    assert stopped(started(), "t1", "pending", 2) == {Rule.ENDS}


def test_a_word_after_a_receipt() -> None:
    log = started("w0 ")
    offset = log.terminal(wire.TurnCancelled)
    log.put(wire.TextDelta(turn="t1", attempt=1, text="w1 ", index=1), Kind.DELTA)
    assert stopped(log, "t1", "cancelled", offset) == {Rule.OWNER}


# ------------------------------------------------------------------------------------------------------------- readers


def reading(change: Callable[[list[AnyNote]], list[AnyNote]]) -> set[Rule]:
    """What is broken if a reader of a session that is right is given something else."""
    log = logs.plain()
    return broken_in([*log.notes, *log.acked(), *change(log.read()), log.left(), *log.stored()])


def test_a_reader_that_is_given_everything() -> None:
    assert reading(lambda notes: notes) == set()


def test_a_reader_that_misses_an_event() -> None:
    assert reading(lambda notes: notes[:4] + notes[5:]) == {Rule.READER}
    assert reading(lambda notes: notes[:1] + notes[2:]) == {Rule.READER}
    assert reading(lambda notes: notes[:-1]) == {Rule.READER}
    assert reading(lambda notes: notes[:1]) == {Rule.READER}


def test_a_reader_that_is_given_an_event_twice() -> None:
    assert reading(lambda notes: notes[:5] + notes[4:]) == {Rule.READER}


def test_a_reader_that_is_given_events_out_of_order() -> None:
    assert reading(lambda notes: [*notes[:4], notes[5], notes[4], *notes[6:]]) == {Rule.READER}


def test_a_reader_that_is_given_another_body_than_is_stored() -> None:
    assert reading(lambda notes: replaced(notes, 4, hash="0123456789abcdef")) == {Rule.READER}


def test_a_reader_that_is_given_what_is_not_stored() -> None:
    more = Got(reader="plain-r", offset=13, hash="0123456789abcdef")
    assert reading(lambda notes: [*notes, more]) == {Rule.READER}


def test_a_reader_that_is_given_a_stand_in() -> None:
    assert reading(lambda notes: [*notes[:3], Got(reader="plain-r", offset=4, hash=""), *notes[5:]]) == {Rule.READER}


def test_a_reader_that_comes_back_and_is_given_again_what_it_had() -> None:
    log = logs.plain()
    again = [*log.read(upto=6), *log.read(after=5)]
    assert reading(lambda _: again) == {Rule.READER}
    hole = [*log.read(upto=6), *log.read(after=7)]
    assert reading(lambda _: hole) == {Rule.READER}
    right = [*log.read(upto=6), *log.read(after=6)]
    assert reading(lambda _: right) == set()
    assert reading(lambda _: [*right[8:], *right[:7]]) == {Rule.READER}


def test_a_reader_that_is_given_something_before_it_asked() -> None:
    assert reading(lambda notes: notes[1:]) == {Rule.READER}


def test_a_reader_of_a_session_that_is_not_there() -> None:
    notes = [Joined(reader="r", session="nowhere", transport="sse", after=0), Got(reader="r", offset=1, hash="01")]
    assert broken_in(notes) == {Rule.READER}


def test_pieces_are_given_as_one_event() -> None:
    log = logs.in_pieces()
    pieces = [Got(reader="in-pieces-p", offset=n, hash=digest(body)) for n, (_, body, _) in enumerate(log.records, 1)]
    assert broken(log, Joined(reader="in-pieces-p", session="in-pieces", transport="sse", after=0), *pieces) == {
        Rule.READER
    }


@pytest.mark.parametrize("text", ["w0 w1 ", "w0 w1 w2 w2 ", "w0 w2 w1 ", ""])
def test_a_reader_without_offsets_that_has_another_text(text: str) -> None:
    assert broken(logs.plain(), Said(reader="x", session="plain", turn="t1", text=text)) == {Rule.SAID}
    assert broken(logs.plain(), Said(reader="x", session="plain", turn="t9", text=text)) == {Rule.SAID}


# ------------------------------------------------------------------------------------------------------------- chance


@st.composite
def damaged(draw: st.DrawFn) -> list[AnyNote]:
    """All notes of a correct session, and one thing wrong with one of them."""
    log = draw(st.sampled_from(logs.correct()))
    notes = log.all_notes()
    index = draw(st.sampled_from([i for i, n in enumerate(notes) if isinstance(n, (Stored, Got, Acked, Sent))]))
    note = notes[index]
    match draw(st.sampled_from(["drop", "double", "swap", "alter"])):
        case "drop" if isinstance(note, (Stored, Got)):
            return notes[:index] + notes[index + 1 :]
        case "double" if isinstance(note, (Stored, Got)):
            return notes[:index] + notes[index:][:1] + notes[index:]
        case "swap" if isinstance(note, (Stored, Got)) and type(notes[index - 1]) is type(note):
            return [*notes[: index - 1], note, notes[index - 1], *notes[index + 1 :]]
        case _:
            return replaced(notes, index, **_altered(draw, note))


def _altered(draw: st.DrawFn, note: AnyNote) -> dict[str, object]:
    if isinstance(note, Stored) and draw(st.booleans()):
        event = json.loads(note.body)
        key = draw(st.sampled_from(sorted(event)))
        event[key] = "changed" if isinstance(event[key], str) else event | {"changed": True}
        return {"body": json.dumps(event)}
    if isinstance(note, (Got, Acked)) and draw(st.booleans()):
        return {"hash": f"{int(note.hash, 16) ^ 1 << draw(st.integers(0, 63)):016x}"}
    assert isinstance(note, (Stored, Got, Acked, Sent))
    return {"offset": draw(st.integers(1, 40).filter(lambda offset: offset != note.offset))}


@given(damaged())
def test_whatever_is_wrong_with_one_note_is_found(notes: list[AnyNote]) -> None:
    assert check(notes).violations != []


@st.composite
def miswritten(draw: st.DrawFn) -> Log:
    """A session with one wrong record of an owner, which all its readers and workers have seen as it is."""
    log = draw(st.sampled_from([logs.taken_over(), logs.taken_over(resumes=False), logs.retried(), logs.lost()]))
    records = log.records
    ours = [i for i, (_, body, _) in enumerate(records) if wire.decode(body).type in _OWNED]
    index = draw(st.sampled_from(ours))
    match draw(st.sampled_from(["drop", "double", "swap"])):
        case "drop":
            del records[index]
        case "double":
            records.insert(index, records[index])
        case _:
            other = draw(st.sampled_from([i for i in (index - 1, index + 1) if i in ours] or [0]))
            records[index], records[other] = records[other], records[index]
    return log


_OWNED = ("turn.started", "text.delta", "turn.completed", "turn.cancelled")


@given(miswritten())
def test_a_record_that_an_owner_could_not_have_written_is_found_without_any_witness(log: Log) -> None:
    assert judge(log).violations != []


# ------------------------------------------------------------------------------------------------------ a fleet at work


class _Users:
    """Do what users do and note what they are told, all in one process."""

    def __init__(self, fleet: Fleet, book: Notebook, group: TaskGroup) -> None:
        self._fleet = fleet
        self._book = book
        self._group = group
        self._places: dict[str, int] = {}

    async def read(self, session: str) -> None:
        reader = f"{session}-r"
        self._book.note(Joined(reader=reader, session=session, transport="library", after=0))
        async with self._fleet.session(session).follow() as events:
            async for event in events:
                self._book.note(Got(reader=reader, offset=event.offset, hash=digest(event.raw)))
                self._places[session] = event.offset

    async def send(
        self, session: str, text: str, *, id: str = "t1", agent: str = "chaos", on_busy: wire.OnBusy = "enqueue"
    ) -> Turn:
        turn = await self._fleet.session(session).send(text, id=id, agent=agent, on_busy=on_busy)
        assert turn.offset is not None
        words = words_of(text)
        self._book.note(Sent(session=session, turn=id, offset=turn.offset, on_busy=on_busy, text=text, words=words))
        if id == "t1":
            self._group.start_soon(self.read, session)
        return turn

    async def stop(self, turn: Turn) -> None:
        receipt = await turn.cancel()
        note = Stopped(
            session=turn.session.id, turn=turn.id, status=receipt.status, offset=receipt.offset, took=receipt.took
        )
        self._book.note(note)

    async def steer(self, turn: Turn) -> None:
        steer = await turn.steer("left please", id="t2")
        consumed_by = await steer.consumed_by(10)
        self._book.note(Steered(session=turn.session.id, turn="t2", consumed_by=consumed_by))

    async def leave(self) -> None:
        """See that all readers have everything, and note what is stored."""
        for session in self._fleet.sessions:
            records = await self._fleet.records(session)
            await eventually(lambda: self._places[session] >= len(records))  # noqa: B023 - it is awaited here
            self._book.note(Left(reader=f"{session}-r", whole=True, upto=len(records)))
            for record, _ in records:
                body = record.body.decode()
                self._book.note(
                    Stored(session=session, offset=record.offset, kind=record.kind, body=body, stored=record.time)
                )


async def test_what_a_real_fleet_leaves_is_right(tmp_path: Path) -> None:
    """Stops, steering, answers, interrupts and retries, while one worker dies and another is drained."""
    book = Notebook(tmp_path, "users")
    book.note(Began(seed=1))

    def noting(name: str) -> Callable[[Broker], Broker]:
        never = Points(dict.fromkeys(POINTS, 0.0), random.Random(1))
        return lambda broker: cast("Broker", NotingBroker(broker, Notebook(tmp_path, name), name, never))

    async with (
        memory_environments(Settings(lease_ttl=LEASE)) as environment,
        fleet_on(environment) as fleet,
        anyio.create_task_group() as group,
    ):
        users = _Users(fleet, book, group)

        async def worker(name: str) -> Running:
            return await fleet.worker(*AGENTS, wrap=noting(name), name=name, ask_hold=0.2, drain=0.05)

        first = await worker("a-1")
        stopped = await users.send("stopped", "count 500 5")
        steered = await users.send("steered", "steer 60 20")
        asking = await users.send("asking", "approve 5 1")
        await users.send("over", "count 60 20")
        await users.send("again", "count 60 20", agent="fresh")
        await users.send("flaky", "flaky 5 1 100")
        await users.send("refused", "fail")
        await users.send("interrupted", "stubborn 0")
        await users.send("interrupted", "count 3 0", id="t2")
        for session in ("stopped", "steered", "over", "again", "interrupted"):
            await fleet.until("text.delta", session)
        await users.stop(stopped)
        await users.steer(steered)
        await users.send("interrupted", "count 4 0", id="t3", on_busy="interrupt")
        await fleet.until("turn.suspended", "asking")
        await first.crash()
        book.note(Fault(kind="kill", target="a"))
        second = await worker("b-1")
        await asking.answer(next(iter((await asking.view()).questions)), True)
        for session in ("over", "again"):
            await fleet.until(lambda event: isinstance(event, wire.TextDelta) and event.attempt == 2, session)
        await second.drain()
        await worker("c-1")
        for session in fleet.sessions:
            with anyio.fail_after(20):
                while (await fleet.broker.log.last(session)).pending:  # noqa: ASYNC110 - a broker has no event for it
                    await anyio.sleep(0.02)
        await users.leave()
        group.cancel_scope.cancel()
    report = check(read_notes(tmp_path))
    assert report.violations == []
    turns = dict(report.figures.turns)
    # What breaks down in each attempt may come to its end, where an attempt has less left to say than it would bear.
    assert turns.pop("completed") + turns.pop("failed") == 7
    assert turns == {"cancelled": 3, "consumed": 1}
    assert report.figures.takeovers.count >= 2
    assert report.figures.cancels.count == 1
    assert report.figures.attempts > 11 + 2
    assert report.figures.read == report.figures.events
    # All but the inputs, and what an append had no time to be told.
    assert 0.8 * report.figures.events < report.figures.acked < report.figures.events


# ------------------------------------------------------------------------------------------------------------- figures


def test_a_takeover_is_timed_from_the_fault_that_made_it_necessary() -> None:
    log = logs.taken_over()  # the last word at 0.4 s, the takeover at 0.5 s

    def seconds(*faults: Fault) -> float:
        (times,) = {judge(log, *faults).figures.takeovers}
        assert times.count == 1
        return round(times.p99, 6)

    assert seconds() == 0.1
    assert seconds(Fault(kind="kill worker", target="a-1", at=0.45)) == 0.05
    assert seconds(Fault(kind="kill", target="a", at=0.45)) == 0.05
    assert seconds(Fault(kind="kill all workers", target="all workers", at=0.45)) == 0.05
    assert seconds(Fault(kind="cable silent", target="a to servers", at=0.3)) == 0.2
    # The same death, noted twice.
    assert seconds(Fault(kind="kill", target="a", at=0.42), Fault(kind="ended as -9", target="a", at=0.45)) == 0.08
    # Not this worker, not in this attempt, not a fault that takes its turns.
    assert seconds(Fault(kind="kill", target="b", at=0.45), Fault(kind="kill", target="a", at=0.1)) == 0.1
    assert seconds(Fault(kind="clock jump", target="a", at=0.45), Fault(kind="kill", target="a", at=0.7)) == 0.1


def test_a_silence_counts_while_a_turn_runs() -> None:
    notes = logs.retried().stored()
    late = [
        msgspec.structs.replace(n, stored=EPOCH + (n.offset + (50 if n.offset > 4 else 0) + (9 if n.offset > 6 else 0)))
        for n in notes
        if isinstance(n, Stored)
    ]
    report = check([Began(seed=1, at=0.0, epoch=EPOCH), *late])
    # 50 s between two attempts are a pause, 10 s within the second are not.
    assert report.figures.longest_stall == 10.0
    assert "retried" in report.figures.stalled
    waiting = [
        msgspec.structs.replace(n, stored=EPOCH + n.offset * 100)
        for n in logs.answered().stored()[:5]
        if isinstance(n, Stored)
    ]
    assert check(waiting).figures.longest_stall == 100.0


def test_the_table_and_the_json_tell_what_was_found() -> None:
    log = logs.plain()
    faults = [Fault(kind="kill", target="a-1", at=3.0), Fault(kind="kill", target="a-1", at=6.0)]
    faults.append(Fault(kind="leader crash: not done, no answer", target="servers", at=7.0))
    report = judge([log, logs.cancelled()], *faults, Unended(session="plain", pending="13a"))
    table = report.table
    for line in (
        "seed           7",
        "sessions       2, and 0 deleted, which are left out",
        "turns          5: cancelled 2, completed 3",
        "faults         3: kill 2, leader crash: not done 1",
        "readers        library 4",
        "violations     QUIET 1",
        "  [QUIET] session plain: it did not come to rest, pending is 13a",
    ):
        assert line in table.splitlines(), table
    figures = json.loads(report.json)
    assert figures["turns"] == {"completed": 3, "cancelled": 2}
    assert figures["violations"] == {"QUIET": 1}
    assert figures["events"] == log.end + logs.cancelled().end
    assert figures["minutes"] == pytest.approx(500 / 60)
