"""What environments of brokers with a server have in common, and a proxy between the two that can be made to fail."""

from __future__ import annotations

import asyncio
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, ClassVar, Generic, Self, TypeVar

import anyio
import anyio.to_thread

from agentrun.broker import Broker
from agentrun.brokers.process import ServerProcess
from agentrun.brokers.streams import partition_of
from agentrun.testing import Environment, Settings

_names = itertools.count()


def new_namespace() -> str:
    """A namespace nobody used, also not an earlier run on the same server."""
    return f"t{os.getpid()}-{next(_names)}-{os.urandom(3).hex()}"


class Proxy(ABC):
    """Passes bytes between clients and one server. How an append's answer is lost is a matter of the protocol."""

    scheme: ClassVar[str]

    def __init__(self, port: int) -> None:
        self._target = port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._frozen: set[asyncio.StreamWriter] = set()
        self.losing = 0
        """How many answers are still to be lost."""
        self.refusing = False
        """Whether new connections are refused."""
        self.port = 0

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
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
            with suppress(OSError, asyncio.IncompleteReadError):
                await self.downward(far_reader, writer, asked)
        finally:
            for end in ends:
                end.transport.abort()
            self._writers.difference_update(ends)
            self._frozen.difference_update(ends)
            await asyncio.gather(upward, return_exceptions=True)

    async def _upward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: asyncio.Event) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if self.losing and self.asks(data):
                    asked.set()
                await self.put(writer, data)
        writer.transport.abort()

    async def put(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        """Pass this on, unless the connection is frozen."""
        if writer not in self._frozen:
            writer.write(data)
            await writer.drain()

    @abstractmethod
    def asks(self, data: bytes) -> bool:
        """Whether a client asks, with these bytes, for what may be lost."""

    @abstractmethod
    async def downward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: asyncio.Event) -> None:
        """Pass on what the server says, but for the answers that are to be lost, until one side has gone."""


ServerT = TypeVar("ServerT", bound=ServerProcess)
BrokerT = TypeVar("BrokerT", bound=Broker)


class ServerEnvironment(Environment, Generic[ServerT, BrokerT]):
    """An empty namespace of a server."""

    proxy: ClassVar[type[Proxy]]

    def __init__(self, server: ServerT, settings: Settings, namespace: str, partitions: int = 1) -> None:
        self.server = server
        self.settings = settings
        self.namespace = namespace
        self.partitions = partitions
        self.proxies: dict[int, Proxy] = {}

    @abstractmethod
    def connect(self, url: str, **options: Any) -> BrokerT:
        """A broker of this environment, not yet entered."""

    def broker(self, url: str | None = None, **options: Any) -> BrokerT:
        """A broker of this environment, not yet entered."""
        options.setdefault("lease_ttl", self.settings.lease_ttl)
        return self.connect(url or self.server.url, **options)

    def open(self) -> AbstractAsyncContextManager[Broker]:
        return self._through_proxy() if self.settings.faults else self.broker()

    @asynccontextmanager
    async def _through_proxy(self) -> AsyncGenerator[Broker]:
        async with self.proxy(self.server.port) as proxy, self.broker(proxy.url) as broker:
            self.proxies[id(broker)] = proxy
            yield broker

    async def drop_next_ack(self, broker: Broker) -> None:
        self.proxies[id(broker)].losing += 1

    async def cut(self, broker: Broker) -> None:
        if proxy := self.proxies.get(id(broker)):
            proxy.cut()
            await anyio.sleep(0.02)

    async def restart(self) -> None:
        await anyio.to_thread.run_sync(self.server.restart)

    def partition(self, session: str) -> int:
        return partition_of(session, self.partitions)
