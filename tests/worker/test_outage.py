"""P8: the broker is away for a while in mid-answer."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.to_thread

from agentrun import wire
from agentrun.agent import Context, agent
from agentrun.brokers.server import NatsServer
from agentrun.testing import Settings
from agentrun.testing.faults import Faults, FaultyBroker
from tests.brokers.nats_environment import NatsEnvironments
from tests.worker.fleet import LEASE, Fleet, eventually, fleet_on

TOKENS = 60


class Talker:
    """Says its numbers at a steady pace, and notes when."""

    def __init__(self, pace: float = 0.02) -> None:
        self.said: list[float] = []
        self.agent = agent(name="talk", resume=True)(self.run)
        self.pace = pace

    async def run(self, ctx: Context) -> AsyncIterator[str]:
        begin = len(ctx.partial.text.split()) if ctx.partial is not None else 0
        for n in range(begin, TOKENS):
            yield f"{n} "
            self.said.append(time.monotonic())
            await anyio.sleep(self.pace)


EVERYTHING = "".join(f"{n} " for n in range(TOKENS))


def faulty(brokers: list[FaultyBroker], **faults: Any) -> Any:
    def wrap(broker: Any) -> Any:
        brokers.append(FaultyBroker(broker, Faults(**faults)))
        return brokers[-1]

    return wrap


async def stored_text(fleet: Fleet) -> str:
    return "".join(e.text for e in await fleet.events() if isinstance(e, wire.TextDelta))


async def test_the_agent_goes_on_and_everything_is_stored_once(fleet: Fleet) -> None:
    brokers: list[FaultyBroker] = []
    talker = Talker()
    await fleet.worker(talker.agent, wrap=faulty(brokers), lease=5.0)
    turn = await fleet.session(agent="talk").send("x")
    await fleet.until("text.delta", times=5)
    before = len(talker.said)
    brokers[0].disconnect(1.0)
    await anyio.sleep(0.6)
    assert len(talker.said) > before + 10
    result = await turn.result(10)
    assert (result.text, result.attempt) == (EVERYTHING, 1)
    assert await stored_text(fleet) == EVERYTHING


async def test_a_full_buffer_pauses_the_agent(memory_fleet: Fleet) -> None:
    brokers: list[FaultyBroker] = []
    talker = Talker(pace=0.01)
    await memory_fleet.worker(talker.agent, wrap=faulty(brokers), buffer_events=20)
    turn = await memory_fleet.session(agent="talk").send("x")
    await memory_fleet.until("text.delta", times=5)
    before = len(talker.said)
    brokers[0].disconnect()
    await anyio.sleep(0.7)
    paused_at = len(talker.said)
    assert 15 <= paused_at - before <= 23
    await anyio.sleep(0.2)
    assert len(talker.said) == paused_at
    brokers[0].reconnect()
    assert (await turn.result(10)).text == EVERYTHING
    assert await stored_text(memory_fleet) == EVERYTHING


async def test_another_worker_takes_over_meanwhile(fleet: Fleet) -> None:
    brokers: list[FaultyBroker] = []
    cut, whole = Talker(), Talker()
    first = await fleet.worker(cut.agent, wrap=faulty(brokers))
    turn = await fleet.session(agent="talk").send("x")
    await fleet.until("text.delta", times=5)
    brokers[0].disconnect()
    await fleet.worker(whole.agent)
    await fleet.until("turn.started", times=2)
    brokers[0].reconnect()
    result = await turn.result(10)
    assert (result.text, result.attempt) == (EVERYTHING, 2)
    assert await stored_text(fleet) == EVERYTHING
    await eventually(lambda: not first.worker.info.running)


async def test_lost_and_late_answers_double_nothing(memory_fleet: Fleet) -> None:
    brokers: list[FaultyBroker] = []
    talker = Talker(pace=0.005)
    await memory_fleet.worker(
        talker.agent, wrap=faulty(brokers, lose_ack=0.2, refuse=0.1, delay=0.2, lose_extend=0.2, seed=3)
    )
    session = memory_fleet.session(agent="talk")
    turns = [await session.send("x") for _ in range(2)]
    for turn in turns:
        assert (await turn.result(30)).text == EVERYTHING
    assert await stored_text(memory_fleet) == EVERYTHING * 2
    assert brokers[0].injected["lose_ack"] >= 3
    assert {t.id for t in turns} == {e.turn for e in await memory_fleet.events() if isinstance(e, wire.TurnCompleted)}


async def test_a_lease_that_ran_out_meanwhile_and_came_back_is_taken_on(fleet: Fleet) -> None:
    brokers: list[FaultyBroker] = []
    talker = Talker()
    await fleet.worker(talker.agent, wrap=faulty(brokers))
    turn = await fleet.session(agent="talk").send("x")
    await fleet.until("text.delta", times=5)
    brokers[0].disconnect(2 * LEASE)
    result = await turn.result(10)
    assert (result.text, result.attempt) == (EVERYTHING, 1)
    assert await stored_text(fleet) == EVERYTHING
    await anyio.sleep(2 * LEASE)
    assert (await fleet.types())[-1] == "turn.completed"


async def test_a_stop_is_heard_while_an_answer_is_in_doubt(memory_fleet: Fleet) -> None:
    """An input right behind a record of our own whose answer was lost: both are taken in, in their order."""
    brokers: list[FaultyBroker] = []

    @agent(name="talk")
    async def asks(ctx: Context) -> AsyncIterator[str]:
        yield "a"
        yield f"{await ctx.approve('sure?')}"

    await memory_fleet.worker(asks, wrap=faulty(brokers, lose_ack={3, 4}))
    turn = await memory_fleet.session(agent="talk").send("x", id="t1")
    await memory_fleet.until("input.required")
    await turn.answer("ask-1", True)
    assert (await turn.result(5)).text == "aTrue"
    assert brokers[0].injected["lose_ack"] == 2


async def test_a_drain_while_the_broker_is_away_ends_anyway(memory_fleet: Fleet) -> None:
    brokers: list[FaultyBroker] = []
    talker = Talker()
    worker = await memory_fleet.worker(talker.agent, wrap=faulty(brokers), drain=0.1, cancel_grace=0.1)
    turn = await memory_fleet.session(agent="talk").send("x")
    await memory_fleet.until("text.delta")
    brokers[0].disconnect()
    worker.worker.drain()
    with anyio.fail_after(10):
        await worker.ended.wait()
    await memory_fleet.worker(talker.agent)
    assert (await turn.result(10)).text == EVERYTHING


async def test_a_server_that_is_killed_and_comes_back() -> None:
    talker = Talker(pace=0.04)
    async with (
        NatsServer() as server,
        NatsEnvironments(server)(Settings(lease_ttl=5.0)) as environment,
        fleet_on(environment) as fleet,
    ):
        await fleet.worker(talker.agent, lease=5.0)
        turn = await fleet.session(agent="talk").send("x")
        await fleet.until("text.delta", times=10)
        before = len(talker.said)
        await anyio.to_thread.run_sync(server.kill)
        await anyio.sleep(0.8)
        assert len(talker.said) > before + 10
        await anyio.to_thread.run_sync(server.start)
        result = await turn.result(20)
        assert (result.text, result.attempt) == (EVERYTHING, 1)
        assert await stored_text(fleet) == EVERYTHING


async def test_a_worker_cut_off_when_it_leases_goes_on_later(memory_fleet: Fleet) -> None:
    brokers: list[FaultyBroker] = []
    await memory_fleet.worker(Talker(0.0).agent, wrap=faulty(brokers))
    brokers[0].disconnect(LEASE)
    turn = await memory_fleet.session(agent="talk").send("x")
    assert (await turn.result(10)).text == EVERYTHING
