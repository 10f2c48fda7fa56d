from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio
import pytest

from agentrun.broker import Broker, Kind, Pending, Tail
from agentrun.brokers.memory import MemoryBroker, MemoryState
from agentrun.errors import Duplicate, Fenced, Unavailable
from agentrun.testing import CHECKS, Environment, Faults, FaultyBroker, MemoryEnvironment, Settings, run_contract
from agentrun.testing.contract_players import Owner, must_take, own, send

TTL = 0.3


def faulty(state: MemoryState | None = None, **faults: object) -> FaultyBroker:
    return FaultyBroker(MemoryBroker(state=state or MemoryState(lease_ttl=TTL)), Faults(**faults))


async def append(broker: Broker, body: bytes = b"x", session: str = "s") -> Tail:
    after = await broker.log.last(session)
    return await broker.log.append(session, body, kind=Kind.CANCEL, after=after, pending=after.pending)


async def bodies(broker: Broker, session: str = "s") -> list[bytes]:
    return [r.body for r in await broker.log.read(session)]


@pytest.mark.parametrize("faults", [Faults(), Faults(delay=0.5, delay_max=0.01)], ids=["none", "delays"])
async def test_the_contract_holds_through_a_broker_that_fails_at_nothing(faults: Faults) -> None:
    class Wrapped(MemoryEnvironment):
        def open(self) -> AbstractAsyncContextManager[Broker]:
            return FaultyBroker(self.connect(), faults)

        async def drop_next_ack(self, broker: Broker) -> None:
            assert isinstance(broker, FaultyBroker)
            await super().drop_next_ack(broker.inner)

    @asynccontextmanager
    async def environments(settings: Settings) -> AsyncGenerator[Environment]:
        yield Wrapped(settings)

    # What an operator does is done on the broker itself.
    checks = [c for c in CHECKS if "operator" not in c.name]
    outcomes = await run_contract(environments, checks, at_once=10)
    assert {o.check.name: o.error for o in outcomes if o.error} == {}


async def test_a_lost_ack_leaves_the_record_stored() -> None:
    async with faulty(lose_ack={2}) as broker:
        await append(broker, b"1")
        with pytest.raises(Unavailable):
            await append(broker, b"2")
        await append(broker, b"3")
        assert await bodies(broker) == [b"1", b"2", b"3"]
        assert broker.injected["lose_ack"] == 1


async def test_a_refused_append_is_not_stored() -> None:
    async with faulty(refuse={2}) as broker:
        await append(broker, b"1")
        with pytest.raises(Unavailable):
            await append(broker, b"2")
        await append(broker, b"3")
        assert await bodies(broker) == [b"1", b"3"]


async def test_while_disconnected_every_call_is_unavailable() -> None:
    async with faulty() as broker:
        await broker.turns.open("agent")
        await send(broker, "s")
        lease = await must_take(broker, "s", 1)
        broker.disconnect()
        assert not broker.connected
        for call in (
            lambda: broker.log.last("s"),
            lambda: broker.log.read("s"),
            lambda: broker.log.delete("s"),
            lambda: broker.log.append("s", b"", kind=Kind.CANCEL, after=Tail(), pending=Pending()),
            lambda: broker.log.follow("s").__aenter__(),
            lambda: broker.turns.open("agent"),
            lambda: broker.turns.lease("agent", wait=0),
            lambda: broker.signals.request("c", b"", timeout=1),
            lambda: broker.signals.gather("c", b"", wait=1),
            lease.ack,
            lease.nack,
        ):
            with pytest.raises(Unavailable):
                await call()
        broker.reconnect()
        assert (await broker.log.last("s")).offset == 1


async def test_an_append_can_break_the_connection_for_a_time() -> None:
    async with faulty(disconnect={2}, outage=0.2) as broker:
        await append(broker, b"1")
        with pytest.raises(Unavailable):
            await append(broker, b"2")
        with pytest.raises(Unavailable):
            await broker.log.last("s")
        await anyio.sleep(0.25)
        await append(broker, b"3")
        assert await bodies(broker) == [b"1", b"3"]


async def test_a_follow_stands_still_while_disconnected_and_goes_on() -> None:
    state = MemoryState()
    async with MemoryBroker(state=state) as writer, faulty(state) as broker, broker.log.follow("s") as records:
        await append(writer, b"1")
        assert [r.body for r in await anext(records)] == [b"1"]
        broker.disconnect()
        await append(writer, b"2")
        with anyio.move_on_after(0.1):
            await anext(records)
            pytest.fail("a record came over a broken connection")
        await append(writer, b"3")
        broker.reconnect()
        found = [*await anext(records), *await anext(records)]
        assert [r.body for r in found] == [b"2", b"3"]


