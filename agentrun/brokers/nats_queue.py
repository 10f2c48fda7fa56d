"""The turn queue: one durable pull consumer per agent and partition, and pull requests only while somebody waits."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import anyio
import msgspec
from msgspec import Struct

from agentrun.broker import Hold, Record, Tail
from agentrun.brokers.checks import not_open
from agentrun.brokers.nats_beat import Heartbeats
from agentrun.brokers.nats_core import Core
from agentrun.brokers.nats_hold import NACK, Delivery, Holder
from agentrun.brokers.nats_layout import consumer_filter, consumer_name, session_of, stream_name
from agentrun.brokers.nats_link import ApiError, Msg, NotConnected, log, status
from agentrun.brokers.nats_read import Reader
from agentrun.errors import AgentrunError, InvalidInput, Misconfigured, Unavailable
from agentrun.wire import check_id

MAX_ACK_PENDING = 20_000
MAX_WAITING = 10_000
MAX_NAMED = 5000
LONGEST_PULL = 30.0
SIGN_OF_LIFE = 5.0
"""Seconds between the server's heartbeats on a waiting pull request."""
SETTLE = 5.0
"""Seconds an ack or nack is tried for."""

ACK_PREFIX = "$JS.ACK."

SHORTEST_PAUSE = 0.5
LONGEST_PAUSE = 5.0
"""Seconds between two tries to use a queue that is not there."""

_NO_CONSUMER = 10014
_NO_STREAM = 10059
_NS = 1_000_000_000


class _Config(Struct, frozen=True):
    ack_wait: int = 0
    ack_policy: str = ""
    filter_subject: str = ""
    max_deliver: int = -1


class _At(Struct, frozen=True):
    consumer_seq: int = 0
    stream_seq: int = 0


class _Consumer(Struct, frozen=True):
    config: _Config
    delivered: _At = _At()
    ack_floor: _At = _At()
    num_ack_pending: int = 0


class NatsLease:
    """`agentrun.broker.Lease`: a delivered message."""

    def __init__(self, queue: NatsQueue, delivery: Delivery, tail: Tail) -> None:
        self._queue = queue
        self._delivery = delivery
        self._tail = tail

    @property
    def session(self) -> str:
        """See `Lease.session`."""
        return self._delivery.session

    @property
    def record(self) -> Record:
        """See `Lease.record`."""
        return self._delivery.record

    @property
    def tail(self) -> Tail:
        """See `Lease.tail`."""
        return self._tail

    @property
    def token(self) -> str:
        """See `Lease.token`: the delivery's ack subject."""
        return self._delivery.reply

    def extend(self) -> None:
        """See `Lease.extend`."""
        self._queue.beats.beat(self._delivery.reply)

    async def ack(self) -> None:
        """See `Lease.ack`."""
        await self._queue.acknowledge(self._delivery.reply)

    async def nack(self, *, delay: float = 0.0) -> None:
        """See `Lease.nack`."""
        body = NACK if delay <= 0 else b'-NAK {"delay": %d}' % int(delay * _NS)
        await self._queue.refuse(self._delivery.reply, body)


class _Named:
    """Which inputs of a consumer lie between the first that is not settled and the last one given out."""

    def __init__(self) -> None:
        self.inputs: deque[tuple[int, str, int]] = deque(maxlen=MAX_NAMED)
        """Stream sequence, session and offset."""
        self.through = 0
        """The stream sequence up to which they were read."""


class _Waiter:
    def __init__(self, until: float) -> None:
        self.until = until
        self.future: asyncio.Future[NatsLease] = asyncio.get_running_loop().create_future()


