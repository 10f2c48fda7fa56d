"""The broker in memory: everything the contract promises but durability, in one process, for development and tests.

State is shared by name: a client and a worker that each open ``MemoryBroker("demo")`` (``memory://demo``) in one
process meet. What a name holds stays until the process ends. All users of one state must run in one event loop; only
`Lease.extend` and `Signals.announce` may be called from other threads.

The parts (`MemoryState`, `MemoryLog`, `MemoryQueue`, `MemorySignals`) are public so that tests can replace one.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Self

import anyio
from anyio.abc import ObjectReceiveStream, ObjectSendStream
from anyio.lowlevel import checkpoint

from agentrun.broker import HANDLER_GRACE, Capabilities, Handler, Hold, Kind, Pending, QueueStats, Record, Tail
from agentrun.brokers.checks import check_lease_ttl, check_record, not_open
from agentrun.brokers.memory_state import AgentQueue, Append, Listener, MemoryLease, MemoryState
from agentrun.errors import InvalidInput, NoListener, SessionGone, Unavailable

__all__ = ["MemoryBroker", "MemoryLease", "MemoryLog", "MemoryQueue", "MemorySignals", "MemoryState"]


class MemoryQueue:
    """`TurnQueue` over a `MemoryState`."""

    def __init__(self, state: MemoryState) -> None:
        self.state = state

    async def open(self, agent: str, *, lease_ttl: float | None = None) -> float:
        """See `TurnQueue.open`."""
        await checkpoint()
        queue = self.state.agent(agent)
        if queue.lease_ttl is None:
            queue.lease_ttl = lease_ttl or self.state.capabilities.lease_ttl
        check_lease_ttl(agent, queue.lease_ttl, lease_ttl)
        return queue.lease_ttl

    async def lease(self, agent: str, *, wait: float) -> MemoryLease | None:
        """See `TurnQueue.lease`."""
        await checkpoint()
        if self.state.agent(agent).lease_ttl is None:
            raise not_open(agent)
        with anyio.move_on_after(wait):
            while not isinstance(found := self.state.take(agent), MemoryLease):
                with anyio.move_on_after(found - self.state.clock()):
                    await self.state.agent(agent).bell.wait()
            return found
        return None

    def early(self) -> Sequence[Hold]:
        """Nothing: the state itself knows what is not ready."""
        return ()

    async def given_out(self, agent: str) -> Sequence[Hold]:
        """See `TurnQueue.given_out`."""
        await checkpoint()
        return self.state.given_out(agent)

    async def hand_back(self, hold: Hold) -> None:
        """See `TurnQueue.hand_back`."""
        await checkpoint()
        self.state.hand_back(hold)


class _Follower:
    """Iterates a session's records from an offset on, for ever."""

    def __init__(self, log: MemoryLog, session: str, after: int, deltas: bool) -> None:
        self._log = log
        self._session = log.state.session(session)
        self._name = session
        self._after = after
        self._deltas = deltas

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Sequence[Record]:
        await checkpoint()
        while True:
            if self._session.gone:
                raise SessionGone(f"session {self._name} was deleted")
            self._log.state.session(self._name)  # takes out what has expired
            if records := self._session.read(self._after, self._deltas, 1000):
                self._after = records[-1].offset
                return records
            await self._session.bell.wait()


class MemoryLog:
    """`SessionLog` over a `MemoryState`."""

    def __init__(self, state: MemoryState) -> None:
        self.state = state

    async def last(self, session: str, *, fresh: bool = False) -> Tail:
        """See `SessionLog.last`."""
        await checkpoint()
        return self.state.peek(session).end

    async def append(
        self,
        session: str,
        body: bytes,
        *,
        kind: Kind,
        after: Tail,
        pending: Pending,
        agent: str | None = None,
        dedupe: str | None = None,
        timeout: float = 30.0,
    ) -> Tail:
        """See `SessionLog.append`."""
        check_record(kind, agent, body, self.state.capabilities.max_body)
        wanted = Append(session, body, kind, after, pending, agent, dedupe)
        token = object()
        try:
            with anyio.move_on_after(timeout):
                while True:
                    with suppress(
                        TimeoutError
                    ):  # the answer was lost; asking again with the token stores nothing twice
                        return await self.exchange(wanted, token)
        finally:
            self.state.answers.pop(token, None)
        raise Unavailable(f"no answer within {timeout} s to an append to session {session}")

    async def exchange(self, wanted: Append, token: object) -> Tail:
        """One try of an append. TimeoutError: its answer was lost (in tests; nothing is lost in memory)."""
        await checkpoint()
        return self.state.append(wanted, token)

    async def read(self, session: str, *, after: int = 0, deltas: bool = True, limit: int = 1000) -> Sequence[Record]:
        """See `SessionLog.read`."""
        await checkpoint()
        return self.state.peek(session).read(after, deltas, limit)

    @asynccontextmanager
    async def follow(
        self, session: str, *, after: int = 0, deltas: bool = True, cursor: int = 0
    ) -> AsyncGenerator[AsyncIterator[Sequence[Record]]]:
        """See `SessionLog.follow`. Seeking costs nothing here, ``cursor`` is not used."""
        await checkpoint()
        yield _Follower(self, session, after, deltas)

    async def delete(self, session: str) -> None:
        """See `SessionLog.delete`."""
        await checkpoint()
        self.state.delete(session)


