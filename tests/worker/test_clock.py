"""The wall clock of a worker's machine is set while turns are under way: the broker's counts, and nothing is late."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable

import anyio
import pytest

from agentrun import wire
from agentrun.agent import Context, agent
from agentrun.errors import Retry, TurnFailed
from tests.worker.fleet import Fleet

HOUR = 3600.0
SetClock = Callable[[float], None]


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> SetClock:
    """Set the wall clock of this process, by some seconds; its brokers have clocks of their own."""
    real = time.time
    return lambda seconds: monkeypatch.setattr(time, "time", lambda: real() + seconds)


@agent(name="talk", resume=True)
async def talk(ctx: Context) -> AsyncIterator[str]:
    yield f"{ctx.attempt} "
    if ctx.text == "retry" and ctx.attempt == 1:
        raise Retry(after=0.3)
    if ctx.text == "ask":
        await ctx.ask("sure?", deadline=0.5)
    if ctx.text == "long" and ctx.attempt == 1:
        await anyio.sleep(60)


@pytest.mark.parametrize("seconds", [-HOUR, HOUR])
async def test_a_retry_comes_when_it_was_said_to(fleet: Fleet, set_clock: SetClock, seconds: float) -> None:
    await fleet.worker(talk)
    turn = await fleet.session(agent="talk").send("retry")
    retrying = await fleet.until("turn.retrying")
    set_clock(seconds)
    assert (await turn.result(10)).text == "1 2 "
    started = await fleet.until("turn.started", times=2)
    assert started.time - retrying.time > 0.2


async def test_a_dead_workers_turn_is_taken_over(fleet: Fleet, set_clock: SetClock) -> None:
    first = await fleet.worker(talk)
    turn = await fleet.session(agent="talk").send("long")
    await fleet.until("text.delta")
    await fleet.worker(talk)
    set_clock(-HOUR)
    await first.crash()
    assert (await turn.result(10)).text == "1 2 "


@pytest.mark.parametrize("text", ["long", "ask"])
async def test_a_deadline_is_met_when_the_clock_is_set_back(fleet: Fleet, set_clock: SetClock, text: str) -> None:
    await fleet.worker(talk)
    turn = await fleet.session(agent="talk").send(text, deadline=1.0)
    await fleet.until("text.delta")
    set_clock(-HOUR)
    with pytest.raises(TurnFailed):
        await turn.result(10)
    assert "turn.expired" in await fleet.types()


async def test_a_turn_does_not_expire_early_when_the_clock_is_set_forward(fleet: Fleet, set_clock: SetClock) -> None:
    await fleet.worker(talk)
    set_clock(HOUR)
    turn = await fleet.session(agent="talk").send("hello", deadline=60.0)
    assert (await turn.result(10)).text == "1 "
    (request,) = [e for _, e in await fleet.records() if isinstance(e, wire.TurnRequested)]
    assert request.deadline is not None
    assert 50 < request.deadline - fleet.broker.now() < 61
