"""Connecting, checking and setting up: what is not as needed is refused in words that help."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import nats
import pytest

from agentrun.broker import Kind, Tail
from agentrun.brokers import connect
from agentrun.brokers.memory import MemoryBroker
from agentrun.brokers.nats import NatsBroker, Streams
from agentrun.brokers.nats_layout import stream_name
from agentrun.brokers.nats_link import ApiError, Link
from agentrun.brokers.server import NatsServer
from agentrun.errors import InvalidInput, Misconfigured, Unavailable
from tests.brokers.nats_environment import drop_streams
from tests.brokers.server_environment import new_namespace


@asynccontextmanager
async def namespace_of(server: NatsServer, partitions: int = 1) -> AsyncGenerator[str]:
    name = new_namespace()
    try:
        yield name
    finally:
        await drop_streams(server.url, name, partitions)


async def setup(server: NatsServer, namespace: str, *, dry_run: bool = False, **streams: Any) -> list[str]:
    async with NatsBroker(server.url, namespace=namespace, check=False, streams=Streams(**streams)) as broker:
        return await broker.setup(dry_run=dry_run)


async def edit(server: NatsServer, namespace: str, **changes: Any) -> None:
    """Change a stream behind agentrun's back."""
    client = await nats.connect(server.url)
    name = stream_name(namespace, 0)
    info = json.loads((await client.request(f"$JS.API.STREAM.INFO.{name}", b"", timeout=5)).data)
    config = {**info["config"], **changes}
    reply = json.loads(
        (await client.request(f"$JS.API.STREAM.UPDATE.{name}", json.dumps(config).encode(), timeout=5)).data
    )
    await client.close()
    assert "error" not in reply, reply


async def test_setup_creates_once_and_a_dry_run_nothing(nats_server: NatsServer) -> None:
    async with namespace_of(nats_server, 3) as namespace:
        would = await setup(nats_server, namespace, dry_run=True, partitions=3)
        assert len(would) == 3
        with pytest.raises(Misconfigured, match="agentrun setup"):
            async with NatsBroker(nats_server.url, namespace=namespace):
                pass
        assert await setup(nats_server, namespace, partitions=3) == would
        assert await setup(nats_server, namespace, partitions=3) == []
        assert await setup(nats_server, namespace) == []


async def test_setup_spreads_sessions_over_partitions(nats_server: NatsServer) -> None:
    async with namespace_of(nats_server, 3) as namespace:
        await setup(nats_server, namespace, partitions=3)
        async with NatsBroker(nats_server.url, namespace=namespace) as broker:
            await broker.turns.open("agent")
            for n in range(12):
                after = Tail()
                await broker.log.append(
                    f"s{n}", b"x", kind=Kind.TURN, agent="agent", after=after, pending=after.pending.add(1)
                )
            leased = set()
            for _ in range(12):
                lease = await broker.turns.lease("agent", wait=5)
                assert lease is not None
                leased.add(lease.session)
                await lease.ack()
            assert leased == {f"s{n}" for n in range(12)}
            (stats,) = await broker.stats()
            assert (stats.agent, stats.waiting, stats.leased) == ("agent", 0, 0)
            for n in range(12):
                assert [r.offset for r in await broker.log.read(f"s{n}")] == [1]


