from __future__ import annotations

import threading
from contextlib import suppress

import anyio
import pytest

from agentrun.broker import Handler, Kind, Pending, Tail
from agentrun.brokers import connect
from agentrun.brokers.memory import MemoryBroker, MemoryState
from agentrun.errors import Duplicate, InvalidInput, Misconfigured, Unavailable
from agentrun.testing.contract_players import must_take, offsets, own, send, take


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


async def test_brokers_of_one_name_meet() -> None:
    async with MemoryBroker("one") as first, MemoryBroker("one") as second, MemoryBroker("two") as other:
        await send(first, "s")
        assert (await second.log.last("s")).offset == 1
        assert (await other.log.last("s")).offset == 0
    async with MemoryBroker("one") as later:
        assert (await later.log.last("s")).offset == 1


async def test_brokers_without_a_name_are_apart() -> None:
    async with MemoryBroker() as first, MemoryBroker() as second:
        await send(first, "s")
        assert (await second.log.last("s")).offset == 0


async def test_urls_name_brokers() -> None:
    async with connect("memory://by-url") as first, connect("memory://by-url") as second:
        await send(first, "s")
        assert (await second.log.last("s")).offset == 1
    async with connect("memory://by-url", namespace="other") as other:
        assert (await other.log.last("s")).offset == 0


def test_a_name_and_a_state_are_refused() -> None:
    with pytest.raises(InvalidInput):
        MemoryBroker("one", state=MemoryState())


async def test_leases_expire_by_the_clock_given() -> None:
    clock = Clock()
    async with MemoryBroker(state=MemoryState(lease_ttl=30, clock=clock)) as broker:
        await broker.turns.open("agent")
        await send(broker, "s")
        lease = await must_take(broker, "s", 1)
        clock.now += 29
        assert await broker.turns.lease("agent", wait=0) is None
        lease.extend()
        clock.now += 29
        assert await broker.turns.lease("agent", wait=0) is None
        clock.now += 1.1
        await must_take(broker, "s", 1, within=0)


async def test_a_waiting_lease_notices_that_the_clock_was_moved() -> None:
    clock = Clock()
    async with MemoryBroker(state=MemoryState(clock=clock)) as broker:
        await broker.turns.open("agent")
        await send(broker, "s")
        await must_take(broker, "s", 1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(must_take, broker, "s", 1)
            await anyio.sleep(0.05)
            clock.now += 100


async def test_deltas_and_keys_expire_by_the_clock_given() -> None:
    clock = Clock()
    state = MemoryState(delta_ttl=60, dedupe_window=600, lease_ttl=1e6, clock=clock)
    async with MemoryBroker(state=state) as broker:
        await broker.turns.open("agent")
        await send(broker, "s", dedupe="key")
        owner = await own(broker, "s", 1)
        await owner.deltas(10)
        clock.now += 30
        await owner.deltas(10)
        assert len(await broker.log.read("s")) == 22
        clock.now += 30
        assert offsets(await broker.log.read("s")) == [1, 2, *range(13, 23)]
        assert (await broker.log.last("s")).lost == 0
        clock.now += 30
        assert offsets(await broker.log.read("s")) == [1, 2]
        tail = await broker.log.last("s")
        assert (tail.offset, tail.lost, tail.next) == (2, 20, 23)
        with pytest.raises(Duplicate):
            await send(broker, "s", dedupe="key")
        clock.now += 600
        assert (await send(broker, "s", dedupe="key")).offset == 23


async def test_what_is_done_with_a_lost_lease_does_nothing() -> None:
    clock = Clock()
    async with MemoryBroker(state=MemoryState(lease_ttl=10, clock=clock)) as broker:
        await broker.turns.open("agent")
        await send(broker, "s")
        old = await must_take(broker, "s", 1)
        clock.now += 11
        new = await must_take(broker, "s", 1)
        await old.nack()
        await old.ack()
        clock.now += 9
        old.extend()
        assert await take(broker, within=0) is None
        clock.now += 2
        again = await must_take(broker, "s", 1, within=0)
        assert not new.held
        assert again.held


async def test_a_lease_of_a_deleted_session_leaves_the_new_one_alone() -> None:
    async with MemoryBroker() as broker:
        await broker.turns.open("agent")
        await send(broker, "s")
        old = await must_take(broker, "s", 1)
        await broker.log.delete("s")
        await send(broker, "s")
        await old.ack()
        await must_take(broker, "s", 1, within=0)


async def test_leases_are_extended_from_many_threads() -> None:
    async with MemoryBroker(state=MemoryState(lease_ttl=0.3)) as broker:
        await broker.turns.open("agent")
        for number in range(8):
            await send(broker, f"s{number}")
        leases = [await take(broker, within=0) for _ in range(8)]
        stop = threading.Event()

        def extend() -> None:
            while not stop.wait(0.05):
                for lease in leases:
                    assert lease
                    lease.extend()

        threads = [threading.Thread(target=extend) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            assert await take(broker, within=1.0) is None
        finally:
            stop.set()
            for thread in threads:
                await anyio.to_thread.run_sync(thread.join)


async def test_a_queue_must_be_open() -> None:
    async with MemoryBroker() as broker:
        with pytest.raises(Misconfigured, match="open"):
            await broker.turns.lease("nobody", wait=0)


async def test_a_turn_needs_an_agent() -> None:
    async with MemoryBroker() as broker:
        with pytest.raises(InvalidInput):
            await broker.log.append("s", b"", kind=Kind.TURN, after=Tail(), pending=Pending().add(1))


async def test_a_handler_that_raises_ends_its_listener() -> None:
    async def handler(body: bytes) -> bytes:
        raise RuntimeError("broken handler")

    async with MemoryBroker() as broker:
        with pytest.raises(ExceptionGroup, match="unhandled") as raised:
            await _ask_and_wait(broker, handler)
        assert raised.group_contains(RuntimeError, match="broken handler")
        async with broker.signals.listen("c", _echo):
            assert await broker.signals.request("c", b"x", timeout=1) == b"x"


async def _ask_and_wait(broker: MemoryBroker, handler: Handler) -> None:
    async with broker.signals.listen("c", handler):
        with suppress(Unavailable):
            await broker.signals.request("c", b"", timeout=0.05)
        await anyio.sleep(1)


async def _echo(body: bytes) -> bytes:
    return body


async def test_reading_a_session_that_is_not_there_leaves_nothing_behind() -> None:
    async with MemoryBroker() as broker:
        for number in range(100):
            await broker.log.last(f"s{number}")
            await broker.log.read(f"s{number}")
        assert len(broker.state.sessions) == 0
