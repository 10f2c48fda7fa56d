"""What is particular to leasing over JetStream: pull requests, held turns, heartbeats, signals."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import anyio
import anyio.to_thread
import pytest

from agentrun.broker import Kind, Lease, Tail
from agentrun.brokers import nats_hold
from agentrun.brokers.nats import NatsBroker
from agentrun.brokers.nats_layout import Route, Stored, session_of, stream_name
from agentrun.brokers.server import NatsServer
from agentrun.errors import Conflict
from agentrun.testing import Settings
from tests.brokers.nats_environment import NatsEnvironment, NatsEnvironments


@pytest.fixture
async def env(nats_environments: NatsEnvironments) -> AsyncGenerator[NatsEnvironment]:
    async with nats_environments(Settings(lease_ttl=1.0)) as environment:
        yield environment


async def send(broker: NatsBroker, session: str, agent: str = "agent") -> Tail:
    while True:
        after = await broker.log.last(session)
        try:
            return await broker.log.append(
                session, b"turn", kind=Kind.TURN, agent=agent, after=after, pending=after.pending.add(after.next)
            )
        except Conflict:
            continue


async def run(broker: NatsBroker, lease: Lease) -> None:
    """Claim, end and settle a turn."""
    offset = lease.record.offset
    tail = await append(broker, lease.session, lambda t: t.pending.claim(offset))
    assert offset in tail.pending
    await append(broker, lease.session, lambda t: t.pending.settle(offset))
    await lease.ack()


async def append(broker: NatsBroker, session: str, change) -> Tail:
    while True:
        after = await broker.log.last(session)
        try:
            return await broker.log.append(session, b"e", kind=Kind.EVENT, after=after, pending=change(after))
        except Conflict:
            continue


async def take(broker: NatsBroker, wait: float = 5.0, agent: str = "agent") -> Lease:
    lease = await broker.turns.lease(agent, wait=wait)
    assert lease is not None
    return lease


async def nothing(broker: NatsBroker, wait: float) -> None:
    assert await broker.turns.lease("agent", wait=wait) is None


async def consumer(env: NatsEnvironment, broker: NatsBroker) -> dict[str, int]:
    name = f"$JS.API.CONSUMER.INFO.{stream_name(env.namespace, 0)}.q-agent"
    return json.loads((await broker.connection.request(name, b"", timeout=5)).data)


async def test_waiting_pulls_do_not_grow(env: NatsEnvironment) -> None:
    async with env.broker() as broker:
        await broker.turns.open("agent")
        for _ in range(30):
            assert await broker.turns.lease("agent", wait=0.01) is None
        for _ in range(30):
            with anyio.move_on_after(0.01):
                await broker.turns.lease("agent", wait=20)
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(nothing, broker, 0.2)
            await anyio.sleep(0.1)
            assert (await consumer(env, broker))["num_waiting"] <= 1
        await send(broker, "s")
        await run(broker, await take(broker))


async def test_a_turn_given_to_a_cancelled_lease_is_not_lost(env: NatsEnvironment) -> None:
    async with env.broker() as broker:
        await broker.turns.open("agent")
        for n in range(30):
            await send(broker, f"s{n}")
            with anyio.move_on_after(0.0005 * (n % 6)):
                lease = await broker.turns.lease("agent", wait=20)
                assert lease is not None
                await run(broker, lease)
                continue
        left = 0
        while lease := await broker.turns.lease("agent", wait=1.5):
            await run(broker, lease)
            left += 1
        ends = [await broker.log.last(f"s{n}") for n in range(30)]
        assert [str(end.pending) for end in ends] == [""] * 30


async def test_an_early_turn_is_held_and_released_at_once(
    env: NatsEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_hold, "LOOK", 30.0)
    async with env.broker(lease_ttl=20.0) as one, env.broker(lease_ttl=20.0) as two:
        await one.turns.open("agent")
        await two.turns.open("agent")
        for _ in range(3):
            await send(one, "s")
        first = await take(one)
        for offset in (2, 3):
            took: list[float] = []

            async def wait(expected: int = offset, took: list[float] = took) -> None:
                lease = await take(two)
                took.append(time.monotonic())
                assert lease.record.offset == expected
                nonlocal first
                first = lease

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                await anyio.sleep(0.2)
                assert took == []
                await run(one, first)
                ended = time.monotonic()
            assert took[0] - ended < 0.5
        (stats,) = await one.stats()
        assert (stats.waiting, stats.leased) == (0, 1)


async def test_a_held_turn_stays_held_past_its_lease_time(env: NatsEnvironment) -> None:
    async with env.broker(lease_ttl=0.5) as broker:
        await broker.turns.open("agent")
        await send(broker, "s")
        await send(broker, "s")
        first = await take(broker)
        with anyio.move_on_after(1.5):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(nothing, broker, 3.0)
                while True:
                    first.extend()
                    await anyio.sleep(0.1)
        # Delivered twice each at the most: the second was held, not given out again and again.
        assert (await consumer(env, broker))["delivered"]["consumer_seq"] <= 3


async def test_a_held_turn_of_a_deleted_session_is_let_go(env: NatsEnvironment) -> None:
    async with env.broker() as broker:
        await broker.turns.open("agent")
        await send(broker, "s")
        await send(broker, "s")
        lease = await take(broker)
        assert await broker.turns.lease("agent", wait=0.2) is None
        assert broker.turns._holder._held.keys() == {"s"}
        await broker.log.delete("s")
        for _ in range(60):
            if not broker.turns._holder._held:
                break
            await anyio.sleep(0.1)
        assert not broker.turns._holder._held
        await lease.ack()


async def test_a_server_that_lags_behind_costs_no_turn(env: NatsEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    async with env.broker() as broker:
        await broker.turns.open("agent")
        await send(broker, "s")
        await send(broker, "t")
        reader = broker.turns._holder._reader
        real, stale = reader.tail, [Tail()] * 4  # each of both looks twice, the second time at the leader

        async def tail(route: Route, *, leader: bool = False) -> Tail:
            return stale.pop() if stale else await real(route, leader=leader)

        monkeypatch.setattr(reader, "tail", tail)
        for _ in range(2):
            await run(broker, await take(broker))
        assert stale == []


async def test_what_is_given_out_is_read_once_however_often_it_is_asked_for(
    env: NatsEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with env.broker() as broker:
        await broker.turns.open("agent")
        reader = broker.turns._holder._reader
        between, read = reader.between, list[str]()

        async def counted(*args: Any, **more: Any) -> Sequence[Stored]:
            found = await between(*args, **more)
            read.extend(session_of(stored.subject) for stored in found)
            return found

        monkeypatch.setattr(reader, "between", counted)

        async def given_out() -> list[str]:
            return sorted(hold.session for hold in await broker.turns.given_out("agent"))

        assert await given_out() == []
        for session in ("s", "t"):
            await send(broker, session)
        first, second = await take(broker), await take(broker)
        assert await given_out() == await given_out() == ["s", "t"]
        await send(broker, "u")
        third = await take(broker)
        for lease in (first, second):
            await run(broker, lease)
        assert await given_out() == ["u"]
        assert sorted(read) == ["s", "t", "u"]
        await run(broker, third)
        assert await given_out() == []
        # A consumer that was made anew gives out again what is left.
        await send(broker, "v")
        await take(broker)
        await broker.connection.request(
            f"$JS.API.CONSUMER.DELETE.{stream_name(env.namespace, 0)}.q-agent", b"", timeout=5
        )
        assert await given_out() == []
        await broker.turns.ensure("agent", 0, 1.0)
        await take(broker)
        assert "v" in await given_out()


async def test_leaving_hands_held_turns_back(env: NatsEnvironment) -> None:
    async with env.broker(lease_ttl=20.0) as one:
        await one.turns.open("agent")
        await send(one, "s")
        await send(one, "s")
        async with env.broker(lease_ttl=20.0) as two:
            await two.turns.open("agent")
            first = await take(two)
            assert await two.turns.lease("agent", wait=0.2) is None
            await run(two, first)
            second = await take(two)
            await second.nack()
            await send(one, "s")
            again = await two.turns.lease("agent", wait=0.0)
            if again is not None:  # it came back that fast
                await again.nack()
        lease = await take(one)
        assert lease.record.offset == 2


async def test_heartbeats_go_out_from_a_thread_while_the_loop_is_blocked(env: NatsEnvironment) -> None:
    async with env.broker() as holder, env.broker() as other:
        await holder.turns.open("agent")
        await other.turns.open("agent")
        await send(holder, "s")
        lease = await take(holder)
        await anyio.sleep(0.3)  # the heartbeat thread connects
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(0.2):
                lease.extend()

        thread = threading.Thread(target=beat)
        thread.start()
        time.sleep(2.5)  # noqa: ASYNC251 - blocks the loop on purpose, for more than two lease times
        stop.set()
        thread.join()
        assert (await consumer(env, holder))["num_redelivered"] == 0
        assert await other.turns.lease("agent", wait=0.2) is None
        assert (await take(other)).record.offset == 1


async def test_what_is_no_turn_is_taken_off_the_queue(env: NatsEnvironment) -> None:
    async with env.broker() as broker:
        await broker.turns.open("agent")
        await broker.connection.publish(f"agentrun.{env.namespace}.0.bad.in.turn.agent", b"?")
        await send(broker, "good")
        lease = await take(broker)
        assert lease.session == "good"
        await run(broker, lease)
        assert await broker.turns.lease("agent", wait=0.3) is None
        (stats,) = await broker.stats()
        assert (stats.waiting, stats.leased) == (0, 0)


async def test_a_deleted_consumer_is_made_anew(env: NatsEnvironment) -> None:
    async with env.broker() as broker:
        await broker.turns.open("agent")
        await send(broker, "s")
        await run(broker, await take(broker))
        name = f"$JS.API.CONSUMER.DELETE.{stream_name(env.namespace, 0)}.q-agent"
        async with anyio.create_task_group() as tasks:

            async def wait() -> None:
                lease = await take(broker, wait=20)
                assert (lease.session, lease.record.offset) == ("t", 1)

            tasks.start_soon(wait)
            await anyio.sleep(0.1)
            await broker.connection.request(name, b"", timeout=5)
            await send(broker, "t")


async def test_leasing_goes_on_over_a_restart_of_the_server() -> None:
    async with NatsServer() as server, NatsBroker(server.url, check=False, lease_ttl=2.0) as broker:
        await broker.setup()
        await broker.turns.open("agent")
        leased: list[str] = []

        async def work() -> None:
            while len(leased) < 20:
                lease = await broker.turns.lease("agent", wait=10)
                assert lease is not None
                leased.append(lease.session)
                await run(broker, lease)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work)
            for n in range(20):
                await send(broker, f"s{n}")
                if n == 10:
                    await anyio.to_thread.run_sync(server.restart)
        assert set(leased) == {f"s{n}" for n in range(20)}


async def test_lease_ack_and_nack_after_the_end_do_no_harm(env: NatsEnvironment) -> None:
    async with env.broker() as broker:
        await broker.turns.open("agent")
        await send(broker, "s")
        lease = await take(broker)
        await run(broker, lease)
        await lease.ack()
        lease.extend()
        await lease.nack()
        assert await broker.turns.lease("agent", wait=0.3) is None
    lease.extend()  # the broker is closed: nothing to do, nothing raised
