"""Workers die, are cut off and drained while turns are sent, stopped, answered and interrupted: P1 to P4 hold."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator

import anyio
import pytest

from agentrun import wire
from agentrun.agent import Context, agent
from agentrun.broker import Broker
from agentrun.errors import BrokerError, SessionError
from agentrun.testing.faults import Faults, FaultyBroker
from tests.worker.fleet import Fleet, Running

SECONDS = 4.0
SESSIONS = 6


@agent(name="any", resume=True)
async def anything(ctx: Context) -> AsyncIterator[str]:
    dice = random.Random(f"{ctx.turn} {ctx.attempt}")
    said = len(ctx.partial.text.split()) if ctx.partial is not None else 0
    for n in range(said, 15):
        yield f"{n} "
        await anyio.sleep(dice.random() * 0.02)
        if dice.random() < 0.01:
            raise ValueError("boom")
    if ctx.text == "ask":
        await ctx.approve("sure?")
    await ctx.steering()


@pytest.mark.parametrize("seed", range(1, 1 + int(os.environ.get("AGENTRUN_SEEDS", "2"))))
async def test_whatever_happens(fleet: Fleet, seed: int) -> None:
    dice = random.Random(seed)
    workers: list[Running] = []
    cut: list[FaultyBroker] = []
    sent: list[tuple[str, str]] = []

    def wrap(broker: Broker) -> FaultyBroker:
        cut.append(FaultyBroker(broker, Faults(lose_ack=0.02, refuse=0.01, lose_extend=0.1, seed=len(cut))))
        return cut[-1]

    async def start() -> None:
        workers.append(await fleet.worker(anything, wrap=wrap, ask_hold=0.1, drain=0.3, max_attempts=50))

    async def harm() -> None:
        while True:
            await anyio.sleep(0.3)
            match dice.randrange(4):
                case 0:
                    await workers.pop(dice.randrange(len(workers))).crash()
                    await start()
                case 1:
                    cut[-1].disconnect(dice.random())
                case 2:
                    await workers.pop(0).drain()
                    await start()
                case _:
                    pass

    async def use(name: str) -> None:
        session = fleet.session(name, "any")
        while True:
            await anyio.sleep(dice.random() * 0.2)
            try:
                match dice.randrange(8):
                    case 0 if sent:
                        await fleet.client.turn(*dice.choice(sent)).cancel()
                    case 1:
                        policy = dice.choice(["interrupt", "rollback", "steer"])
                        sent.append((name, (await session.send("x", on_busy=policy)).id))
                    case 2 if sent:
                        await fleet.client.turn(*dice.choice(sent)).answer("ask-1", True)
                    case _:
                        sent.append((name, (await session.send(dice.choice(["x", "ask"]))).id))
            except (SessionError, BrokerError):
                continue

    for _ in range(3):
        await start()
    with anyio.move_on_after(SECONDS):
        async with anyio.create_task_group() as group:
            group.start_soon(harm)
            for n in range(SESSIONS):
                group.start_soon(use, f"s{n}")
    for broker in cut:
        broker.reconnect()
    await start()
    async with anyio.create_task_group() as group:
        for n in range(SESSIONS):
            group.start_soon(everything_ends, fleet, f"s{n}")
    assert len(sent) > 50


async def everything_ends(fleet: Fleet, name: str) -> None:
    """Answer what is asked until nothing is pending; then every turn has exactly one end."""
    session = fleet.session(name, "any")
    with anyio.fail_after(20):
        while (await fleet.broker.log.last(name)).pending:
            for view in (await session.history()).turns.values():
                if not view.ended and any(q.answer is None for q in view.questions.values()):
                    try:
                        await session.turn(view.id).answer("ask-1", True)
                    except SessionError:
                        continue
            await anyio.sleep(0.2)
    history = await session.history()
    assert [v.id for v in history.turns.values() if not v.ended] == []
    events = await fleet.events(name)
    started = [e.turn for e in events if isinstance(e, wire.TurnStarted) and e.attempt == 1]
    assert started == sorted(started, key=lambda t: history.turns[t].offset)
    for event in events:
        if isinstance(event, wire.TurnCompleted):
            assert event.message.text == "".join(f"{n} " for n in range(15))
