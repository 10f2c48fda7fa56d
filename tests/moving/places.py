"""Two brokers, and what goes from one to the other."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import asynccontextmanager

from agentrun.broker import Broker
from agentrun.moving import Moved, export_session, import_sessions
from agentrun.testing import Environment, Environments, Settings
from tests.worker.fleet import LEASE, Fleet, fleet_on


@asynccontextmanager
async def two_places(
    source: Environments, target: Environments, settings: Settings | None = None
) -> AsyncGenerator[tuple[Environment, Environment]]:
    """An empty broker each."""
    settings = settings or Settings()
    async with source(settings) as one, target(settings) as other:
        yield one, other


@asynccontextmanager
async def two_fleets(source: Environments, target: Environments) -> AsyncGenerator[tuple[Fleet, Fleet]]:
    """An empty broker each, for workers to come."""
    places = two_places(source, target, Settings(lease_ttl=LEASE))
    async with places as (one, other), fleet_on(one) as here, fleet_on(other) as there:
        yield here, there


async def exported(broker: Broker, *sessions: str, force: bool = False) -> list[bytes]:
    """Their lines."""
    return [line for name in sessions or ("s",) async for line in export_session(broker, name, force=force)]


async def stream(lines: Iterable[bytes]) -> AsyncIterator[bytes]:
    for line in lines:
        yield line


async def imported(broker: Broker, lines: Iterable[bytes]) -> list[Moved]:
    """What became of each session."""
    return [moved async for moved in import_sessions(broker, stream(lines))]
