"""A worker that is asked to end does so, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import AsyncIterator

import anyio
import pytest

from agentrun import wire
from agentrun.agent import Context, agent
from agentrun.errors import TurnFailed
from tests.worker.fleet import QUICK, Fleet, eventually


@agent(name="talk", resume=True)
async def talk(ctx: Context) -> AsyncIterator[str]:
    said = len(ctx.partial.text.split()) if ctx.partial is not None else 0
    for n in range(said, 20):
        yield f"{n} "
        await anyio.sleep(0.02)


async def test_running_turns_end_and_no_new_ones_are_taken(fleet: Fleet) -> None:
    worker = await fleet.worker(talk)
    turn = await fleet.session(agent="talk").send("x")
    await fleet.until("text.delta")
    worker.worker.drain()
    assert worker.worker.info.draining
    later = await fleet.session("other", "talk").send("x")
    behind = await fleet.session(agent="talk").send("y")
    with anyio.fail_after(20):
        await worker.ended.wait()
    assert (await turn.result(1)).attempt == 1
    await anyio.sleep(0.2)
    assert await fleet.types("other") == []
    await fleet.worker(talk)
    await later.result(5)
    await behind.result(5)


async def test_what_is_not_over_in_time_is_handed_back_uncharged(fleet: Fleet) -> None:
    first = await fleet.worker(talk, drain=0.1, max_attempts=1)
    turn = await fleet.session(agent="talk").send("x")
    await fleet.until("text.delta", times=3)
    await first.drain()
    assert (await fleet.types())[-1] == "turn.released"
    released = (await fleet.records())[-1][0]
    assert str(released.pending) == f"{turn.offset}"
    await fleet.worker(talk, max_attempts=1)
    with anyio.fail_after(2):
        result = await turn.result()
    assert result.attempt == 2
    assert result.text.split() == [str(n) for n in range(20)]
    texts = "".join(e.text for e in await fleet.events() if isinstance(e, wire.TextDelta))
    assert texts == result.text


async def test_a_second_request_hands_back_at_once(fleet: Fleet) -> None:
    worker = await fleet.worker(talk, drain=60.0)
    await fleet.session(agent="talk").send("x")
    await fleet.until("text.delta")
    worker.worker.drain()
    await anyio.sleep(0.05)
    worker.worker.stop()
    with anyio.fail_after(2):
        await worker.ended.wait()
    assert (await fleet.types())[-1] == "turn.released"


async def test_an_idle_worker_ends_at_once(fleet: Fleet) -> None:
    worker = await fleet.worker(talk)
    worker.worker.drain()
    with anyio.fail_after(1):
        await worker.ended.wait()


async def test_a_stop_during_the_drain_ends_the_turn(fleet: Fleet) -> None:
    worker = await fleet.worker(talk)
    turn = await fleet.session(agent="talk").send("x")
    await fleet.until("text.delta")
    worker.worker.drain()
    assert (await turn.cancel()).status == "cancelled"
    with anyio.fail_after(2):
        await worker.ended.wait()


async def test_no_thread_and_no_agent_is_left(memory_fleet: Fleet) -> None:
    ended: list[bool] = []

    @agent(name="talk")
    async def shielded(ctx: Context) -> AsyncIterator[str]:
        try:
            yield "a"
            await anyio.sleep(60)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.8)
                ended.append(True)

    worker = await memory_fleet.worker(shielded, drain=0.05, cancel_grace=0.1)
    await memory_fleet.session(agent="talk").send("x")
    await memory_fleet.until("text.delta")
    assert [t for t in threading.enumerate() if t.name == "agentrun-keeper"]
    await worker.drain()
    assert ended == [True]
    assert not [t for t in threading.enumerate() if t.name == "agentrun-keeper"]


@pytest.mark.parametrize("twice", [False, True], ids=["drain", "now"])
async def test_the_signals_of_a_process(memory_fleet: Fleet, twice: bool) -> None:
    from agentrun.worker import Worker

    release = anyio.Event()

    @agent(name="talk")
    async def waits(ctx: Context) -> AsyncIterator[str]:
        yield "a"
        await release.wait()

    worker = Worker(memory_fleet.broker, [waits], settings=QUICK)
    async with anyio.create_task_group() as group:
        group.start_soon(worker.serve)
        turn = await memory_fleet.session(agent="talk").send("x")
        await memory_fleet.until("text.delta")
        os.kill(os.getpid(), signal.SIGTERM)
        await eventually(lambda: worker.info.draining)
        if twice:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            release.set()
    assert (await memory_fleet.types())[-1] == ("turn.released" if twice else "turn.completed")
    assert turn.id


async def test_a_worker_whose_agents_fail_goes_on(memory_fleet: Fleet) -> None:
    @agent(name="talk")
    async def fails(ctx: Context) -> None:
        if ctx.text == "bad":
            raise MemoryError

    worker = await memory_fleet.worker(fails, max_attempts=1)
    with pytest.raises(TurnFailed):
        await (await memory_fleet.session("a", "talk").send("bad")).result(5)
    await (await memory_fleet.session("b", "talk").send("good")).result(5)
    assert not worker.ended.is_set()
