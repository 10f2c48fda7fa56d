"""Workers that come, go and die, a client beside them, and what must hold of every session they leave."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
from anyio.abc import TaskGroup

from agentrun import wire
from agentrun.agent import Agent
from agentrun.broker import Broker, Kind, Record, Tail
from agentrun.client import Client, Session
from agentrun.errors import Conflict
from agentrun.settings import ClientSettings, WorkerSettings
from agentrun.telemetry import Telemetry
from agentrun.testing import Environment
from agentrun.worker import Worker

LEASE = 0.6
QUICK = WorkerSettings(
    concurrency=10, lease=LEASE, drain=5.0, retry_delay=0.05, cancel_grace=0.3, ask_hold=10.0, min_gap=0.002
)


class Running:
    """A worker at work."""

    def __init__(self, worker: Worker, broker: Broker) -> None:
        self.worker = worker
        self.broker = broker
        self.scope = anyio.CancelScope()
        self.ended = anyio.Event()

    async def crash(self) -> None:
        """It disappears, and says nothing."""
        self.scope.cancel()
        await self.ended.wait()

    async def drain(self) -> None:
        self.worker.drain()
        await self.ended.wait()


class Fleet:
    """Everything that works on one broker in a test."""

    def __init__(
        self, environment: Environment, broker: Broker, group: TaskGroup, telemetry: Telemetry | None = None
    ) -> None:
        self.environment = environment
        self.broker = broker
        self.telemetry = telemetry
        self.client = Client(broker, settings=ClientSettings(cancel_live=1.0), telemetry=telemetry)
        self.group = group
        self.sessions: set[str] = set()

    async def worker(
        self, *agents: Agent, wrap: Callable[[Broker], Broker] | None = None, name: str | None = None, **settings: Any
    ) -> Running:
        """Start one, on a connection of its own."""
        values = {f: getattr(QUICK, f) for f in QUICK.__struct_fields__} | settings
        return await self.group.start(self._run, agents, wrap, name, WorkerSettings(**values))

    async def _run(
        self,
        agents: tuple[Agent, ...],
        wrap: Callable[[Broker], Broker] | None,
        name: str | None,
        settings: WorkerSettings,
        *,
        task_status: anyio.abc.TaskStatus[Running],
    ) -> None:
        async with self.environment.open() as broker:
            seen = wrap(broker) if wrap else broker
            worker = Worker(seen, agents, settings=settings, name=name, telemetry=self.telemetry)
            running = Running(worker, seen)
            with running.scope:
                async with anyio.create_task_group() as group:
                    await group.start(worker.run)
                    task_status.started(running)
        running.ended.set()

    def session(self, name: str = "s", agent: str | None = None) -> Session:
        self.sessions.add(name)
        return self.client.session(name, agent=agent)

    async def append(
        self, event: wire.KnownEvent | bytes, *, kind: Kind = Kind.TURN, agent: str | None = None, session: str = "s"
    ) -> int:
        """Append an input as it is, past all that a client checks."""
        self.sessions.add(session)
        body = event if isinstance(event, bytes) else wire.encode(event)
        wakes = isinstance(event, (wire.TurnAnswer, wire.TurnCancel))
        tail: Tail | None = await self.broker.log.last(session)
        while True:
            assert tail is not None
            pending = tail.pending.add(tail.next, wakes=wakes) if kind is Kind.TURN else tail.pending
            try:
                stored = await self.broker.log.append(
                    session, body, kind=kind, after=tail, pending=pending, agent=agent if kind is Kind.TURN else None
                )
                return stored.offset
            except Conflict as conflict:
                tail = conflict.tail

    async def records(self, session: str = "s") -> list[tuple[Record, wire.AnyEvent]]:
        records = await self.broker.log.read(session, limit=100_000)
        return [(record, decoded(record.body)) for record in records]

    async def events(self, session: str = "s") -> list[wire.AnyEvent]:
        """What the session holds, without the inputs, and with what was split put together again."""
        joiner = wire.Joiner()
        joined = (joiner.feed(event) for record, event in await self.records(session) if not record.kind.input)
        return [event for event in joined if event is not None]

    async def types(self, session: str = "s") -> list[str]:
        return [event.type for event in await self.events(session)]

    async def until(self, wanted: str | Callable[[wire.AnyEvent], bool], session: str = "s", times: int = 1) -> Record:
        """Wait until the session holds such an event, and return its record."""
        test = wanted if callable(wanted) else lambda event: event.type == wanted
        joiner = wire.Joiner()
        async with self.broker.log.follow(session) as batches:
            async for batch in batches:
                for record in batch:
                    event = joiner.feed(decoded(record.body))
                    if event is not None and test(event):
                        times -= 1
                        if times == 0:
                            return record
        raise AssertionError("unreachable")

    async def check(self) -> None:
        """What holds of every session, whatever happened to it."""
        for session in self.sessions:
            check_session(await self.records(session))


async def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until it holds."""
    with anyio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - what it waits for has no event
            await anyio.sleep(0.005)


def decoded(body: bytes) -> wire.AnyEvent:
    try:
        return wire.decode(body)
    except wire.InvalidInput:
        return wire.UnknownEvent("undecodable", body)


def check_session(records: list[tuple[Record, wire.AnyEvent]], *, dense: bool = True) -> None:
    """P1 to P4, as the log shows them."""
    if dense:
        assert [record.offset for record, _ in records] == list(range(1, len(records) + 1))
    attempts: dict[str, int] = {}
    ends: dict[str, int] = {}
    owner = ""
    index = 0
    for record, event in records:
        if record.kind.input or isinstance(event, (wire.InputRejected, wire.SteerConsumed, wire.UnknownEvent)):
            continue
        assert isinstance(event, wire.OutputEvent)
        assert event.turn not in ends, f"{event.type} at {record.offset} after the turn ended at {ends[event.turn]}"
        if isinstance(event, wire.TurnStarted):
            assert event.attempt == attempts.get(event.turn, 0) + 1
            attempts[event.turn] = event.attempt
            owner, index = event.turn, 0
        elif isinstance(event, wire.TERMINAL):
            ends[event.turn] = record.offset
            assert event.turn == owner or event.attempt == attempts.get(event.turn, 0)
        else:
            assert event.turn == owner, f"{event.type} at {record.offset} by {event.turn}, the owner is {owner}"
            assert event.attempt == attempts[owner], f"a zombie's {event.type} at {record.offset}"
        if isinstance(event, (wire.TextDelta, wire.ReasoningDelta)):
            assert event.index == index
            index += event.count


@asynccontextmanager
async def fleet_on(environment: Environment, telemetry: Telemetry | None = None) -> AsyncGenerator[Fleet]:
    async with environment.open() as broker, anyio.create_task_group() as group:
        fleet = Fleet(environment, broker, group, telemetry)
        yield fleet
        group.cancel_scope.cancel()
    async with environment.open() as broker:
        fleet.broker = broker
        await fleet.check()


class Wrapped:
    """A broker with one part of another make."""

    def __init__(self, broker: Broker, **parts: Any) -> None:
        self.capabilities = parts.get("capabilities", broker.capabilities)
        self.turns = parts.get("turns", broker.turns)
        self.log = parts.get("log", broker.log)
        self.signals = parts.get("signals", broker.signals)
        self.now = broker.now


class Part:
    """Passes on what it does not do itself."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
