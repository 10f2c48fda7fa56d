"""What is particular to appending to and reading from JetStream."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncGenerator
from contextlib import suppress

import anyio
import anyio.to_thread
import pytest

from agentrun.broker import Kind, Pending, Record, Tail
from agentrun.brokers.nats import NatsBroker
from agentrun.brokers.server import NatsServer
from agentrun.errors import Conflict, Duplicate, InvalidInput, SessionGone, TooLarge, Unavailable
from agentrun.testing import Settings
from tests.brokers.nats_environment import NatsEnvironment, NatsEnvironments, NatsProxy


@pytest.fixture
async def env(nats_environments: NatsEnvironments) -> AsyncGenerator[NatsEnvironment]:
    async with nats_environments(Settings()) as environment:
        yield environment


async def fill(broker: NatsBroker, session: str, count: int, *, kind: Kind = Kind.EVENT) -> Tail:
    tail = await broker.log.last(session)
    for _ in range(count):
        tail = await broker.log.append(
            session, str(tail.next).encode(), kind=kind, after=tail, pending=tail.pending, timeout=10
        )
    return tail


async def records(broker: NatsBroker, session: str) -> list[Record]:
    return list(await broker.log.read(session))


# -------------------------------------------------------------------------------------------------- unknown outcomes


async def test_a_lost_ack_is_resolved_from_the_log(env: NatsEnvironment) -> None:
    async with NatsProxy(env.server.port) as proxy, env.broker(proxy.url) as broker:
        tail = await fill(broker, "s", 2)
        proxy.losing = 1
        tail = await broker.log.append("s", b"mine", kind=Kind.EVENT, after=tail, pending=Pending())
        assert proxy.lost == 1
        assert tail.offset == 3
        assert [r.body for r in await records(broker, "s")] == [b"1", b"2", b"mine"]
        assert (await broker.log.last("s")).cursor == tail.cursor


async def test_a_lost_ack_of_an_input_with_a_key_is_no_duplicate(env: NatsEnvironment) -> None:
    async with NatsProxy(env.server.port) as proxy, env.broker(proxy.url) as broker:
        proxy.losing = 1
        after = Tail()
        tail = await broker.log.append(
            "s", b"x", kind=Kind.TURN, agent="a", after=after, pending=after.pending.add(1), dedupe="k"
        )
        assert (proxy.lost, tail.offset) == (1, 1)
        with pytest.raises(Duplicate) as caught:
            await broker.log.append("s", b"x", kind=Kind.CANCEL, after=tail, pending=tail.pending, dedupe="k")
        assert caught.value.offset == 1


async def test_the_same_bytes_of_another_writer_are_not_taken_for_ours(env: NatsEnvironment) -> None:
    async with NatsProxy(env.server.port) as proxy, env.broker(proxy.url) as one, env.broker() as two:
        outcomes: list[str] = []

        async def late() -> None:
            try:
                await one.log.append("s", b"same", kind=Kind.CANCEL, after=Tail(), pending=Pending())
                outcomes.append("stored")
            except Conflict as error:
                outcomes.append(f"conflict at {error.tail and error.tail.offset}")

        proxy.refusing = True
        proxy.cut()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(late)
            await anyio.sleep(0.1)
            await two.log.append("s", b"same", kind=Kind.CANCEL, after=Tail(), pending=Pending())
            proxy.refusing = False
        assert outcomes == ["conflict at 1"]
        assert len(await records(two, "s")) == 1


async def test_an_append_while_disconnected_gives_up_and_is_never_stored(env: NatsEnvironment) -> None:
    async with NatsProxy(env.server.port) as proxy, env.broker(proxy.url) as broker, env.broker() as other:
        tail = await fill(broker, "s", 1)
        proxy.refusing = True
        proxy.cut()
        await anyio.sleep(0.05)
        began = time.monotonic()
        for n in range(5):
            with pytest.raises(Unavailable, match="no connection"):
                await broker.log.append(
                    "s", b"late %d" % n, kind=Kind.EVENT, after=tail, pending=Pending(), timeout=0.2
                )
        assert time.monotonic() - began < 5
        proxy.refusing = False
        back = await broker.log.append("s", b"in time", kind=Kind.EVENT, after=tail, pending=Pending(), timeout=10)
        assert back.offset == 2
        await anyio.sleep(0.2)
        assert [r.body for r in await records(other, "s")] == [b"1", b"in time"]


async def test_a_hung_server_ends_in_unavailable_and_at_most_one_record() -> None:
    async with NatsServer() as server, NatsBroker(server.url, check=False) as broker:
        await broker.setup()
        tail = await fill(broker, "s", 1)
        server.suspend()
        await anyio.sleep(0.2)
        try:
            with pytest.raises(Unavailable):
                await broker.log.append("s", b"?", kind=Kind.EVENT, after=tail, pending=Pending(), timeout=1.2)
        finally:
            server.resume()
        with anyio.fail_after(10):
            while (tail := await broker.log.last("s")).offset < 2:
                # Whether it was stored was not known; if not, it is free to be stored by the next.
                try:
                    await broker.log.append("s", b"next", kind=Kind.EVENT, after=tail, pending=Pending())
                except Conflict:
                    continue
        assert [r.offset for r in await records(broker, "s")] == [1, 2]


async def test_appends_go_on_over_crashes_of_the_server() -> None:
    async with NatsServer() as server, NatsBroker(server.url, check=False) as broker:
        await broker.setup()
        done = anyio.Event()
        ends: dict[str, int] = {}

        async def write(session: str) -> None:
            tail = Tail()
            while not done.is_set():
                tail = await broker.log.append(
                    session, str(tail.next).encode(), kind=Kind.EVENT, after=tail, pending=Pending()
                )
            ends[session] = tail.offset

        async with anyio.create_task_group() as tasks:
            for n in range(8):
                tasks.start_soon(write, f"s{n}")
            for _ in range(2):
                await anyio.sleep(0.3)
                await anyio.to_thread.run_sync(server.kill)
                await anyio.to_thread.run_sync(server.start)
            await anyio.sleep(0.5)
            done.set()
        assert len(ends) == 8
        for session, end in ends.items():
            found = [(r.offset, r.body) for r in await broker.log.read(session, limit=10**6)]
            assert found == [(n, str(n).encode()) for n in range(1, end + 1)]


async def test_a_cancelled_append_leaves_nothing_behind(env: NatsEnvironment) -> None:
    async with env.broker() as broker:
        for _ in range(50):
            # An append that was cancelled may be stored behind the back of the next one.
            with anyio.move_on_after(random.random() * 0.002), suppress(Conflict):
                await fill(broker, "s", 10)
        await anyio.sleep(0.1)
        assert broker._core.appends._slots == {}
        found = await records(broker, "s")
        assert [r.offset for r in found] == list(range(1, len(found) + 1))


# ---------------------------------------------------------------------------------------------------------- limits


async def test_bodies_over_the_limit_and_unusable_names_are_refused(env: NatsEnvironment) -> None:
    async with env.broker() as broker:
        limit = broker.capabilities.max_body
        with pytest.raises(TooLarge):
            await broker.log.append("s", b"x" * (limit + 1), kind=Kind.EVENT, after=Tail(), pending=Pending())
        for session, agent, dedupe in (("a.b", "a", "k"), ("s", "a b", "k"), ("s", "a", "k\r\nEvil: 1")):
            with pytest.raises(InvalidInput):
                await broker.log.append(
                    session, b"x", kind=Kind.TURN, agent=agent, dedupe=dedupe, after=Tail(), pending=Pending()
                )
        long = Pending()
        for offset in range(1, 400):
            long = long.add(10**7 + offset)
        with pytest.raises(TooLarge):
            await broker.log.append("s", b"x", kind=Kind.EVENT, after=Tail(), pending=long)
        assert await records(broker, "s") == []


async def test_a_record_deleted_under_its_key_is_gone(env: NatsEnvironment) -> None:
    async with env.broker() as broker:
        await broker.log.append("s", b"x", kind=Kind.CANCEL, after=Tail(), pending=Pending(), dedupe="k")
        await broker.log.delete("s")
        with pytest.raises(SessionGone):
            await broker.log.append("s", b"x", kind=Kind.CANCEL, after=Tail(), pending=Pending(), dedupe="k")


async def test_a_leader_that_may_be_none_any_more_is_not_believed_that_a_record_is_gone(
    env: NatsEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with env.broker() as broker:
        await broker.log.append("s", b"x", kind=Kind.CANCEL, after=Tail(), pending=Pending(), dedupe="k")
        await broker.log.delete("s")
        monkeypatch.setattr(broker.log._reader, "confirm", not_led)
        with pytest.raises(Unavailable, match="too few"):
            await broker.log.append("s", b"x", kind=Kind.CANCEL, after=Tail(), pending=Pending(), dedupe="k")
        with pytest.raises(Unavailable, match="too few"):
            await broker.log.last("s", fresh=True)


async def not_led(_route: object) -> None:
    raise Unavailable("its leader hears too few of the other servers")


# --------------------------------------------------------------------------------------------------------- reading


async def test_any_offset_is_found_with_few_gets(env: NatsEnvironment) -> None:
    async with env.broker() as broker:
        async with anyio.create_task_group() as tasks:
            for n in range(8):
                tasks.start_soon(fill, broker, f"other{n}", 150)
            tasks.start_soon(fill, broker, "s", 900)
        before = broker._core.reads.client.stats["out_msgs"]
        wanted = [0, 1, 2, 31, 32, 33, 450, 867, 868, 899, 900, 901, *random.sample(range(900), 20)]
        for after in wanted:
            found = await broker.log.read("s", after=after, limit=3)
            assert [r.offset for r in found] == [n for n in range(after + 1, after + 4) if n <= 900]
        cost = (broker._core.reads.client.stats["out_msgs"] - before) / len(wanted)
        assert cost < 12


async def test_without_deltas_both_kinds_of_the_rest_come_in_order(env: NatsEnvironment) -> None:
    async with env.broker() as broker:
        kinds = [random.choice([Kind.DELTA, Kind.EVENT, Kind.CANCEL]) for _ in range(120)]
        for kind in kinds:
            await fill(broker, "s", 1, kind=kind)
        wanted = [n for n, kind in enumerate(kinds, 1) if kind is not Kind.DELTA]
        assert [r.offset for r in await broker.log.read("s", deltas=False)] == wanted
        for after in (0, 40, 119):
            found = await broker.log.read("s", after=after, deltas=False, limit=7)
            assert [r.offset for r in found] == [n for n in wanted if n > after][:7]


async def test_many_and_large_records_are_read_in_pages(env: NatsEnvironment) -> None:
    async with env.broker() as broker:
        await fill(broker, "s", 1300)
        assert [r.offset for r in await broker.log.read("s", limit=1250)] == list(range(1, 1251))
        tail = Tail()
        for _ in range(6):
            tail = await broker.log.append("large", b"x" * 700_000, kind=Kind.EVENT, after=tail, pending=Pending())
        assert [len(r.body) for r in await broker.log.read("large")] == [700_000] * 6


async def test_a_message_that_is_no_record_is_named(env: NatsEnvironment) -> None:
    async with env.broker() as broker:
        # As a request, whose reply is the stream's word that it is stored.
        await broker.connection.request(f"agentrun.{env.namespace}.0.s.out.turn", b"garbage", timeout=5)
        with pytest.raises(InvalidInput, match="seq 1"):
            await broker.log.last("s")


# ---------------------------------------------------------------------------------------------------------- expiry


async def test_offsets_of_expired_deltas_are_not_given_out_again(nats_environments: NatsEnvironments) -> None:
    async with nats_environments(Settings(delta_ttl=1.0)) as env, env.broker() as broker:
        after = Tail()
        tail = await broker.log.append("s", b"t", kind=Kind.TURN, agent="a", after=after, pending=after.pending.add(1))
        started = await broker.log.append("s", b"s", kind=Kind.EVENT, after=tail, pending=tail.pending.claim(1))
        last = await fill(broker, "s", 20, kind=Kind.DELTA)
        end = await broker.log.last("s")
        for _ in range(100):
            if end.offset == 2:
                break
            await anyio.sleep(0.1)
            end = await broker.log.last("s")
        assert end.offset == 2
        assert end.lost > 1000
        for old in (started, last):
            with pytest.raises(Conflict):
                await broker.log.append("s", b"e", kind=Kind.EVENT, after=old, pending=Pending())
        new = await broker.log.append("s", b"e", kind=Kind.EVENT, after=end, pending=Pending())
        assert new.offset == end.next > last.offset
        assert [r.offset for r in await records(broker, "s")] == [1, 2, new.offset]


async def test_what_stays_after_a_restart(nats_environments: NatsEnvironments) -> None:
    async with nats_environments(Settings()) as env, env.broker() as broker:
        await fill(broker, "s", 5)
        await env.restart()
        with anyio.fail_after(10):
            tail = await broker.log.last("s")
            assert tail.offset == 5
            assert (await fill(broker, "s", 1)).offset == 6
