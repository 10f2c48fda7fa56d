from __future__ import annotations

import asyncio
import gc
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from scripted_owner import Clock, Owner, lag, make_broker, make_client, message

from agentrun import wire
from agentrun.broker import Kind, Pending
from agentrun.brokers.memory import MemoryBroker
from agentrun.client import Session
from agentrun.errors import InvalidInput, SessionGone
from agentrun.reading import Event

TTL = 100.0


class Setting:
    def __init__(self) -> None:
        self.clock = Clock()
        self.broker: MemoryBroker = make_broker(self.clock, delta_ttl=TTL)
        self.session: Session = make_client(self.broker).session("s")
        self.owner = Owner(self.broker)

    def expire(self) -> None:
        self.clock.now += TTL + 1

    async def stored(self, after: int = 0) -> list[Event]:
        with anyio.fail_after(20):
            return [e async for e in self.session.events(after, follow=False)]

    async def live(self, count: int, after: int = 0) -> list[Event]:
        found: list[Event] = []
        with anyio.fail_after(20):
            async with self.session.follow(after) as events:
                while len(found) < count:
                    found.append(await anext(events))
        return found


@pytest.fixture
def setting() -> Setting:
    return Setting()


def shape(events: list[Event]) -> list[tuple[int, str]]:
    return [(e.offset, e.type) for e in events]


async def two_turns(setting: Setting) -> None:
    await setting.session.send("a", id="t1")
    await setting.owner.run("t1", 1, "one", " two")
    await setting.session.send("b", id="t2")
    await setting.owner.start("t2", 6)
    await setting.owner.say("three")
    await setting.owner.ask("q1")
    await setting.owner.say(" four")
    await setting.owner.end()


async def test_reading_goes_on_exactly_behind_every_offset(setting: Setting) -> None:
    await two_turns(setting)
    whole = await setting.stored()
    assert [e.offset for e in whole] == list(range(1, 12))
    for after in range(12):
        assert shape(await setting.stored(after)) == shape(whole)[after:]
        assert shape(await setting.live(11 - after, after)) == shape(whole)[after:]


async def test_live_and_later_readers_see_the_same(setting: Setting) -> None:
    live: list[Event] = []

    async def read() -> None:
        async for event in setting.session.events():
            live.append(event)
            if event.offset == 11:
                return

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await anyio.lowlevel.checkpoint()
            await two_turns(setting)
    later = await setting.stored()
    assert [(e.offset, e.raw, e.time, e.cursor) for e in live] == [(e.offset, e.raw, e.time, e.cursor) for e in later]


async def test_an_event_carries_what_was_stored(setting: Setting) -> None:
    await setting.session.send("a", id="t1")
    (record,) = await setting.broker.log.read("s")
    (event,) = await setting.stored()
    assert (event.offset, event.raw, event.time, event.cursor) == (
        1,
        record.body,
        setting.clock.now,
        record.cursor,
    )
    assert (event.type, event.turn, event.data) == ("turn.requested", "t1", wire.decode(record.body))


@pytest.mark.parametrize(
    ("body", "kind", "turn"),
    [
        (b'{"type":"mood","turn":"t1","color":"blue"}', "mood", "t1"),
        (b'{"type":"text.delta","turn":"t1","text":5}', "text.delta", "t1"),
        (b'{"turn":"t1"}', "", "t1"),
        (b"[1]", "", None),
        (b"not json", "", None),
        (b"\xff\xfe", "", None),
        (b'{"type":"mood","turn":"\xff"}', "mood", None),
        (b'{"type":"text.delta","text":"\xff"}', "text.delta", None),
        (b'{"type":"\xff"}', "", None),
        (b"", "", None),
    ],
)
async def test_what_cannot_be_decoded_is_passed_on(setting: Setting, body: bytes, kind: str, turn: str | None) -> None:
    await setting.session.send("a", id="t1")
    tail = await setting.broker.log.last("s")
    await setting.broker.log.append("s", body, kind=Kind.EVENT, after=tail, pending=Pending())
    await setting.session.send("b", id="t2")
    events = await setting.stored()
    assert [e.offset for e in events] == [1, 2, 3]
    assert (events[1].data, events[1].raw) == (wire.UnknownEvent(kind, body), body)
    assert (events[1].type, events[1].turn) == (kind, turn)
    assert (await setting.session.history()).offset == 3