@pytest.mark.parametrize("call", ["INFO", "STREAM.INFO"])
async def test_a_cluster_that_cannot_tell_at_the_moment_is_not_misconfigured(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    errors = [
        (ApiError(503, 10008, "JetStream system temporarily unavailable"), Unavailable),
        (ApiError(503, 10039, "JetStream not enabled for account"), Misconfigured),
    ]
    api = Link.api
    async with namespace_of(nats_server) as namespace:
        await setup(nats_server, namespace)
        for error, raised in errors:

            async def answer(link: Link, asked: str, *args: Any, error: ApiError = error, **options: Any) -> Any:
                return error if asked.startswith(call) else await api(link, asked, *args, **options)

            monkeypatch.setattr(Link, "api", answer)
            with pytest.raises(raised, match=error.description):
                async with NatsBroker(nats_server.url, namespace=namespace):
                    pass
            monkeypatch.setattr(Link, "api", api)


async def test_sessions_are_found_on_all_pages_of_all_partitions(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {f"s{n}" for n in range(30)}
    pages = 0

    async def cut(link: Link, call: str, request: Any = None, **options: Any) -> bytes | ApiError:
        """The server's own pages are of 100,000 subjects."""
        nonlocal pages
        reply = await api(link, call, request, **options)
        if not request or "subjects_filter" not in request:
            return reply
        assert isinstance(reply, bytes)
        pages += 1
        info = json.loads(reply)
        info["state"]["subjects"] = dict(list((info["state"].get("subjects") or {}).items())[:4])
        return json.dumps(info).encode()

    api = Link.api
    async with namespace_of(nats_server, 3) as namespace:
        await setup(nats_server, namespace, partitions=3)
        async with NatsBroker(nats_server.url, namespace=namespace) as broker:
            for name in names:
                await broker.log.append(
                    name, b"x", kind=Kind.TURN, agent="agent", after=Tail(), pending=Tail().pending.add(1)
                )
            monkeypatch.setattr(Link, "api", cut)
            found = await broker.sessions()
            assert sorted(found) == sorted(names)
            assert pages >= 30 / 4
            pages = 0
            assert len(await broker.sessions(limit=3)) == 3
            assert pages == 1


async def test_setup_refuses_another_number_of_partitions(nats_server: NatsServer) -> None:
    async with namespace_of(nats_server) as namespace:
        await setup(nats_server, namespace, partitions=1)
        with pytest.raises(Misconfigured, match="sessions would move"):
            await setup(nats_server, namespace, partitions=2)


async def test_setup_raises_the_time_of_deltas_and_never_lowers_it(nats_server: NatsServer) -> None:
    async with namespace_of(nats_server) as namespace:
        await setup(nats_server, namespace, delta_ttl=60.0)
        with pytest.raises(Misconfigured, match="cannot be lowered"):
            await setup(nats_server, namespace, delta_ttl=30.0)
        assert len(await setup(nats_server, namespace, delta_ttl=90.0)) == 1
        async with NatsBroker(nats_server.url, namespace=namespace) as broker:
            assert broker.capabilities.delta_ttl == 90.0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"allow_direct": False}, "allow_direct"),
        ({"republish": None}, "republish"),
        ({"duplicate_window": 60 * 10**9}, "duplicate_window"),
        ({"max_msgs_per_subject": 5}, "max_msgs_per_subject"),
        ({"metadata": {}}, "metadata"),
    ],
)
async def test_a_stream_that_was_changed_is_refused(
    nats_server: NatsServer, changes: dict[str, Any], named: str
) -> None:
    async with namespace_of(nats_server) as namespace:
        await setup(nats_server, namespace)
        await edit(nats_server, namespace, **changes)
        with pytest.raises(Misconfigured, match=named):
            async with NatsBroker(nats_server.url, namespace=namespace):
                pass


async def test_setup_mends_what_was_changed_and_keeps_what_is_the_operators(nats_server: NatsServer) -> None:
    async with namespace_of(nats_server) as namespace:
        await setup(nats_server, namespace)
        await edit(nats_server, namespace, allow_direct=False, max_bytes=10**9, description="mine")
        (line,) = await setup(nats_server, namespace)
        assert "allow_direct" in line
        async with NatsBroker(nats_server.url, namespace=namespace) as broker:
            reply = await broker.connection.request(f"$JS.API.STREAM.INFO.{stream_name(namespace, 0)}", b"", timeout=5)
        config = json.loads(reply.data)["config"]
        assert (config["max_bytes"], config["description"]) == (10**9, "mine")


async def test_before_setup_every_use_says_so(nats_server: NatsServer) -> None:
    async with NatsBroker(nats_server.url, namespace=new_namespace(), check=False) as broker:
        with pytest.raises(Misconfigured, match="agentrun setup"):
            await broker.log.last("s")


