"""Every broker passes the public suite."""

from __future__ import annotations

import pytest

from agentrun.brokers.server import NatsServer
from agentrun.testing import BrokerContract, Environments, memory_environments
from tests.brokers.nats_environment import NatsEnvironments
from tests.brokers.sqlite_environment import sqlite_environments
from tests.brokers.valkey_environment import ValkeyEnvironments


class TestContract(BrokerContract):
    @pytest.fixture(params=["memory", "sqlite", "nats-1", "nats-3", "valkey-2"])
    def environments(self, request: pytest.FixtureRequest) -> Environments:
        backend, _, partitions = request.param.partition("-")
        match backend:
            case "memory":
                return memory_environments
            case "sqlite":
                return sqlite_environments
            case "nats":
                server: NatsServer = request.getfixturevalue("nats_server")
                return NatsEnvironments(server, int(partitions))
            case "valkey":
                return ValkeyEnvironments(request.getfixturevalue("valkey_server"), int(partitions))
            case _:
                raise ValueError(f"no environment for broker {request.param!r}")
