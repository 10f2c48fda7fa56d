"""NATS as an environment of the conformance suite, and a proxy that loses answers and breaks connections."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import nats

from agentrun.brokers.nats import NatsBroker, Streams
from agentrun.brokers.nats_layout import stream_name
from agentrun.brokers.server import NatsServer
from agentrun.testing import Settings
from tests.brokers.server_environment import Proxy, ServerEnvironment, new_namespace


class NatsProxy(Proxy):
    """Knows just enough of the protocol to leave out an append's answer."""

    scheme = "nats"

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.lost = 0
        """How many answers to appends were lost."""

    def asks(self, data: bytes) -> bool:
        return False  # an append's answer is known by what it says

    async def downward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: asyncio.Event) -> None:
        while line := await reader.readline():
            frame = line
            if line.startswith((b"MSG ", b"HMSG ")):
                body = await reader.readexactly(int(line.split()[-1]) + 2)
                if self.losing and body.startswith(b'{"stream":') and b'"seq":' in body:
                    self.losing -= 1
                    self.lost += 1
                    continue
                frame += body
            await self.put(writer, frame)


class NatsEnvironment(ServerEnvironment[NatsServer, NatsBroker]):
    """An empty namespace of a server."""

    proxy = NatsProxy

    def connect(self, url: str, **options: Any) -> NatsBroker:
        return NatsBroker(url, namespace=self.namespace, **options)

    async def trim(self, session: str, through: int) -> None:
        async with self.broker() as broker:
            kept = [r for r in await broker.log.read(session) if r.offset > through]
            partition = self.partition(session)
            request: dict[str, Any] = {"filter": f"agentrun.{self.namespace}.{partition}.{session}.>"}
            if kept:
                request["seq"] = kept[0].cursor
            reply = await broker.connection.request(
                f"$JS.API.STREAM.PURGE.{stream_name(self.namespace, partition)}",
                json.dumps(request).encode(),
                timeout=5,
            )
            assert json.loads(reply.data)["success"]


class NatsEnvironments:
    """`agentrun.testing.Environments` of one server."""

    def __init__(self, server: NatsServer, partitions: int = 1) -> None:
        self.server = server
        self.partitions = partitions

    @asynccontextmanager
    async def __call__(self, settings: Settings) -> AsyncGenerator[NatsEnvironment]:
        environment = NatsEnvironment(self.server, settings, new_namespace(), self.partitions)
        streams = Streams(delta_ttl=settings.delta_ttl, partitions=self.partitions)
        async with environment.broker(check=False, streams=streams) as broker:
            await broker.setup()
        try:
            yield environment
        finally:
            with anyio.CancelScope(shield=True):
                await drop_streams(self.server.url, environment.namespace, self.partitions)


async def drop_streams(url: str, namespace: str, partitions: int = 1) -> None:
    """Remove a namespace's streams."""
    client = await nats.connect(url)
    for partition in range(partitions):
        await client.request(f"$JS.API.STREAM.DELETE.{stream_name(namespace, partition)}", b"", timeout=5)
    await client.close()
