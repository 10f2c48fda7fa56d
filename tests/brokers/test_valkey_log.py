"""What is this broker's own in appending and reading: losses that are noticed, expiry, pages, broken connections."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import anyio
import pytest

from agentrun.broker import Broker, Kind, Pending, Record, Tail
from agentrun.brokers.valkey import ValkeyBroker
from agentrun.brokers.valkey_server import ValkeyServer
from agentrun.errors import Conflict, RecordsLost, SessionGone
from agentrun.testing import Settings
from tests.brokers.server_environment import new_namespace
from tests.brokers.valkey_environment import ValkeyEnvironment, ValkeyEnvironments, ValkeyProxy, client


async def append(broker: Broker, body: bytes = b"", *, kind: Kind = Kind.EVENT, session: str = "s") -> Tail:
    tail = await broker.log.last(session)
    return await broker.log.append(session, body, kind=kind, after=tail, pending=tail.pending)


async def offsets_of(broker: Broker, session: str = "s") -> list[int]:
    return [record.offset for record in await broker.log.read(session)]


async def some(records: AsyncIterator[Sequence[Record]]) -> list[int]:
    with anyio.fail_after(20):
        return [record.offset for record in await anext(records)]


class Lossy:
    """A server that can be taken back to what its disk had at a time, as a crash or a failover would."""

    def __init__(self, server: ValkeyServer, directory: Path) -> None:
        self.server = server
        self._data = directory / "data"
        self._copy = directory / "copy"

    def remember(self) -> None:
        self.server.kill()
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(self._data, self._copy)
        self.server.start()

    def go_back(self) -> None:
        self.server.kill()
        shutil.rmtree(self._data)
        shutil.copytree(self._copy, self._data)
        self.server.start()


@pytest.fixture
async def lossy(tmp_path: Path) -> AsyncIterator[Lossy]:
    with ValkeyServer(data=tmp_path / "data", settings="appendfsync always") as server:
        async with ValkeyBroker(server.url, namespace="n", check=False) as broker:
            await broker.setup()
        yield Lossy(server, tmp_path)


@pytest.mark.parametrize("since", [0, 1, 5], ids=["shorter", "as-long", "longer"])
async def test_an_append_behind_what_was_lost_says_so(lossy: Lossy, since: int) -> None:
    async with ValkeyBroker(lossy.server.url, namespace="n") as broker:
        await append(broker)
        lossy.remember()
        tail = await append(broker)
        lossy.go_back()
        for _ in range(since):
            await append(broker, b"another")
        with pytest.raises(RecordsLost) as raised:
            await broker.log.append("s", b"", kind=Kind.EVENT, after=tail, pending=Pending())
        assert (raised.value.after, raised.value.end) == (2, 1 + since)
        assert await offsets_of(broker) == list(range(1, 2 + since))


async def test_a_follower_of_what_was_lost_is_told(lossy: Lossy) -> None:
    async with ValkeyBroker(lossy.server.url, namespace="n") as broker:
        await append(broker)
        lossy.remember()
        async with broker.log.follow("s") as records:
            tail = await append(broker)
            seen: list[int] = []
            while len(seen) < 2:
                seen += await some(records)
            lossy.go_back()
            with pytest.raises(RecordsLost):
                await some(records)
        async with broker.log.follow("s", after=2, cursor=tail.cursor) as records:
            with pytest.raises(RecordsLost):
                await some(records)


async def test_a_session_that_was_lost_is_told_from_one_that_was_deleted(lossy: Lossy) -> None:
    async with ValkeyBroker(lossy.server.url, namespace="n") as broker:
        tails = {session: await append(broker, session=session) for session in ("lost", "deleted")}
        await broker.log.delete("deleted")
        async with client(lossy.server) as valkey:
            await valkey.delete(*[f"{{ar:n:0}}:{kind}:lost" for kind in "te"])
        for begun_anew in (False, True):
            for session, error in (("lost", RecordsLost), ("deleted", SessionGone)):
                if begun_anew:
                    await append(broker, session=session)
                async with broker.log.follow(session, after=1, cursor=tails[session].cursor) as records:
                    with pytest.raises(SessionGone) as raised:
                        await some(records)
                    assert type(raised.value) is error
                with pytest.raises(Conflict if session == "deleted" else RecordsLost):
                    await broker.log.append(
                        session, b"", kind=Kind.EVENT, after=tails[session], pending=Pending(), timeout=5
                    )


async def test_the_cursor_of_another_broker_is_no_sign_of_a_loss(valkey_environments: ValkeyEnvironments) -> None:
    async with valkey_environments(Settings()) as environment, environment.broker() as broker:
        await append(broker)
        async with broker.log.follow("s", after=1, cursor=4711) as records:
            await append(broker)
            assert await some(records) == [2]


# ------------------------------------------------------------------------------------------------ expiry and pages


async def test_deltas_expire_while_others_are_appended(valkey_environments: ValkeyEnvironments) -> None:
    async with valkey_environments(Settings(delta_ttl=2.0)) as environment, environment.broker() as broker:
        tails = [await append(broker)]
        while len(tails) < 250 or tails[-1].time - tails[249].time < 2.05:
            # Nothing is waited for at first: more than a page expires at once.
            await anyio.sleep(0.0 if len(tails) < 250 else 0.2)
            after = tails[-1]
            tails.append(await broker.log.append("s", b"", kind=Kind.DELTA, after=after, pending=Pending()))
        old = tails[-1].time - 2.0
        left = [tail.offset for tail in tails if tail.offset == 1 or tail.time > old]
        # Not in one go: none younger than its time may be taken along.
        assert 2 < len(left) < len(tails) - 240
        assert await offsets_of(broker) == left
        async with client(environment.server) as valkey:
            ttl = await valkey.pttl(f"{environment.prefix('s')}d:s")
        assert 0 < ttl <= 2250


async def test_a_page_has_a_limit_of_bytes_and_readers_get_all(valkey_environments: ValkeyEnvironments) -> None:
    async with valkey_environments(Settings()) as environment, environment.broker() as broker:
        tail = Tail()
        for number in range(130):
            kind = Kind.DELTA if number % 3 else Kind.EVENT
            tail = await broker.log.append("s", b"x" * 100_000, kind=kind, after=tail, pending=Pending())
        assert await offsets_of(broker) == list(range(1, 131))
        async with broker.log.follow("s", after=7) as records:
            pages = [await some(records)]
            while pages[-1][-1] < 130:
                pages.append(await some(records))
        assert [offset for page in pages for offset in page] == list(range(8, 131))
        assert max(map(len, pages)) < 123


# ------------------------------------------------------------------------------------------------ the connection


async def test_a_restart_of_the_server_keeps_all_and_what_is_open_goes_on(lossy: Lossy) -> None:
    async with ValkeyBroker(lossy.server.url, namespace="n") as broker, broker.log.follow("s") as records:
        await broker.turns.open("agent")
        tail = await append(broker, b"1")
        assert await some(records) == [1]
        lossy.server.kill()
        lossy.server.start()
        pending = Pending().add(2)
        await broker.log.append("s", b"2", kind=Kind.TURN, after=tail, pending=pending, agent="agent")
        assert await some(records) == [2]
        lease = await broker.turns.lease("agent", wait=20)
        assert lease is not None
        assert [r.body for r in await broker.log.read("s")] == [b"1", b"2"]


async def test_scripts_that_were_flushed_are_loaded_again(valkey_environments: ValkeyEnvironments) -> None:
    settings = Settings(lease_ttl=1.0)
    async with valkey_environments(settings) as environment, environment.broker() as broker:
        await broker.turns.open("agent")
        async with client(environment.server) as valkey:
            await valkey.script_flush()
            tail = await broker.log.append(
                "s", b"", kind=Kind.TURN, after=Tail(), pending=Pending().add(1), agent="agent"
            )
            assert await offsets_of(broker) == [1]
            lease = await broker.turns.lease("agent", wait=5)
            assert lease is not None
            await valkey.script_flush()
            for _ in range(8):  # from the thread of the heartbeats
                lease.extend()
                await anyio.sleep(0.25)
            assert await broker.turns.lease("agent", wait=0) is None
        await broker.log.append("s", b"", kind=Kind.EVENT, after=tail, pending=Pending())


async def test_a_server_that_hangs_is_left_and_found_again(valkey_environments: ValkeyEnvironments) -> None:
    async with (
        valkey_environments(Settings()) as environment,
        ValkeyProxy(environment.server.port) as proxy,
        environment.broker(proxy.url) as broker,
        broker.log.follow("s") as records,
    ):
        await append(broker)
        assert await some(records) == [1]
        proxy.freeze()
        with anyio.fail_after(30):
            assert (await append(broker)).offset == 2
        assert await some(records) == [2]


@pytest.mark.parametrize("uvloop", [True, False], ids=["uvloop", "asyncio"])
def test_connections_that_break_while_it_is_written_lose_and_double_nothing(
    valkey_server: ValkeyServer, uvloop: bool
) -> None:
    async def main() -> None:
        environment = ValkeyEnvironment(valkey_server, Settings(), new_namespace())
        async with environment.broker(check=False) as operator:
            await operator.setup()
        async with ValkeyProxy(valkey_server.port) as proxy, environment.broker(proxy.url) as broker:
            sent: list[bytes] = []

            async def write() -> None:
                tail = Tail()
                for number in range(150):
                    body = b"%d" % number
                    tail = await broker.log.append("s", body, kind=Kind.DELTA, after=tail, pending=Pending())
                    sent.append(body)
                    await anyio.sleep(0.002)

            async with broker.log.follow("s") as records, anyio.create_task_group() as tasks:
                tasks.start_soon(write)
                seen: list[Record] = []
                with anyio.fail_after(60):
                    while len(seen) < 150:
                        seen += await anext(records)
                        if len(seen) < 100 and len(seen) % 7 == 0:
                            proxy.cut()
            assert [record.offset for record in seen] == list(range(1, 151))
            assert [record.body for record in seen] == sent

    anyio.run(main, backend_options={"use_uvloop": uvloop})
