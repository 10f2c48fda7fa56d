"""What an agent emits, and what of it is appended when."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrun import wire
from agentrun.broker import Kind, Pending, Record, Tail
from agentrun.brokers.memory import MemoryBroker
from agentrun.brokers.memory_state import MemoryState
from agentrun.errors import Conflict, Fenced, InvalidInput, SessionGone, Unavailable
from agentrun.publish import Pacer, Publisher
from agentrun.writer import SessionWriter


class Log:
    """A session's log whose answers the test can hold up, or make fail."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.inner = broker.log
        self.delay: Callable[[], float] = lambda: 0.0
        self.before: Callable[[], Any] | None = None
        self.failing: list[Exception] = []
        self.losing = 0
        self.appends: list[float] = []

    async def append(self, session: str, body: bytes, **args: Any) -> Tail:
        self.appends.append(time.monotonic())
        if self.before is not None:
            await self.before()
        if self.failing:
            raise self.failing.pop(0)
        tail = await self.inner.append(session, body, **args)
        if (delay := self.delay()) > 0:
            await anyio.sleep(delay)
        if self.losing:
            self.losing -= 1
            raise Unavailable("lost")
        return tail

    async def read(self, session: str, **args: Any) -> Any:
        return await self.inner.read(session, **args)

    async def last(self, session: str, *, fresh: bool = False) -> Tail:
        return await self.inner.last(session, fresh=fresh)


class Bench:
    """A publisher on a session that is claimed."""

    def __init__(self, state: MemoryState) -> None:
        self.broker = MemoryBroker(state=state)
        self.log = Log(self.broker)
        self.inputs: list[Record] = []
        self.writer: SessionWriter
        self.publisher: Publisher

    async def open(self, **options: Any) -> None:
        tail = await self.send()
        started = wire.encode(wire.TurnStarted(turn="t1", attempt=1, worker="w", lease="l"))
        tail = await self.broker.log.append(
            "s", started, kind=Kind.EVENT, after=tail, pending=tail.pending.claim(tail.offset)
        )
        self.writer = SessionWriter(self.log, "s", tail, self.inputs.append)
        values: dict[str, Any] = {
            "turn": "t1",
            "attempt": 1,
            "message": None,
            "pacer": Pacer(0, 1),
            "min_gap": 0.001,
            "buffer_events": 4096,
            "checkpoint_after": 3600.0,
            "max_body": 1_000_000,
        }
        self.publisher = Publisher(self.writer, **(values | options))

    async def send(self) -> Tail:
        while True:
            tail = await self.broker.log.last("s")
            body = wire.encode(wire.TurnRequested(turn=f"t{tail.next}", agent="a", input="x"))
            try:
                return await self.broker.log.append(
                    "s", body, kind=Kind.TURN, after=tail, pending=tail.pending.add(tail.next), agent="a"
                )
            except Conflict:
                continue

    async def records(self) -> list[tuple[Record, Any]]:
        return [(r, wire.decode(r.body)) for r in await self.broker.log.read("s", after=2, limit=100_000)]

    async def events(self) -> list[Any]:
        joiner = wire.Joiner()
        joined = (joiner.feed(e) for r, e in await self.records() if not r.kind.input)
        return [e for e in joined if e is not None]


@asynccontextmanager
async def bench(*, state: MemoryState | None = None, **options: Any) -> AsyncGenerator[Bench]:
    made = Bench(state or MemoryState())
    await made.open(**options)
    async with anyio.create_task_group() as group:
        group.start_soon(made.publisher.run)
        yield made
        group.cancel_scope.cancel()


def text(value: str) -> wire.TextDelta:
    return wire.TextDelta(text=value)


async def test_the_first_token_goes_out_at_once_and_what_comes_meanwhile_is_merged() -> None:
    async with bench(min_gap=0.001) as b:
        b.log.delay = lambda: 0.05
        for n in range(10):
            await b.publisher.emit(text(f"{n}"))
            await anyio.lowlevel.checkpoint()
        await b.publisher.flush()
        events = await b.events()
    assert [(e.text, e.index, e.count) for e in events] == [("0", 0, 1), ("123456789", 1, 9)]


async def test_at_chat_speed_each_token_is_a_record() -> None:
    async with bench() as b:
        for n in range(5):
            await b.publisher.emit(text(f"{n}"))
            await anyio.sleep(0.01)
        assert [(e.text, e.index, e.count) for e in await b.events()] == [(f"{n}", n, 1) for n in range(5)]


async def test_deltas_keep_their_distance_and_events_do_not_wait() -> None:
    async with bench(min_gap=0.5) as b:
        await b.publisher.emit(text("a"))
        await b.publisher.flush()
        await b.publisher.emit(wire.ToolCall(call="c", name="n", input={}))
        await b.publisher.flush()
        await b.publisher.emit(text("b"))
        await b.publisher.flush()
    first, call, second = b.log.appends
    assert call - first < 0.45
    assert second - first >= 0.499


