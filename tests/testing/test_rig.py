"""The rig, and the fixtures made of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager

import anyio
import pytest

from agentrun import Client, Context, WorkerSettings, agent
from agentrun.broker import Broker
from agentrun.brokers.server import NatsServer
from agentrun.client import Turn
from agentrun.testing import AckLost, Rig, RunningWorker, WorkerDies, memory_rig, nats_rig

pytest_plugins = ["agentrun.testing.pytest_plugin"]

StartWorker = Callable[..., AbstractAsyncContextManager[RunningWorker]]


@agent(resume=True)
async def slow(ctx: Context):
    """Waits in its first attempt, so that something can happen to it."""
    yield "one " if ctx.partial is None else "two "
    if ctx.attempt == 1:
        await anyio.sleep_forever()


@pytest.fixture(params=["memory", "nats"])
async def rig(request: pytest.FixtureRequest) -> AsyncGenerator[Rig]:
    if request.param == "memory":
        yield memory_rig()
        return
    server: NatsServer = request.getfixturevalue("agentrun_server")
    async with nats_rig(server.url) as rig:
        yield rig


async def spoken(turn: Turn) -> None:
    async for event in turn.events():
        if event.type == "text.delta":
            return


async def types(turn: Turn) -> list[str]:
    return [event.type async for event in turn.events()]


async def test_a_killed_workers_turn_goes_to_another_at_once(rig: Rig) -> None:
    alone = WorkerSettings(lost_after=0)  # nobody looks for the dead, and the lease outlasts the test
    async with rig.worker(slow, settings=alone) as first:
        turn = await rig.client.session("s", agent="slow").send("x")
        await spoken(turn)
        await first.kill()
        async with rig.worker(slow, settings=alone):
            result = await turn.result(timeout=20)
    assert (result.text, result.attempt) == ("one two ", 2)
    assert (await types(turn)).count("turn.lost") == 1


async def test_a_worker_dies_at_a_token_while_another_is_there(rig: Rig) -> None:
    async with rig.worker(slow, mishaps=[WorkerDies(after=1)]) as first:
        turn = await rig.client.session("s", agent="slow").send("x")
        await first.gone.wait()
        async with rig.worker(slow):
            assert (await turn.result(timeout=20)).attempt == 2


async def test_a_drained_worker_hands_over(rig: Rig) -> None:
    async with rig.worker(slow) as first:
        turn = await rig.client.session("s", agent="slow").send("x")
        await spoken(turn)
        first.worker.stop()
        await first.gone.wait()
        async with rig.worker(slow):
            assert (await turn.result(timeout=20)).text == "one two "
    assert (await types(turn)).count("turn.released") == 1


async def test_a_workers_connection_fails_in_words() -> None:
    rig = memory_rig()

    @agent
    async def echo(ctx: Context):
        yield ctx.text

    async with rig.worker(echo, settings=WorkerSettings(lease=1.0)) as worker:
        worker.drop_next_ack()
        session = rig.client.session("s", agent="echo")
        assert (await (await session.send("a")).result(timeout=20)).text == "a"
        assert worker.broker.injected["lose_ack"] == 1
        worker.lose_connection()
        turn = await session.send("b")
        with pytest.raises(TimeoutError):
            await turn.result(timeout=0.2)
        worker.mend_connection()
        assert (await turn.result(timeout=20)).text == "b"


async def test_a_mishap_happens_once() -> None:
    rig = memory_rig()

    @agent
    async def counting(ctx: Context):
        for number in range(5):
            yield str(number)

    async with rig.worker(counting, mishaps=[AckLost(after=2)]) as worker:
        for name in ("s1", "s2"):
            turn = await rig.client.session(name, agent="counting").send("x")
            assert (await turn.result(timeout=20)).text == "01234"
        assert worker.broker.injected["lose_ack"] == 1


async def test_an_error_of_the_test_comes_as_it_is() -> None:
    with pytest.raises(KeyError, match="mine"):
        async with memory_rig().worker(slow):
            raise KeyError("mine")


async def test_the_fixtures_are_one_rig(
    agentrun_client: Client, agentrun_broker: Broker, agentrun_worker: StartWorker
) -> None:
    @agent
    async def echo(ctx: Context):
        yield f"{ctx.text}!"

    assert agentrun_client.broker is agentrun_broker
    async with agentrun_worker(echo):
        turn = await agentrun_client.session("s", agent="echo").send("hello")
        assert (await turn.result(timeout=20)).text == "hello!"
    assert (await types(turn))[0] == "turn.requested"