# ------------------------------------------------------------------------------------------------------------- holes


async def test_expired_tokens_come_as_a_snapshot(setting: Setting) -> None:
    await two_turns(setting)
    setting.expire()
    for events in (await setting.stored(), await setting.live(9)):
        assert (
            shape(events)
            == [
                (1, "turn.requested"),
                (2, "turn.started"),
                (4, "snapshot"),
                (5, "turn.completed"),
                (6, "turn.requested"),
                (7, "turn.started"),
                (8, "snapshot"),
                (9, "input.required"),
                (10, "snapshot"),
                (11, "turn.completed"),
            ][: len(events)]
        )
        first, second = events[2].data, events[6].data
        assert first == wire.Snapshot(turn="t1", attempt=1, from_=3, to=4, message=message("one two"))
        assert isinstance(second, wire.Snapshot)
        assert (second.turn, second.from_, second.to) == ("t2", 8, 8)
    assert wire.decode(events[2].raw) == events[2].data
    assert events[2].turn == "t1"


async def test_reading_goes_on_behind_a_snapshot_and_inside_its_hole(setting: Setting) -> None:
    await two_turns(setting)
    setting.expire()
    whole = await setting.stored()
    for index, event in enumerate(whole):
        assert shape(await setting.stored(event.offset)) == shape(whole)[index + 1 :]
    inside = (await setting.stored(3))[0]
    assert inside.data == wire.Snapshot(turn="t1", attempt=1, from_=4, to=4, message=message("one two"))


async def test_a_turn_s_events_have_the_snapshot_too(setting: Setting) -> None:
    await two_turns(setting)
    setting.expire()
    turn = setting.session.turn("t1")
    assert [e.type async for e in turn.events()] == [
        "turn.requested",
        "turn.started",
        "snapshot",
        "turn.completed",
    ]


async def test_a_long_run_after_a_hole_is_read_ahead(setting: Setting) -> None:
    await setting.session.send("a", id="t1")
    await setting.owner.start("t1", 1)
    await setting.owner.say("old")
    setting.expire()
    await setting.owner.say(*(f" {n}" for n in range(2500)))
    end = await setting.owner.end()
    for events in (await setting.stored(), await setting.live(end - 1)):
        assert [e.offset for e in events] == [1, 2, 3, *range(4, end + 1)][: len(events)]
        assert events[2].data == wire.Snapshot(turn="t1", attempt=1, from_=3, to=3, message=message("old"))


async def test_many_holes_cost_one_stand_in_each(setting: Setting) -> None:
    await setting.session.send("a", id="t1")
    await setting.owner.start("t1", 1)
    for number in range(300):
        await setting.owner.say(str(number))
        await setting.owner.emit(wire.ToolCall(call=f"c{number}", name="f", input={}))
    parts: list[wire.Part] = []
    for number in range(300):
        parts += [wire.TextPart(str(number)), wire.ToolPart(f"c{number}", "f", {})]
    event = wire.TurnCompleted(turn="t1", attempt=1, turn_offset=1, message=wire.Message(parts=parts))
    await setting.owner.append(event)
    setting.expire()
    events = await setting.stored()
    assert [e.offset for e in events] == list(range(1, 604))
    snapshots = [e.data for e in events if isinstance(e.data, wire.Snapshot)]
    assert [len(s.message.parts) for s in snapshots] == list(range(1, 600, 2))


async def test_where_nothing_tells_there_is_a_gap(setting: Setting) -> None:
    await setting.session.send("a", id="t1")
    await setting.owner.start("t1", 1)
    await setting.owner.say("lost")
    setting.expire()
    await setting.owner.say("left")
    events = await setting.stored()
    assert shape(events) == [(1, "turn.requested"), (2, "turn.started"), (3, "gap"), (4, "text.delta")]
    assert events[2].data == wire.Gap(from_=3, to=3)
    assert shape(await setting.live(4)) == shape(events)
    assert (await setting.session.history()).turns["t1"].incomplete


async def test_a_hole_at_the_end_is_told(setting: Setting) -> None:
    await setting.session.send("a", id="t1")
    await setting.owner.start("t1", 1)
    await setting.owner.say("one", "two", "three")
    setting.expire()
    events = await setting.stored()
    assert shape(events) == [(1, "turn.requested"), (2, "turn.started"), (5, "gap")]
    assert events[2].data == wire.Gap(from_=3, to=5)
    # Who has seen some of it is told of the rest, who has seen all of it of nothing.
    assert (await setting.stored(4))[0].data == wire.Gap(from_=5, to=5)
    assert await setting.stored(5) == []
    history = await setting.session.history()
    assert (history.offset, history.turns["t1"].incomplete) == (5, True)


