"""The state behind `agentrun.brokers.memory`: what is a server elsewhere. All of it synchronous."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint
from anyio.streams.memory import MemoryObjectSendStream

from agentrun.broker import Capabilities, Handler, Hold, Kind, Pending, Record, Tail
from agentrun.errors import Conflict, Duplicate

__all__ = ["AgentQueue", "Append", "Listener", "MemoryLease", "MemoryState", "StoredSession"]

_RELOOK = 1.0
"""Seconds after which a waiting lease looks again in any case: a test's clock may have been moved."""


def _steady_clock() -> Callable[[], float]:
    """Wall time that never jumps: leases must not run out because somebody set the clock."""
    start = time.time() - time.monotonic()
    return lambda: start + time.monotonic()


class Bell:
    """Wakes everyone who waits now. Made before there is an event loop, as a broker may be."""

    def __init__(self) -> None:
        self._event: anyio.Event | None = None

    def ring(self) -> None:
        if self._event:
            self._event.set()
            self._event = None

    async def wait(self) -> None:
        if self._event is None:
            self._event = anyio.Event()
        await self._event.wait()


class Append(NamedTuple):
    """What `SessionLog.append` was asked to store."""

    session: str
    body: bytes
    kind: Kind
    after: Tail
    pending: Pending
    agent: str | None
    dedupe: str | None


class StoredSession:
    """One session's records: deltas apart, so that they can expire and be left out at no cost."""

    def __init__(self) -> None:
        self.kept: list[Record] = []
        self.deltas: list[Record] = []
        self.expired = 0
        """How many of ``deltas``, from the front, are gone."""
        self.given = 0
        """The last offset ever given out."""
        self.pending = Pending()
        self.keys: dict[str, tuple[int, float]] = {}
        self.agents: set[str] = set()
        self.holder: QueuedInput | None = None
        self.bell = Bell()
        self.gone = False

    def expire(self, before: float) -> None:
        """Take out the deltas stored at ``before`` or earlier."""
        start = self.expired
        while self.expired < len(self.deltas) and self.deltas[self.expired].time <= before:
            self.expired += 1
        if self.expired > start and self.expired * 2 > len(self.deltas):
            del self.deltas[: self.expired]
            self.expired = 0

    @property
    def end(self) -> Tail:
        """The session's end, as far as what is still stored tells."""
        last = self.kept[-1] if self.kept else None
        if self.expired < len(self.deltas) and (last is None or self.deltas[-1].offset > last.offset):
            last = self.deltas[-1]
        if last is None:
            return Tail(lost=self.given)
        lost = self.given - last.offset
        return Tail(last.offset, last.pending, last.cursor, last.time, lost, last.kind)

    def read(self, after: int, deltas: bool, limit: int) -> list[Record]:
        """Up to ``limit`` records above ``after``."""
        start = bisect_right(self.kept, after, key=lambda r: r.offset)
        found = self.kept[start : start + limit]
        if deltas:
            start = bisect_right(self.deltas, after, lo=self.expired, key=lambda r: r.offset)
            found = sorted(found + self.deltas[start : start + limit], key=lambda r: r.offset)[:limit]
        return found

    def store(self, record: Record) -> None:
        """Add a record at the end."""
        (self.deltas if record.kind is Kind.DELTA else self.kept).append(record)
        self.given = record.offset
        self.pending = record.pending

    def trim(self, through: int) -> None:
        """Remove the records up to ``through``."""
        self.kept = [r for r in self.kept if r.offset > through]
        self.deltas = [r for r in self.deltas[self.expired :] if r.offset > through]
        self.expired = 0


class QueuedInput:
    """One queued input, leased or not."""

    def __init__(self, session: str, record: Record) -> None:
        self.session = session
        self.record = record
        self.due = 0.0
        self.lease: MemoryLease | None = None


class AgentQueue:
    """The queue of one agent."""

    def __init__(self) -> None:
        self.lease_ttl: float | None = None
        self.items: dict[tuple[str, int], QueuedInput] = {}
        self.bell = Bell()