async def test_no_setting_makes_deltas_faster_than_readers_reckon_with() -> None:
    async with bench(min_gap=0.0) as b:
        for _ in range(5):
            await b.publisher.emit(text("a"))
            await b.publisher.flush()
    gaps = [after - before for before, after in zip(b.log.appends, b.log.appends[1:], strict=False)]
    assert min(gaps) >= 0.001


async def test_text_reasoning_and_events_keep_their_order() -> None:
    async with bench() as b:
        b.log.delay = lambda: 0.01
        for event in (
            text("a"),
            text("b"),
            wire.ReasoningDelta(text="r"),
            wire.ReasoningDelta(text="s"),
            text("c"),
            wire.Data(name="d", data=1),
            text("e"),
        ):
            await b.publisher.emit(event)
        await b.publisher.flush()
        events = await b.events()
    assert [getattr(e, "text", "data") for e in events] == ["ab", "rs", "c", "data", "e"]
    assert [(e.index, e.count) for e in events if e.type != "data"] == [(0, 2), (2, 2), (4, 1), (5, 1)]


async def test_pieces_of_tool_input_are_merged_call_by_call() -> None:
    async with bench(min_gap=0.02) as b:
        await b.publisher.emit(text("a"))
        await b.publisher.flush()
        for call, name, piece in (("c1", "f", ""), ("c1", "", "{"), ("c1", "", "}"), ("c2", "g", "["), ("c2", "", "]")):
            await b.publisher.emit(wire.ToolInputDelta(call=call, name=name, text=piece))
        await b.publisher.flush()
        await b.publisher.emit(text("b"))
        await b.publisher.flush()
        _, one, two, last = await b.events()
    assert [(e.call, e.name, e.text) for e in (one, two)] == [("c1", "f", "{}"), ("c2", "g", "[]")]
    assert (last.index, last.count) == (1, 1)


async def test_a_full_buffer_holds_the_agent() -> None:
    async with bench(buffer_events=5) as b:
        b.log.delay = lambda: 0.1
        emitted: list[int] = []

        async def agent() -> None:
            for n in range(12):
                await b.publisher.emit(text(f"{n}"))
                emitted.append(n)
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as group:
            group.start_soon(agent)
            await anyio.sleep(0.05)
            assert len(emitted) == 5
        await b.publisher.flush()
        assert "".join(e.text for e in await b.events()) == "".join(f"{n}" for n in range(12))


async def test_a_token_that_counts_for_more_fills_the_buffer_for_more() -> None:
    async with bench(buffer_events=10) as b:
        b.log.delay = lambda: 0.05
        await b.publisher.emit(wire.TextDelta(text="abc", count=10))
        with anyio.move_on_after(0.02) as scope:
            await b.publisher.emit(text("d"))
        assert scope.cancelled_caught


async def test_a_long_text_is_sliced_and_counted_once() -> None:
    value = "".join(f"{n:06d}" for n in range(20_000))
    async with bench() as b:
        await b.publisher.emit(text("x"))
        await b.publisher.emit(text(value))
        await b.publisher.emit(text("y"))
        await b.publisher.flush()
        events = await b.events()
    assert "".join(e.text for e in events) == f"x{value}y"
    assert max(len(e.text) for e in events) <= 32_768
    index = 0
    for e in events:
        assert e.index == index
        index += e.count
    assert index == 3


async def test_a_text_over_a_small_brokers_limit_is_chunked_and_stays() -> None:
    async with bench(state=MemoryState(max_body=2000), max_body=2000) as b:
        await b.publisher.emit(text("é" * 5000))
        await b.publisher.flush()
        (event,) = await b.events()
        kinds = {r.kind for r, _ in await b.records()}
    assert event.text == "é" * 5000
    assert kinds == {Kind.EVENT}


async def test_what_is_changed_after_it_was_emitted_is_stored_as_it_was() -> None:
    data = {"x": 1}
    async with bench() as b:
        await b.publisher.emit(wire.Data(name="d", data=data))
        data["x"] = 2
        await b.publisher.flush()
        (event,) = await b.events()
    assert event.data == {"x": 1}
    (part,) = b.publisher.builder.message.parts
    assert isinstance(part, wire.DataPart)
    assert part.data == {"x": 1}


@pytest.mark.parametrize(
    "event",
    [
        wire.Data(name="d", data=object()),
        wire.ToolCall(call=1, name="n", input={}),
        wire.TextDelta(text=b"bytes"),
        wire.TextDelta(text="x", count=-1),
        wire.ToolInputDelta(call=None, text="x"),
    ],
    ids=lambda e: e.type,
)
async def test_what_cannot_be_stored_meets_who_emits_it(event: Any) -> None:
    async with bench() as b:
        with pytest.raises(InvalidInput):
            await b.publisher.emit(event)
        await b.publisher.emit(text("goes on"))
        await b.publisher.flush()
        assert len(await b.events()) == 1