async def test_what_took_over_after_the_hole_at_the_end_fills_it(setting: Setting) -> None:
    await setting.session.send("a", id="t1")
    await setting.owner.start("t1", 1)
    await setting.owner.say("one", " two")
    setting.expire()
    async with setting.session.follow(2) as events:
        with anyio.move_on_after(0.05):
            await anext(events)
            pytest.fail("nothing is known of the hole yet")
    async with setting.session.follow(2) as events:
        await setting.owner.start("t1", 1, attempt=2, message=message("one two"))
        with anyio.fail_after(20):
            first, second = await anext(events), await anext(events)
    assert first.data == wire.Snapshot(turn="t1", attempt=1, from_=3, to=4, message=message("one two"))
    assert (second.offset, second.type) == (5, "turn.started")


async def test_a_trimmed_beginning_is_a_gap_for_whoever_would_read_it(setting: Setting) -> None:
    await two_turns(setting)
    setting.broker.state.trim("s", 6)
    for after in (0, 3, 5):
        first, second = (await setting.stored(after))[:2]
        assert first.data == wire.Gap(from_=after + 1, to=6, reason="trimmed")
        assert (second.offset, second.type) == (7, "turn.started")
    assert (await setting.stored(6))[0].offset == 7


# ------------------------------------------------------------------------------------------------------------ chunks


async def test_events_stored_in_pieces_come_whole_at_the_last_piece(setting: Setting) -> None:
    output = {"text": 'é"\\' * 900, "chunk": True}
    await setting.session.send("a", id="t1")
    await setting.owner.start("t1", 1)
    await setting.owner.say('they call it "chunk"')
    last = await setting.owner.emit(wire.ToolResult(call="c1", output=output), limit=2000)
    end = await setting.owner.end()
    assert last > 6
    for events in (await setting.stored(), await setting.live(5)):
        assert [e.offset for e in events] == [1, 2, 3, last, end]
        assert events[3].data == wire.ToolResult(turn="t1", attempt=1, call="c1", output=output)
        assert wire.decode(events[3].raw) == events[3].data
        assert events[3].turn == "t1"
    history = await setting.session.history()
    assert history.offset == end


async def test_an_input_between_pieces_breaks_nothing(setting: Setting) -> None:
    await setting.session.send("a", id="t1")
    await setting.owner.start("t1", 1)
    event = wire.ToolResult(turn="t1", attempt=1, call="c1", output="x" * 4000)
    pieces = wire.split(event, 1500)
    for number, body in enumerate(pieces):
        tail = await setting.broker.log.last("s")
        await setting.broker.log.append("s", body, kind=Kind.EVENT, after=tail, pending=tail.pending)
        if number < len(pieces) - 1:
            await setting.session.send(number, id=f"x{number}")
    whole = await setting.stored()
    assert [e.type for e in whole] == [
        "turn.requested",
        "turn.started",
        *["turn.requested"] * (len(pieces) - 1),
        "tool.result",
    ]
    for index, read in enumerate(whole):
        assert shape(await setting.stored(read.offset)) == shape(whole)[index + 1 :]
        assert (await setting.stored(read.offset) or whole)[-1].data == event
    assert (await setting.session.history()).turns["x0"].state == "queued"


async def test_pieces_of_a_dead_owner_are_not_joined_to_those_of_the_next(setting: Setting) -> None:
    await setting.session.send("a", id="t1")
    await setting.owner.start("t1", 1)
    dead = wire.split(wire.ToolResult(turn="t1", attempt=1, call="c1", output="x" * 4000), 1500)
    for body in dead[:-1]:
        tail = await setting.broker.log.last("s")
        await setting.broker.log.append("s", body, kind=Kind.EVENT, after=tail, pending=tail.pending)
    await setting.owner.start("t1", 1, attempt=2)
    await setting.owner.emit(wire.ToolResult(call="c1", output="y" * 4000), limit=1500)
    results = [e.data for e in await setting.stored() if isinstance(e.data, wire.ToolResult)]
    assert results == [wire.ToolResult(turn="t1", attempt=2, call="c1", output="y" * 4000)]


