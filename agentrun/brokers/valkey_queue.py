"""The queues of inputs in Valkey.

What is ready is listed at the server, in the step in which it becomes so (see `valkey_scripts`). Whoever waits looks
when something was listed, when the first entry of a list falls due, and now and then.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

import anyio
from valkey.exceptions import ResponseError

from agentrun.bell import Bell, Ear
from agentrun.broker import Hold, Record, Tail
from agentrun.brokers.checks import check_lease_ttl, not_open
from agentrun.brokers.valkey_beat import Heartbeats
from agentrun.brokers.valkey_channels import Subscriber
from agentrun.brokers.valkey_core import Core, Stored, tail_of
from agentrun.brokers.valkey_link import NotConnected, NotSent, log
from agentrun.brokers.valkey_scripts import ACK, GIVE_BACK, LEASE
from agentrun.errors import Unavailable
from agentrun.wire import check_id

SETTLE = 10.0
"""Seconds an ack or a handing back is tried for."""
MAX_NAMED = 5000
LOOK = 5.0
"""Seconds after which whoever waits looks in any case: a wake-up may be lost."""
_SOON = 0.005
"""Seconds between two looks at the least: clocks differ by that much."""


class ValkeyLease:
    """A lease; what is done with it after it was given to another does nothing."""

    def __init__(self, queue: ValkeyQueue, agent: _Agent, token: str, session: str, record: Record, tail: Tail) -> None:
        self.session = session
        self.record = record
        self.tail = tail
        self.token = token
        self._queue = queue
        self._agent = agent

    def extend(self) -> None:
        """See `Lease.extend`."""
        self._queue.extend(self._agent.name, self._agent.lease_ttl, self.session, self.record.offset, self.token)

    async def ack(self) -> None:
        """See `Lease.ack`.

        Raises:
            Unavailable: It is not known whether it was settled.
        """
        await self._queue.acknowledge(self.session, self.record.offset, self.token)

    async def nack(self, *, delay: float = 0.0) -> None:
        """See `Lease.nack`.

        Raises:
            Unavailable: It is not known whether it was handed back; if not, it runs out.
        """
        await self._queue.give_back(self.session, self.record.offset, self.token, delay)


class _Agent:
    """The queue of an agent, as this connection sees it."""

    def __init__(self, name: str, lease_ttl: float, prefixes: Sequence[str]) -> None:
        self.name = name
        self.lease_ttl = lease_ttl
        self.bell = Bell()
        self.due = dict.fromkeys(prefixes, 0.0)
        """When to look at each partition, by the server's clock."""

    def look(self, prefix: str | None = None) -> None:
        """Have one partition, or all, looked at at once."""
        for one in [prefix] if prefix in self.due else list(self.due):
            self.due[one] = 0.0
        self.bell.ring()


