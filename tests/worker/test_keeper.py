"""Leases are kept whatever an agent does to the event loop, but not for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.to_thread
import pytest

from agentrun import wire
from agentrun.agent import Context, agent
from agentrun.brokers.memory import MemoryBroker
from agentrun.brokers.memory_state import MemoryState
from agentrun.keeper import Keeper
from agentrun.testing import Environment, Environments, Settings
from tests.worker.fleet import LEASE, Fleet, eventually, fleet_on


def blocking(seconds: float, runs: list[int]) -> Any:
    @agent(name="block")
    async def block(ctx: Context) -> AsyncIterator[str]:
        runs.append(ctx.attempt)
        yield "a"
        await anyio.sleep(0.05)
        if ctx.attempt == 1:
            time.sleep(seconds)  # noqa: ASYNC251 - that is the point
        yield "b"

    return block


def in_another_loop(state: MemoryState, found: list[Any], stop: threading.Event) -> None:
    """Another worker's view: does the queue give the session's input out again?"""

    async def look() -> None:
        async with MemoryBroker(state=state) as broker:
            while not stop.is_set():
                with state.lock:
                    found.append([item.due - state.clock() for item in state.agents["block"].items.values()])
                await anyio.sleep(0.05)
                assert broker.capabilities

    anyio.run(look)


async def test_a_blocked_loop_keeps_its_leases_and_is_reported(
    memory_fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    runs: list[int] = []
    due: list[list[float]] = []
    stop = threading.Event()
    await memory_fleet.worker(blocking(4 * LEASE, runs), block_report=0.3)
    state = memory_fleet.environment.state
    watcher = threading.Thread(target=in_another_loop, args=(state, due, stop))
    turn = await memory_fleet.session(agent="block").send("x")
    await memory_fleet.until("text.delta")
    watcher.start()
    result = await turn.result(10)
    stop.set()
    watcher.join()
    assert (result.text, result.attempt, runs) == ("ab", 1, [1])
    assert len([d for d in due if d]) > 10
    assert min(min(d) for d in due if d) > 0
    reports = [r.getMessage() for r in caplog.records if "event loop has been blocked" in r.getMessage()]
    assert len(reports) == 1
    assert "time.sleep(seconds)" in reports[0]


async def test_a_loop_blocked_for_too_long_loses_its_turn(
    nats_environments: Environments, caplog: pytest.LogCaptureFixture
) -> None:
    """The one that takes over works in another process, as far as the broker can tell: its loop is not blocked."""
    runs: list[int] = []
    block = blocking(5 * LEASE, runs)
    taken: list[wire.AnyEvent] = []

    async def another(environment: Environment) -> None:
        async with fleet_on(environment) as fleet:
            await fleet.worker(block)
            taken.append(wire.decode((await fleet.until("turn.completed")).body))

    async with nats_environments(Settings(lease_ttl=LEASE)) as environment, fleet_on(environment) as fleet:
        await fleet.worker(block, block_report=0.2, block_limit=LEASE)
        turn = await fleet.session(agent="block").send("x")
        await fleet.until("text.delta")
        await anyio.to_thread.run_sync(anyio.run, another, environment)
        assert (await turn.result(5)).attempt == 2
    (end,) = taken
    assert isinstance(end, wire.TurnCompleted)
    assert (end.attempt, runs) == (2, [1, 2])
    assert "given up" in caplog.text


class Held:
    """A lease that counts."""

    session = "s"

    def __init__(self, *, broken: bool = False) -> None:
        self.extended = 0
        self.broken = broken

    def extend(self) -> None:
        self.extended += 1
        if self.broken:
            raise OSError("gone")


async def test_leases_are_extended_while_they_are_held() -> None:
    one, broken = Held(), Held(broken=True)
    with Keeper(0.02, report=5.0, limit=5.0) as keeper:
        keeper.hold(broken)
        keeper.hold(one)
        await eventually(lambda: one.extended > 3 and broken.extended > 3)
        keeper.drop(one)
        await anyio.sleep(0.05)
        count = one.extended
        await anyio.sleep(0.1)
        assert one.extended == count


async def test_nothing_is_extended_past_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    one = Held()
    with Keeper(0.02, report=0.05, limit=0.3) as keeper:
        keeper.hold(one)
        await anyio.sleep(0.1)
        time.sleep(0.3)  # noqa: ASYNC251 - that is the point
        at_limit = one.extended
        time.sleep(0.3)  # noqa: ASYNC251
        assert one.extended <= at_limit + 1
        assert keeper.blocked == 1
        before = one.extended
        await eventually(lambda: one.extended > before + 2)
    assert "given up" in caplog.text


async def test_a_blocked_worker_on_a_real_broker_keeps_its_turn(fleet: Fleet) -> None:
    runs: list[int] = []
    await fleet.worker(blocking(3 * LEASE, runs), block_report=5.0)
    result = await (await fleet.session(agent="block").send("x")).result(10)
    assert (result.attempt, runs) == (1, [1])
    assert [e.attempt for e in await fleet.events() if isinstance(e, wire.TurnStarted)] == [1]
