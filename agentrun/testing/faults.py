"""A broker that fails by plan: wrap any broker, and see what your program does.

::

    faults = Faults(lose_ack={3}, refuse=0.02, lose_extend=0.1, seed=7)
    async with MemoryBroker() as broker:
        faulty = FaultyBroker(broker, faults)
        ...
        assert faulty.injected["lose_ack"] == 1

Each fault is given the numbers of the calls it hits, counted from 1 for each kind of call, or the chance that it hits
a call. The same faults and the same calls give the same failures.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Self

import anyio
from anyio.lowlevel import checkpoint
from msgspec import Struct

from agentrun.broker import Broker, Capabilities, Handler, Hold, Kind, Lease, Pending, Record, Tail
from agentrun.errors import Unavailable

__all__ = ["Faults", "FaultyBroker", "When"]

When = frozenset[int] | set[int] | float
"""The numbers of the calls that are hit, from 1, or a chance from 0 to 1."""


class Faults(Struct, frozen=True, kw_only=True):
    """What goes wrong, and when.

    Args:
        lose_ack: Appends that are stored and raise `Unavailable`: whether they are stored is not known.
        refuse: Appends that are not stored and raise `Unavailable`.
        delay: Appends that are stored up to ``delay_max`` seconds late.
        delay_max: See ``delay``.
        disconnect: Appends at which the connection breaks, before they are stored, for ``outage`` seconds.
        outage: See ``disconnect``.
        lose_extend: `Lease.extend` calls that never arrive.
        lose_settle: `Lease.ack` and `Lease.nack` calls that never arrive; the lease runs out.
        repeat_lease: Leases that are given out a second time at once, by the next `TurnQueue.lease` of their agent.
        seed: Chances are drawn from it.
    """

    lose_ack: When = 0.0
    refuse: When = 0.0
    delay: When = 0.0
    delay_max: float = 0.05
    disconnect: When = 0.0
    outage: float = 1.0
    lose_extend: When = 0.0
    lose_settle: When = 0.0
    repeat_lease: When = 0.0
    seed: int = 0


class _Dice:
    """Says of each call whether it is hit. Each fault has its own count and chances: none shifts another's."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.injected: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()
        self._next: Counter[str] = Counter()
        self._chances: dict[str, random.Random] = {}

    def hit_next(self, fault: str) -> None:
        """Hit one call more, whatever was planned: the next one."""
        self._next[fault] += 1

    def hits(self, fault: str) -> bool:
        when: When = getattr(self.faults, fault)
        self._calls[fault] += 1
        hit = self.chance(fault) < when if isinstance(when, (int, float)) else self._calls[fault] in when
        if self._next[fault]:
            self._next[fault] -= 1
            hit = True
        self.injected[fault] += hit
        return hit

    def chance(self, fault: str) -> float:
        if fault not in self._chances:
            self._chances[fault] = random.Random(f"{self.faults.seed} {fault}")  # noqa: S311 - meant to be repeatable
        return self._chances[fault].random()


class FaultyBroker:
    """A connection to the same broker as ``inner``, that fails as `Faults` say.

    While it is disconnected every call raises `Unavailable` at once, extensions of leases are lost, requests to
    handlers go unanswered, a lease that is given out is never received, and a follow stands still; it goes on where it
    was. Entering and leaving it enters and
    leaves ``inner``; that may also be done outside.
    """

    def __init__(self, inner: Broker, faults: Faults | None = None) -> None:
        self.inner = inner
        self._dice = _Dice(faults or Faults())
        self._line = _Line()
        self.log = _FaultyLog(inner, self._dice, self._line)
        self.turns = _FaultyQueue(inner, self._dice, self._line)
        self.signals = _FaultySignals(inner, self._line)

    @property
    def capabilities(self) -> Capabilities:
        """Those of the broker inside."""
        return self.inner.capabilities

    def now(self) -> float:
        """See `Broker.now`."""
        return self.inner.now()

    @property
    def injected(self) -> Counter[str]:
        """How often each fault hit, by its name in `Faults`."""
        return self._dice.injected

    @property
    def connected(self) -> bool:
        """Whether the connection stands."""
        return self._line.connected

    def disconnect(self, seconds: float = float("inf")) -> None:
        """Break the connection, for a time or until `reconnect`."""
        self._line.cut(seconds)

    def drop_next_ack(self) -> None:
        """Lose the answer to the next append that is stored: it raises `Unavailable`, besides what `Faults` plan."""
        self._dice.hit_next("lose_ack")

    @property
    def held(self) -> list[Hold]:
        """The leases this connection was given and has not settled."""
        return self.turns.held

    def reconnect(self) -> None:
        """Mend the connection."""
        self._line.mend()

    async def __aenter__(self) -> Self:
        await self.inner.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.inner.__aexit__(*exc)


