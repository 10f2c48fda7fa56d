"""Three servers, three replicas: what only a cluster does."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import anyio.to_thread
import nats
import nats.errors
import pytest

from agentrun.broker import Kind, Pending, Tail
from agentrun.brokers.nats import NatsBroker, Streams
from agentrun.brokers.nats_layout import stream_name
from agentrun.brokers.server import NatsServer
from agentrun.errors import AgentrunError
from agentrun.testing import CHECKS, Settings, run_check
from tests.brokers.nats_environment import NatsEnvironment
from tests.brokers.server_environment import new_namespace


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[NatsServer]]:
    ports = [free_port() for _ in range(3)]
    routes = ", ".join(f"nats://127.0.0.1:{port}" for port in ports)
    servers = [
        NatsServer(settings=f"cluster {{ name: c, listen: 127.0.0.1:{port}, routes: [{routes}] }}") for port in ports
    ]
    try:
        with ThreadPoolExecutor(3) as threads:
            list(threads.map(NatsServer.start, servers))
        yield servers
    finally:
        for server in servers:
            server.stop()


class ClusterEnvironment(NatsEnvironment):
    def broker(self, url: str | None = None, **options: Any) -> NatsBroker:
        return super().broker(url or self.url, **options)

    url = ""


@asynccontextmanager
async def cluster_environment(servers: list[NatsServer], settings: Settings) -> AsyncGenerator[ClusterEnvironment]:
    environment = ClusterEnvironment(servers[0], settings, new_namespace())
    environment.url = ",".join(server.url for server in servers)
    streams = Streams(delta_ttl=settings.delta_ttl, replicas=3)
    for attempt in range(60):  # a cluster that has just started has no leader for some seconds
        try:
            async with environment.broker(check=False, streams=streams) as broker:
                await broker.setup()
            break
        except AgentrunError:
            if attempt == 59:
                raise
            await anyio.sleep(0.25)
    yield environment


CHECKED = ("L1_one_of_many", "L3", "L4", "L6_offsets", "Q2_fleet", "Q2_turns")


@pytest.mark.parametrize("check", [c for c in CHECKS if c.name.startswith(CHECKED)], ids=lambda c: c.name)
async def test_promise_is_kept_with_three_replicas(check: Any, cluster: list[NatsServer]) -> None:
    await run_check(check, lambda settings: cluster_environment(cluster, settings))


async def test_nothing_is_lost_when_the_leader_crashes(cluster: list[NatsServer]) -> None:
    done = False
    written: list[str] = []
    ends: dict[str, int] = {}
    seen: dict[str, list[int]] = {}

    async def write(broker: NatsBroker, session: str) -> None:
        tail = Tail()
        while not done:
            tail = await broker.log.append(
                session, str(tail.next).encode(), kind=Kind.EVENT, after=tail, pending=Pending()
            )
        written.append(session)

    async def follow(broker: NatsBroker, session: str) -> None:
        async with broker.log.follow(session) as lists:
            async for records in lists:
                seen.setdefault(session, []).extend(r.offset for r in records)
                if seen[session][-1] == ends.get(session):
                    return

    async with cluster_environment(cluster, Settings()) as env, env.broker() as writer, env.broker() as reader:
        async with anyio.create_task_group() as tasks:
            for n in range(5):
                tasks.start_soon(write, writer, f"s{n}")
                tasks.start_soon(follow, reader, f"s{n}")
            await anyio.sleep(0.5)
            leader = await leader_of(writer, env, cluster)
            await anyio.to_thread.run_sync(leader.kill)
            before = {session: offsets[-1] for session, offsets in seen.items()}
            with anyio.fail_after(30):
                for _ in range(300):
                    await anyio.sleep(0.1)
                    if all(offsets[-1] > before[session] + 20 for session, offsets in seen.items()):
                        break
            done = True
            for _ in range(100):
                if len(written) == 5:
                    break
                await anyio.sleep(0.05)
            for n in range(5):  # a last record, so that each follower comes to see that it is at the end
                session = f"s{n}"
                tail = await writer.log.last(session)
                ends[session] = tail.next
                await writer.log.append(session, b"end", kind=Kind.EVENT, after=tail, pending=Pending())
        await anyio.to_thread.run_sync(leader.start)
        assert len(ends) == 5
        for session, end in ends.items():
            assert seen[session] == list(range(1, end + 1))
            found = await reader.log.read(session, limit=10**6)
            assert [r.offset for r in found] == list(range(1, end + 1))


async def test_who_comes_while_there_is_no_leader_waits_for_one(cluster: list[NatsServer]) -> None:
    async with cluster_environment(cluster, Settings()) as env:
        rest, *others = cluster
        for server in others:
            await anyio.to_thread.run_sync(server.kill)
        try:
            await without_a_leader(rest)
            entered = anyio.Event()

            async def enter() -> None:
                async with NatsBroker(rest.url, namespace=env.namespace) as broker:
                    await broker.turns.open("agent")
                    entered.set()

            async with anyio.create_task_group() as group:
                group.start_soon(enter)
                await anyio.sleep(1.0)
                assert not entered.is_set()
                for server in others:
                    await anyio.to_thread.run_sync(server.start)
                with anyio.fail_after(30):
                    await entered.wait()
        finally:
            for server in others:
                await anyio.to_thread.run_sync(server.start)


async def without_a_leader(server: NatsServer) -> None:
    """Wait until a server that is left alone has noticed it."""
    client = await nats.connect(server.url)
    try:
        with anyio.fail_after(60):
            answer = b""
            while b'"err_code":10008' not in answer:
                with suppress(nats.errors.TimeoutError):  # while it believes in a leader, it leaves the answer to that
                    answer = (await client.request("$JS.API.STREAM.NAMES", b"", timeout=1)).data
                await anyio.sleep(0.25)
    finally:
        await client.close()


async def leader_of(broker: NatsBroker, env: NatsEnvironment, servers: list[NatsServer]) -> NatsServer:
    reply = await broker.connection.request(f"$JS.API.STREAM.INFO.{stream_name(env.namespace, 0)}", b"", timeout=5)
    name = json.loads(reply.data)["cluster"]["leader"]
    return next(server for server in servers if server.name == name)
