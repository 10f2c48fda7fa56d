"""A worker within the process of a bench: what a broker in memory can be measured with."""

from __future__ import annotations

from contextlib import AsyncExitStack

import anyio

from agentrun import brokers
from agentrun.cli._fleet import Fleet
from agentrun.cli._place import Place
from agentrun.cli.worker import load_agent
from agentrun.client import Client
from agentrun.settings import WorkerSettings
from agentrun.worker import Worker, WorkerInfo


class InsideFleet(Fleet):
    """One worker of an agent that shares this process and its event loop with load and readers.

    Args:
        place: Where it works.
        agent: The agent, as ``module:name``.
        lease: Its lease time, in seconds.
        concurrency: Turns it runs at once.
    """

    def __init__(self, place: Place, agent: str, *, lease: float, concurrency: int = 50) -> None:
        super().__init__(place, agent, lease=lease, concurrency=concurrency)
        self._agent = load_agent(agent)
        self._settings = WorkerSettings(lease=lease, concurrency=concurrency, drain=0.0)
        self._stack = AsyncExitStack()

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()
        await super().__aexit__(*exc)

    async def start(self, client: Client, count: int = 1) -> list[WorkerInfo]:
        """Start the worker; there are no processes to tell of."""
        enter = self._stack.enter_async_context
        broker = await enter(brokers.connect(self.place.url, namespace=self.place.namespace))
        worker = Worker(broker, [self._agent], settings=self._settings)
        group = await enter(anyio.create_task_group())
        self._stack.callback(worker.stop)
        await group.start(worker.run)
        return []
