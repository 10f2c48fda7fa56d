"""Fixtures for pytest: ``pytest_plugins = ["agentrun.testing.pytest_plugin"]`` in the root ``conftest.py``.

They are not async, so they work with any plugin that runs async tests. All are in memory; a module's tests run on a
real server where it has its own ``agentrun_rig``::

    @pytest.fixture
    async def agentrun_rig(agentrun_server):
        async with nats_rig(agentrun_server.url) as rig:
            yield rig
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager

import pytest
from anyio.from_thread import start_blocking_portal

from agentrun.broker import Broker
from agentrun.brokers.server import NatsServer
from agentrun.client import Client
from agentrun.testing.openai_server import FakeOpenAI
from agentrun.testing.rig import Rig, RunningWorker, memory_rig

__all__ = [
    "agentrun_broker",
    "agentrun_client",
    "agentrun_openai",
    "agentrun_rig",
    "agentrun_server",
    "agentrun_worker",
]


@pytest.fixture
def agentrun_rig() -> Rig:
    """An empty broker in memory with a client and workers: `agentrun.testing.Rig`."""
    return memory_rig()


@pytest.fixture
def agentrun_broker(agentrun_rig: Rig) -> Broker:
    """The rig's broker."""
    return agentrun_rig.broker


@pytest.fixture
def agentrun_client(agentrun_rig: Rig) -> Client:
    """A client of the rig's broker."""
    return agentrun_rig.client


@pytest.fixture
def agentrun_worker(agentrun_rig: Rig) -> Callable[..., AbstractAsyncContextManager[RunningWorker]]:
    """Starts a worker for the time of an ``async with``: `agentrun.testing.Rig.worker`."""
    return agentrun_rig.worker


@pytest.fixture(scope="session")
def agentrun_server() -> Iterator[NatsServer]:
    """A nats-server of this run, started when it is first asked for; needs ``agentrun[server]``."""
    with NatsServer() as server:
        yield server


@pytest.fixture
def agentrun_openai(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOpenAI]:
    """A provider that says what is scripted, to which ``OPENAI_BASE_URL`` points: `FakeOpenAI.play`.

    It serves from a thread of its own. Look at ``requests``; its methods that wait cannot be used.
    """
    fake = FakeOpenAI()
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(fake):
        monkeypatch.setenv("OPENAI_BASE_URL", fake.url)
        monkeypatch.setenv("OPENAI_API_BASE", fake.url)
        monkeypatch.setenv("OPENAI_API_KEY", "test")
        yield fake
