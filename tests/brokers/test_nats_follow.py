"""Joining what is stored with what comes, when live messages are lost and connections break."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator
from typing import Any

import anyio
import anyio.to_thread
import pytest

from agentrun.broker import Kind, Pending, Tail
from agentrun.brokers import nats_follow, nats_read
from agentrun.brokers.nats import NatsBroker
from agentrun.brokers.nats_follow import Follower
from agentrun.brokers.nats_link import Msg
from agentrun.brokers.server import NatsServer
from agentrun.errors import SessionGone, Unavailable
from agentrun.testing import Settings
from tests.brokers.nats_environment import NatsEnvironment, NatsEnvironments, NatsProxy


@pytest.fixture
async def env(nats_environments: NatsEnvironments) -> AsyncGenerator[NatsEnvironment]:
    async with nats_environments(Settings()) as environment:
        yield environment


async def write(broker: NatsBroker, session: str, count: int, *, pause: float = 0.0, inputs: bool = False) -> Tail:
    tail = await broker.log.last(session)
    for n in range(count):
        kind = random.choice([Kind.EVENT, Kind.DELTA, Kind.CANCEL]) if inputs else Kind.DELTA
        kind = Kind.EVENT if n == count - 1 else kind
        tail = await broker.log.append(session, str(tail.next).encode(), kind=kind, after=tail, pending=Pending())
        if pause:
            await anyio.sleep(pause)
    return tail


async def follow_to(broker: NatsBroker, session: str, after: int, end: int, *, deltas: bool = True) -> list[int]:
    seen: list[int] = []
    async with broker.log.follow(session, after=after, deltas=deltas) as lists:
        async for records in lists:
            assert records
            assert all(r.body == str(r.offset).encode() for r in records)
            seen += [r.offset for r in records]
            if seen[-1] >= end:
                return seen
    raise AssertionError("a follow never ends by itself")


class Forgetful(Follower):
    """A follower to whom every third live message does not get through."""

    def _on_live(self, msg: Msg) -> None:
        if random.random() > 0.3:
            super()._on_live(msg)


async def test_a_hundred_readers_join_a_fast_writer_at_any_offset(
    env: NatsEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentrun.brokers.nats_log.Follower", Forgetful)
    monkeypatch.setattr(nats_follow, "IDLE", 0.3)
    end = 600
    async with env.broker() as writer, env.broker() as readers:
        await write(writer, "s", 200)

        async def read(after: int, delay: float, deltas: bool) -> None:
            await anyio.sleep(delay)
            seen = await follow_to(readers, "s", after, end, deltas=deltas)
            if deltas:
                assert seen == list(range(after + 1, end + 1))
            else:
                wanted = [r.offset for r in await readers.log.read("s", after=after, deltas=False)]
                assert seen == wanted

        async with anyio.create_task_group() as tasks:
            for n in range(110):
                tasks.start_soon(read, random.randrange(400), random.random(), n % 10 != 0)
            await write(writer, "s", 400, inputs=True)


async def test_who_asks_for_what_is_still_to_come_misses_nothing_of_it(
    env: NatsEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deaf(Follower):
        def _on_live(self, msg: Msg) -> None:
            pass

    monkeypatch.setattr("agentrun.brokers.nats_log.Follower", Deaf)
    monkeypatch.setattr(nats_follow, "IDLE", 0.2)
    async with env.broker() as broker:
        tail = Tail()
        for kind in (Kind.EVENT, Kind.CANCEL, Kind.DELTA):
            tail = await broker.log.append("s", b"", kind=kind, after=tail, pending=Pending())
        async with broker.log.follow("s", after=6) as lists, anyio.create_task_group() as tasks:
            found: list[int] = []

            async def read() -> None:
                with anyio.fail_after(20):
                    while not found or found[-1] < 9:
                        found.extend(record.offset for record in await anext(lists))

            tasks.start_soon(read)
            await anyio.sleep(0.1)  # it has looked: the log ends at 3
            for kind in (Kind.EVENT, Kind.CANCEL, *[Kind.DELTA] * 4):
                tail = await broker.log.append("s", b"", kind=kind, after=tail, pending=Pending())
        assert found == [7, 8, 9]


async def test_a_lost_last_message_is_found(env: NatsEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(Follower):
        def _on_live(self, msg: Msg) -> None:
            pass

    monkeypatch.setattr("agentrun.brokers.nats_log.Follower", Deaf)
    async with env.broker() as broker, broker.log.follow("s") as lists:
        with anyio.fail_after(20):
            await write(broker, "s", 1)
            assert [r.offset for r in await anext(lists)] == [1]


class Watched(Follower):
    """A follower that notes the interval after which it looks the end up, each time it does."""

    looks: dict[str, list[float]]

    async def _look(self) -> None:
        self.looks.setdefault(self._session, []).append(self._idle)
        await super()._look()


async def test_a_session_without_work_is_looked_up_ever_more_seldom(
    env: NatsEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = 0.02
    growing = [step, 2 * step, 4 * step, 8 * step, 8 * step, 8 * step]
    monkeypatch.setattr("agentrun.brokers.nats_log.Follower", Watched)
    monkeypatch.setattr(nats_follow, "IDLE", step)
    monkeypatch.setattr(nats_follow, "IDLE_MOST", 8 * step)
    Watched.looks = {}
    seen: list[tuple[str, int]] = []

    async def looked(session: str, times: int) -> None:
        with anyio.fail_after(15):
            while len(Watched.looks.get(session, ())) < times:  # noqa: ASYNC110 - what it waits for has no event
                await anyio.sleep(step)

    async with env.broker() as broker, anyio.create_task_group() as tasks:

        async def read(session: str) -> None:
            async with broker.log.follow(session) as lists:
                async for records in lists:
                    seen.extend((session, record.offset) for record in records)

        pending = Pending().add(1)
        await broker.log.append("busy", b"1", kind=Kind.TURN, agent="a", after=Tail(), pending=pending)
        await write(broker, "idle", 1)
        for session in ("busy", "idle", "nothing"):
            tasks.start_soon(read, session)
        for session in ("idle", "nothing"):
            await looked(session, 6)
            assert Watched.looks[session][:6] == growing
        await looked("busy", 6)
        assert set(Watched.looks["busy"]) == {step}
        assert len(Watched.looks["busy"]) > len(Watched.looks["idle"]), "the interval is not kept"

        before = len(Watched.looks["idle"])
        await write(broker, "idle", 1)
        await looked("idle", before + 7)
        again = Watched.looks["idle"][before:]
        assert again[again.index(step) :][:3] == growing[:3], "a record sets it back"
        tasks.cancel_scope.cancel()
    assert sorted(seen) == [("busy", 1), ("idle", 1), ("idle", 2)]


async def test_a_session_whose_work_ends_is_looked_up_less_often(
    env: NatsEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_follow, "IDLE", 0.02)
    async with env.broker() as broker, broker.log.follow("s") as lists:
        assert isinstance(lists, Follower)
        turn = await broker.log.append("s", b"1", kind=Kind.TURN, agent="a", after=Tail(), pending=Pending().add(1))
        await anext(lists)
        with anyio.move_on_after(0.3):
            await anext(lists)
        assert lists._idle == nats_follow.IDLE
        await broker.log.append("s", b"2", kind=Kind.EVENT, after=turn, pending=turn.pending.settle(1))
        await anext(lists)
        assert lists._idle == nats_follow.IDLE
        with anyio.move_on_after(0.3):
            await anext(lists)
        assert lists._idle > 2 * nats_follow.IDLE


async def test_following_goes_on_when_connections_break(env: NatsEnvironment) -> None:
    async with NatsProxy(env.server.port) as proxy, env.broker(proxy.url) as readers, env.broker() as writer:
        seen: dict[int, list[int]] = {}

        async def read(n: int) -> None:
            seen[n] = await follow_to(readers, "s", 0, 150, deltas=n % 2 == 0)

        async with anyio.create_task_group() as tasks:
            for n in range(6):
                tasks.start_soon(read, n)
            tasks.start_soon(cut_often, proxy)
            await write(writer, "s", 150, pause=0.005, inputs=True)
        rest = [r.offset for r in await writer.log.read("s", deltas=False)]
        assert [seen[n] for n in range(6)] == [list(range(1, 151)), rest] * 3


async def cut_often(proxy: NatsProxy) -> None:
    for _ in range(3):
        await anyio.sleep(0.25)
        proxy.cut()


async def test_following_goes_on_when_the_server_restarts() -> None:
    async with NatsServer() as server, NatsBroker(server.url, check=False) as broker:
        await broker.setup()
        seen: list[int] = []

        async def read() -> None:
            seen.extend(await follow_to(broker, "s", 0, 40))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await write(broker, "s", 20)
            await anyio.to_thread.run_sync(server.restart)
            await write_when_back(broker, 20)
        assert seen == list(range(1, 41))


async def write_when_back(broker: NatsBroker, count: int) -> None:
    with anyio.fail_after(15):
        await write(broker, "s", count)


async def test_a_slow_reader_keeps_a_bounded_buffer_and_loses_nothing(
    env: NatsEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_follow, "BUFFER", 20)
    async with env.broker() as broker, broker.log.follow("s") as lists:
        await write(broker, "s", 5)
        seen = [r.offset for r in await anext(lists)]
        await write(broker, "s", 300)
        assert isinstance(lists, Follower)
        assert len(lists._buffer) <= 20
        while seen[-1] < 305:
            seen += [r.offset for r in await anext(lists)]
        assert seen == list(range(1, 306))


async def test_a_cursor_spares_the_search_and_a_wrong_one_does_no_harm(env: NatsEnvironment) -> None:
    async with env.broker() as broker:
        await write(broker, "other", 50)
        await write(broker, "s", 300)
        at = {r.offset: r.cursor for r in await broker.log.read("s")}
        costs: dict[str, int] = {}
        for name, cursor in {"right": at[150], "none": 0, "wrong": at[151], "foreign": 3, "beyond": 10**6}.items():
            before = broker._core.reads.client.stats["out_msgs"]
            async with broker.log.follow("s", after=150, cursor=cursor) as lists:
                assert (await anext(lists))[0].offset == 151
            costs[name] = broker._core.reads.client.stats["out_msgs"] - before
        assert costs["right"] < costs["none"]


async def test_a_deleted_session_ends_the_follow(env: NatsEnvironment) -> None:
    async with env.broker() as broker, broker.log.follow("s") as lists:
        await write(broker, "s", 3)
        await anext(lists)
        await broker.log.delete("s")
        with anyio.fail_after(20), pytest.raises(SessionGone):
            await anext(lists)


async def test_a_leader_that_may_be_none_any_more_ends_no_follow(
    env: NatsEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = anyio.Event()

    async def not_led(_route: object) -> None:
        asked.set()
        raise Unavailable("its leader hears too few of the other servers")

    async with env.broker() as broker, broker.log.follow("s") as lists, anyio.create_task_group() as group:
        await write(broker, "s", 3)
        await anext(lists)
        monkeypatch.setattr(broker.log._reader, "confirm", not_led)
        await broker.log.delete("s")
        group.start_soon(anext, lists)
        with anyio.fail_after(20):
            await asked.wait()
        await anyio.sleep(0.1)  # the next one has not raised
        group.cancel_scope.cancel()


async def test_an_abandoned_follow_leaves_no_subscription(env: NatsEnvironment) -> None:
    async with env.broker() as broker:
        before = len(broker._core.reads.client._subs)
        await write(broker, "s", 1)
        for deltas in (True, False):
            with anyio.move_on_after(0.1):
                async with broker.log.follow("s", after=1, deltas=deltas) as lists:
                    await anext(lists)
        assert len(broker._core.reads.client._subs) == before
        assert broker._core.reads.on_reconnect == set()


async def test_what_is_no_record_on_the_live_subject_does_no_harm(
    env: NatsEnvironment, caplog: pytest.LogCaptureFixture
) -> None:
    async with env.broker() as broker, broker.log.follow("s") as lists:
        await write(broker, "s", 1)
        assert [r.offset for r in await anext(lists)] == [1]
        link = broker._core.reads
        subject = f"{broker._core.route('s').live}.out.turn"
        await link.client.publish(subject, b"junk", headers={"No": "record"})
        await link.client.publish(subject, b"junk")
        await write(broker, "s", 1)
        with anyio.fail_after(20):
            assert [r.offset for r in await anext(lists)] == [2]
        assert link.connected
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"a message on {subject} cannot be used"
    ]


@pytest.mark.parametrize("deltas", [True, False])
async def test_readers_that_come_back_together_ask_by_and_by(env: NatsEnvironment, deltas: bool) -> None:
    """Each reads what it missed; asked all at once, a server that is slow would be asked again and again."""
    count = 300
    async with (
        NatsProxy(env.server.port) as proxy,
        env.broker(proxy.url) as broker,
        env.broker() as writer,
        anyio.create_task_group() as group,
    ):
        seen: dict[int, int] = {}
        asked = 0
        reads = broker._core.reads
        publish = reads.publish

        async def counting(subject: str, *arguments: Any, **more: Any) -> None:
            nonlocal asked
            asked += "DIRECT.GET" in subject
            await publish(subject, *arguments, **more)

        reads.publish = counting

        async def read(n: int) -> None:
            async with broker.log.follow(f"s{n}", deltas=deltas) as lists:
                async for records in lists:
                    seen[n] = records[-1].offset

        async def write_all(count_each: int) -> None:
            for n in range(count):
                await write(writer, f"s{n}", count_each)

        async def until(offset: int) -> int:
            """Wait until all have it; the most requests that were under way at a time."""
            most = 0
            with anyio.fail_after(50):
                while len(seen) < count or min(seen.values()) < offset:
                    most = max(most, len(reads._slots))
                    await anyio.sleep(0.001)
            return most

        await write_all(1)
        for n in range(count):
            group.start_soon(read, n)
        await until(1)
        proxy.refusing = True
        proxy.cut()
        await write_all(1)
        asked = 0
        proxy.refusing = False
        # Without deltas a reader has two requests under way at a time.
        assert await until(2) <= 2 * nats_read.CATCH_UPS_AT_ONCE + 5
        assert asked <= 12 * count
        group.cancel_scope.cancel()
