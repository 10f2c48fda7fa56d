"""The environment of the broker in memory, for its own checks and as an example."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio

from agentrun.broker import Broker, Tail
from agentrun.brokers.memory import MemoryBroker, MemoryLog
from agentrun.brokers.memory_state import Append, MemoryState
from agentrun.testing.contract_base import Environment, Settings

__all__ = ["MemoryEnvironment", "memory_environments"]


class LossyLog(MemoryLog):
    """A log in memory that can lose an answer."""

    losing = 0

    async def exchange(self, wanted: Append, token: object) -> Tail:
        """One try of an append, whose answer may be lost."""
        answer = await super().exchange(wanted, token)
        if self.losing:
            self.losing -= 1
            await anyio.sleep(0.05)
            raise TimeoutError
        return answer


class MemoryEnvironment(Environment):
    """An empty broker in memory."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.state = self.new_state()

    def new_state(self) -> MemoryState:
        """What a broker just started has."""
        return MemoryState(lease_ttl=self.settings.lease_ttl, delta_ttl=self.settings.delta_ttl)

    def open(self) -> AbstractAsyncContextManager[Broker]:
        """See `Environment.open`."""
        return self.connect()

    def connect(self) -> MemoryBroker:
        """A connection whose log can lose answers."""
        broker = MemoryBroker(state=self.state)
        broker.log = LossyLog(self.state)
        return broker

    async def drop_next_ack(self, broker: Broker) -> None:
        """See `Environment.drop_next_ack`."""
        assert isinstance(broker.log, LossyLog)
        broker.log.losing += 1

    async def cut(self, broker: Broker) -> None:
        """There is no connection to break."""

    async def trim(self, session: str, through: int) -> None:
        """See `Environment.trim`."""
        self.state.trim(session, through)

    async def restart(self) -> None:
        """See `Environment.restart`."""
        self.state = self.new_state()


@asynccontextmanager
async def memory_environments(settings: Settings) -> AsyncGenerator[Environment]:
    """`Environments` of the broker in memory."""
    yield MemoryEnvironment(settings)