async def test_nothing_is_taken_after_the_close_and_everything_before_it_is_stored() -> None:
    async with bench() as b:
        b.log.delay = lambda: 0.02
        for n in range(3):
            await b.publisher.emit(wire.Data(name="d", data=n))
        await b.publisher.close()
        assert [e.data for e in await b.events()] == [0, 1, 2]
        with pytest.raises(Fenced):
            await b.publisher.emit(text("late"))
        with pytest.raises(Fenced):
            b.publisher.put(wire.Data(name="d", data=9))


async def test_who_waits_for_room_in_the_buffer_is_refused_at_the_close() -> None:
    async with bench(buffer_events=1) as b:
        b.log.delay = lambda: 0.05
        refused: list[Exception] = []
        await b.publisher.emit(text("a"))

        async def agent() -> None:
            try:
                await b.publisher.emit(text("b"))
            except Fenced as error:
                refused.append(error)

        async with anyio.create_task_group() as group:
            group.start_soon(agent)
            await anyio.sleep(0.01)
            await b.publisher.close()
        assert len(refused) == 1
        assert [e.text for e in await b.events()] == ["a"]


async def test_flush_waits_for_what_was_queued_and_for_nothing_later() -> None:
    async with bench() as b, anyio.create_task_group() as group:
        b.log.delay = lambda: 0.003

        async def stream() -> None:
            while True:
                await b.publisher.emit(wire.Data(name="d", data=1))
                await anyio.lowlevel.checkpoint()

        group.start_soon(stream)
        await anyio.sleep(0.02)
        with anyio.fail_after(30):
            await b.publisher.flush()
        group.cancel_scope.cancel()


async def test_an_input_in_between_is_stepped_over_and_reported_once() -> None:
    async with bench() as b:
        await b.publisher.emit(text("a"))
        await b.publisher.flush()
        sent = await b.send()
        await b.publisher.emit(text("b"))
        await b.publisher.flush()
        record = next(r for r, _ in await b.records() if r.offset == sent.offset)
        assert b.writer.observe(record)
        records = await b.records()
    assert [r.offset for r in b.inputs] == [sent.offset]
    assert [r.offset for r, _ in records] == [3, 4, 5]
    assert str(records[-1][0].pending) == f"1a,{sent.offset}"


async def test_a_takeover_fences_with_everything_queued() -> None:
    async with bench() as b:
        tail = await b.broker.log.last("s")
        other = wire.encode(wire.TurnStarted(turn="t1", attempt=2, worker="w2", lease="l2"))
        await b.broker.log.append("s", other, kind=Kind.EVENT, after=tail, pending=tail.pending.claim(1))
        await b.publisher.emit(text("a"))
        with pytest.raises(Fenced, match="taken over at offset 3"):
            await b.publisher.flush()
        with pytest.raises(Fenced):
            await b.publisher.emit(text("b"))
        assert not b.writer.observe((await b.records())[0][0])
        assert len(await b.records()) == 1


async def test_a_deleted_session_fences() -> None:
    async with bench() as b:
        await b.broker.log.delete("s")
        await b.publisher.emit(text("a"))
        with pytest.raises(Fenced):
            await b.publisher.flush()
    async with bench() as b:
        b.log.failing = [SessionGone("gone")]
        await b.publisher.emit(text("a"))
        with pytest.raises(Fenced):
            await b.publisher.flush()


async def test_an_append_in_doubt_is_found_again_with_an_input_right_behind_it() -> None:
    stored: list[tuple[str, int]] = []
    async with bench() as b:
        b.publisher.on_stored = lambda event, offset: stored.append((event.type, offset))
        b.log.losing = 1
        sent: list[Tail] = []

        async def after_the_first() -> None:
            if len(b.log.appends) == 2 and not sent:
                sent.append(await b.send())

        b.log.before = after_the_first
        await b.publisher.emit(wire.Data(name="d", data=1))
        await b.publisher.flush()
        await b.publisher.emit(wire.Data(name="d", data=2))
        await b.publisher.flush()
        types = [e.type for _, e in await b.records()]
    assert types == ["data", "turn.requested", "data"]
    assert stored == [("data", 3), ("data", 5)]
    assert [r.offset for r in b.inputs] == [4]


async def test_the_last_word_is_thought_over_when_an_input_came_first() -> None:
    async with bench() as b:
        await b.publisher.close()
        sent = await b.send()
        body = wire.encode(wire.TurnReleased(turn="t1", attempt=1))
        assert await b.writer.try_append(body, Kind.EVENT, Pending.release) is None
        assert [r.offset for r in b.inputs] == [sent.offset]
        tail = await b.writer.try_append(body, Kind.EVENT, Pending.release)
        assert tail is not None
        assert str(tail.pending) == f"1,{sent.offset}"


