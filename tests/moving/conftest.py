from __future__ import annotations

from collections.abc import Callable

import pytest

from agentrun.testing import Environments, memory_environments
from tests.brokers.sqlite_environment import sqlite_environments

Named = Callable[[str], Environments]


@pytest.fixture
def named(request: pytest.FixtureRequest) -> Named:
    """The environments of a broker by its name; a server is started only where one is asked for."""

    def find(name: str) -> Environments:
        if name in ("nats", "valkey"):
            return request.getfixturevalue(f"{name}_environments")
        return {"memory": memory_environments, "sqlite": sqlite_environments}[name]

    return find
