"""What a worker does when the connection lies, and when somebody takes away or changes what it needs at the broker."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import anyio
import pytest

from agentrun import wire
from agentrun.agent import Context, agent
from agentrun.broker import Broker
from agentrun.brokers import watch as watching
from agentrun.brokers.nats import NatsBroker, Streams
from agentrun.brokers.nats_layout import stream_name
from agentrun.errors import Misconfigured
from agentrun.testing import Settings
from agentrun.worker import Worker
from tests.brokers.nats_environment import NatsEnvironment, NatsEnvironments, NatsProxy
from tests.worker.fleet import QUICK, Fleet, eventually

LEASE = 10.0


@agent(name="talk", resume=True)
async def talk(ctx: Context) -> AsyncIterator[str]:
    begin = len(ctx.partial.text.split()) if ctx.partial is not None else 0
    for n in range(begin, int(ctx.text)):
        yield f"{n} "
        await anyio.sleep(0.05)


def said(count: int) -> str:
    return "".join(f"{n} " for n in range(count))


@pytest.fixture
async def env(nats_environments: NatsEnvironments) -> AsyncGenerator[NatsEnvironment]:
    async with nats_environments(Settings(lease_ttl=LEASE, faults=True)) as environment:
        yield environment


@pytest.fixture
async def fleet(
    env: NatsEnvironment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> AsyncGenerator[Fleet]:
    """Its client is connected directly, its workers through a proxy each; who watches the streams is quick."""
    for name, seconds in (("SPREAD", 0.1), ("NOT_BEFORE", 0.5), ("WHILE_WRONG", 1.0)):
        monkeypatch.setattr(watching, name, seconds)
    caplog.set_level(logging.INFO)
    async with env.broker() as broker, anyio.create_task_group() as group:
        fleet = Fleet(env, broker, group)
        yield fleet
        group.cancel_scope.cancel()
        await fleet.check()


async def api(fleet: Fleet, call: str, request: Any = None) -> Any:
    broker = fleet.broker
    assert isinstance(broker, NatsBroker)
    body = b"" if request is None else json.dumps(request).encode()
    reply = json.loads((await broker.connection.request(f"$JS.API.{call}", body, timeout=5)).data)
    assert "error" not in reply, reply
    return reply


async def edit(fleet: Fleet, env: NatsEnvironment, **changes: Any) -> None:
    name = stream_name(env.namespace, 0)
    config = (await api(fleet, f"STREAM.INFO.{name}"))["config"]
    for key, value in changes.items():
        if value is None:
            config.pop(key)
        else:
            config[key] = value
    await api(fleet, f"STREAM.UPDATE.{name}", config)


async def set_up(env: NatsEnvironment, **streams: Any) -> None:
    async with env.broker(check=False, streams=Streams(**streams)) as broker:
        await broker.setup()


def proxy_of(env: NatsEnvironment, broker: Broker) -> NatsProxy:
    return env.proxies[id(broker)]


async def until_said(caplog: pytest.LogCaptureFixture, text: str, seconds: float = 30.0) -> None:
    await eventually(lambda: text in caplog.text, seconds)


# ------------------------------------------------------------------------------------------------- the connection


async def test_a_connection_that_passes_nothing_is_noticed_and_the_turns_go_on(
    env: NatsEnvironment, fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await fleet.worker(talk, lease=LEASE)
    running = await fleet.session("a", "talk").send("60")
    await fleet.until("text.delta", "a", times=5)
    began = time.monotonic()
    proxy_of(env, worker.broker).freeze()
    for name in ("appends", "queue", "reads", "heartbeats"):
        await until_said(caplog, f"connection {name} to {proxy_of(env, worker.broker).url} is back")
    # Two pings of 2 s that nobody answers, and the reconnect.
    assert time.monotonic() - began < 20
    later = await fleet.session("b", "talk").send("3")
    assert (await later.result(30)).text == said(3)
    result = await running.result(30)
    assert (result.text, result.attempt) == (said(60), 1)


async def test_one_that_was_cut_off_for_longer_than_its_lease_is_fenced(
    nats_environments: NatsEnvironments,
) -> None:
    async with (
        nats_environments(Settings(lease_ttl=1.0, faults=True)) as env,
        env.broker() as broker,
        anyio.create_task_group() as group,
    ):
        fleet = Fleet(env, broker, group)
        first = await fleet.worker(talk, lease=1.0, name="first")
        turn = await fleet.session("a", "talk").send("80")
        await fleet.until("text.delta", "a", times=5)
        proxy_of(env, first.broker).freeze()
        await fleet.worker(talk, lease=1.0, name="second")
        result = await turn.result(40)
        assert (result.text, result.attempt) == (said(80), 2)
        await eventually(lambda: not first.worker.info.running, 30)
        starts = [e.worker for e in await fleet.events("a") if isinstance(e, wire.TurnStarted)]
        assert starts == ["first", "second"]
        await fleet.check()
        group.cancel_scope.cancel()


# ------------------------------------------------------------------------------------------------- consumer, stream


@pytest.mark.parametrize("busy", [True, False])
async def test_a_consumer_deleted_under_a_worker_is_made_anew(
    env: NatsEnvironment, fleet: Fleet, caplog: pytest.LogCaptureFixture, busy: bool
) -> None:
    await fleet.worker(talk, lease=LEASE, concurrency=1 if busy else 10)
    running = await fleet.session("a", "talk").send("40")
    queued = await fleet.session("b", "talk").send("3")
    await fleet.until("text.delta", "a", times=3)
    await api(fleet, f"CONSUMER.DELETE.{stream_name(env.namespace, 0)}.q-talk")
    later = await fleet.session("c", "talk").send("3")
    result = await running.result(30)
    assert (result.text, result.attempt) == (said(40), 1)
    assert [(await turn.result(30)).text for turn in (queued, later)] == [said(3)] * 2
    assert "queue of agent talk, partition 0: its consumer was gone" in caplog.text
    assert (await fleet.broker.stats())[0].waiting == 0


async def test_a_deleted_stream_is_said_once_and_work_goes_on_when_it_is_set_up_again(
    env: NatsEnvironment, fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await fleet.worker(talk, lease=LEASE)
    await fleet.session("a", "talk").send("10000")
    await fleet.until("text.delta", "a", times=3)
    name = stream_name(env.namespace, 0)
    await api(fleet, f"STREAM.DELETE.{name}")
    await until_said(caplog, f"stream {name} is not there: run `agentrun setup`")
    await until_said(caplog, f"namespace {env.namespace} is not set up")
    before, requests = time.process_time(), len(caplog.records)
    await anyio.sleep(3.0)
    assert time.process_time() - before < 1.5, "a busy loop"
    assert len(caplog.records) - requests <= 3, caplog.text
    await set_up(env)
    later = await fleet.session("b", "talk").send("3")
    assert (await later.result(40)).text == said(3)
    await eventually(lambda: not worker.worker.info.running, 20)
    await until_said(caplog, "as needed again")
    assert caplog.text.count("what is promised does not hold now") == 1
    fleet.sessions.discard("a")


# ------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"republish": None}, "republish is None"), ({"allow_direct": False}, "allow_direct is False")],
    ids=["no-republish", "no-direct-get"],
)
async def test_settings_that_break_the_promises_are_an_error_after_a_reconnect(
    env: NatsEnvironment,
    fleet: Fleet,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
    says: str,
) -> None:
    worker = await fleet.worker(talk, lease=LEASE)
    await edit(fleet, env, **changes)
    proxy_of(env, worker.broker).cut()
    await until_said(caplog, says)
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 1
    assert f"stream {stream_name(env.namespace, 0)} is not as needed, run `agentrun setup`" in errors[0]
    await set_up(env)
    turn = await fleet.session("a", "talk").send("3")
    assert (await turn.result(40)).text == said(3)
    proxy_of(env, worker.broker).cut()
    await until_said(caplog, "as needed again")


async def test_a_stream_that_does_not_answer_reads_is_looked_at_without_a_reconnect(
    env: NatsEnvironment, fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    await fleet.worker(talk, lease=LEASE)
    await fleet.session("a", "talk").send("100")
    await fleet.until("text.delta", "a", times=3)
    await edit(fleet, env, allow_direct=False)
    with anyio.move_on_after(1.0):
        await fleet.session("b", "talk").send("3")
    await until_said(caplog, "allow_direct is False")
    await set_up(env)
    turn = await fleet.session("b", "talk").send("3")
    assert (await turn.result(40)).text == said(3)


async def test_another_number_of_partitions_ends_who_knew_the_old_one(env: NatsEnvironment, fleet: Fleet) -> None:
    async def work() -> None:
        async with env.broker() as broker, anyio.create_task_group() as group:
            await group.start(Worker(broker, [talk], settings=QUICK).run)
            await api(fleet, f"STREAM.DELETE.{stream_name(env.namespace, 0)}")
            await set_up(env, partitions=2)
            await anyio.sleep_forever()

    try:
        with anyio.fail_after(50), pytest.raises(Misconfigured, match="has 2 partitions now, and had 1"):
            await work()
    finally:
        await api(fleet, f"STREAM.DELETE.{stream_name(env.namespace, 1)}")


async def test_a_look_that_takes_longer_than_the_pause_after_it_ends_nobody(
    env: NatsEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    async def look(watch: watching.Watch) -> None:
        nonlocal looks
        looks += 1
        await anyio.sleep(0.1)
        watch.look()

    for name, value in (("SPREAD", 0.01), ("NOT_BEFORE", 0.05), ("EVERY", 0.05)):
        monkeypatch.setattr(watching, name, value)
    monkeypatch.setattr(watching.Watch, "_look", look)
    async with env.broker():
        await eventually(lambda: looks >= 3)