async def test_deltas_of_our_own_that_expired_do_not_fence_us() -> None:
    clock = [1000.0]
    state = MemoryState(delta_ttl=10.0, clock=lambda: clock[0])
    async with bench(state=state) as b:
        await b.publisher.emit(text("a"))
        await b.publisher.flush()
        clock[0] += 60
        await b.publisher.emit(text("b"))
        await b.publisher.flush()
        records = await b.records()
    assert [(r.offset, e.text, e.index) for r, e in records] == [(4, "b", 1)]


async def test_the_message_is_kept_again_and_again_also_while_nothing_is_said() -> None:
    async with bench(checkpoint_after=0.05) as b:
        await b.publisher.emit(text("a"))
        await anyio.sleep(0.13)
        await b.publisher.emit(text("b"))
        await anyio.sleep(0.06)
        await b.publisher.close()
        said = [e.message.text for e in await b.events() if isinstance(e, wire.TurnCheckpoint)]
    assert said[:2] == ["a", "a"]
    assert said[-1] == "ab"


def test_a_busy_worker_keeps_to_the_tick_and_an_idle_one_does_not() -> None:
    pacer = Pacer(0.005, above=100)
    assert pacer.delay(10.0) == 0.0
    for n in range(30):
        pacer.delay(10.0 + n / 1000)
    wait = pacer.delay(10.2512)
    assert 0 < wait <= 0.005
    assert (10.2512 + wait) / 0.005 == pytest.approx(round((10.2512 + wait) / 0.005))
    assert pacer.delay(10.6) == 0.0


# ------------------------------------------------------------------------------------------------------- any sequence

emits = st.one_of(
    st.text("ab é😀", min_size=1, max_size=6).map(lambda v: ("text", v)),
    st.text("rs", min_size=1, max_size=3).map(lambda v: ("reasoning", v)),
    st.text("{}", min_size=1, max_size=3).map(lambda v: ("tool", v)),
    st.integers(0, 9).map(lambda v: ("data", v)),
    st.just(("sleep", 0)),
    st.just(("send", 0)),
    st.just(("lose", 0)),
)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(emits, max_size=40),
    delays=st.lists(st.sampled_from([0.0, 0.001, 0.004]), min_size=1, max_size=8),
    limit=st.sampled_from([1, 3, 4096]),
)
def test_whatever_is_emitted_is_stored_once_in_order(
    steps: list[tuple[str, Any]], delays: list[float], limit: int
) -> None:
    anyio.run(_stored_once_in_order, steps, delays, limit)


async def _stored_once_in_order(steps: list[tuple[str, Any]], delays: list[float], limit: int) -> None:
    said: list[tuple[str, Any]] = []
    async with bench(buffer_events=limit, max_body=1_000_000) as b:
        turn = iter(delays * 100)
        b.log.delay = lambda: next(turn, 0.0)
        for what, value in steps:
            match what:
                case "text":
                    await b.publisher.emit(text(value))
                case "reasoning":
                    await b.publisher.emit(wire.ReasoningDelta(text=value))
                case "tool":
                    await b.publisher.emit(wire.ToolInputDelta(call="c", text=value))
                case "data":
                    await b.publisher.emit(wire.Data(name="d", data=value))
                case "sleep":
                    await anyio.sleep(0.002)
                case "send":
                    await b.send()
                case _:
                    b.log.losing += 1
            if what in ("text", "reasoning", "tool", "data"):
                said.append((what, value))
        await b.publisher.close()
        records = await b.records()
    assert [r.offset for r, _ in records] == list(range(3, 3 + len(records)))
    assert _merged(said) == _merged([_told(e) for r, e in records if not r.kind.input])
    index = 0
    for _, event in records:
        if isinstance(event, (wire.TextDelta, wire.ReasoningDelta)):
            assert event.index == index
            index += event.count
    assert index == sum(what in ("text", "reasoning") for what, _ in said)
    assert b.publisher.builder.message.text == "".join(value for what, value in said if what == "text")
    found = [r.offset for r in b.inputs]
    assert found == sorted(set(found))


def _told(event: Any) -> tuple[str, Any]:
    match event:
        case wire.TextDelta():
            return "text", event.text
        case wire.ReasoningDelta():
            return "reasoning", event.text
        case wire.ToolInputDelta():
            return "tool", event.text
        case _:
            return "data", event.data


def _merged(said: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for what, value in said:
        if out and what != "data" and out[-1][0] == what:
            out[-1] = (what, out[-1][1] + value)
        else:
            out.append((what, value))
    return out