async def test_an_open_queue_of_another_lease_time_is_refused(nats_server: NatsServer) -> None:
    async with namespace_of(nats_server) as namespace:
        await setup(nats_server, namespace)
        async with NatsBroker(nats_server.url, namespace=namespace) as broker:
            assert await broker.turns.open("agent", lease_ttl=2.0) == 2.0
            assert await broker.turns.open("agent") == 2.0
        async with NatsBroker(nats_server.url, namespace=namespace) as broker:
            assert await broker.turns.open("agent") == 2.0
            with pytest.raises(Misconfigured, match="lease time of 2 s, not 3 s"):
                await broker.turns.open("agent", lease_ttl=3.0)


# ------------------------------------------------------------------------------------------------ connecting


async def test_an_old_server_is_refused() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        info = {"server_id": "x", "version": "2.10.26", "max_payload": 1 << 20, "headers": True}
        writer.write(b"INFO " + json.dumps(info).encode() + b"\r\n")
        while line := await reader.readline():
            if line.startswith(b"PING"):
                writer.write(b"PONG\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(Misconfigured, match=r"2\.10\.26, needed is 2\.12"):
            async with NatsBroker(f"nats://127.0.0.1:{port}"):
                pass


async def test_an_account_without_jetstream_is_refused() -> None:
    settings = "accounts { A { users: [{user: ann, password: s3cret}] } }"
    async with NatsServer(settings=settings) as server:
        url = server.url.replace("://", "://ann:s3cret@")
        with pytest.raises(Misconfigured, match="JetStream") as caught:
            async with NatsBroker(url):
                pass
        assert "s3cret" not in str(caught.value)


async def test_a_wrong_password_ends_soon_and_is_not_shown() -> None:
    settings = "authorization { user: ann, password: right }"
    async with NatsServer(settings=settings) as server:
        url = server.url.replace("://", "://ann:s3cret@")
        with anyio.fail_after(20), pytest.raises(Unavailable, match=f"127.0.0.1:{server.port}") as caught:
            async with NatsBroker(url, connect_timeout=120.0):
                pass
        assert "s3cret" not in str(caught.value)
        assert "Authorization" in str(caught.value)
        assert "agentrun dev" not in str(caught.value)  # it runs


async def test_of_several_servers_one_that_refuses_is_not_the_last_word() -> None:
    settings = "authorization { user: ann, password: right }"
    async with NatsServer(settings=settings) as strict, NatsServer() as open_to_all:
        wrong, away = strict.url.replace("://", "://ann:s3cret@"), "nats://127.0.0.1:1"
        async with NatsBroker(f"{wrong},{open_to_all.url}", check=False, connect_timeout=20.0):
            pass
        with anyio.fail_after(20), pytest.raises(Unavailable, match="Authorization"):
            async with NatsBroker(f"{wrong},{away}", connect_timeout=120.0):
                pass


async def test_no_server_is_told_within_the_connect_timeout() -> None:
    began = time.monotonic()
    with pytest.raises(Unavailable, match="agentrun dev"):
        async with NatsBroker("nats://127.0.0.1:1", connect_timeout=0.5):
            pass
    assert time.monotonic() - began < 3


async def test_an_error_in_the_body_comes_out_as_it_is(nats_server: NatsServer) -> None:
    with pytest.raises(ZeroDivisionError):
        async with NatsBroker(nats_server.url, check=False):
            raise ZeroDivisionError


def test_connect_picks_the_broker_by_url() -> None:
    assert isinstance(connect("nats://127.0.0.1:4222", namespace="n"), NatsBroker)
    assert isinstance(connect("memory://here"), MemoryBroker)
    for url in ("amqp://x", "127.0.0.1"):
        with pytest.raises(InvalidInput, match="nats://"):
            connect(url)
    with pytest.raises(InvalidInput, match="namespace"):
        connect("nats://x", namespace="a.b")


@pytest.mark.parametrize("url", ["nats://", "nats://ann:s3cret@host:port", "nats://a,nats://:4222"])
def test_an_unusable_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InvalidInput, match="URL") as caught:
        NatsBroker(url)
    assert "s3cret" not in str(caught.value)


async def test_different_kinds_of_servers_are_refused() -> None:
    with pytest.raises(Unavailable, match="mixing"):
        async with NatsBroker("nats://127.0.0.1:1,ws://127.0.0.1:1", connect_timeout=1.0):
            pass
