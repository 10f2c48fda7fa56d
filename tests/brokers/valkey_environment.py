"""Valkey as an environment of the conformance suite, and a proxy that loses answers and breaks connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from valkey.asyncio import Valkey

from agentrun.brokers.valkey import Streams, ValkeyBroker
from agentrun.brokers.valkey_scripts import APPEND
from agentrun.brokers.valkey_server import ValkeyServer
from agentrun.testing import Settings
from tests.brokers.server_environment import Proxy, ServerEnvironment, new_namespace


class ValkeyProxy(Proxy):
    """Loses a script's answer by breaking its connection before it."""

    scheme = "valkey"

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.script = APPEND
        """Whose answers are lost."""

    def asks(self, data: bytes) -> bool:
        return self.script.sha.encode() in data

    async def downward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: asyncio.Event) -> None:
        while data := await reader.read(65536):
            if asked.is_set():
                asked.clear()
                if b"-NOSCRIPT" not in data:  # then it was not run, and comes again
                    self.losing -= 1
                    return
            await self.put(writer, data)


class ValkeyEnvironment(ServerEnvironment[ValkeyServer, ValkeyBroker]):
    """An empty namespace of a server."""

    proxy = ValkeyProxy

    def connect(self, url: str, **options: Any) -> ValkeyBroker:
        return ValkeyBroker(url, namespace=self.namespace, **options)

    def prefix(self, session: str) -> str:
        """What the keys of the session's partition begin with."""
        return f"{{ar:{self.namespace}:{self.partition(session)}}}:"

    async def trim(self, session: str, through: int) -> None:
        async with client(self.server) as valkey:
            for kind in "ed":
                await valkey.xtrim(
                    f"{self.prefix(session)}{kind}:{session}", minid=f"{through + 1}-0", approximate=False
                )


class ValkeyEnvironments:
    """`agentrun.testing.Environments` of one server."""

    def __init__(self, server: ValkeyServer, partitions: int = 1) -> None:
        self.server = server
        self.partitions = partitions

    @asynccontextmanager
    async def __call__(self, settings: Settings) -> AsyncGenerator[ValkeyEnvironment]:
        environment = ValkeyEnvironment(self.server, settings, new_namespace(), self.partitions)
        streams = Streams(delta_ttl=settings.delta_ttl, partitions=self.partitions)
        async with environment.broker(check=False, streams=streams) as broker:
            await broker.setup()
        yield environment


@asynccontextmanager
async def client(server: ValkeyServer, **options: Any) -> AsyncGenerator[Valkey]:
    """A client of the server, for what a broker does not do."""
    valkey = Valkey(port=server.port, **options)
    try:
        yield valkey
    finally:
        with anyio.CancelScope(shield=True):
            await valkey.aclose()
