"""Valkey as an environment of the conformance suite, and a proxy that loses answers and breaks connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any
from zlib import crc32

import anyio
import anyio.to_thread
from valkey.asyncio import Valkey

from agentrun.broker import Broker
from agentrun.brokers.valkey import Streams, ValkeyBroker
from agentrun.brokers.valkey_scripts import APPEND
from agentrun.brokers.valkey_server import ValkeyServer
from agentrun.testing import Environment, Settings
from tests.brokers.nats_environment import new_namespace


class Proxy:
    """Passes bytes between clients and one server. Loses a script's answer by breaking its connection before it."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.losing = 0
        """How many answers to ``script`` are still to be lost."""
        self.script = APPEND
        self.refusing = False
        """Whether new connections are refused."""
        self._frozen: set[asyncio.StreamWriter] = set()
        self.port = 0

    @property
    def url(self) -> str:
        return f"valkey://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Break all connections."""
        for writer in tuple(self._writers):
            writer.transport.abort()

    def freeze(self) -> None:
        """Pass nothing any more on the connections there are now, which stay open. New ones work."""
        self._frozen.update(self._writers)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self.refusing:
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        ends = (writer, far_writer)
        self._writers.update(ends)
        asked = asyncio.Event()
        upward = asyncio.create_task(self._upward(reader, far_writer, asked))
        try:
            with suppress(OSError):
                await self._downward(far_reader, writer, asked)
        finally:
            for end in ends:
                end.transport.abort()
            self._writers.difference_update(ends)
            self._frozen.difference_update(ends)
            await asyncio.gather(upward, return_exceptions=True)

    async def _upward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: asyncio.Event) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if self.losing and self.script.sha.encode() in data:
                    asked.set()
                if writer not in self._frozen:
                    writer.write(data)
                    await writer.drain()
        writer.transport.abort()

    async def _downward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: asyncio.Event) -> None:
        while data := await reader.read(65536):
            if asked.is_set():
                asked.clear()
                if b"-NOSCRIPT" not in data:  # then it was not run, and comes again
                    self.losing -= 1
                    return
            if writer not in self._frozen:
                writer.write(data)
                await writer.drain()


class ValkeyEnvironment(Environment):
    """An empty namespace of a server."""

    def __init__(self, server: ValkeyServer, settings: Settings, namespace: str, partitions: int = 1) -> None:
        self.server = server
        self.settings = settings
        self.namespace = namespace
        self.partitions = partitions
        self.proxies: dict[int, Proxy] = {}

    def broker(self, url: str | None = None, **options: Any) -> ValkeyBroker:
        """A broker of this environment, not yet entered."""
        options.setdefault("lease_ttl", self.settings.lease_ttl)
        return ValkeyBroker(url or self.server.url, namespace=self.namespace, **options)

    def open(self) -> AbstractAsyncContextManager[Broker]:
        return self._through_proxy() if self.settings.faults else self.broker()

    @asynccontextmanager
    async def _through_proxy(self) -> AsyncGenerator[Broker]:
        async with Proxy(self.server.port) as proxy, self.broker(proxy.url) as broker:
            self.proxies[id(broker)] = proxy
            yield broker

    async def drop_next_ack(self, broker: Broker) -> None:
        self.proxies[id(broker)].losing += 1

    async def cut(self, broker: Broker) -> None:
        if proxy := self.proxies.get(id(broker)):
            proxy.cut()
            await anyio.sleep(0.02)

    def prefix(self, session: str) -> str:
        """What the keys of the session's partition begin with."""
        return f"{{ar:{self.namespace}:{crc32(session.encode()) % self.partitions}}}:"

    async def trim(self, session: str, through: int) -> None:
        async with client(self.server) as valkey:
            for kind in "ed":
                await valkey.xtrim(
                    f"{self.prefix(session)}{kind}:{session}", minid=f"{through + 1}-0", approximate=False
                )

    async def restart(self) -> None:
        await anyio.to_thread.run_sync(self.server.restart)


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
        await valkey.aclose()
