from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentrun.brokers.server import NatsServer
from tests.e2e.processes import Cli, new_cli

# Everything runs on NATS, the reference. A process of the command line takes a third of a second of a core to start, so
# that on other brokers only that runs again which another broker can break: on Valkey the promises (all that need a
# broker's leases, fences and wake-ups), moving, gateways that end and die, and each command once; on SQLite, which has
# no server, what two processes at one file can break: the log as the only truth, zombies, and each command once. The
# demonstration runs on both. What the client does, it does in this process, at hardly any cost: on all four. Arguments,
# exit codes, terminal and tokens are the same code for all. What a broker promises in detail its own suite shows:
# tests/brokers.


@pytest.fixture
def broker(request: pytest.FixtureRequest) -> str:
    """The broker's URL: NATS, unless a test says `on`."""
    return where(request, getattr(request, "param", "nats"))


def where(request: pytest.FixtureRequest, name: str) -> str:
    """The URL of a broker for processes by its name; a server is started only where one is asked for."""
    if name == "sqlite":
        folder: Path = request.getfixturevalue("tmp_path")
        return f"sqlite:///{folder}/dev.db"
    return request.getfixturevalue(f"{name}_server").url


@pytest.fixture
def cli(broker: str) -> Iterator[Cli]:
    """A namespace of the test's own."""
    cli = new_cli(broker)
    try:
        yield cli
    finally:
        cli.end()


@pytest.fixture(scope="module")
def shared(nats_server: NatsServer) -> Iterator[Cli]:
    """A namespace with a worker, for tests that leave both as they are."""
    cli = new_cli(nats_server.url)
    try:
        cli.worker("shared")
        yield cli
    finally:
        cli.end()


@pytest.fixture
def session() -> str:
    return f"s-{uuid.uuid4().hex[:8]}"
