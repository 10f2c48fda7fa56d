"""A broker for one test, a client on it, and workers that come, go and die.

::

    rig = memory_rig()
    async with rig.worker(support) as worker:
        turn = await rig.client.session("s").send("hello", agent="support")
        ...
        await worker.kill()

The pytest fixtures of `agentrun.testing.pytest_plugin` are its parts.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import anyio
from anyio.abc import TaskStatus

from agentrun import brokers, wire
from agentrun.agent import Agent
from agentrun.background import Background
from agentrun.broker import Broker, BrokerAdmin, Hold, Kind, SessionLog
from agentrun.brokers.memory import MemoryBroker, MemoryState
from agentrun.client import Client
from agentrun.errors import Conflict
from agentrun.settings import WorkerSettings
from agentrun.testing.faults import FaultyBroker
from agentrun.testing.mishaps import Halt, Mishap, Watched, halt_of
from agentrun.worker import Worker

__all__ = ["Rig", "RunningWorker", "memory_rig", "nats_rig"]

SETTINGS = WorkerSettings(retry_delay=0.05, drain=5.0)
"""A worker's settings in tests, unless others are given."""


class RunningWorker:
    """A worker at work; made by `Rig.worker`.

    Attributes:
        worker: The worker itself: its name, what it is doing.
        broker: Its connection, which can be made to fail.
        scope: Where it runs.
        gone: Set when it works no more: it was killed, or has drained.
        held: What it held when it died.
    """

    def __init__(
        self,
        broker: FaultyBroker,
        agents: Sequence[Agent],
        *,
        log: SessionLog,
        settings: WorkerSettings,
        mishaps: Sequence[Mishap | Halt],
        name: str | None,
    ) -> None:
        halts = [halt_of(mishap) for mishap in mishaps]
        run = [Watched(agent, self, log, halts) for agent in agents] if halts else agents
        self.worker = Worker(broker, run, settings=settings, name=name)
        self.broker = broker
        self.scope = anyio.CancelScope()
        self.gone = anyio.Event()
        self.held: list[Hold] = []

    async def kill(self) -> None:
        """It disappears without a word, and is found dead at once: what it held is for another to take over.

        In production its peers find out after ``WorkerSettings.lost_after`` seconds of silence.
        """
        self.die()
        await self.gone.wait()

    async def drain(self) -> None:
        """It takes no more turns, and ends when those it runs have, or after ``WorkerSettings.drain`` seconds."""
        self.worker.drain()
        await self.gone.wait()

    def drop_next_ack(self) -> None:
        """Its next append is stored, and it is not told so."""
        self.broker.drop_next_ack()

    def lose_connection(self, seconds: float = float("inf")) -> None:
        """It cannot reach the broker for a time, or until `mend_connection`."""
        self.broker.disconnect(seconds)

    def mend_connection(self) -> None:
        """It can reach the broker again."""
        self.broker.reconnect()

    def die(self) -> None:
        """`kill`, without waiting for its end."""
        # What it still says while its tasks end is not heard; a process that was killed says nothing either.
        self.held = [*self.broker.held, *self.broker.turns.early()]
        self.broker.disconnect()
        self.scope.cancel()


async def _run(running: RunningWorker, rescuer: Broker, *, task_status: TaskStatus[None]) -> None:
    try:
        async with running.broker:
            with running.scope:
                await running.worker.run(task_status=task_status)
        # Its connection is closed now, else what is handed back could be given to it again.
        for hold in running.held:
            await _hand_over(rescuer, hold, running.worker.name)
    finally:
        running.gone.set()


class Rig:
    """All that works on one broker in a test.

    Args:
        broker: A connected broker.
        connect: Gives another connection to it, to be entered; each worker has one of its own.

    Attributes:
        broker: The broker.
        client: A client on it.
    """

    def __init__(self, broker: Broker, connect: Callable[[], Broker]) -> None:
        self.broker = broker
        self.client = Client(broker)
        self._connect = connect

    @asynccontextmanager
    async def worker(
        self,
        *agents: Agent,
        settings: WorkerSettings | None = None,
        mishaps: Sequence[Mishap | Halt] = (),
        name: str | None = None,
    ) -> AsyncGenerator[RunningWorker]:
        """Run a worker while the context is open. Leaving it ends the worker at once, whatever it runs.

        Args:
            agents: What it runs.
            settings: Its times and limits.
            mishaps: What befalls it.
            name: Its name in the log.
        """
        broker = FaultyBroker(self._connect())
        running = RunningWorker(
            broker, agents, log=self.broker.log, settings=settings or SETTINGS, mishaps=mishaps, name=name
        )
        async with Background() as background:  # which wraps no error of the test's own
            await background.group.start(partial(_run, running, self.broker))
            yield running


async def _hand_over(broker: Broker, hold: Hold, worker: str) -> None:
    """Do for a worker that is known to be dead what its peers would do."""
    while True:
        tail = await broker.log.last(hold.session, fresh=True)
        if not (tail.pending.running and tail.pending.ready(hold.offset)):
            break
        records = await broker.log.read(hold.session, deltas=False, limit=100_000)
        events = [wire.decode(record.body) for record in records if not record.kind.input]
        started = [event for event in events if isinstance(event, wire.TurnStarted)][-1]
        if started.worker != worker:
            return
        lost = wire.TurnLost(turn=started.turn, attempt=started.attempt, worker=worker, by="agentrun.testing")
        try:
            await broker.log.append(
                hold.session, wire.encode(lost), kind=Kind.EVENT, after=tail, pending=tail.pending.release()
            )
            break
        except Conflict:
            continue
    await broker.turns.hand_back(hold)


def memory_rig(state: MemoryState | None = None) -> Rig:
    """Return a rig on a broker in memory, of its own unless a state is given. It needs no closing."""
    state = state or MemoryState()
    return Rig(MemoryBroker(state=state), lambda: MemoryBroker(state=state))


@asynccontextmanager
async def nats_rig(url: str) -> AsyncGenerator[Rig]:
    """Give a rig in a new namespace of a NATS server. What it stores stays there: use a server that is thrown away.

    Raises:
        Unavailable: The server cannot be reached.
    """
    namespace = f"test-{os.getpid()}-{secrets.token_hex(4)}"
    async with brokers.connect(url, namespace=namespace, check=False) as admin:
        assert isinstance(admin, BrokerAdmin)
        await admin.setup()
    async with brokers.connect(url, namespace=namespace) as broker:
        yield Rig(broker, lambda: brokers.connect(url, namespace=namespace))
