"""NATS as an environment of the conformance suite, and a proxy that loses answers and breaks connections."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any
from zlib import crc32

import anyio
import anyio.to_thread
import nats

from agentrun.broker import Broker
from agentrun.brokers.nats import NatsBroker, Streams
from agentrun.brokers.nats_layout import stream_name
from agentrun.brokers.server import NatsServer
from agentrun.testing import Environment, Settings

_names = itertools.count()


def new_namespace() -> str:
    """A namespace nobody used, also not an earlier run on the same server."""
    return f"t{os.getpid()}-{next(_names)}-{os.urandom(3).hex()}"


class Proxy:
    """Passes bytes between clients and one server; knows just enough of the protocol to lose an append's answer."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._frozen: set[asyncio.StreamWriter] = set()
        self.losing = 0
        """How many answers to appends are still to be lost."""
        self.lost = 0
        self.refusing = False
        """Whether new connections are refused."""
        self.port = 0

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

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
        upward = asyncio.create_task(self._upward(reader, far_writer))
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                await self._downward(far_reader, writer)
        finally:
            for end in ends:
                end.transport.abort()
            self._writers.difference_update(ends)
            self._frozen.difference_update(ends)
            await asyncio.gather(upward, return_exceptions=True)

    async def _upward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if writer not in self._frozen:
                    writer.write(data)
                    await writer.drain()
        writer.transport.abort()

    async def _downward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            frame = line
            if line.startswith((b"MSG ", b"HMSG ")):
                body = await reader.readexactly(int(line.split()[-1]) + 2)
                if self.losing and body.startswith(b'{"stream":') and b'"seq":' in body:
                    self.losing -= 1
                    self.lost += 1
                    continue
                frame += body
            if writer not in self._frozen:
                writer.write(frame)
                await writer.drain()


class NatsEnvironment(Environment):
    """An empty namespace of a server."""

    def __init__(self, server: NatsServer, settings: Settings, namespace: str, partitions: int = 1) -> None:
        self.server = server
        self.settings = settings
        self.namespace = namespace
        self.partitions = partitions
        self.proxies: dict[int, Proxy] = {}

    def broker(self, url: str | None = None, **options: Any) -> NatsBroker:
        """A broker of this environment, not yet entered."""
        options.setdefault("lease_ttl", self.settings.lease_ttl)
        return NatsBroker(url or self.server.url, namespace=self.namespace, **options)

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

    async def trim(self, session: str, through: int) -> None:
        async with self.broker() as broker:
            kept = [r for r in await broker.log.read(session) if r.offset > through]
            partition = crc32(session.encode()) % self.partitions
            request = {"filter": f"agentrun.{self.namespace}.{partition}.{session}.>"}
            if kept:
                request["seq"] = kept[0].cursor
            reply = await broker.connection.request(
                f"$JS.API.STREAM.PURGE.{stream_name(self.namespace, partition)}",
                json.dumps(request).encode(),
                timeout=5,
            )
            assert json.loads(reply.data)["success"]

    async def restart(self) -> None:
        await anyio.to_thread.run_sync(self.server.restart)


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
