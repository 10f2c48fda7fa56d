"""What is this broker's own in leasing: wake-ups without polls, lost answers, who comes first."""

from __future__ import annotations

import time

import anyio
import anyio.lowlevel
import pytest

from agentrun.broker import Hold, Lease
from agentrun.brokers.valkey_scripts import GIVE_BACK, LEASE
from agentrun.brokers.valkey_server import ValkeyServer
from agentrun.errors import Unavailable
from agentrun.testing import CHECKS, Settings
from agentrun.testing.contract_players import AGENT, PATIENCE, must_not_take, must_take, own, send
from tests.brokers.valkey_environment import ValkeyEnvironment, ValkeyEnvironments, ValkeyProxy, client

LONG = Settings(lease_ttl=60.0)


async def calls(environment: ValkeyEnvironment) -> int:
    """How many scripts the server has run."""
    async with client(environment.server) as valkey:
        stats = await valkey.info("commandstats")
        return stats["cmdstat_evalsha"]["calls"]


async def test_who_waits_does_not_ask_again_and_again(valkey_environments: ValkeyEnvironments) -> None:
    async with valkey_environments(LONG) as environment, environment.broker() as broker:
        await broker.turns.open(AGENT)
        await send(broker, "busy")
        await must_take(broker, "busy", 1)
        before = await calls(environment)
        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(must_not_take, broker, "nothing is ready")
                await anyio.sleep(0.05)
        # Each looks once, and once more when its time is over: whoever asks in between would ask for ever.
        assert await calls(environment) - before <= 2 * 8


@pytest.mark.parametrize("steps", range(6))
async def test_what_was_given_to_a_caller_that_left_is_given_out_again(
    valkey_environments: ValkeyEnvironments, steps: int
) -> None:
    async with valkey_environments(LONG) as environment, environment.broker() as broker:
        await broker.turns.open(AGENT)
        await send(broker, "s")
        before = await calls(environment)
        with anyio.CancelScope() as scope:

            async def leave() -> None:
                for _ in range(steps):
                    await anyio.lowlevel.checkpoint()
                scope.cancel()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(leave)
                if lease := await broker.turns.lease(AGENT, wait=PATIENCE):
                    await lease.nack()
        await must_take(broker, "s", 1)
        assert await calls(environment) > before


async def test_a_lease_whose_answer_is_lost_is_the_same_when_asked_again(
    valkey_environments: ValkeyEnvironments,
) -> None:
    async with (
        valkey_environments(LONG) as environment,
        ValkeyProxy(environment.server.port) as proxy,
        environment.broker(proxy.url) as broker,
    ):
        await broker.turns.open(AGENT)
        await send(broker, "s")
        proxy.script, proxy.losing = LEASE, 1
        await must_take(broker, "s", 1)
        assert proxy.losing == 0


async def test_a_handing_back_whose_answer_is_lost_is_not_repeated(valkey_environments: ValkeyEnvironments) -> None:
    async with (
        valkey_environments(LONG) as environment,
        ValkeyProxy(environment.server.port) as proxy,
        environment.broker(proxy.url) as broker,
        environment.broker() as other,
    ):
        await other.turns.open(AGENT)
        await broker.turns.open(AGENT)
        await send(broker, "s")
        lease = await must_take(broker, "s", 1)
        proxy.script, proxy.losing = GIVE_BACK, 1
        with pytest.raises(Unavailable):
            await broker.turns.hand_back(Hold(AGENT, "s", 1, lease.token))
        await must_take(other, "s", 1)


async def test_leases_are_kept_while_the_event_loop_is_blocked(valkey_environments: ValkeyEnvironments) -> None:
    async with valkey_environments(Settings(lease_ttl=1.0)) as environment, environment.broker() as broker:
        await broker.turns.open(AGENT)
        await send(broker, "s")
        lease = await must_take(broker, "s", 1)
        await until_extended(environment, lease)
        for _ in range(10):
            time.sleep(0.25)  # noqa: ASYNC251 - an agent that blocks; the keeper's thread goes on
            lease.extend()
        await must_not_take(broker, "the lease was extended")


