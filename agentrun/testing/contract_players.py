"""Those who act in the checks: a sender and an owner, as small as they can be while keeping the rules."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import anyio

from agentrun.broker import Broker, Kind, Lease, Pending, Record, Tail
from agentrun.errors import Conflict, Fenced
from agentrun.testing.contract_base import Environment, expect

AGENT = "agent"
PROMPT = 1.0
"""Seconds within which "promptly" and "at once" must be, also on a busy machine."""
QUIET = 0.25
"""Seconds for which a check watches that something does not happen."""
PATIENCE = 60.0
"""Seconds after which what must come counts as missing."""


@asynccontextmanager
async def connections(env: Environment, count: int, *agents: str) -> AsyncGenerator[list[Broker]]:
    """Independent connections to the environment's broker, with the agents' queues open on each."""
    async with AsyncExitStack() as stack:
        brokers = [await stack.enter_async_context(env.open()) for _ in range(count)]
        for broker in brokers:
            for agent in agents or (AGENT,):
                await broker.turns.open(agent)
        yield brokers


async def send(
    broker: Broker,
    session: str,
    body: bytes = b"hello",
    *,
    kind: Kind = Kind.TURN,
    agent: str = AGENT,
    dedupe: str | None = None,
    wakes: bool = False,
) -> Tail:
    """Append an input, as any client may at any time: again until nothing came in between."""
    while True:
        after = await broker.log.last(session)
        queued = kind is Kind.TURN
        try:
            return await broker.log.append(
                session,
                body,
                kind=kind,
                after=after,
                pending=after.pending.add(after.next, wakes=wakes) if queued else after.pending,
                agent=agent if queued else None,
                dedupe=dedupe,
            )
        except Conflict:
            await anyio.sleep(random.uniform(0, 0.002))  # noqa: S311 - spreads the tries, nothing more


class Owner:
    """Works on one leased input, as a worker does: claims it, appends, settles, and stops when it was superseded."""

    def __init__(self, broker: Broker, lease: Lease) -> None:
        self.broker = broker
        self.lease = lease
        self.session = lease.session
        self.offset = lease.record.offset
        self.tail = lease.tail

    async def start(self) -> Owner:
        """Claim the session."""
        await self.append(b"started", change=lambda p: p.claim(self.offset))
        return self

    async def append(
        self, body: bytes, *, kind: Kind = Kind.EVENT, change: Callable[[Pending], Pending] = lambda p: p
    ) -> Tail:
        """Append a record, after whatever others sent meanwhile.

        Raises:
            Fenced: Another owner took the session over.
        """
        while True:
            try:
                self.tail = await self.broker.log.append(
                    self.session, body, kind=kind, after=self.tail, pending=change(self.tail.pending)
                )
            except Conflict:
                await self._catch_up()
            else:
                return self.tail

    async def _catch_up(self) -> None:
        records = await self.broker.log.read(self.session, after=self.tail.offset)
        if any(not r.kind.input for r in records):
            raise Fenced(f"session {self.session} has another owner than that of input {self.offset}")
        self.tail = tail_of(records[-1]) if records else await self.broker.log.last(self.session)
        if self.offset not in self.tail.pending:
            raise Fenced(f"input {self.offset} of session {self.session} was settled by another")

    async def deltas(self, count: int) -> Tail:
        """Append tokens."""
        for number in range(count):
            await self.append(b"token %d" % number, kind=Kind.DELTA)
        return self.tail

    async def settle(self, *others: int) -> Tail:
        """Append the terminal record, without the ack."""
        return await self.append(b"done %d" % self.offset, change=lambda p: p.settle(self.offset, *others))

    async def finish(self) -> None:
        """Append the terminal record, then ack."""
        await self.settle()
        await self.lease.ack()

    async def park(self) -> None:
        """Suspend the turn: nothing runs until something wakes it."""
        await self.append(b"suspended", change=Pending.park)
        await self.lease.ack()


def tail_of(record: Record) -> Tail:
    """The session's end when this record was its last."""
    return Tail(record.offset, record.pending, record.cursor, record.time, 0, record.kind)


async def take(broker: Broker, agent: str = AGENT, *, within: float = PATIENCE) -> Lease | None:
    """Lease an input, asking again when the broker returned early; None if none came in that time."""
    end = anyio.current_time() + within
    while True:
        left = end - anyio.current_time()
        if lease := await broker.turns.lease(agent, wait=max(left, 0)):
            return lease
        if left <= 0:
            return None


async def must_take(
    broker: Broker, session: str, offset: int, *, within: float = PATIENCE, agent: str = AGENT
) -> Lease:
    """Lease an input and check that it is this one."""
    lease = await take(broker, agent, within=within)
    expect(lease, f"input {offset} of {session} must be leased within {within} s, nothing came")
    assert lease
    got = (lease.session, lease.record.offset)
    expect(got == (session, offset), f"the input leased next must be {(session, offset)}, not {got}")
    expect(
        lease.tail.pending.ready(offset),
        f"the lease of {offset} came with an end of which it is not ready: {lease.tail}",
    )
    return lease


async def own(broker: Broker, session: str, offset: int, *, within: float = PATIENCE) -> Owner:
    """Lease this input and claim its session."""
    return await Owner(broker, await must_take(broker, session, offset, within=within)).start()


async def must_not_take(broker: Broker, why: str, *, within: float = QUIET, agent: str = AGENT) -> None:
    """Check that nothing is leased for a time."""
    lease = await take(broker, agent, within=within)
    if lease:
        expect(False, f"nothing must be leased: {why}; {lease.record.offset} of {lease.session} was")


@asynccontextmanager
async def kept(lease: Lease, ttl: float) -> AsyncGenerator[None]:
    """Extend the lease from a thread of its own, every quarter of its time."""

    async def extend() -> None:
        while True:
            await anyio.to_thread.run_sync(lease.extend)
            await anyio.sleep(ttl / 4)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(extend)
        yield
        tasks.cancel_scope.cancel()


async def everything(broker: Broker, session: str, *, deltas: bool = True) -> list[Record]:
    """All stored records of the session."""
    found: list[Record] = []
    while True:
        page = await broker.log.read(session, after=found[-1].offset if found else 0, deltas=deltas)
        found.extend(page)
        if len(page) < 1000:
            return found


async def until(condition: Callable[[], Awaitable[bool]], *, within: float = PATIENCE) -> bool:
    """Whether the condition comes true in that time."""
    with anyio.move_on_after(within):
        while not await condition():  # noqa: ASYNC110 - what is waited for is in the broker, which sets no event
            await anyio.sleep(0.005)
        return True
    return False


def offsets(records: Sequence[Record]) -> list[int]:
    """Their offsets."""
    return [r.offset for r in records]


async def gather_through(records: AsyncIterator[Sequence[Record]], offset: int) -> list[Record]:
    """Read from a follow until this offset has come."""
    found: list[Record] = []
    with anyio.move_on_after(PATIENCE):
        async for some in records:
            expect(some, "a follow must give lists of at least one record")
            found.extend(some)
            if found[-1].offset >= offset:
                return found
    expect(False, f"a follow must reach offset {offset}; what came in {PATIENCE} s: {offsets(found)[-20:]}")
    raise AssertionError
