"""What a check is and what it runs against."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

from msgspec import Struct

from agentrun.broker import Broker

__all__ = ["Check", "ContractBroken", "Environment", "Environments", "Settings", "check", "expect"]


class ContractBroken(AssertionError):
    """A broker does not keep a line of the contract. The message says what was expected and what came."""


def expect(condition: object, message: str) -> None:
    """Raise `ContractBroken` with this message unless the condition holds."""
    if not condition:
        raise ContractBroken(message)


class Settings(Struct, frozen=True):
    """What a check needs of its broker; times in seconds, short so that the suite is."""

    lease_ttl: float = 1.0
    delta_ttl: float = 3600.0
    faults: bool = False
    """Whether the check uses `Environment.drop_next_ack` or `Environment.cut`."""


class Environment(ABC):
    """One empty broker, set up, to be given to one check. Third parties subclass it.

    All of it is needed, and no check is skipped. What you have not written yet may raise an error: then only the checks
    that need it fail.
    """

    @abstractmethod
    def open(self) -> AbstractAsyncContextManager[Broker]:
        """A new, independent connection to this environment's broker."""

    @abstractmethod
    async def drop_next_ack(self, broker: Broker) -> None:
        """Lose the answer to the next append through this connection, after the append is stored."""

    @abstractmethod
    async def cut(self, broker: Broker) -> None:
        """Break this connection for a moment, as a network does; it may come back by itself. Return once it broke.

        A broker without a network has nothing to break and returns at once.
        """

    @abstractmethod
    async def trim(self, session: str, through: int) -> None:
        """Remove the session's records up to this offset, as an age or size limit of the broker does."""

    @abstractmethod
    async def restart(self) -> None:
        """Restart the broker. No connection is open meanwhile."""


Environments = Callable[[Settings], AbstractAsyncContextManager[Environment]]
"""Makes an empty environment with these times."""


class Check(Struct, frozen=True):
    """One check of the contract. ``name`` begins with the line of the contract it checks."""

    name: str
    promise: str
    settings: Settings
    run: Callable[[Environment], Awaitable[None]]


_USUAL = Settings()


def check(registry: list[Check], line: str, settings: Settings = _USUAL) -> Callable[[CheckFunction], CheckFunction]:
    """Register an async function as a check of this line of the contract."""

    def register(function: CheckFunction) -> CheckFunction:
        promise = (function.__doc__ or "").strip().splitlines()[0]
        registry.append(Check(f"{line}_{function.__name__}", promise, settings, function))
        return function

    return register


CheckFunction = Callable[[Environment], Awaitable[None]]