class Listener(NamedTuple):
    """Somebody who listens on a channel: how requests are handled, and where announcements go."""

    tasks: TaskGroup
    handler: Handler
    told: MemoryObjectSendStream[bytes]


class MemoryState:
    """What the connections of one broker share: the part that is a server elsewhere.

    Args:
        lease_ttl: Seconds after which a lease that was not extended is given out again.
        delta_ttl: Seconds a DELTA record stays.
        dedupe_window: Seconds for which a ``dedupe`` key is remembered.
        max_body: Bytes a record's body may have.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        *,
        lease_ttl: float = 30.0,
        delta_ttl: float = 3600.0,
        dedupe_window: float = 7200.0,
        max_body: int = 1_000_000,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.clock = clock or _steady_clock()
        self.capabilities = Capabilities(
            name="memory",
            durable=False,
            detects_no_listener=True,
            max_body=max_body,
            delta_ttl=delta_ttl,
            dedupe_window=dedupe_window,
            lease_ttl=lease_ttl,
        )
        self.lock = threading.Lock()
        """Guards leases, which other threads extend."""
        self.answers: dict[object, Tail] = {}
        self.sessions: dict[str, StoredSession] = {}
        self.listeners: dict[str, list[Listener]] = {}
        self.loop: asyncio.AbstractEventLoop | None = None
        """Where the listeners are, for announcements from other threads."""
        self._agents: dict[str, AgentQueue] = {}
        self._sequence = 0

    def session(self, name: str) -> StoredSession:
        """The session, made if need be, with what has expired taken out."""
        if name not in self.sessions:
            self.sessions[name] = StoredSession()
        return self.peek(name)

    def peek(self, name: str) -> StoredSession:
        """The session, to be read only: nothing is kept of one that is not there."""
        found = self.sessions.get(name) or StoredSession()
        found.expire(self.clock() - self.capabilities.delta_ttl)
        return found

    def agent(self, name: str) -> AgentQueue:
        """The agent's queue, made if need be."""
        return self._agents.setdefault(name, AgentQueue())

    @property
    def agents(self) -> dict[str, AgentQueue]:
        """The queues of all agents."""
        return self._agents

    def append(self, wanted: Append, token: object) -> Tail:
        """Store the record, or give the answer again if the append of this token is stored already.

        The answer is kept in ``answers`` until the caller takes it out.
        """
        if token in self.answers:
            return self.answers[token]
        session = self.session(wanted.session)
        self._check_key(session, wanted.dedupe)
        end = session.end
        self._check_end(wanted, end)
        self._sequence += 1
        offset = wanted.after.next
        record = Record(offset, wanted.kind, wanted.body, self.clock(), self._sequence, wanted.pending, wanted.agent)
        session.store(record)
        if wanted.dedupe is not None:
            session.keys[wanted.dedupe] = (record.offset, record.time)
        if record.kind is Kind.TURN and record.agent is not None:
            self.agent(record.agent).items[wanted.session, record.offset] = QueuedInput(wanted.session, record)
            session.agents.add(record.agent)
        self.wake(wanted.session)
        self.answers[token] = session.end
        return session.end

    def _check_end(self, wanted: Append, end: Tail) -> None:
        # The offset alone does not do: deltas may have come after it and expired since.
        if wanted.after.offset != end.offset or wanted.after.next < end.next:
            raise Conflict(f"session {wanted.session} ends at {end.offset}, not at {wanted.after.offset}", end)

    def _check_key(self, session: StoredSession, key: str | None) -> None:
        oldest = self.clock() - self.capabilities.dedupe_window
        while session.keys and (first := next(iter(session.keys.items())))[1][1] <= oldest:
            del session.keys[first[0]]
        if key is not None and key in session.keys:
            raise Duplicate(key, session.keys[key][0])

    def wake(self, name: str) -> None:
        """Tell the session's followers, and whoever waits for one of its inputs, to look again."""
        session = self.sessions[name]
        session.bell.ring()
        for agent in session.agents:
            self._agents[agent].bell.ring()

    def trim(self, name: str, through: int) -> None:
        """Remove the session's records up to an offset, as a broker's age limit does."""
        session = self.session(name)
        session.trim(through)
        self._unqueue(name, session, through)

    def delete(self, name: str) -> None:
        """Remove the session, its queued inputs with it."""
        session = self.sessions.pop(name, None)
        if session is None:
            return
        session.gone = True
        self._unqueue(name, session, session.given)
        session.bell.ring()

    def _unqueue(self, name: str, session: StoredSession, through: int) -> None:
        for agent in session.agents:
            items = self._agents[agent].items
            for key in [key for key in items if key[0] == name and key[1] <= through]:
                del items[key]

    def take(self, name: str) -> MemoryLease | float:
        """A lease on a ready input of the agent, or the time at which there may be one."""
        agent, now = self._agents[name], self.clock()
        soonest = now + _RELOOK
        for key, item in list(agent.items.items()):
            if item.due > now:  # before all else: most inputs of a busy queue are leased
                soonest = min(soonest, item.due)
                continue
            session = self.session(item.session)
            if self._settled(session, item):
                del agent.items[key]
            elif self._ready(session, item):
                with self.lock:
                    free_at = self._free_at(session, item)
                    if free_at <= now:
                        return self._lease(agent, session, item, now)
                soonest = min(soonest, free_at)
        return soonest

    def _settled(self, session: StoredSession, item: QueuedInput) -> bool:
        return item.record.offset not in session.pending

    def _ready(self, session: StoredSession, item: QueuedInput) -> bool:
        return session.pending.ready(item.record.offset)

    def _lease(self, agent: AgentQueue, session: StoredSession, item: QueuedInput, now: float) -> MemoryLease:
        item.lease = MemoryLease(self, item, session.end, agent.lease_ttl or self.capabilities.lease_ttl)
        item.due = now + item.lease.ttl
        session.holder = item
        return item.lease

    def _free_at(self, session: StoredSession, item: QueuedInput) -> float:
        """When the input may be given out: when it is due, and nobody holds another of its session."""
        holder = session.holder
        if holder and holder is not item and holder.lease and holder.record.offset in session.pending:
            return max(item.due, holder.due)
        return item.due

    def given_out(self, name: str) -> list[Hold]:
        """What is leased of an agent's inputs."""
        items = self.agent(name).items.values()
        return [Hold(name, i.session, i.record.offset, i.lease.token) for i in items if i.lease is not None]

    def hand_back(self, hold: Hold) -> None:
        """Put back what somebody holds, whoever it is by now."""
        item = self.agent(hold.agent).items.get((hold.session, hold.offset))
        if item is not None and item.lease is not None:
            self.settle(item, again_at=self.clock())

    def settle(self, item: QueuedInput, *, again_at: float | None) -> None:
        """Take a leased input out of its queue, or put it back to be leased from a time on."""
        with self.lock:
            item.lease = None
            item.due = again_at or 0.0
        items = self.agent(item.record.agent or "").items
        key = (item.session, item.record.offset)
        if items.get(key) is not item:
            return  # the session was deleted meanwhile
        if again_at is None:
            del items[key]
        self.wake(item.session)


class MemoryLease:
    """A lease; what is done with it after it ran out and was given to another does nothing."""

    def __init__(self, state: MemoryState, item: QueuedInput, tail: Tail, ttl: float) -> None:
        self.session = item.session
        self.record = item.record
        self.tail = tail
        self.ttl = ttl
        self.token = uuid.uuid4().hex
        self._state = state
        self._item = item

    @property
    def held(self) -> bool:
        """Whether it is still this holder's."""
        return self._item.lease is self

    def extend(self) -> None:
        """Reset the clock, from any thread."""
        with self._state.lock:
            if self.held:
                self._item.due = self._state.clock() + self.ttl

    async def ack(self) -> None:
        """Never lease this input again."""
        await checkpoint()
        if self.held:
            self._state.settle(self._item, again_at=None)

    async def nack(self, *, delay: float = 0.0) -> None:
        """Give it back."""
        await checkpoint()
        if self.held:
            self._state.settle(self._item, again_at=self._state.clock() + delay)