async def test_a_piece_whose_beginning_was_trimmed_is_passed_on(setting: Setting) -> None:
    await setting.session.send("a", id="t1")
    await setting.owner.start("t1", 1)
    last = await setting.owner.emit(wire.ToolResult(call="c1", output="y" * 4000), limit=1500)
    setting.broker.state.trim("s", 3)
    assert shape(await setting.stored()) == [(3, "gap"), (last, "chunk")]


# ------------------------------------------------------------------------------------------------ the iterator itself


async def test_offsets_from_the_future_are_another_log_s(setting: Setting) -> None:
    await setting.session.send("a", id="t1")
    for read in (setting.stored(2), setting.live(1, 2)):
        with pytest.raises(SessionGone, match="ends at offset 1, before 2"):
            await read
    for read in (setting.stored(-1), setting.live(1, -1)):
        with pytest.raises(InvalidInput, match="-1"):
            await read
    assert await setting.stored(1) == []


async def test_a_server_that_lags_behind_is_not_believed_that_a_session_is_gone(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    await two_turns(setting)
    for read in (setting.stored, lambda after: setting.live(3, after)):
        with monkeypatch.context() as patch:
            lag(setting.broker, patch, through=5)
            assert [e.offset for e in await read(8)] == [9, 10, 11]


async def test_a_replica_that_lags_is_waited_for(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    await two_turns(setting)
    last, read = setting.broker.log.last, setting.broker.log.read
    old = (await setting.broker.log.read("s"))[4].tail
    ends, pages = [old, old], [5, 5, 8]

    async def lagging_last(session: str) -> Any:
        return ends.pop() if ends else await last(session)

    async def lagging_read(session: str, **options: Any) -> Any:
        upto = pages.pop(0) if pages else 100
        return [r for r in await read(session, **options) if r.offset <= upto]

    monkeypatch.setattr(setting.broker.log, "last", lagging_last)
    assert [e.offset for e in await setting.stored(8)] == [9, 10, 11]
    monkeypatch.setattr(setting.broker.log, "read", lagging_read)
    assert [e.offset for e in await setting.stored()] == list(range(1, 12))
    assert not pages


async def test_leaving_the_loop_leaves_nothing_behind(setting: Setting) -> None:
    await two_turns(setting)
    tasks = len(asyncio.all_tasks())
    seen: list[int] = []
    for _ in range(10):
        async for event in setting.session.events():
            seen.append(event.offset)
            break
        async for event in setting.session.turn("t2").events():
            seen.append(event.offset)
            break
    gc.collect()
    await anyio.lowlevel.checkpoint()
    await anyio.lowlevel.checkpoint()
    assert seen == [1, 6] * 10
    assert len(asyncio.all_tasks()) == tasks


async def test_an_iterator_may_be_left_by_a_timeout_and_by_cancellation(setting: Setting) -> None:
    await setting.session.send("a", id="t1")
    seen: list[int] = []
    with anyio.move_on_after(0.05):
        async for event in setting.session.events():
            seen += [event.offset]
    assert seen == [1]
    async with anyio.create_task_group() as group:

        async def read() -> None:
            async for event in setting.session.events():
                seen.extend([event.offset])

        group.start_soon(read)
        await anyio.sleep(0.02)
        group.cancel_scope.cancel()
    assert seen == [1, 1]


def test_an_iterator_that_outlives_the_loop_gives_no_warning(setting: Setting) -> None:
    kept: list[Any] = []

    async def main() -> None:
        await setting.session.send("a", id="t1")
        events = setting.session.events()
        kept.append(events)
        assert (await anext(events)).offset == 1

    anyio.run(main)
    kept.clear()
    gc.collect()


async def test_two_readers_do_not_disturb_each_other(setting: Setting) -> None:
    found: dict[int, list[int]] = {0: [], 4: []}

    async def read(after: int) -> None:
        async for event in setting.session.events(after):
            found[after].append(event.offset)
            if event.offset == 11:
                return

    await setting.session.send("a", id="t1")
    await setting.owner.run("t1", 1, "one", " two")
    async with anyio.create_task_group() as group:
        group.start_soon(read, 0)
        group.start_soon(read, 4)
        await setting.session.send("b", id="t2")
        await setting.owner.run("t2", 6, "x", "y", "z")
    assert found == {0: list(range(1, 12)), 4: list(range(5, 12))}
