"""A turn sent into a session that has work: interrupt, rollback, steer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.lowlevel

from agentrun import wire
from agentrun.agent import Context, agent
from tests.worker.fleet import Fleet

seen: list[list[dict[str, Any]]] = []


@agent(name="talk")
async def talk(ctx: Context) -> AsyncIterator[str]:
    yield f"<{ctx.text}>"
    if ctx.text.startswith("long"):
        await anyio.sleep(60)
    ctx.request.metadata["messages"] = ctx.messages
    seen.append(ctx.messages)


async def ends(fleet: Fleet) -> list[tuple[str, str]]:
    return [(e.turn, e.type) for e in await fleet.events() if isinstance(e, wire.TERMINAL)]


async def test_interrupt_stops_everything_sent_before_it_and_runs_next(fleet: Fleet) -> None:
    await fleet.worker(talk)
    await fleet.worker(talk)
    session = fleet.session(agent="talk")
    await session.send("long", id="t1")
    await session.send("y", id="t2")
    await fleet.until("text.delta")
    interrupting = await session.send("now", id="t3", on_busy="interrupt")
    behind = await session.send("later", id="t4")
    assert (await interrupting.result(5)).text == "<now>"
    await behind.result(5)
    assert await ends(fleet) == [
        ("t1", "turn.cancelled"),
        ("t2", "turn.cancelled"),
        ("t3", "turn.completed"),
        ("t4", "turn.completed"),
    ]
    first = next(e for e in await fleet.events() if isinstance(e, wire.TurnCancelled))
    assert (first.by, first.reason, first.rolled_back, first.message.text) == ("t3", "interrupt", False, "<long>")
    assert {"role": "assistant", "content": "<long>"} in seen[-1]


async def test_rollback_takes_what_it_stopped_out_of_the_history(fleet: Fleet) -> None:
    await fleet.worker(talk)
    session = fleet.session(agent="talk")
    await (await session.send("first", id="t1")).result(5)
    await session.send("long", id="t2")
    await fleet.until(lambda e: isinstance(e, wire.TextDelta) and e.turn == "t2")
    turn = await session.send("instead", id="t3", on_busy="rollback")
    await turn.result(5)
    stopped = next(e for e in await fleet.events() if isinstance(e, wire.TurnCancelled))
    assert (stopped.turn, stopped.rolled_back, stopped.reason) == ("t2", True, "rollback")
    assert seen[-1] == [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "<first>"},
        {"role": "user", "content": "instead"},
    ]


async def test_a_running_turn_is_stopped_and_replaced(fleet: Fleet) -> None:
    await fleet.worker(talk)
    session = fleet.session(agent="talk")
    await (await session.send("first", id="t1")).result(5)
    await session.send("long", id="t2")
    await fleet.until(lambda e: isinstance(e, wire.TextDelta) and e.turn == "t2")
    turn = await session.send("short", id="t3", on_busy="interrupt", replaces="t2")
    await turn.result(5)
    assert await ends(fleet) == [("t1", "turn.completed"), ("t2", "turn.cancelled"), ("t3", "turn.completed")]
    assert seen[-1] == [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "<first>"},
        {"role": "user", "content": "short"},
    ]


async def test_a_turn_that_is_only_replaced_goes_on(fleet: Fleet) -> None:
    await fleet.worker(steered(True))
    session = fleet.session(agent="talk")
    turn = await session.send("go", id="t1")
    await fleet.until("text.delta")
    behind = await session.send("instead", id="t2", replaces="t1")
    await turn.steer("stop", id="t3")
    assert (await turn.result(5)).text == "<go>+stop"
    assert (await behind.result(5)).text == "<instead>"
    assert (await session.history()).messages() == [
        {"role": "user", "content": "instead"},
        {"role": "assistant", "content": "<instead>"},
    ]


async def test_an_interrupt_ends_a_suspended_turn(fleet: Fleet) -> None:
    @agent(name="talk")
    async def asks(ctx: Context) -> AsyncIterator[str]:
        if ctx.text == "ask":
            await ctx.approve("sure?")
        yield "done"

    await fleet.worker(asks, ask_hold=0.05)
    session = fleet.session(agent="talk")
    await session.send("ask", id="t1")
    await session.send("waits", id="t2")
    await fleet.until("turn.suspended")
    turn = await session.send("now", id="t3", on_busy="interrupt")
    await turn.result(5)
    assert await ends(fleet) == [("t1", "turn.cancelled"), ("t2", "turn.cancelled"), ("t3", "turn.completed")]
    assert (await fleet.broker.log.last("s")).pending == ()


async def test_an_interrupt_while_nobody_runs(fleet: Fleet) -> None:
    session = fleet.session(agent="talk")
    await session.send("a", id="t1")
    await session.send("b", id="t2", on_busy="interrupt")
    await fleet.worker(talk)
    await fleet.until("turn.completed")
    assert await ends(fleet) == [("t1", "turn.cancelled"), ("t2", "turn.completed")]


async def test_interrupts_of_different_agents_keep_the_order(fleet: Fleet) -> None:
    @agent(name="other")
    async def other(ctx: Context) -> AsyncIterator[str]:
        yield f"<{ctx.text}>"

    await fleet.worker(talk)
    await fleet.worker(other)
    session = fleet.session()
    await session.send("long", id="t1", agent="talk")
    await fleet.until("text.delta")
    await session.send("b", id="t2", agent="other", on_busy="interrupt")
    last = await session.send("c", id="t3", agent="talk")
    await last.result(5)
    assert await ends(fleet) == [("t1", "turn.cancelled"), ("t2", "turn.completed"), ("t3", "turn.completed")]


def steered(takes: bool) -> Any:
    @agent(name="talk")
    async def steer(ctx: Context) -> AsyncIterator[str]:
        yield f"<{ctx.text}>"
        if ctx.text != "go":
            return
        for _ in range(100):
            await anyio.sleep(0.01)
            for text in await ctx.steering() if takes else ():
                yield f"+{text}"
                if text == "stop":
                    return
            if not takes and len(seen) > 0:
                return

    return steer


async def test_steering_that_is_taken_ends_with_the_turn_that_took_it(fleet: Fleet) -> None:
    await fleet.worker(steered(True))
    session = fleet.session(agent="talk")
    turn = await session.send("go", id="t1")
    await fleet.until("text.delta")
    steer = await turn.steer("left", id="t2")
    assert await steer.consumed_by(5) == "t1"
    waits = await session.send("waits", id="t3")
    await turn.steer("stop", id="t4")
    assert (await turn.result(5)).text == "<go>+left+stop"
    await waits.result(5)
    consumed = [(e.turn, e.steer, e.offset) for e in await fleet.events() if isinstance(e, wire.SteerConsumed)]
    assert consumed == [("t1", "t2", steer.offset), ("t1", "t4", consumed[1][2])]
    assert await ends(fleet) == [("t1", "turn.completed"), ("t3", "turn.completed")]
    await anyio.sleep(0.8)
    assert (await fleet.broker.log.last("s")).pending == ()
    views = (await session.history()).turns
    assert views["t2"].state == "consumed"


async def test_steering_that_nobody_takes_runs_in_its_turn(fleet: Fleet) -> None:
    seen.clear()
    await fleet.worker(steered(False))
    session = fleet.session(agent="talk")
    turn = await session.send("go", id="t1")
    await fleet.until("text.delta")
    steer = await turn.steer("left", id="t2")
    await session.send("last", id="t3")
    seen.append([])
    assert await steer.consumed_by(5) is None
    assert (await steer.result(5)).text == "<left>"
    await fleet.until("turn.completed", times=3)
    assert [t for t, _ in await ends(fleet)] == ["t1", "t2", "t3"]


async def test_two_takers_of_steering_get_each_input_once(memory_fleet: Fleet) -> None:
    got: list[str] = []

    @agent(name="talk")
    async def steer(ctx: Context) -> None:
        await ctx.emit("a")

        async def take() -> None:
            while len(got) < 3:
                got.extend(await ctx.steering())
                await anyio.sleep(0.001)

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(take)

    await memory_fleet.worker(steer)
    turn = await memory_fleet.session(agent="talk").send("go")
    await memory_fleet.until("text.delta")
    for n in range(3):
        await turn.steer(f"{n}")
    await turn.result(5)
    assert got == ["0", "1", "2"]


async def test_steering_is_taken_while_another_part_of_the_agent_streams(memory_fleet: Fleet) -> None:
    """What waits for one record to be stored does not wait for the stream to pause."""

    @agent(name="talk")
    async def steer(ctx: Context) -> None:
        async def stream() -> None:
            while True:
                await ctx.emit("a")
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as group:
            group.start_soon(stream)
            while not await ctx.steering():  # noqa: ASYNC110 - it asks, as agents do
                await anyio.sleep(0.001)
            group.cancel_scope.cancel()

    await memory_fleet.worker(steer)
    turn = await memory_fleet.session(agent="talk").send("go")
    await memory_fleet.until("text.delta")
    await turn.steer("stop")
    await turn.result(5)
