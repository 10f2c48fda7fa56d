"""The broker of a run: one nats-server, or a cluster of three. What happens to them happens to real processes."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.to_thread

from agentrun.brokers.nats import NatsBroker, Streams
from agentrun.brokers.nats_layout import stream_name
from agentrun.brokers.server import NatsServer
from agentrun.errors import AgentrunError, Misconfigured, Unavailable
from tests.chaos.routes import Routes, Way

_SETTLING = 30.0
"""Seconds a cluster gets to have leaders."""


def free_ports(count: int) -> list[int]:
    """Ports that are free, and that no outgoing connection is given while their owner is away."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(15_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


class Servers:
    """Started, set up for a namespace, and ended again.

    Args:
        count: 1 or 3.
        namespace: Is set up with as many replicas.
    """

    def __init__(self, count: int, namespace: str) -> None:
        ports = free_ports(count * (count + 2))
        self.routes = Routes(ports[count : 2 * count], ports[2 * count : 3 * count], ports[3 * count :])
        self.all = [
            NatsServer(port=port, settings=self.routes.settings(n) if count > 1 else "")
            for n, port in enumerate(ports[:count])
        ]
        self.namespace = namespace
        self.stream = stream_name(namespace, 0)
        self._operator: NatsBroker | None = None

    @property
    def operator(self) -> NatsBroker:
        """A connection that needs no cable."""
        assert self._operator is not None
        return self._operator

    @asynccontextmanager
    async def run(self) -> AsyncGenerator[None]:
        """Have them run. Whatever is stopped when the context is left goes on before."""
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

        await _until_it_works(once)

    # ------------------------------------------------------------------------------------------------ what befalls

    async def crash(self, server: NatsServer, away: float) -> None:
        """Kill a server, and start it again after a time, with its data."""
        await anyio.to_thread.run_sync(server.kill)
        await anyio.sleep(away)
        await anyio.to_thread.run_sync(server.start)

    async def restart(self, server: NatsServer) -> None:
        """Stop a server in good order and start it again."""
        await anyio.to_thread.run_sync(server.restart)

    async def freeze(self, server: NatsServer, seconds: float) -> None:
        """Stop a server's process for a time."""
        server.suspend()
        try:
            await anyio.sleep(seconds)
        finally:
            server.resume()

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
        """Let the stream take nothing more, or be as it was set up."""

        async def once() -> None:
            info = await self.api(f"STREAM.INFO.{self.stream}")
            limits = {"max_bytes": info["state"]["bytes"], "discard": "new"} if full else _UNLIMITED
            await self.api(f"STREAM.UPDATE.{self.stream}", {**info["config"], **limits})

        await (once() if full else _until_it_works(once))

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
        """Wait until all servers run, hear each other, and the stream has a leader."""
        self.routes.restore()
        for server in self.all:
            server.resume()
            await anyio.to_thread.run_sync(server.start)

        async def once() -> None:
            await self.leader()
            await self.operator.log.last("health")

        await _until_it_works(once)


_UNLIMITED = {"max_bytes": -1, "discard": "old"}


async def _until_it_works(what: Callable[[], Awaitable[None]]) -> None:
    with anyio.move_on_after(_SETTLING):
        while True:
            try:
                await what()
            except AgentrunError:
                await anyio.sleep(0.25)
            else:
                return
    await what()