async def until_extended(environment: ValkeyEnvironment, lease: Lease) -> None:
    """Until the thread of the heartbeats has its connection."""
    async with client(environment.server) as valkey:
        key = f"{environment.prefix(lease.session)}t:{lease.session}"
        end = await valkey.hget(key, "lx")
        with anyio.fail_after(20):
            while await valkey.hget(key, "lx") == end:
                lease.extend()
                await anyio.sleep(0.02)


async def test_who_let_a_lease_run_out_does_not_get_it_again_at_once(valkey_environments: ValkeyEnvironments) -> None:
    async with (
        valkey_environments(LONG) as environment,
        environment.broker() as silent,
        environment.broker() as other,
        client(environment.server) as valkey,
    ):
        await silent.turns.open(AGENT)
        await other.turns.open(AGENT)
        await send(other, "s")
        await must_take(silent, "s", 1)
        prefix = environment.prefix("s")
        while True:
            seconds, micros = await valkey.time()
            now = seconds * 1_000_000 + micros
            await valkey.hset(f"{prefix}t:s", "lx", now)
            await valkey.zadd(f"{prefix}l:{AGENT}", {"1:s": now})
            lease = await silent.turns.lease(AGENT, wait=0)
            seconds, micros = await valkey.time()
            if seconds * 1_000_000 + micros < now + 200_000:
                break  # else this machine was too slow to see anything
        assert lease is None
        await must_take(other, "s", 1)


async def test_a_turn_that_has_begun_goes_before_a_long_queue(valkey_environments: ValkeyEnvironments) -> None:
    async with (
        valkey_environments(Settings(lease_ttl=0.5)) as environment,
        environment.broker() as dead,
        environment.broker() as broker,
    ):
        await dead.turns.open(AGENT)
        await broker.turns.open(AGENT)
        await send(broker, "begun")
        await own(dead, "begun", 1)
        for number in range(50):
            await send(broker, f"s{number}")
        await anyio.sleep(0.6)
        await must_take(broker, "begun", 1)


async def test_an_input_that_was_trimmed_blocks_nobody(valkey_environments: ValkeyEnvironments) -> None:
    async with valkey_environments(LONG) as environment, environment.broker() as broker:
        await broker.turns.open(AGENT)
        await send(broker, "trimmed")
        await send(broker, "s")
        await environment.trim("trimmed", 1)
        await must_take(broker, "s", 1)
        await must_not_take(broker, "the other one was trimmed")
        (stats,) = await broker.stats()
        assert (stats.waiting, stats.leased) == (0, 1)


async def test_nothing_is_left_of_what_was_settled_or_deleted(valkey_environments: ValkeyEnvironments) -> None:
    async with valkey_environments(LONG) as environment, environment.broker() as broker:
        await broker.turns.open(AGENT)
        for session in ("ended", "waiting"):
            for _ in range(3):
                await send(broker, session)
        owner = await own(broker, "ended", 1)
        await owner.settle(2, 3)
        await broker.log.delete("waiting")
        await broker.log.delete("ended")
        (stats,) = await broker.stats()
        assert (stats.waiting, stats.leased) == (0, 0)
        async with client(environment.server) as valkey:
            keys = [key.decode() async for key in valkey.scan_iter(f"{environment.prefix('s')}*")]
        # What says that the sessions were deleted, how much is queued, and what a lease was given, for a minute.
        kinds = {key.partition("}:")[2].partition(":")[0] for key in keys}
        assert kinds == {"t", "n", "g"}


async def test_a_fleet_goes_on_over_crashes_of_the_server() -> None:
    check = next(check for check in CHECKS if check.name == "Q2_fleet_keeps_order_without_overlap")
    with ValkeyServer(settings="appendfsync always") as server:
        async with ValkeyEnvironments(server)(check.settings) as environment, anyio.create_task_group() as tasks:

            async def crash() -> None:
                for _ in range(5):
                    await anyio.sleep(0.7)
                    server.kill()
                    await anyio.to_thread.run_sync(server.start)

            tasks.start_soon(crash)
            await check.run(environment)
            tasks.cancel_scope.cancel()
