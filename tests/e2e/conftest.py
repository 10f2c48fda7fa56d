from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from agentrun.brokers.server import NatsServer
from tests.e2e.processes import Cli, new_cli


@pytest.fixture(scope="session")
def server() -> Iterator[NatsServer]:
    with NatsServer() as running:
        yield running


@pytest.fixture
def cli(server: NatsServer) -> Iterator[Cli]:
    """A namespace of the test's own."""
    cli = new_cli(server)
    try:
        yield cli
    finally:
        cli.end()


@pytest.fixture(scope="module")
def shared(server: NatsServer) -> Iterator[Cli]:
    """A namespace with a worker, for tests that leave both as they are."""
    cli = new_cli(server)
    try:
        cli.worker("shared")
        yield cli
    finally:
        cli.end()


@pytest.fixture
def session() -> str:
    return f"s-{uuid.uuid4().hex[:8]}"
