from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from agentrun.testing import Environments, Settings, memory_environments
from tests.worker.fleet import LEASE, Fleet, fleet_on

VALKEY = ("test_bad_inputs", "test_clock", "test_outage", "test_peers", "test_storm", "test_takeover")
"""Where the broker may show: on Valkey, the other tests would only take their time once more."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test of a worker runs on the broker in memory and on NATS, some on Valkey as well."""
    if "environments" in metafunc.fixturenames:
        module = metafunc.module.__name__.rpartition(".")[2]
        brokers = ["memory", "nats", "valkey"] if module in VALKEY else ["memory", "nats"]
        metafunc.parametrize("environments", brokers, indirect=True)


@pytest.fixture
def environments(request: pytest.FixtureRequest) -> Environments:
    """Empty environments of the test's broker."""
    if request.param == "memory":
        return memory_environments
    return request.getfixturevalue(f"{request.param}_environments")


@pytest.fixture
async def fleet(environments: Environments) -> AsyncGenerator[Fleet]:
    async with environments(Settings(lease_ttl=LEASE)) as environment, fleet_on(environment) as fleet:
        yield fleet


@pytest.fixture
async def memory_fleet() -> AsyncGenerator[Fleet]:
    """For what does not depend on the broker."""
    async with memory_environments(Settings(lease_ttl=LEASE)) as environment, fleet_on(environment) as fleet:
        yield fleet
