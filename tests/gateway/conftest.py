"""Gateways in this process, on the broker in memory, behind real HTTP on loopback."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import httpx
import pytest

from agentrun.agent import Agent
from agentrun.brokers.memory import MemoryBroker
from agentrun.client import Client
from agentrun.gateway import Auth, Gateway, GatewaySettings
from agentrun.gateway.server import serving
from agentrun.settings import ClientSettings, WorkerSettings
from agentrun.testing.faults import Faults, FaultyBroker
from agentrun.worker import Worker
from workers.echo import echo

WORKER = WorkerSettings(lease=2.0, drain=1.0, retry_delay=0.05, cancel_grace=0.5, min_gap=0.002)


class Site:
    """One broker with a worker, and what a test does there.

    Attributes:
        client: A client of the broker.
        name: The broker's.
    """

    def __init__(self, name: str, broker: MemoryBroker, stack: AsyncExitStack) -> None:
        self.name = name
        self.client = Client(broker, agent="echo")
        self._stack = stack

    async def gateway(self, *, auth: Auth | None = None, client: Client | None = None, **settings: Any) -> Served:
        """Start a gateway; it ends with the test."""
        return await self._stack.enter_async_context(self.serving(auth=auth, client=client, **settings))

    def faulty(self, faults: Faults | None = None, **settings: Any) -> tuple[Client, FaultyBroker]:
        """A client of this broker over a connection that can be cut."""
        broker = FaultyBroker(self.client.broker, faults or Faults())
        return Client(broker, agent="echo", settings=ClientSettings(**settings)), broker

    @asynccontextmanager
    async def serving(
        self, *, auth: Auth | None = None, port: int = 0, client: Client | None = None, **settings: Any
    ) -> AsyncGenerator[Served]:
        """Run a gateway while the context is open, on a connection of its own or that of ``client``."""
        values: dict[str, Any] = {"agent": "echo", "list_sessions": True, "rate": 1e6, "burst": 1_000_000} | settings
        broker = client or f"memory://{self.name}"
        gateway = Gateway(broker, auth=auth or Auth.insecure(), settings=GatewaySettings(**values))
        async with (
            serving(gateway, port=port, drain=gateway.drain) as url,
            httpx.AsyncClient(base_url=url, timeout=20) as http,
        ):
            yield Served(gateway, url, http)

    async def worker(self, *agents: Agent, **settings: Any) -> anyio.CancelScope:
        """Start another worker; cancelling the scope is its crash."""
        values = {name: getattr(WORKER, name) for name in WORKER.__struct_fields__} | settings
        group = await self._stack.enter_async_context(_group())
        broker = await self._stack.enter_async_context(MemoryBroker(self.name))
        worker = Worker(broker, agents, settings=WorkerSettings(**values))
        scope = anyio.CancelScope()

        async def run() -> None:
            with scope:
                await worker.run()

        group.start_soon(run)
        return scope


class Served:
    """A gateway that is served.

    Attributes:
        url: Its address.
        http: A client of it.
    """

    def __init__(self, gateway: Gateway, url: str, http: httpx.AsyncClient) -> None:
        self.gateway = gateway
        self.url = url
        self.http = http

    async def send(self, session: str, input: Any, **more: Any) -> dict[str, Any]:
        """Send a turn and return what the gateway says."""
        response = await self.http.post(f"/v1/sessions/{session}/turns", json={"input": input, **more})
        assert response.status_code == 202, response.text
        return response.json()

    @asynccontextmanager
    async def sse(self, path: str, **options: Any) -> AsyncGenerator[AsyncIterator[Frame]]:
        """Open a stream of server-sent events."""
        headers = {"accept": "text/event-stream", **options.pop("headers", {})}
        async with self.http.stream("GET", path, headers=headers, **options) as response:
            assert response.status_code == 200, await response.aread()
            yield frames(response)


class Frame(dict[str, str]):
    """One server-sent event: its fields; a comment under the empty name."""


async def frames(response: httpx.Response) -> AsyncIterator[Frame]:
    """The server-sent events of a response."""
    frame = Frame()
    async for line in response.aiter_lines():
        if not line:
            yield frame
            frame = Frame()
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        frame[name] = frame[name] + "\n" + value if name in frame else value


@asynccontextmanager
async def _group() -> AsyncGenerator[Any]:
    async with anyio.create_task_group() as group:
        yield group
        group.cancel_scope.cancel()


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    """A broker in memory with one worker, which runs ``workers.echo``."""
    name = uuid.uuid4().hex
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(MemoryBroker(name))
        site = Site(name, broker, stack)
        await site.worker(echo)
        yield site


@pytest.fixture
async def served(site: Site) -> Served:
    """A gateway without tokens on that broker."""
    return await site.gateway()
