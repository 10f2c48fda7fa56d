"""A session's owner whose every word is written by the test, and a broker whose clock the test moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from agentrun import wire
from agentrun.broker import Broker, Kind, Pending, Record, Tail
from agentrun.brokers.memory import MemoryBroker
from agentrun.brokers.memory_state import MemoryState
from agentrun.client import Client
from agentrun.publish import kind_of
from agentrun.settings import ClientSettings


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def make_broker(clock: Clock | None = None, **options: Any) -> MemoryBroker:
    return MemoryBroker(state=MemoryState(clock=clock, **options))


def make_client(broker: Broker, **settings: Any) -> Client:
    return Client(broker, agent="echo", settings=ClientSettings(**settings))


def message(text: str) -> wire.Message:
    return wire.Message(parts=[wire.TextPart(text)])


def lag(broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch, through: int) -> None:
    """Show sessions as they were at that offset, as a server that is cut off does, until a fresh end is asked for."""
    log = broker.log
    last, read = log.last, log.read
    fresh_since = False

    async def lagging_read(session: str, **args: Any) -> Sequence[Record]:
        return [r for r in await read(session, **args) if fresh_since or r.offset <= through]

    async def lagging_last(session: str, *, fresh: bool = False) -> Tail:
        nonlocal fresh_since
        fresh_since = fresh_since or fresh
        if fresh_since:
            return await last(session)
        seen = await lagging_read(session)
        return seen[-1].tail if seen else Tail()

    monkeypatch.setattr(log, "last", lagging_last)
    monkeypatch.setattr(log, "read", lagging_read)


class Owner:
    """Appends to one session as the worker that owns it would."""

    def __init__(self, broker: Broker, session: str = "s") -> None:
        self.broker = broker
        self.session = session
        self.turn = ""
        self.at = 0
        self.attempt = 0
        self.text = ""

    async def append(
        self, event: wire.OutputEvent, change: Callable[[Pending], Pending] | None = None, limit: int = 1_000_000
    ) -> int:
        tail = await self.broker.log.last(self.session)
        bodies = wire.split(event, limit)
        for body in bodies:
            pending = change(tail.pending) if change and body is bodies[-1] else tail.pending
            kind = kind_of(event) if len(bodies) == 1 else Kind.EVENT
            tail = await self.broker.log.append(self.session, body, kind=kind, after=tail, pending=pending)
        return tail.offset

    async def start(self, turn: str, at: int, *, attempt: int = 1, **fields: Any) -> int:
        self.turn, self.at, self.attempt, self.text = turn, at, attempt, ""
        started = wire.TurnStarted(turn=turn, attempt=attempt, worker="w", lease=f"{turn}-{attempt}", **fields)
        return await self.append(started, lambda pending: pending.claim(at))

    async def say(self, *texts: str) -> int:
        offset = 0
        for text in texts:
            offset = await self.emit(wire.TextDelta(text=text))
            self.text += text
        return offset

    async def emit(self, event: wire.OutputEvent, limit: int = 1_000_000) -> int:
        event.turn, event.attempt = self.turn, self.attempt
        return await self.append(event, limit=limit)

    async def ask(self, request: str = "q1", kind: wire.AskKind = "approval", **fields: Any) -> int:
        return await self.emit(wire.InputRequired(request=request, kind=kind, **fields))

    async def suspend(self, *requests: str) -> int:
        event = wire.TurnSuspended(
            turn=self.turn, attempt=self.attempt, requests=list(requests), message=message(self.text)
        )
        return await self.append(event, Pending.park)

    async def end(self, cls: Callable[..., Any] = wire.TurnCompleted, *settles: int, **fields: Any) -> int:
        event = cls(turn=self.turn, attempt=self.attempt, turn_offset=self.at, message=message(self.text), **fields)
        return await self.append(event, lambda pending: pending.settle(self.at, *settles))

    async def run(self, turn: str, at: int, *texts: str) -> int:
        """A whole turn, from its start to its completion."""
        await self.start(turn, at)
        await self.say(*texts)
        return await self.end()
