"""NATS under chaos: one nats-server, or a cluster of three, which can be parted from each other."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.to_thread

from agentrun.brokers.nats import NatsBroker, Streams
from agentrun.brokers.nats_layout import stream_name
from agentrun.brokers.server import NatsServer
from agentrun.errors import Misconfigured, Unavailable
from tests.chaos.agents import AGENTS
from tests.chaos.cable import Cable
from tests.chaos.plan import SERVERS, Plan, Plans
from tests.chaos.routes import Routes, Way
from tests.chaos.servers import Servers, free_ports, until_it_works

_PARTED: Mapping[str, Callable[[Routes, int], list[Way]]] = {
    "cut off": Routes.alone,
    "cut off from one": Routes.link,
    "silent": Routes.alone,
    "deaf": Routes.to,
    "mute": Routes.of,
}
"""How a server can be parted from the others, and what does not pass then."""
_UNLIMITED = {"max_bytes": -1, "discard": "old"}


class NatsServers(Servers):
    """One, or a cluster.

    Args:
        count: 1 or 3.
        namespace: Is set up with as many replicas.
    """

    def __init__(self, count: int, namespace: str) -> None:
        ports = free_ports(count * (count + 2))
        self.routes = Routes(ports[count : 2 * count], ports[2 * count : 3 * count], ports[3 * count :])
        self._all = [
            NatsServer(port=port, settings=self.routes.settings(n) if count > 1 else "")
            for n, port in enumerate(ports[:count])
        ]
        self.namespace = namespace
        self.stream = stream_name(namespace, 0)
        self._operator: NatsBroker | None = None

    @property
    def all(self) -> list[NatsServer]:
        """See `Servers.all`."""
        return self._all

    @property
    def operator(self) -> NatsBroker:
        """See `Servers.operator`."""
        assert self._operator is not None
        return self._operator

    def cables(self) -> list[Cable]:
        """See `Servers.cables`."""
        return [Cable(server.port) for server in self.all]

    def url(self, port: int) -> str:
        """See `Servers.url`."""
        return f"nats://127.0.0.1:{port}"

    @asynccontextmanager
    async def run(self) -> AsyncGenerator[None]:
        """See `Servers.run`."""
        async with self.routes.laid():
            try:
                await anyio.to_thread.run_sync(self._start)
                self._check_advertised()
                await self._set_up()
                url = ",".join(server.url for server in self.all)
                async with NatsBroker(url, namespace=self.namespace) as self._operator:
                    yield
            finally:
                with anyio.CancelScope(shield=True):
                    for server in self.all:
                        server.resume()
                        await anyio.to_thread.run_sync(server.stop)

    def _start(self) -> None:
        with ThreadPoolExecutor(len(self.all)) as threads:
            list(threads.map(NatsServer.start, self.all))

    def _check_advertised(self) -> None:
        for server in self.all:
            with socket.create_connection(("127.0.0.1", server.port)) as connection, connection.makefile("rb") as lines:
                info = json.loads(lines.readline().partition(b" ")[2])
            if info.get("connect_urls"):
                raise Misconfigured(f"clients would learn of {info['connect_urls']}")

    async def _set_up(self) -> None:
        url = ",".join(server.url for server in self.all)
        streams = Streams(replicas=len(self.all))

        async def once() -> None:
            async with NatsBroker(url, namespace=self.namespace, check=False, streams=streams) as broker:
                await broker.setup()

        await until_it_works(once)

    # ------------------------------------------------------------------------------------------------ what befalls

    def plans(self, dice: random.Random) -> Plans:
        """See `Servers.plans`: what befalls a cluster."""
        if len(self.all) == 1:
            return {}
        return {
            "leader crash": (2, lambda: self._leader_crash(dice)),
            "leader steps down": (2, lambda: self._step_down(dice)),
            "partition": (2, lambda: self._partition(dice)),
            "leader parted": (2, lambda: self._parted(dice, "the leader", self.leader)),
        }

    def _leader_crash(self, dice: random.Random) -> Plan:
        away = dice.uniform(0.0, 3.0)

        async def act() -> None:
            await self.crash(await self.leader(), away)

        return Plan(SERVERS, away, act)

    def _step_down(self, dice: random.Random) -> Plan:
        what = dice.choice(["STREAM", *(f"CONSUMER.q-{agent.name}" for agent in AGENTS)])
        return Plan(SERVERS, 0.0, lambda: self.step_down(what))

    def _partition(self, dice: random.Random) -> Plan:
        server = dice.choice(self.all)

        async def whom() -> NatsServer:
            return server

        return self._parted(dice, f"server {self.all.index(server)}", whom)

    def _parted(self, dice: random.Random, name: str, whom: Callable[[], Awaitable[NatsServer]]) -> Plan:
        """Its clients stay with it."""
        how = dice.choice(list(_PARTED))
        # From less than it takes to elect another leader, to more than it takes a leader to see that it is alone.
        seconds = dice.uniform(2.0, 12.0)

        async def act() -> None:
            ways = _PARTED[how](self.routes, self.all.index(await whom()))
            await self.part(ways, seconds, cut=how.startswith("cut"))

        return Plan(SERVERS, seconds, act, [f"{name}: {how}"])

    async def part(self, ways: Collection[Way], seconds: float, *, cut: bool) -> None:
        """Let nothing pass between servers for a time, by reset connections or by silent ones.

        Raises:
            Leaky: Something has passed.
        """
        async with self.routes.parted(ways, [server.name for server in self.all], cut=cut):
            await anyio.sleep(seconds)

    async def leader(self) -> NatsServer:
        """Who leads the stream.

        Raises:
            Unavailable: There is no leader, or nobody to ask.
        """
        info = await self.api(f"STREAM.INFO.{self.stream}")
        name = info.get("cluster", {}).get("leader")
        for server in self.all:
            if server.name == name or len(self.all) == 1:
                return server
        raise Unavailable("the stream has no leader")

    async def step_down(self, what: str = "STREAM") -> None:
        """Have the stream, or the queue of an agent (``CONSUMER`` and its name), led by another server."""
        kind, _, consumer = what.partition(".")
        subject = f"{kind}.LEADER.STEPDOWN.{self.stream}" + (f".{consumer}" if consumer else "")
        await self.api(subject)

    async def limit(self, *, full: bool) -> None:
        """See `Servers.limit`."""

        async def once() -> None:
            info = await self.api(f"STREAM.INFO.{self.stream}")
            limits = {"max_bytes": info["state"]["bytes"], "discard": "new"} if full else _UNLIMITED
            await self.api(f"STREAM.UPDATE.{self.stream}", {**info["config"], **limits})

        await (once() if full else until_it_works(once))

    async def api(self, call: str, request: object = None) -> dict[str, Any]:
        """Make a request of JetStream.

        Raises:
            Unavailable: It was refused, or nobody answered.
        """
        try:
            reply = await self.operator.connection.request(
                f"$JS.API.{call}", b"" if request is None else json.dumps(request).encode(), timeout=3
            )
        except Exception as error:
            raise Unavailable(f"{call}: {error!r}") from error
        answer = json.loads(reply.data)
        if "error" in answer:
            raise Unavailable(f"{call}: {answer['error']}")
        return answer

    async def await_health(self) -> None:
        """See `Servers.await_health`: they hear each other, and the stream has a leader."""
        self.routes.restore()
        for server in self.all:
            server.resume()
            await anyio.to_thread.run_sync(server.start)

        async def once() -> None:
            await self.leader()
            await self.operator.log.last("health")

        await until_it_works(once)