async def test_an_outage_ends_by_itself_for_a_follow() -> None:
    state = MemoryState()
    async with MemoryBroker(state=state) as writer, faulty(state) as broker, broker.log.follow("s") as records:
        broker.disconnect(0.1)
        await append(writer)
        with anyio.fail_after(2):
            assert [r.offset for r in await anext(records)] == [1]


async def test_handlers_do_not_answer_while_disconnected() -> None:
    state = MemoryState()

    async def handler(body: bytes) -> bytes:
        return body

    async with MemoryBroker(state=state) as caller, faulty(state) as broker, broker.signals.listen("c", handler):
        assert await caller.signals.request("c", b"1", timeout=1) == b"1"
        broker.disconnect()
        with pytest.raises(Unavailable):
            await caller.signals.request("c", b"2", timeout=0.1)


async def test_lost_extensions_let_the_lease_run_out() -> None:
    async with faulty(lose_extend=1.0) as broker:
        await broker.turns.open("agent")
        await send(broker, "s")
        lease = await must_take(broker, "s", 1)
        for _ in range(5):
            await anyio.sleep(TTL / 4)
            await anyio.to_thread.run_sync(lease.extend)
        await must_take(broker, "s", 1, within=TTL)
        assert broker.injected["lose_extend"] == 5


async def test_a_lost_settlement_gives_the_lease_out_again() -> None:
    async with faulty(lose_settle={1}) as broker:
        await broker.turns.open("agent")
        await send(broker, "s")
        owner = await own(broker, "s", 1)
        await owner.park()
        owner = await own(broker, "s", 1)
        await owner.finish()
        assert await broker.turns.lease("agent", wait=TTL * 1.5) is None


async def test_the_next_ack_is_lost_whatever_was_planned() -> None:
    async with faulty() as broker:
        await append(broker, b"1")
        broker.drop_next_ack()
        with pytest.raises(Unavailable):
            await append(broker, b"2")
        await append(broker, b"3")
        assert await bodies(broker) == [b"1", b"2", b"3"]
        assert broker.injected["lose_ack"] == 1


async def test_it_knows_what_it_holds() -> None:
    async with faulty() as broker:
        await broker.turns.open("agent")
        await send(broker, "s")
        lease = await must_take(broker, "s", 1)
        assert [(hold.session, hold.offset, hold.token) for hold in broker.held] == [("s", 1, lease.token)]
        await lease.nack()
        assert broker.held == []


async def test_a_lease_given_out_twice_is_caught_by_the_fence() -> None:
    async with faulty(repeat_lease={1}) as broker:
        await broker.turns.open("agent")
        await send(broker, "s")
        first, second = await must_take(broker, "s", 1), await must_take(broker, "s", 1)
        owner = await Owner(broker, first).start()
        with pytest.raises(Fenced):
            await Owner(broker, second).start()
        await owner.finish()
        assert await broker.turns.lease("agent", wait=0.1) is None


async def hit_appends(seed: int, **more: object) -> list[int]:
    hit: list[int] = []
    async with faulty(refuse=0.3, seed=seed, **more) as broker:
        for number in range(60):
            try:
                await append(broker)
            except Unavailable:
                hit.append(number)
    return hit


async def test_the_same_seed_gives_the_same_faults() -> None:
    first = await hit_appends(1)
    assert 5 < len(first) < 35
    assert await hit_appends(1) == first
    assert await hit_appends(1, delay=0.5, delay_max=0.0) == first  # one fault's chances do not shift another's
    assert await hit_appends(2) != first


async def test_an_idempotent_sender_gets_everything_stored_once() -> None:
    async with faulty(lose_ack=0.3, refuse=0.3, seed=5) as broker:
        for number in range(30):
            stored = False
            while not stored:
                try:
                    await send(broker, "s", b"%d" % number, kind=Kind.CANCEL, dedupe=f"key{number}")
                    stored = True
                except Duplicate:
                    stored = True
                except Unavailable:
                    continue
        assert await bodies(broker) == [b"%d" % n for n in range(30)]
        assert broker.injected["lose_ack"] > 3
        assert broker.injected["refuse"] > 3
