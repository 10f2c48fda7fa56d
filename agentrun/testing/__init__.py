"""Test agents and backends; prove that a broker keeps the contract of `agentrun.broker`.

Agents
======

`run_turn` runs one turn of an agent with a real worker in memory, and returns its text, events and outcome; workers can
die and connections break meanwhile (`WorkerDies`, `AckLost`, `ConnectionLost`). `Script` and `ScriptedModel` say what
the model says. A `Rig` is a broker, a client and workers, for all else; `agentrun.testing.pytest_plugin` has it as
fixtures. docs/testing.md shows all of it.

Brokers
=======

A broker of your own is proved by subclassing `BrokerContract` in a test module. Each check runs in an `Environment`:
an empty broker, whose methods open connections and, for some checks, do what goes wrong in the world (an answer is
lost, a connection breaks, the broker restarts). ::

    class AcmeEnvironment(Environment):
        def __init__(self, url: str, settings: Settings) -> None: ...

        def open(self):
            return AcmeBroker(self.url, lease_ttl=self.settings.lease_ttl, delta_ttl=self.settings.delta_ttl)

        async def drop_next_ack(self, broker): ...
        async def cut(self, broker): ...
        async def trim(self, session, through): ...
        async def restart(self): ...


    class TestAcme(BrokerContract):
        @pytest.fixture
        def environments(self, acme_url):
            @asynccontextmanager
            async def make(settings):
                async with empty_acme_namespace(acme_url) as url:
                    yield AcmeEnvironment(url, settings)

            return make

That gives one test per check, such as ``test_promise[Q2_nacked_turn_is_not_overtaken]``. No pytest plugin is needed,
and `run_contract` does the same without pytest. A capability declared False is checked as well: for what happens then.
A whole test file, and how to write a broker at all, is in docs/write-a-broker.md.

`agentrun.brokers.memory.MemoryBroker` is a broker as well and passes the suite: tests of your program can use it, and
need no mock. `FaultyBroker` wraps any broker and loses answers, heartbeats and the connection, by plan or by chance.
`MUTANTS` (in `agentrun.testing.mutants`) are brokers that each break one promise: the suite catches every one.
"""

from agentrun.testing.contract import CHECKS, BrokerContract, Outcome, run_check, run_contract
from agentrun.testing.contract_base import Check, ContractBroken, Environment, Environments, Settings
from agentrun.testing.environments import MemoryEnvironment, memory_environments
from agentrun.testing.faults import Faults, FaultyBroker
from agentrun.testing.mishaps import AckLost, ConnectionLost, Mishap, WorkerDies
from agentrun.testing.rig import Rig, RunningWorker, memory_rig, nats_rig
from agentrun.testing.script import ModelError, Script, ScriptedModel
from agentrun.testing.turn import Answers, TurnResult, run_turn

__all__ = [
    "CHECKS",
    "AckLost",
    "Answers",
    "BrokerContract",
    "Check",
    "ConnectionLost",
    "ContractBroken",
    "Environment",
    "Environments",
    "Faults",
    "FaultyBroker",
    "MemoryEnvironment",
    "Mishap",
    "ModelError",
    "Outcome",
    "Rig",
    "RunningWorker",
    "Script",
    "ScriptedModel",
    "Settings",
    "TurnResult",
    "WorkerDies",
    "memory_environments",
    "memory_rig",
    "nats_rig",
    "run_check",
    "run_contract",
    "run_turn",
]
