from __future__ import annotations

from collections.abc import Iterator

import pytest

from agentrun.brokers.server import NatsServer
from agentrun.brokers.valkey_server import ValkeyServer
from tests.brokers.nats_environment import NatsEnvironments
from tests.brokers.valkey_environment import ValkeyEnvironments

_GROUPS = {
    "commands": ("tests/e2e/test_cli", "tests/e2e/test_promises", "tests/e2e/test_everywhere"),
    "processes": ("tests/e2e",),
    "bench": ("tests/bench", "tests/docs", "tests/brokers/test_nats_cluster.py"),
    "browser": ("tests/browser", "tests/gateway/test_npm"),
    "chaos": tuple(f"tests/chaos/test_{name}.py" for name in ("chaos", "load", "partition", "valkey")),
    "litellm": ("tests/adapters",),  # it takes seconds to import
}


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start processes of their own run one after the other, beside the others: the cores are few."""
    for item in items:
        found = (group for group, places in _GROUPS.items() if item.nodeid.startswith(places))
        if (group := next(found, None)) is not None:
            item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Groups that do not take effect make tests of processes fail by chance, a long way from the reason."""
    for item in session.items:
        grouped = item.nodeid.rpartition("@")[2] in _GROUPS
        if hasattr(session.config, "workerinput") and item.get_closest_marker("xdist_group") and not grouped:
            raise pytest.UsageError(f"pytest-xdist does not see the group of {item.nodeid}: see constraints.txt")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """nats-py is asyncio; so is everything here."""
    return "asyncio"


@pytest.fixture(scope="session")
def nats_server() -> Iterator[NatsServer]:
    """A real nats-server, shared by all tests of the run; each test takes a namespace of its own."""
    with NatsServer() as server:
        yield server


@pytest.fixture
def nats_environments(nats_server: NatsServer) -> NatsEnvironments:
    """Empty namespaces of that server."""
    return NatsEnvironments(nats_server)


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[ValkeyServer]:
    """A real valkey-server, shared by all tests of the run; each test takes a namespace of its own."""
    with ValkeyServer() as server:
        yield server


@pytest.fixture
def valkey_environments(valkey_server: ValkeyServer) -> ValkeyEnvironments:
    """Empty namespaces of that server."""
    return ValkeyEnvironments(valkey_server)