class _Agent:
    """One agent's consumers, and who waits for its inputs here."""

    def __init__(self, name: str, lease_ttl: float) -> None:
        self.name = name
        self.lease_ttl = lease_ttl
        self.waiters: deque[_Waiter] = deque()
        self.judging = 0
        """Messages that came and are not yet known to be ready: each may serve a waiter."""
        self.changed = anyio.Event()

    @property
    def demand(self) -> int:
        return len(self.waiters) - self.judging

    def bell(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()


class _Puller:
    """Keeps at most one pull request waiting at one partition's consumer, while there is demand."""

    def __init__(self, queue: NatsQueue, core: Core, agent: _Agent, partition: int) -> None:
        self._queue = queue
        self._core = core
        self._link = core.queue
        self._agent = agent
        self._partition = partition
        self._stream = stream_name(core.namespace, partition)
        self._inbox = f"{core.queue.client.new_inbox()}.pull"
        self._serial = 0
        self._open = False
        """Whether the current request waits at the server."""
        self._trouble = ""
        self._said = ""
        self._closing = False
        self._sign = anyio.Event()

    async def run(self) -> None:
        """Pull for ever."""
        subscription = await self._link.subscribe(f"{self._inbox}.*", self._on_message)
        self._link.on_reconnect.add(self._restart)
        pause = SHORTEST_PAUSE
        try:
            while True:
                while self._agent.demand <= 0:
                    await self._agent.changed.wait()
                try:
                    if self._trouble:
                        await self._mend()
                    pause = SHORTEST_PAUSE
                    await self._pull()
                except NotConnected:
                    await anyio.sleep(0.1)
                except AgentrunError as error:
                    self._say(f"{error}; it is tried again")
                    await anyio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads workers, no secret
                    pause = min(2 * pause, LONGEST_PAUSE)
        finally:
            self._link.on_reconnect.discard(self._restart)
            # The server may be sending an input at this moment: it must not wait for its lease to run out.
            self._closing = True
            with anyio.CancelScope(shield=True):
                await self._link.drain(subscription)

    def _restart(self) -> None:
        self._open = False
        self._sign.set()

    def _say(self, what: str) -> None:
        """Log it, unless it is what was said last."""
        if self._said != what:
            self._said = what
            log.warning("queue of agent %s, partition %d: %s", self._agent.name, self._partition, what)

    async def _mend(self) -> None:
        await anyio.sleep(random.uniform(0.1, 0.5))  # noqa: S311 - spreads workers, no secret
        await self._queue.ensure(self._agent.name, self._partition, self._agent.lease_ttl)
        self._say(f"{self._trouble}; it is there again")
        self._trouble = self._said = ""

    async def _pull(self) -> None:
        waits = max(w.until for w in self._agent.waiters) - time.monotonic() if self._agent.waiters else 0.0
        expires = min(max(waits, 0.05), LONGEST_PULL)
        request: dict[str, Any] = {"batch": 1, "expires": int(expires * _NS)}
        patience = expires + 1.0
        if expires > 2 * SIGN_OF_LIFE:
            request["idle_heartbeat"] = int(SIGN_OF_LIFE * _NS)
            patience = 2 * SIGN_OF_LIFE + 1.0
        self._serial += 1
        self._open = True
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{consumer_name(self._agent.name)}"
        try:
            await self._link.publish(subject, msgspec.json.encode(request), reply=f"{self._inbox}.{self._serial}")
            while self._open:
                self._sign = anyio.Event()
                with anyio.move_on_after(patience):
                    await self._sign.wait()
                    continue
                return  # no sign of life: the request is lost, ask again
        finally:
            self._open = False

    async def _on_message(self, msg: Msg) -> None:
        current = msg.subject.endswith(f".{self._serial}") if msg.subject.startswith(self._inbox) else True
        state = status(msg)
        if not state:
            # Any request's message is good; which one it answers cannot be told, but only one waits as a rule.
            self._open = False
            self._sign.set()
            if self._closing:
                await self._link.publish(msg.reply, NACK)
            else:
                self._queue.judge(self._agent, msg)
            return
        if not current:
            return
        if state != "100":
            self._open = False
            if state == "503" or (state == "409" and "Deleted" in (msg.headers or {}).get("Description", "")):
                self._trouble = f"its consumer was gone ({state})"
                self._core.suspect()
        self._sign.set()


class NatsQueue:
    """`agentrun.broker.TurnQueue` on JetStream."""

    def __init__(self, core: Core, reader: Reader, beats: Heartbeats) -> None:
        self._core = core
        self._reader = reader
        self._agents: dict[str, _Agent] = {}
        self._named: dict[tuple[str, int], _Named] = {}
        self._opening = anyio.Lock()
        self._holder = Holder(core, reader, self._offer)
        self.beats = beats

    # ---------------------------------------------------------------------------------------------- opening

    async def open(self, agent: str, *, lease_ttl: float | None = None) -> float:
        """See `TurnQueue.open`."""
        check_id("agent", agent)
        async with self._opening:
            known = self._agents.get(agent)
            wanted = lease_ttl if lease_ttl is not None else (known.lease_ttl if known else None)
            found = wanted
            for partition in range(self._core.found.partitions):
                found = await self.ensure(agent, partition, found, given=wanted is not None)
            assert found is not None
            if known is None:
                known = self._agents[agent] = _Agent(agent, found)
                self.beats.start()
                for partition in range(self._core.found.partitions):
                    self._core.background.start_soon(_Puller(self, self._core, known, partition).run)
            return known.lease_ttl

    async def ensure(self, agent: str, partition: int, lease_ttl: float | None, *, given: bool = True) -> float:
        """Create the consumer if it is missing and return its lease time."""
        stream, name = stream_name(self._core.namespace, partition), consumer_name(agent)
        filter = consumer_filter(self._core.namespace, partition, agent)
        reply = await self._core.queue.api(f"CONSUMER.INFO.{stream}.{name}")
        if isinstance(reply, ApiError) and reply.err_code == _NO_CONSUMER:
            config = {
                "name": name,
                "durable_name": name,
                "description": f"turns of agent {agent}",
                "filter_subject": filter,
                "ack_policy": "explicit",
                "ack_wait": int((lease_ttl or self._core.lease_ttl) * _NS),
                "max_deliver": -1,
                "max_ack_pending": MAX_ACK_PENDING,
                "max_waiting": MAX_WAITING,
                "deliver_policy": "all",
                "replay_policy": "instant",
            }
            request = {"stream_name": stream, "action": "create", "config": config}
            reply = await self._core.queue.api(f"CONSUMER.CREATE.{stream}.{name}.{filter}", request)
            if isinstance(reply, ApiError):  # somebody else made it at the same time, with another lease time
                reply = await self._core.queue.api(f"CONSUMER.INFO.{stream}.{name}")
        if isinstance(reply, ApiError) and reply.err_code == _NO_STREAM:
            raise Misconfigured(f"stream {stream} is not there: run `agentrun setup`")
        if isinstance(reply, ApiError):
            raise reply.about(f"the queue of agent {agent} in {stream} cannot be used")
        found = msgspec.json.decode(reply, type=_Consumer).config
        if found.filter_subject != filter or found.ack_policy != "explicit" or found.max_deliver != -1:
            raise Misconfigured(f"consumer {name} of stream {stream} was not made by agentrun: {found}")
        ttl = found.ack_wait / _NS
        if given and lease_ttl is not None and abs(ttl - lease_ttl) > 1e-6:
            raise Misconfigured(
                f"the queue of agent {agent} has a lease time of {ttl:g} s, not {lease_ttl:g} s: ask for the same, "
                f"or change it for all with `nats consumer edit {stream} {name} --wait {lease_ttl:g}s`"
            )
        return ttl

    # ---------------------------------------------------------------------------------------------- leasing

    async def lease(self, agent: str, *, wait: float) -> NatsLease | None:
        """See `TurnQueue.lease`."""
        state = self._agents.get(agent)
        if state is None:
            raise not_open(agent)
        waiter = _Waiter(time.monotonic() + wait)
        state.waiters.append(waiter)
        state.bell()
        given = False
        try:
            with anyio.move_on_after(wait):
                await asyncio.wait([waiter.future])
            given = waiter.future.done()
            return waiter.future.result() if given else None
        finally:
            if waiter in state.waiters:
                state.waiters.remove(waiter)
            if not given and waiter.future.done():  # cancelled in the moment it was given something
                self._core.background.start_soon(self._give_back, waiter.future.result())

    async def _give_back(self, lease: NatsLease) -> None:
        try:
            await lease.nack()
        except Unavailable as error:
            log.debug("not handed back, it will run out: %s", error)

    def judge(self, agent: _Agent, msg: Msg) -> None:
        """Find out whether a delivered input is ready, and give it to who waits, hold it, or drop it."""
        agent.judging += 1
        self._core.background.start_soon(self._judge, agent, msg)

    async def _judge(self, agent: _Agent, msg: Msg) -> None:
        try:
            try:
                delivery = Delivery.of(msg, agent.name, agent.lease_ttl)
            except InvalidInput as error:
                log.error("not a turn, taken off the queue: %s", error)
                await self._core.queue.publish(msg.reply, b"+TERM")
                return
            await self._holder.judge(delivery)
        except NotConnected as error:
            log.debug("a delivered turn is left to be delivered again: %s", error)
        except AgentrunError as error:
            log.warning("a delivered turn is left to be delivered again: %s", error)
        except anyio.get_cancelled_exc_class():
            with suppress(NotConnected):
                await self._core.queue.publish(msg.reply, NACK)
            raise
        finally:
            agent.judging -= 1
            agent.bell()

    async def _offer(self, delivery: Delivery, tail: Tail) -> None:
        agent = self._agents[delivery.agent]
        lease = NatsLease(self, delivery, tail)
        while agent.waiters:
            waiter = agent.waiters.popleft()
            if not waiter.future.done():
                waiter.future.set_result(lease)
                return
        await self._core.queue.publish(delivery.reply, NACK)

    async def acknowledge(self, subject: str) -> None:
        """Take an input off the queue and wait until the server has done it.

        Raises:
            Unavailable: It did not say so in time.
        """
        await self._core.queue.ask(subject, b"+ACK", patience=SETTLE)

    def early(self) -> list[Hold]:
        """See `TurnQueue.early`."""
        return self._holder.early()

    async def given_out(self, agent: str) -> list[Hold]:
        """See `TurnQueue.given_out`: what lies between the first that is not settled and the last one given out.

        What was read the last time is not read again.
        """
        found: list[Hold] = []
        for partition in range(self._core.found.partitions):
            stream, name = stream_name(self._core.namespace, partition), consumer_name(agent)
            reply = await self._core.queue.api(f"CONSUMER.INFO.{stream}.{name}")
            if isinstance(reply, ApiError):
                if reply.err_code in (_NO_CONSUMER, _NO_STREAM):
                    continue
                raise Unavailable(f"the queue of agent {agent} in {stream}: {reply.description}")
            consumer = msgspec.json.decode(reply, type=_Consumer)
            if consumer.num_ack_pending == 0:
                continue
            for seq, session, offset in await self._between(agent, partition, consumer):
                # What the server looks at is the stream's sequence; the other number must only be a possible one.
                token = f"{ACK_PREFIX}{stream}.{name}.1.{seq}.{consumer.delivered.consumer_seq}.0.0"
                found.append(Hold(agent, session, offset, token))
        return found[-MAX_NAMED:]

    async def _between(self, agent: str, partition: int, consumer: _Consumer) -> Sequence[tuple[int, str, int]]:
        first, last = consumer.ack_floor.stream_seq + 1, consumer.delivered.stream_seq
        named = self._named.get((agent, partition))
        if named is None or named.through > last:  # the consumer was made anew, or a server lags behind
            named = self._named[agent, partition] = _Named()
        stream = stream_name(self._core.namespace, partition)
        filter = consumer_filter(self._core.namespace, partition, agent)
        new = await self._reader.between(stream, filter, max(first, named.through + 1), last, newest=MAX_NAMED)
        named.inputs.extend((s.seq, session_of(s.subject), s.offset) for s in new if s.seq > named.through)
        named.through = max(named.through, last)
        while named.inputs and named.inputs[0][0] < first:
            named.inputs.popleft()
        return named.inputs

    async def hand_back(self, hold: Hold) -> None:
        """See `TurnQueue.hand_back`. The server honours this for any delivery of the input, an older one too."""
        if not hold.token.startswith(ACK_PREFIX):
            raise InvalidInput(f"not a token of this queue: {hold.token[:100]!r}")
        await self.refuse(hold.token, NACK)

    async def refuse(self, subject: str, body: bytes) -> None:
        """Give an input back.

        Raises:
            Unavailable: There was no connection.
        """
        with anyio.move_on_after(SETTLE):
            while True:
                try:
                    # Once only: sent again late, it could take the input from whoever has it by then.
                    await self._core.queue.exchange(subject, body, timeout=SETTLE)
                    return
                except NotConnected:
                    await anyio.sleep(0.1)
        raise Unavailable(self._core.queue.gone)
