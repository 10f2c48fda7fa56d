"""Servers that are parted from each other: the cables that do it, and what is told on the wrong side."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

import anyio
import pytest

import agentrun
from agentrun import Client, Session, Unavailable
from agentrun.brokers.server import NatsServer
from tests.chaos.nats_servers import NatsServers
from tests.chaos.routes import Leaky

T = TypeVar("T")

pytestmark = pytest.mark.timeout(180)

PER_PEER = 4
"""Connections of a route: three for all, and one for the servers' own."""


@pytest.fixture
async def servers() -> AsyncGenerator[NatsServers]:
    servers = NatsServers(3, "chaos")
    async with servers.run():
        yield servers


async def connections(servers: NatsServers) -> list[int]:
    return [len(await servers.routes.routes(n)) for n in range(3)]


async def until_whole(servers: NatsServers) -> None:
    with anyio.fail_after(30):
        while await connections(servers) != [2 * PER_PEER] * 3:  # noqa: ASYNC110 - servers ring no bell
            await anyio.sleep(0.1)


async def test_a_server_is_cut_off_and_comes_back(servers: NatsServers) -> None:
    await until_whole(servers)
    names = [server.name for server in servers.all]
    async with servers.routes.parted(servers.routes.alone(1), names, cut=True):
        await anyio.sleep(1.5)  # they try again
        assert await connections(servers) == [PER_PEER, 0, PER_PEER]
    await until_whole(servers)
    async with servers.routes.parted(servers.routes.link(1), names, cut=True):
        await anyio.sleep(1.5)
        assert await connections(servers) == [2 * PER_PEER, PER_PEER, PER_PEER]
    await until_whole(servers)


async def test_a_partition_that_lets_something_pass_is_no_silent_one(servers: NatsServers) -> None:
    names = [server.name for server in servers.all]
    leader = servers.all.index(await servers.leader())
    for ways in (servers.routes.alone(leader), servers.routes.of(leader), servers.routes.to(leader)):
        async with servers.routes.parted(ways, names, cut=False):
            await anyio.sleep(2)

    async def leak() -> None:
        async with servers.routes.parted(servers.routes.of(leader), names, cut=False):
            servers.routes.restore()
            await anyio.sleep(3)  # a leader speaks to the others every second

    with pytest.raises(Leaky):
        await leak()


def connected(servers: list[NatsServer]) -> AbstractAsyncContextManager[Client]:
    return agentrun.connect(",".join(server.url for server in servers), namespace="chaos")


async def test_a_leader_that_is_cut_off_says_of_nothing_that_it_is_not_there(servers: NatsServers) -> None:
    names = [server.name for server in servers.all]
    leader = await servers.leader()
    others = [server for server in servers.all if server is not leader]
    async with connected([leader]) as client, connected(others) as more:
        here, there = (c.session("s", agent="a") for c in (client, more))
        await here.send("a", id="t1")
        async with servers.routes.parted(servers.routes.alone(servers.all.index(leader)), names, cut=False):
            turn = await once_possible(lambda: there.send("b", id="t2"))
            assert (await client.broker.log.last("s")).offset == 1  # it answers, from what it has
            with pytest.raises(Unavailable):
                await offsets(here, after=turn.offset)
            with pytest.raises(Unavailable):
                await here.turn("t2").view()
        assert await once_possible(lambda: offsets(here, after=turn.offset)) == []
        assert (await once_possible(here.turn("t2").view)).state == "queued"
        assert await once_possible(lambda: offsets(here, after=0)) == [1, 2]


async def offsets(session: Session, after: int) -> list[int]:
    return [event.offset async for event in session.events(after, follow=False)]


async def once_possible(what: Callable[[], Awaitable[T]]) -> T:
    """Do it as soon as there is a leader to do it with."""
    with anyio.fail_after(60):
        while True:
            try:
                return await what()
            except Unavailable:
                await anyio.sleep(0.1)