class MemorySignals:
    """`Signals` over a `MemoryState`. A handler that raises ends its listener's context with that error."""

    def __init__(self, state: MemoryState) -> None:
        self.state = state

    @asynccontextmanager
    async def listen(self, channel: str, handler: Handler) -> AsyncGenerator[None]:
        """See `Signals.listen`."""
        told, hear = anyio.create_memory_object_stream[bytes](float("inf"))
        async with told, anyio.create_task_group() as tasks:
            tasks.start_soon(_hear, hear, handler)
            entry = Listener(tasks, handler, told)
            self.state.loop = asyncio.get_running_loop()
            self.state.listeners.setdefault(channel, []).append(entry)
            try:
                await checkpoint()
                yield
            finally:
                self.state.listeners[channel].remove(entry)
                if not self.state.listeners[channel]:
                    del self.state.listeners[channel]
                told.close()
                tasks.cancel_scope.deadline = anyio.current_time() + HANDLER_GRACE

    async def request(self, channel: str, body: bytes, *, timeout: float) -> bytes:
        """See `Signals.request`."""
        await checkpoint()
        if channel not in self.state.listeners:
            raise NoListener(f"nobody listens on {channel!r}")
        async with self._ask(channel, body) as replies:
            with anyio.move_on_after(timeout):
                async for reply in replies:
                    return reply
                await anyio.sleep_forever()
        raise Unavailable(f"no reply on {channel!r} within {timeout} s")

    async def gather(self, channel: str, body: bytes, *, wait: float) -> list[bytes]:
        """See `Signals.gather`. Returns as soon as every listener is done."""
        await checkpoint()
        found: list[bytes] = []
        async with self._ask(channel, body) as replies:
            with anyio.move_on_after(wait):
                async for reply in replies:
                    found.append(reply)  # noqa: PERF401 - what came before the time was up must be kept
        return found

    def announce(self, channel: str, body: bytes) -> None:
        """See `Signals.announce`."""

        def tell() -> None:
            for listener in self.state.listeners.get(channel, ()):
                with suppress(anyio.BrokenResourceError):  # it is just leaving
                    listener.told.send_nowait(body)

        if self.state.loop is not None:
            with suppress(RuntimeError):  # the loop was closed: nobody listens any more
                self.state.loop.call_soon_threadsafe(tell)

    @asynccontextmanager
    async def _ask(self, channel: str, body: bytes) -> AsyncGenerator[AsyncIterator[bytes]]:
        send, receive = anyio.create_memory_object_stream[bytes](float("inf"))
        with send, receive:
            for listener in self.state.listeners.get(channel, ()):
                listener.tasks.start_soon(_answer, listener.handler, body, send.clone())
            send.close()
            yield receive


async def _answer(handler: Handler, body: bytes, replies: ObjectSendStream[bytes]) -> None:
    async with replies:
        reply = await handler(body)
        if reply is not None:
            with suppress(anyio.BrokenResourceError):  # whoever asked has gone, with its answer or without
                await replies.send(reply)


async def _hear(told: ObjectReceiveStream[bytes], handler: Handler) -> None:
    async with told:
        async for body in told:
            await handler(body)


_named: dict[str, MemoryState] = {}


class MemoryBroker:
    """A connection to a broker in this process.

    Args:
        name: Brokers of one name share their state. None: a state of its own, unless ``state`` is given.
        state: The state to connect to, to set its times and limits: ``MemoryBroker(state=MemoryState(lease_ttl=1))``.
    """

    def __init__(self, name: str | None = None, *, state: MemoryState | None = None) -> None:
        if name is not None and state is not None:
            raise InvalidInput("give a name or a state, not both")
        if name is not None:
            state = _named.setdefault(name, MemoryState())
        self.state = state or MemoryState()
        self.log = MemoryLog(self.state)
        self.turns = MemoryQueue(self.state)
        self.signals = MemorySignals(self.state)

    @property
    def capabilities(self) -> Capabilities:
        """What this broker can do."""
        return self.state.capabilities

    def now(self) -> float:
        """See `Broker.now`."""
        return self.state.clock()

    async def __aenter__(self) -> Self:
        await checkpoint()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await checkpoint()

    async def setup(self, *, dry_run: bool = False) -> list[str]:
        """Nothing is needed in memory."""
        await checkpoint()
        return []

    async def stats(self) -> list[QueueStats]:
        """The queues of all agents."""
        await checkpoint()
        return [self._stats(name, agent) for name, agent in sorted(self.state.agents.items())]

    async def sessions(self, *, limit: int = 1000) -> list[str]:
        """See `BrokerAdmin.sessions`."""
        await checkpoint()
        holding = (n for n, session in self.state.sessions.items() if any(r.kind is Kind.TURN for r in session.kept))
        return list(itertools.islice(holding, limit))

    def _stats(self, name: str, agent: AgentQueue) -> QueueStats:
        now = self.state.clock()
        open_items = [i for i in agent.items.values() if i.record.offset in self.state.session(i.session).pending]
        leased = sum(i.lease is not None and i.due > now for i in open_items)
        ttl = agent.lease_ttl or self.capabilities.lease_ttl
        return QueueStats(agent=name, waiting=len(open_items) - leased, leased=leased, lease_ttl=ttl)
