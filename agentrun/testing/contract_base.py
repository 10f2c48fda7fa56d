"""What a check is and what it runs against."""

from __future__ import annotations

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


class Environment:
    """One empty broker, set up, to be given to one check. Third parties subclass it.

    A check that needs a method you did not write fails and names it; nothing is skipped.
    """

    def open(self) -> AbstractAsyncContextManager[Broker]:
        """A new, independent connection to this environment's broker."""
        raise NotImplementedError("Environment.open: return a new connection to the broker")

    async def drop_next_ack(self, broker: Broker) -> None:
        """Lose the answer to the next append through this connection, after the append is stored."""
        raise NotImplementedError("Environment.drop_next_ack: lose the answer to the connection's next append")

    async def cut(self, broker: Broker) -> None:
        """Break this connection for a moment, as a network does; it may come back by itself. Return once it broke.

        A broker without a network has nothing to break and returns at once.
        """
        raise NotImplementedError("Environment.cut: break the connection for a moment")

    async def trim(self, session: str, through: int) -> None:
        """Remove the session's records up to this offset, as an age or size limit of the broker does."""
        raise NotImplementedError("Environment.trim: remove the session's first records")

    async def restart(self) -> None:
        """Restart the broker. No connection is open meanwhile."""
        raise NotImplementedError("Environment.restart: restart the broker")


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
