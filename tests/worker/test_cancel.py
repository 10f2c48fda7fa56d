"""P5: a stop works wherever the turn is, and says so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import anyio
import anyio.to_thread
import msgspec
import pytest

from agentrun import wire
from agentrun.agent import Context, agent
from agentrun.broker import Kind
from agentrun.errors import Retry
from tests.worker.fleet import Fleet, Part, Wrapped, eventually


async def ending(fleet: Fleet, session: str = "s") -> wire.AnyEvent:
    return (await fleet.events(session))[-1]


@agent(name="talk")
async def talk(ctx: Context) -> AsyncIterator[str]:
    for n in range(1000):
        yield f"{n} "
        await anyio.sleep(0.01)


@agent(name="talk")
async def mute(ctx: Context) -> None:
    await anyio.sleep(60)


@agent(name="talk")
async def slow_start(ctx: Context) -> AsyncIterator[str]:
    await anyio.sleep(60)
    yield "never"


@pytest.mark.parametrize("shape", [talk, mute, slow_start], ids=["in-mid-stream", "silent", "before-the-first-token"])
async def test_a_running_turn_is_stopped_live_with_a_receipt(fleet: Fleet, shape: object) -> None:
    await fleet.worker(shape)
    turn = await fleet.session(agent="talk").send("x")
    await fleet.until("turn.started")
    await anyio.sleep(0.1)
    receipt = await turn.cancel(by="me", reason="enough")
    records = await fleet.records()
    last, event = records[-1]
    assert isinstance(event, wire.TurnCancelled)
    assert (event.by, event.reason, event.rolled_back) == ("me", "enough", False)
    assert (receipt.status, receipt.offset) == ("cancelled", last.offset)
    assert last.pending == ()
    said = "".join(e.text for _, e in records if isinstance(e, wire.TextDelta))
    assert event.message.text == said
    assert not [e for _, e in records if isinstance(e, wire.TurnCancel)]
    await anyio.sleep(0.8)
    assert await fleet.types() == [e.type for r, e in records if not r.kind.input]


async def test_the_reply_comes_when_the_end_is_stored(fleet: Fleet) -> None:
    await fleet.worker(talk)
    await fleet.session(agent="talk").send("x", id="t1")
    await fleet.until("turn.started")
    await anyio.sleep(0.05)
    body = wire.encode(wire.TurnCancel(turn="t1", by="me"))
    reply = msgspec.json.decode(await fleet.broker.signals.request("s.s", body, timeout=3), type=wire.CancelReply)
    tail = await fleet.broker.log.last("s")
    assert (reply.receipt, reply.offset) == ("cancelled", tail.offset)


async def test_a_stored_stop_reaches_the_running_worker(fleet: Fleet) -> None:
    await fleet.worker(talk)
    turn = await fleet.session(agent="talk").send("x")
    await fleet.until("text.delta")
    await fleet.append(wire.TurnCancel(turn=turn.id, by="me"), kind=Kind.CANCEL)
    record = await fleet.until("turn.cancelled")
    assert record.pending == ()


async def test_a_stop_of_a_waiting_turn_is_carried_out_by_the_owner_at_once(fleet: Fleet) -> None:
    await fleet.worker(talk)
    session = fleet.session(agent="talk")
    running = await session.send("x")
    waiting = await session.send("y")
    await fleet.until("text.delta")
    receipt = await waiting.cancel(by="me")
    assert receipt.status == "cancelled"
    assert receipt.took < 2.0
    event = next(e for e in await fleet.events() if isinstance(e, wire.TurnCancelled))
    assert (event.turn, event.by) == (waiting.id, "me")
    assert (await session.history()).turns[running.id].state == "running"
    assert str((await fleet.broker.log.last("s")).pending) == f"{running.offset}a"
    await running.cancel()


async def test_a_stored_stop_of_a_waiting_turn_is_carried_out_by_the_owner(fleet: Fleet) -> None:
    await fleet.worker(talk)
    session = fleet.session(agent="talk")
    running = await session.send("x")
    waiting = await session.send("y")
    await fleet.until("text.delta")
    await fleet.append(wire.TurnCancel(turn=waiting.id), kind=Kind.CANCEL)
    await fleet.until("turn.cancelled")
    assert (await session.history()).turns[running.id].state == "running"
    await running.cancel()


async def test_a_turn_stopped_before_any_worker_came_never_runs(fleet: Fleet) -> None:
    ran: list[str] = []

    @agent(name="talk")
    async def count(ctx: Context) -> None:
        ran.append(ctx.text)

    session = fleet.session(agent="talk")
    first = await session.send("x")
    second = await session.send("y")
    await fleet.append(wire.TurnCancel(turn=first.id), kind=Kind.CANCEL)
    await fleet.worker(count)
    await second.result(5)
    assert ran == ["y"]
    assert await fleet.types() == ["turn.cancelled", "turn.started", "turn.completed"]


async def test_a_tool_in_a_thread_is_not_waited_for(fleet: Fleet) -> None:
    ended: list[float] = []

    def tool() -> None:
        time.sleep(1.5)
        ended.append(time.monotonic())

    @agent(name="talk")
    async def threaded(ctx: Context) -> AsyncIterator[str]:
        yield "a"
        await anyio.to_thread.run_sync(tool)
        yield "b"

    await fleet.worker(threaded)
    turn = await fleet.session(agent="talk").send("x")
    await fleet.until("text.delta")
    receipt = await turn.cancel()
    assert (receipt.status, ended) == ("cancelled", [])
    await eventually(lambda: bool(ended))
    await anyio.sleep(0.1)
    end = await ending(fleet)
    assert isinstance(end, wire.TurnCancelled)
    assert end.message.text == "a"


async def test_an_agent_that_swallows_its_cancellation_meets_it_again(fleet: Fleet) -> None:
    swallowed: list[int] = []

    @agent(name="talk")
    async def stubborn(ctx: Context) -> None:
        await ctx.emit("a")
        while len(swallowed) < 3:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                swallowed.append(1)
        await asyncio.sleep(60)

    await fleet.worker(stubborn)
    turn = await fleet.session(agent="talk").send("x")
    await fleet.until("text.delta")
    receipt = await turn.cancel()
    assert (receipt.status, len(swallowed)) == ("cancelled", 3)


async def test_a_turn_ends_although_its_agent_never_does(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    release = anyio.Event()
    refused: list[type[BaseException]] = []

    async def until_released(ctx: Context) -> None:
        with anyio.CancelScope(shield=True):
            while not release.is_set():
                await anyio.sleep(0.02)
                for what in (ctx.emit("late"), ctx.ask("late?"), ctx.steering()):
                    try:
                        await what
                    except Exception as error:
                        refused.append(type(error))

    @agent(name="talk")
    async def never(ctx: Context) -> None:
        await ctx.emit("a")
        if ctx.text == "x":
            try:
                await anyio.sleep(60)
            finally:
                await until_released(ctx)

    await fleet.worker(never)
    session = fleet.session(agent="talk")
    turn = await session.send("x")
    await fleet.until("text.delta")
    before = time.monotonic()
    receipt = await turn.cancel()
    assert receipt.status == "cancelled"
    assert 0.25 < time.monotonic() - before < 2.0
    count = len(refused)
    await (await session.send("y")).result(5)
    await anyio.sleep(0.1)
    assert len(refused) > count
    assert {e.__name__ for e in refused} == {"Fenced"}
    assert (await fleet.types()) == [
        "turn.started",
        "text.delta",
        "turn.cancelled",
        "turn.started",
        "text.delta",
        "turn.completed",
    ]
    assert "swallows cancellation" in caplog.text
    release.set()


async def test_a_cleanup_that_takes_its_time_is_waited_for(memory_fleet: Fleet) -> None:
    cleaned: list[bool] = []

    @agent(name="talk")
    async def careful(ctx: Context) -> AsyncIterator[str]:
        try:
            yield "a"
            await anyio.sleep(60)
        finally:
            with anyio.move_on_after(1, shield=True):
                await anyio.sleep(0.1)
                cleaned.append(True)

    await memory_fleet.worker(careful)
    turn = await memory_fleet.session(agent="talk").send("x")
    await memory_fleet.until("text.delta")
    await turn.cancel()
    assert cleaned == [True]


async def test_a_stop_right_after_the_end_makes_no_second_one(fleet: Fleet) -> None:
    @agent(name="talk")
    async def short(ctx: Context) -> AsyncIterator[str]:
        yield "a"

    await fleet.worker(short)
    turn = await fleet.session(agent="talk").send("x")
    end = await fleet.until("turn.completed")
    receipt = await turn.cancel()
    assert (receipt.status, receipt.offset) == ("already_ended", end.offset)
    await fleet.append(wire.TurnCancel(turn=turn.id), kind=Kind.CANCEL)
    await anyio.sleep(0.3)
    assert (await fleet.types()) == ["turn.started", "text.delta", "turn.completed"]


async def test_stops_at_any_moment_of_short_turns_never_make_two_ends(fleet: Fleet) -> None:
    @agent(name="talk")
    async def short(ctx: Context) -> AsyncIterator[str]:
        for _ in range(3):
            yield "a"
            await anyio.sleep(0.004)

    await fleet.worker(short, concurrency=20)
    seen: dict[str, int] = {}

    async def one(n: int) -> None:
        turn = await fleet.session(f"s{n}", "talk").send("x")
        await anyio.sleep(0.01 * n)
        receipt = await turn.cancel()
        seen[receipt.status] = seen.get(receipt.status, 0) + 1
        events = await fleet.events(f"s{n}")
        ends = [e for e in events if isinstance(e, wire.TERMINAL)]
        assert len(ends) == 1
        assert isinstance(ends[0], wire.TurnCancelled) == (receipt.status == "cancelled")

    async with anyio.create_task_group() as group:
        for n in range(20):
            group.start_soon(one, n)
    assert set(seen) == {"cancelled", "already_ended"}


async def test_the_second_stop_of_a_waiting_turn_finds_it_ended(fleet: Fleet) -> None:
    """Also where the worker that ended it, busy with the turn before it, is still there to be asked."""
    await fleet.worker(talk)
    session = fleet.session(agent="talk")
    running, waiting = [await session.send("x") for _ in range(2)]
    await fleet.until("text.delta")
    first = await waiting.cancel(by="me")
    again = await waiting.cancel(by="me")
    assert (first.status, again.status) == ("cancelled", "already_ended")
    assert first.offset == again.offset
    assert (await running.cancel()).status == "cancelled"


async def test_all_turns_of_a_session_are_stopped_together(fleet: Fleet) -> None:
    await fleet.worker(talk)
    session = fleet.session(agent="talk")
    turns = [await session.send("x") for _ in range(4)]
    await fleet.until("text.delta")
    receipt = await session.cancel(by="me")
    assert receipt.status == "cancelled"
    views = (await session.history()).turns
    assert [views[t.id].state for t in turns] == ["cancelled"] * 4
    assert (await fleet.broker.log.last("s")).pending == ()


async def test_all_is_stored_where_nobody_listens(fleet: Fleet) -> None:
    session = fleet.session(agent="talk")
    turns = [await session.send("x") for _ in range(3)]
    await fleet.append(wire.TurnCancel(all=True, by="me"), kind=Kind.CANCEL)
    later = await session.send("y")
    await fleet.worker(talk)
    await fleet.until("text.delta")
    views = (await session.history()).turns
    assert [views[t.id].state for t in (*turns, later)] == ["cancelled"] * 3 + ["running"]
    await later.cancel()


@pytest.mark.parametrize("word", ["turn.suspended", "turn.retrying", "turn.released"])
async def test_a_stop_while_the_last_word_is_on_its_way_is_not_lost(memory_fleet: Fleet, word: str) -> None:
    # The owner's compare-and-append finds the stop. Nobody else would obey it, or not for a long time.
    found: list[str] = []

    class Log(Part):
        async def append(self, session: str, body: bytes, **args: object) -> object:
            if f'"{word}"'.encode() in body and not found:
                found.append(word)
                await memory_fleet.append(wire.TurnCancel(turn="t1", by="me"), kind=Kind.CANCEL)
            return await self.inner.append(session, body, **args)

    @agent(name="talk")
    async def asks(ctx: Context) -> None:
        if word == "turn.retrying":
            raise Retry(after=30.0)
        await ctx.ask("sure?", hold=0.05 if word == "turn.suspended" else 60.0)

    worker = await memory_fleet.worker(asks, drain=0.05, wrap=lambda b: Wrapped(b, log=Log(b.log)))
    await memory_fleet.session(agent="talk").send("x", id="t1")
    await memory_fleet.until("turn.started")
    if word == "turn.released":
        await worker.drain()
    await memory_fleet.until("turn.cancelled")
    assert found == [word]
    assert word not in await memory_fleet.types()


@pytest.mark.parametrize("seen", ["by-watch", "by-conflict"])
async def test_an_input_is_acted_on_once_whichever_way_it_is_found(memory_fleet: Fleet, seen: str) -> None:
    """By the watch while the agent is silent; by an append that conflicts while the watch is late."""

    class Late(Part):
        def follow(self, *args: object, **options: object) -> object:
            return _late(self.inner.follow(*args, **options), 0.0 if seen == "by-watch" else 0.5)

    session = memory_fleet.session(agent="talk")
    await memory_fleet.worker(mute if seen == "by-watch" else talk, wrap=lambda b: Wrapped(b, log=Late(b.log)))
    running = await session.send("x")
    await memory_fleet.until("turn.started")
    waiting = [await session.send(f"{n}") for n in range(3)]
    for turn in waiting:
        await memory_fleet.append(wire.TurnCancel(turn=turn.id), kind=Kind.CANCEL)
    await memory_fleet.until("turn.cancelled", times=3)
    await anyio.sleep(0.7)
    cancelled = [e.turn for e in await memory_fleet.events() if isinstance(e, wire.TurnCancelled)]
    assert cancelled == [t.id for t in waiting]
    await memory_fleet.append(wire.TurnCancel(turn=running.id), kind=Kind.CANCEL)
    await memory_fleet.until("turn.cancelled", times=4)


def _late(context: object, seconds: float) -> object:
    from contextlib import asynccontextmanager

    @asynccontextmanager
    async def follow() -> AsyncIterator[object]:
        async with context as batches:

            async def held() -> AsyncIterator[object]:
                async for batch in batches:
                    await anyio.sleep(seconds)
                    yield batch

            yield held()

    return follow()


async def test_signals_that_are_no_stop_are_let_pass(memory_fleet: Fleet) -> None:
    await memory_fleet.worker(talk)
    turn = await memory_fleet.session(agent="talk").send("x")
    await memory_fleet.until("turn.started")
    bodies: list[Callable[[], bytes]] = [
        lambda: b"nonsense",
        lambda: wire.encode(wire.TurnAnswer(turn=turn.id, request="r", value=1)),
        lambda: wire.encode(wire.TurnCancel(turn="unknown")),
        lambda: wire.encode(wire.TurnCancel()),
    ]
    for body in bodies:
        assert await memory_fleet.broker.signals.gather("s.s", body(), wait=0.2) == []
    assert (await memory_fleet.session().history()).turns[turn.id].state == "running"
    await turn.cancel()