class ValkeyQueue:
    """`agentrun.broker.TurnQueue` on Valkey."""

    def __init__(self, core: Core, beats: Heartbeats) -> None:
        self._core = core
        self._beats = beats
        self._agents: dict[str, _Agent] = {}

    async def open(self, agent: str, *, lease_ttl: float | None = None) -> float:
        """See `TurnQueue.open`."""
        check_id("agent", agent)
        key = f"{self._core.names}agents"
        wanted = lease_ttl or self._core.lease_ttl
        await self._core.command("HSETNX", key, agent, str(wanted))
        found = float(await self._core.command("HGET", key, agent))
        check_lease_ttl(agent, found, lease_ttl)
        self._beats.start()
        if agent not in self._agents:
            prefixes = [self._core.prefix(number) for number in range(self._core.found.partitions)]
            state = self._agents[agent] = _Agent(agent, found, prefixes)
            subscriber = Subscriber(lambda prefix: state.look(prefix.decode()), state.look)
            self._core.signals.add(f"{self._core.topics}wake:{agent}", subscriber)
        self._agents[agent].lease_ttl = found
        return found

    async def lease(self, agent: str, *, wait: float) -> ValkeyLease | None:
        """See `TurnQueue.lease`. While there is no connection, nothing is given."""
        state = self._agents.get(agent)
        if state is None:
            raise not_open(agent)
        end = anyio.current_time() + wait
        ear = Ear(state.bell)
        try:
            while True:
                with anyio.move_on_after(max(end - anyio.current_time(), 0.5)):
                    if lease := await self._take(state):
                        return lease
                left = end - anyio.current_time()
                if left <= 0:
                    return None
                soon = max(min(state.due.values()) - self._core.clock.now(), _SOON)
                if not await ear.wait(min(left, soon, LOOK)) and soon >= LOOK:
                    state.look()
        finally:
            ear.close()

    async def _take(self, state: _Agent) -> ValkeyLease | None:
        """Look at the partitions that it is time for."""
        now = self._core.clock.now()
        for prefix in [prefix for prefix, due in state.due.items() if due <= now]:
            state.due[prefix] = now + LOOK  # a wake-up while we ask has it looked at again
            asked = False
            try:
                lease = await self._ask(state, prefix)
                asked = True
            finally:
                if not asked:
                    state.due[prefix] = 0.0
            if lease is not None:
                state.look(prefix)  # there may be more, for others who wait
                return lease
        return None

    async def _ask(self, state: _Agent, prefix: str) -> ValkeyLease | None:
        token = f"{self._core.id}.{secrets.token_hex(8)}"
        again = False
        while True:
            words = (prefix, self._core.topics, state.name, token, str(round(state.lease_ttl * 1e6)))
            try:
                future = self._core.commands.evaluate(LEASE, f"{prefix}r:{state.name}", (*words, "1" if again else "0"))
                try:
                    # It may be given while we are cancelled; nobody would run it until it runs out.
                    reply = await self._core.answer(LEASE, asyncio.shield(future))
                except asyncio.CancelledError:
                    future.add_done_callback(lambda done: self._return(state, token, done))
                    raise
            except NotSent:
                await self._core.until_connected()
            except NotConnected:
                again = True
                await self._core.until_connected()
            else:
                break
        if reply[0] == b"lease":
            return self._lease(state, token, reply)
        if reply[1]:
            state.due[prefix] = min(state.due[prefix], int(reply[1]) / 1e6)
        return None

    def _lease(self, state: _Agent, token: str, reply: list[Any]) -> ValkeyLease:
        _, session, record, *end = reply
        return ValkeyLease(self, state, token, session.decode(), Stored.parse(record).record, tail_of(end))

    def _return(self, state: _Agent, token: str, done: asyncio.Future[Any]) -> None:
        """Give back what was given to a caller that had gone."""
        if done.cancelled() or isinstance(done.exception(), NotConnected | ResponseError):
            return
        if done.result()[0] == b"lease" and self._core.tasks.running:
            lease = self._lease(state, token, done.result())
            self._core.background.start_soon(self._give_back_quietly, lease)

    async def _give_back_quietly(self, lease: ValkeyLease) -> None:
        try:
            with anyio.CancelScope(shield=True):
                await lease.nack()
        except Unavailable as error:
            log.debug("not handed back, it will run out: %s", error)

    def extend(self, agent: str, lease_ttl: float, session: str, offset: int, token: str) -> None:
        """Reset a lease's clock; any thread, never blocks, best effort."""
        place = self._core.place(session)
        self._beats.extend(place.key, (place.prefix, session, str(offset), token, agent, str(round(lease_ttl * 1e6))))

    async def acknowledge(self, session: str, offset: int, token: str) -> None:
        """Take a leased input off the queue."""
        place = self._core.place(session)
        args = (place.prefix, session, self._core.topics, str(offset), token)
        await self._core.run(ACK, place.key, args, patience=SETTLE)

    async def give_back(self, session: str, offset: int, token: str, delay: float) -> None:
        """Have a leased input given out again."""
        place = self._core.place(session)
        args = (place.prefix, session, self._core.topics, str(offset), token, str(round(delay * 1e6)))
        await self._core.run(GIVE_BACK, place.key, args, patience=SETTLE)

    def early(self) -> Sequence[Hold]:
        """Nothing: the server lists only what is ready."""
        return ()

    async def given_out(self, agent: str) -> Sequence[Hold]:
        """See `TurnQueue.given_out`. The token says nothing here: `hand_back` takes it from whoever has it."""
        check_id("agent", agent)
        found: list[Hold] = []
        for number in range(self._core.found.partitions):
            leased = f"{self._core.prefix(number)}l:{agent}"
            for member in await self._core.command("ZRANGE", leased, "0", str(MAX_NAMED - 1), "REV"):
                offset, _, session = member.decode().partition(":")
                found.append(Hold(agent, session, int(offset), ""))
        return found[:MAX_NAMED]

    async def hand_back(self, hold: Hold) -> None:
        """See `TurnQueue.hand_back`."""
        place = self._core.place(hold.session)
        args = (place.prefix, hold.session, self._core.topics, str(hold.offset), "", "0")
        # Sent again late, it could take the input from whoever has it by then.
        await self._core.run_unless_done(GIVE_BACK, place.key, args, patience=SETTLE)
