"""What a mutant is: the broker in memory with one part replaced."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from msgspec import Struct

from agentrun.brokers.memory import MemoryBroker, MemoryLog, MemoryQueue, MemorySignals
from agentrun.brokers.memory_state import MemoryState
from agentrun.testing.contract_base import Environment, Environments, Settings
from agentrun.testing.environments import LossyLog, MemoryEnvironment

__all__ = ["Mutant", "Parts", "mutant"]


class Mutant(Struct, frozen=True):
    """A broken broker: what is wrong with it, and the check that must say so."""

    name: str
    caught_by: str
    environments: Environments


def mutant(registry: list[Mutant], caught_by: str) -> Callable[[type[Parts]], type[Parts]]:
    """Register these parts as a mutant that this check has to catch."""

    def register(parts: type[Parts]) -> type[Parts]:
        @asynccontextmanager
        async def environments(settings: Settings) -> AsyncGenerator[Environment]:
            yield _MutantEnvironment(settings, parts)

        registry.append(Mutant(parts.__name__, caught_by, environments))
        return parts

    return register


class Parts:
    """What a mutant is made of; each replaces one part."""

    State: type[MemoryState] = MemoryState
    Log: type[MemoryLog] = LossyLog
    Turns: type[MemoryQueue] = MemoryQueue
    Signals: type[MemorySignals] = MemorySignals


class _MutantEnvironment(MemoryEnvironment):
    def __init__(self, settings: Settings, parts: type[Parts]) -> None:
        self.parts = parts
        super().__init__(settings)

    def new_state(self) -> MemoryState:
        return self.parts.State(lease_ttl=self.settings.lease_ttl, delta_ttl=self.settings.delta_ttl)

    def connect(self) -> MemoryBroker:
        broker = MemoryBroker(state=self.state)
        broker.log = self.parts.Log(self.state)
        broker.turns = self.parts.Turns(self.state)
        broker.signals = self.parts.Signals(self.state)
        return broker
