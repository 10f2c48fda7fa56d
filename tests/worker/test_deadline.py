"""A turn that is not over in time expires, wherever it is."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import anyio
import pytest

from agentrun import wire
from agentrun.agent import Context, agent
from agentrun.errors import Retry, TurnFailed
from tests.worker.fleet import Fleet


@agent(name="talk")
async def talk(ctx: Context) -> AsyncIterator[str]:
    yield f"<{ctx.text}>"
    if ctx.text == "long":
        await anyio.sleep(60)
    if ctx.text == "retry":
        raise Retry(after=30.0)
    if ctx.text == "ask":
        await ctx.approve("sure?")


async def expired(fleet: Fleet) -> list[wire.TurnExpired]:
    return [e for e in await fleet.events() if isinstance(e, wire.TurnExpired)]


async def test_while_it_runs(fleet: Fleet) -> None:
    await fleet.worker(talk)
    turn = await fleet.session(agent="talk").send("long", deadline=0.4)
    before = time.monotonic()
    with pytest.raises(TurnFailed, match="deadline"):
        await turn.result(5)
    assert time.monotonic() - before < 2
    (end,) = await expired(fleet)
    assert (end.turn, end.attempt, end.message.text) == (turn.id, 1, "<long>")


async def test_while_it_waits_behind_another(fleet: Fleet) -> None:
    await fleet.worker(talk)
    session = fleet.session(agent="talk")
    running = await session.send("long")
    waiting = await session.send("short", deadline=0.4)
    with pytest.raises(TurnFailed, match="deadline"):
        await waiting.result(3)
    assert (await session.history()).turns[running.id].state == "running"
    await running.cancel()
    assert (await fleet.broker.log.last("s")).pending == ()


async def test_while_nobody_works(fleet: Fleet) -> None:
    turn = await fleet.session(agent="talk").send("short", deadline=0.2)
    await anyio.sleep(0.3)
    await fleet.worker(talk)
    with pytest.raises(TurnFailed, match="deadline"):
        await turn.result(5)
    assert await fleet.types() == ["turn.expired"]


async def test_while_it_waits_for_a_retry(fleet: Fleet) -> None:
    await fleet.worker(talk)
    turn = await fleet.session(agent="talk").send("retry", deadline=0.5)
    with pytest.raises(TurnFailed, match="deadline"):
        await turn.result(5)
    assert await fleet.types() == ["turn.started", "text.delta", "turn.retrying", "turn.expired"]


async def test_while_it_is_suspended(fleet: Fleet) -> None:
    await fleet.worker(talk, ask_hold=0.05)
    turn = await fleet.session(agent="talk").send("ask", deadline=0.6)
    await fleet.until("turn.suspended")
    with pytest.raises(TurnFailed, match="deadline"):
        await turn.result(5)
    suspended = next(e for e in await fleet.events() if isinstance(e, wire.TurnSuspended))
    assert suspended.until is not None
    assert (await expired(fleet))[0].message.text == "<ask>"
    assert (await fleet.broker.log.last("s")).pending == ()


@pytest.mark.parametrize("hold", [0.05, 10.0], ids=["suspended", "held"])
async def test_a_question_nobody_answers_in_time(fleet: Fleet, hold: float) -> None:
    @agent(name="talk")
    async def asks(ctx: Context) -> None:
        await ctx.ask("name?", kind="text", deadline=0.5)

    await fleet.worker(asks, ask_hold=hold)
    turn = await fleet.session(agent="talk").send("x")
    before = time.monotonic()
    with pytest.raises(TurnFailed, match="in time"):
        await turn.result(5)
    assert 0.3 < time.monotonic() - before < 3
    assert ("turn.suspended" in await fleet.types()) == (hold == 0.05)
