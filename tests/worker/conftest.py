from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from agentrun.testing import Environments, Settings, memory_environments
from tests.worker.fleet import LEASE, Fleet, fleet_on


@pytest.fixture(params=["memory", "nats", "valkey"])
def environments(request: pytest.FixtureRequest) -> Environments:
    """Each test of a worker runs on every broker."""
    return (
        memory_environments if request.param == "memory" else request.getfixturevalue(f"{request.param}_environments")
    )


@pytest.fixture
async def fleet(environments: Environments) -> AsyncGenerator[Fleet]:
    async with environments(Settings(lease_ttl=LEASE)) as environment, fleet_on(environment) as fleet:
        yield fleet


@pytest.fixture
async def memory_fleet() -> AsyncGenerator[Fleet]:
    """For what does not depend on the broker."""
    async with memory_environments(Settings(lease_ttl=LEASE)) as environment, fleet_on(environment) as fleet:
        yield fleet