class _Line:
    """The connection: up, or down until a time. Read from any thread, as leases are extended from any."""

    def __init__(self) -> None:
        self._until = 0.0
        self._changed: anyio.Event | None = None

    @property
    def connected(self) -> bool:
        return time.monotonic() >= self._until

    def cut(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def mend(self) -> None:
        self._until = 0.0
        if self._changed:
            self._changed.set()
            self._changed = None

    async def use(self) -> None:
        """Raise Unavailable while the connection is broken."""
        await checkpoint()
        if not self.connected:
            raise Unavailable("the connection is broken, as planned")

    async def stands(self) -> None:
        """Wait until the connection stands."""
        while not self.connected:
            self._changed = self._changed or anyio.Event()
            with anyio.move_on_after(self._until - time.monotonic()):
                await self._changed.wait()


class _FaultyLog:
    def __init__(self, inner: Broker, dice: _Dice, line: _Line) -> None:
        self._inner = inner
        self._dice = dice
        self._line = line

    async def last(self, session: str, *, fresh: bool = False) -> Tail:
        await self._line.use()
        return await self._inner.log.last(session, fresh=fresh)

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
        if self._dice.hits("disconnect"):
            self._line.cut(self._dice.faults.outage)
        await self._line.use()
        if self._dice.hits("refuse"):
            raise Unavailable(f"an append to session {session} was not stored, as planned")
        if self._dice.hits("delay"):
            await anyio.sleep(self._dice.chance("delay_max") * self._dice.faults.delay_max)
        tail = await self._inner.log.append(
            session, body, kind=kind, after=after, pending=pending, agent=agent, dedupe=dedupe, timeout=timeout
        )
        if self._dice.hits("lose_ack"):
            raise Unavailable(f"the answer to an append to session {session} was lost, as planned")
        return tail

    async def read(self, session: str, *, after: int = 0, deltas: bool = True, limit: int = 1000) -> Sequence[Record]:
        await self._line.use()
        return await self._inner.log.read(session, after=after, deltas=deltas, limit=limit)

    @asynccontextmanager
    async def follow(
        self, session: str, *, after: int = 0, deltas: bool = True, cursor: int = 0
    ) -> AsyncGenerator[AsyncIterator[Sequence[Record]]]:
        await self._line.use()
        async with self._inner.log.follow(session, after=after, deltas=deltas, cursor=cursor) as records:
            yield _FaultyFollow(records, self._line)

    async def delete(self, session: str) -> None:
        await self._line.use()
        await self._inner.log.delete(session)


class _FaultyFollow:
    """Holds what comes while the connection is broken."""

    def __init__(self, records: AsyncIterator[Sequence[Record]], line: _Line) -> None:
        self._records = records
        self._line = line
        self._held: Sequence[Record] | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Sequence[Record]:
        # Kept, so that nothing is lost when the caller gives up waiting and asks again.
        if self._held is None:
            self._held = await anext(self._records)
        await self._line.stands()
        found, self._held = self._held, None
        return found


class _FaultyQueue:
    def __init__(self, inner: Broker, dice: _Dice, line: _Line) -> None:
        self._inner = inner
        self._dice = dice
        self._line = line
        self._again: dict[str, list[Lease]] = {}
        self._held: dict[str, Hold] = {}

    @property
    def held(self) -> list[Hold]:
        return list(self._held.values())

    async def open(self, agent: str, *, lease_ttl: float | None = None) -> float:
        await self._line.use()
        return await self._inner.turns.open(agent, lease_ttl=lease_ttl)

    async def lease(self, agent: str, *, wait: float) -> Lease | None:
        await self._line.use()
        if again := self._again.pop(agent, None):
            return _FaultyLease(again[0], self._dice, self._line, self._held)
        lease = await self._inner.turns.lease(agent, wait=wait)
        if lease is None:
            return None
        await self._line.use()  # what was given out meanwhile never arrived; it runs out
        self._held[lease.token] = Hold(agent, lease.session, lease.record.offset, lease.token)
        if self._dice.hits("repeat_lease"):
            self._again[agent] = [lease]
        return _FaultyLease(lease, self._dice, self._line, self._held)

    def early(self) -> Sequence[Hold]:
        return self._inner.turns.early()

    async def given_out(self, agent: str) -> Sequence[Hold]:
        await self._line.use()
        return await self._inner.turns.given_out(agent)

    async def hand_back(self, hold: Hold) -> None:
        await self._line.use()
        await self._inner.turns.hand_back(hold)


class _FaultyLease:
    def __init__(self, inner: Lease, dice: _Dice, line: _Line, held: dict[str, Hold]) -> None:
        self._inner = inner
        self._dice = dice
        self._line = line
        self._held = held

    @property
    def session(self) -> str:
        return self._inner.session

    @property
    def record(self) -> Record:
        return self._inner.record

    @property
    def tail(self) -> Tail:
        return self._inner.tail

    @property
    def token(self) -> str:
        return self._inner.token

    def extend(self) -> None:
        if self._line.connected and not self._dice.hits("lose_extend"):
            self._inner.extend()

    async def ack(self) -> None:
        await self._settle(self._inner.ack)

    async def nack(self, *, delay: float = 0.0) -> None:
        await self._settle(lambda: self._inner.nack(delay=delay))

    async def _settle(self, settle: Callable[[], Awaitable[None]]) -> None:
        await self._line.use()
        if not self._dice.hits("lose_settle"):
            await settle()
        self._held.pop(self.token, None)


class _FaultySignals:
    def __init__(self, inner: Broker, line: _Line) -> None:
        self._inner = inner
        self._line = line

    def listen(self, channel: str, handler: Handler) -> AbstractAsyncContextManager[None]:
        async def hear(body: bytes) -> bytes | None:
            if not self._line.connected:
                return None
            reply = await handler(body)
            return reply if self._line.connected else None

        return self._inner.signals.listen(channel, hear)

    async def request(self, channel: str, body: bytes, *, timeout: float) -> bytes:
        await self._line.use()
        return await self._inner.signals.request(channel, body, timeout=timeout)

    async def gather(self, channel: str, body: bytes, *, wait: float) -> list[bytes]:
        await self._line.use()
        return await self._inner.signals.gather(channel, body, wait=wait)

    def announce(self, channel: str, body: bytes) -> None:
        if self._line.connected:
            self._inner.signals.announce(channel, body)
