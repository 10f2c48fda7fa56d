"""Order: what is done with a delivered input that is not ready (design.md, D4).

It is kept, heartbeating, without a slot, until its session's records say that it is ready (then it is offered to a
local slot or handed back at once) or no longer pending (then it is taken off the queue).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Literal, NamedTuple, Self

import anyio

from agentrun.broker import Hold, Record, Tail
from agentrun.brokers.nats_beat import IN_PROGRESS
from agentrun.brokers.nats_core import Core
from agentrun.brokers.nats_layout import Route, Stored, session_of
from agentrun.brokers.nats_link import Msg, NotConnected, log
from agentrun.brokers.nats_read import Reader
from agentrun.errors import AgentrunError, InvalidInput

LOOK = 2.0
"""Seconds after which the session's end is looked up again, should a live record have been lost."""

NACK = b"-NAK"
NACK_LATER = b'-NAK {"delay": 1000000000}'

Offer = Callable[["Delivery", Tail], Awaitable[None]]


class Delivery(NamedTuple):
    """An input as the queue delivered it; ``reply`` is where it is settled."""

    agent: str
    session: str
    record: Record
    reply: str
    lease_ttl: float

    @classmethod
    def of(cls, msg: Msg, agent: str, lease_ttl: float) -> Self:
        """Read a delivered message.

        Raises:
            InvalidInput: It is not a record.
        """
        tokens = msg.reply.split(".")
        # $JS.ACK.<stream>.<consumer>.<delivered>.<seq>.…, in newer servers with domain and account before the stream.
        at = 5 if len(tokens) == 9 else 7
        try:
            seq, stamp = int(tokens[at]), int(tokens[at + 2]) // 1000 / 1e6  # as exact as the other times
        except (IndexError, ValueError):
            raise InvalidInput(f"an ack subject that is not understood: {msg.reply!r}") from None
        record = Stored(msg.subject, seq, stamp, msg.headers or {}, msg.data).record()
        return cls(agent, session_of(msg.subject), record, msg.reply, lease_ttl)


class _Held:
    """The early inputs of one session that are held here."""

    def __init__(self) -> None:
        self.inputs: dict[int, Delivery] = {}
        self.beaten: dict[int, float] = {}
        self.look = anyio.Event()

    def add(self, delivery: Delivery) -> None:
        self.inputs[delivery.record.offset] = delivery
        self.beaten[delivery.record.offset] = time.monotonic()
        self.look.set()

    def remove(self, offset: int) -> None:
        del self.inputs[offset], self.beaten[offset]


class Holder:
    """Decides on delivered inputs and holds the early ones."""

    def __init__(self, core: Core, reader: Reader, offer: Offer) -> None:
        self._core = core
        self._reader = reader
        self._offer = offer
        self._held: dict[str, _Held] = {}

    def early(self) -> list[Hold]:
        """What is held."""
        return [
            Hold(d.agent, d.session, d.record.offset, d.reply)
            for held in list(self._held.values())  # copied at once: this is asked from another thread
            for d in list(held.inputs.values())
        ]

    async def judge(self, delivery: Delivery) -> None:
        """Offer it, hold it, take it off the queue, or hand it back where what is seen of its session is too old."""
        held = self._held.get(delivery.session)
        if held is not None and delivery.record.offset in held.inputs:
            held.add(delivery)  # delivered once more: its newer reply subject counts
            return
        route = self._core.route(delivery.session)
        tail = await self._tail(route, delivery.record.offset)
        verdict = self._verdict(delivery, tail)
        if verdict == "early":
            self._hold(delivery, route)
        else:
            await self._act(verdict, delivery, tail)

    async def _tail(self, route: Route, seen: int) -> Tail:
        tail = await self._reader.tail(route)
        if tail.offset < seen:
            # The server that answered lags behind, or the session was deleted since: the leader knows.
            tail = await self._reader.tail(route, leader=True)
        return tail

    def _verdict(self, delivery: Delivery, tail: Tail) -> Literal["ready", "early", "settled", "unseen"]:
        offset = delivery.record.offset
        if tail.offset < offset:
            return "unseen"
        if offset not in tail.pending:
            return "settled"
        if not tail.pending.ready(offset):
            return "early"
        # A delivery that lay unread while this process was stopped is stale: the input has gone to another since. Its
        # owner's fresh records tell. A dead owner's cannot be: its lease outlived it by two thirds.
        written = tail.pending.running and tail.kind is not None and not tail.kind.input
        if written and self._core.now() - tail.time < delivery.lease_ttl / 3:
            return "early"
        return "ready"

    async def _act(self, verdict: str, delivery: Delivery, tail: Tail) -> None:
        if verdict == "ready":
            await self._offer(delivery, tail)
        elif verdict == "unseen":
            # A leader that was stopped, and was replaced meanwhile, still answers for a moment when it wakes. If the
            # session was deleted instead, there is nothing that could be delivered again.
            await self._core.queue.publish(delivery.reply, NACK_LATER)
        else:
            await self._core.queue.publish(delivery.reply, b"+ACK")

    def _hold(self, delivery: Delivery, route: Route) -> None:
        held = self._held.get(delivery.session)
        if held is None:
            held = self._held[delivery.session] = _Held()
            self._core.background.start_soon(self._watch, delivery.session, route, held)
        held.add(delivery)

    async def _watch(self, session: str, route: Route, held: _Held) -> None:
        link = self._core.reads

        async def on_live(_msg: Msg) -> None:
            held.look.set()

        subscription = await link.subscribe(f"{route.live}.out.turn", on_live)
        try:
            while held.inputs:
                held.look = anyio.Event()
                try:
                    await self._review(route, held)
                    await self._beat(held)
                except (NotConnected, AgentrunError) as error:
                    log.debug("held turns of session %s: %s", session, error)
                if held.inputs:
                    shortest = min(d.lease_ttl for d in held.inputs.values())
                    with anyio.move_on_after(min(LOOK, shortest / 4)):
                        await held.look.wait()
        finally:
            if self._held.get(session) is held:
                del self._held[session]
            await link.unsubscribe(subscription)
            for delivery in held.inputs.values():
                await self._hand_back(delivery)

    async def _hand_back(self, delivery: Delivery) -> None:
        try:
            await self._core.queue.publish(delivery.reply, NACK)
        except NotConnected:
            log.debug("a held turn of session %s was not handed back, its lease will run out", delivery.session)

    async def _review(self, route: Route, held: _Held) -> None:
        tail = await self._tail(route, max(held.inputs))
        for offset in sorted(held.inputs):
            delivery = held.inputs[offset]
            verdict = self._verdict(delivery, tail)
            if verdict != "early":
                # Whoever gets it now has a full lease.
                await self._core.queue.publish(delivery.reply, IN_PROGRESS)
                await self._act(verdict, delivery, tail)
                held.remove(offset)

    async def _beat(self, held: _Held) -> None:
        now = time.monotonic()
        for offset, delivery in held.inputs.items():
            if now - held.beaten[offset] >= delivery.lease_ttl / 3:
                held.beaten[offset] = now
                await self._core.queue.publish(delivery.reply, IN_PROGRESS)
