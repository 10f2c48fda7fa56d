"""Checks of the order within sessions: Q2, parking and waking, and a fleet at work."""

from __future__ import annotations

import random

import anyio

from agentrun.broker import Broker, Kind, Lease
from agentrun.errors import Fenced
from agentrun.testing.contract_base import Check, Environment, Settings, check, expect
from agentrun.testing.contract_players import (
    AGENT,
    PATIENCE,
    PROMPT,
    Owner,
    connections,
    everything,
    kept,
    must_not_take,
    must_take,
    own,
    send,
)

CHECKS: list[Check] = []


@check(CHECKS, "Q2", Settings(lease_ttl=3.0))
async def turns_run_one_at_a_time_in_order(env: Environment) -> None:
    """The turns of a session are leased one at a time, in the order they were sent."""
    async with connections(env, 2) as (one, two):
        waiting = [(await send(one, "s")).offset for _ in range(3)]
        for offset, broker in zip(waiting, (one, two, one), strict=True):
            owner = await own(broker, "s", offset)
            await must_not_take(two, f"input {offset} is being run")
            await owner.finish()


@check(CHECKS, "Q2", Settings(lease_ttl=3.0))
async def nacked_turn_is_not_overtaken(env: Environment) -> None:
    """A turn that is handed back, at once or for a time, comes again before those sent after it."""
    async with connections(env, 2) as (one, two):
        for _ in range(2):
            await send(one, "s")
        await (await must_take(one, "s", 1)).nack()
        await (await must_take(two, "s", 1)).nack(delay=0.6)
        await must_not_take(two, "the head was handed back for a time")
        owner = await own(one, "s", 1)
        await owner.append(b"released", change=lambda p: p.release())
        await owner.lease.nack()
        await (await own(two, "s", 1)).finish()
        await (await own(one, "s", 2)).finish()


@check(CHECKS, "Q2")
async def settled_input_is_never_leased(env: Environment) -> None:
    """An input that is settled in the log is not leased: neither one consumed by another turn nor one never acked."""
    async with connections(env, 2) as (one, two):
        for _ in range(3):
            await send(one, "s")
        owner = await own(one, "s", 1)
        await owner.settle(2)
        # Neither 1 nor 2 is acked: who settled them died just then.
        last = await own(two, "s", 3, within=PROMPT)
        await last.finish()
        await must_not_take(two, "all are settled", within=one.capabilities.lease_ttl * 1.3)


@check(CHECKS, "Q2")
async def order_holds_when_owners_die(env: Environment) -> None:
    """Turns whose owners die are leased again before those sent after them, as long as they are not settled."""
    async with connections(env, 2) as (one, two):
        for _ in range(2):
            await send(one, "s")
        dead = await own(one, "s", 1)
        await dead.deltas(2)
        await (await own(two, "s", 1)).finish()
        await (await own(two, "s", 2)).finish()


@check(CHECKS, "Q2")
async def parked_head_waits_for_its_waker(env: Environment) -> None:
    """A parked head holds back what was sent after it; its waker is leased promptly and carries the turn on."""
    async with connections(env, 2) as (one, two):
        await send(one, "s")
        owner = await own(one, "s", 1)
        await send(one, "s", b"second")
        await owner.park()
        await must_not_take(two, "the head is parked", within=one.capabilities.lease_ttl * 1.5)
        waker = (await send(two, "s", b"answer", wakes=True)).offset
        lease = await must_take(one, "s", waker, within=PROMPT)
        owner = await Owner(one, lease).start()
        expect(str(owner.tail.pending) == f"{waker}a,3", f"the waker takes the head's place: {owner.tail.pending}")
        async with kept(lease, one.capabilities.lease_ttl):
            await must_not_take(two, "the waker carries the turn")
        await owner.finish()
        await (await own(two, "s", 3, within=PROMPT)).finish()
        await must_not_take(two, "all are settled")


@check(CHECKS, "Q2")
async def waker_is_given_out_again(env: Environment) -> None:
    """A waker whose owner dies, before or after it claimed the session, is leased again."""
    async with connections(env, 2) as (one, two):
        await send(one, "s")
        owner = await own(one, "s", 1)
        await owner.park()
        await send(one, "s", wakes=True)
        offset = (await one.log.last("s")).offset
        await must_take(one, "s", offset)
        await own(two, "s", offset)
        await (await own(one, "s", offset)).finish()
        await must_not_take(two, "all are settled")


@check(CHECKS, "Q2", Settings(lease_ttl=3.0))
async def parked_head_comes_back_at_its_deadline(env: Environment) -> None:
    """A parked head that was handed back with a delay is leased again when it has passed."""
    async with connections(env, 2) as (one, two):
        await send(one, "s")
        owner = await own(one, "s", 1)
        await send(one, "s")
        await owner.append(b"suspended", change=lambda p: p.park())
        await owner.lease.nack(delay=0.6)
        await must_not_take(two, "the head is parked and its deadline is not over")
        await (await own(two, "s", 1, within=0.6 + PROMPT)).finish()
        await (await own(one, "s", 3, within=PROMPT)).finish()


@check(CHECKS, "Q2", Settings(lease_ttl=3.0))
async def inputs_of_several_agents_keep_their_order(env: Environment) -> None:
    """A session whose turns go to different agents runs them in the order sent."""
    async with connections(env, 2, AGENT, "other") as (one, two):
        await send(one, "s", agent="other")
        await send(one, "s")
        await must_not_take(two, "the session's first turn is another agent's")
        lease = await must_take(one, "s", 1, agent="other")
        await (await Owner(one, lease).start()).finish()
        await (await own(two, "s", 2, within=PROMPT)).finish()


class _Fleet:
    """Loops that lease, work and sometimes die, and a note of what must not be."""

    def __init__(self, brokers: list[Broker], wanted: int) -> None:
        self.ttl = brokers[0].capabilities.lease_ttl
        self.left = wanted
        self.live: dict[str, tuple[Lease, float]] = {}
        self.overlaps: list[str] = []
        self.done: dict[str, list[int]] = {}
        self.chance = random.Random(3)  # noqa: S311 - a fixed choice, nothing secret
        self.brokers = brokers

    async def loop(self, broker: Broker) -> None:
        while self.left > 0:
            if lease := await broker.turns.lease(AGENT, wait=0.3):
                await self.work(broker, lease)

    async def work(self, broker: Broker, lease: Lease) -> None:
        session, now = lease.session, anyio.current_time()
        if session in self.live:
            other, since = self.live[session]
            # A terminal record may be seen here before its worker hears that it is stored.
            if other.record.offset in lease.tail.pending and now - since < self.ttl * 0.9:
                self.overlaps.append(f"{lease.record.offset} beside {other.record.offset} of {session}")
        self.live[session] = (lease, now)
        try:
            owner = await Owner(broker, lease).start()
            await owner.deltas(2)
            await anyio.sleep(0.01)
            if self.chance.random() < 0.05:
                return  # died: never settled
            lease.extend()
            self.live[session] = (lease, anyio.current_time())
            await owner.settle()
        except Fenced:
            return
        if (held := self.live.get(session)) is not None and held[0] is lease:
            # Where it is not, a later turn of the session has come and gone before this one's end was heard of here.
            del self.live[session]
        self.done.setdefault(session, []).append(lease.record.offset)
        self.left -= 1
        await lease.ack()


@check(CHECKS, "Q2", Settings(lease_ttl=2.0))
async def fleet_keeps_order_without_overlap(env: Environment) -> None:
    """40 sessions of 4 turns, 12 loops on 3 connections of which 5 % die: no overlap, in order, each settled once."""
    sessions, turns = 40, 4
    async with connections(env, 3) as brokers:
        fleet = _Fleet(brokers, sessions * turns)

        async def client(session: str) -> None:
            for number in range(turns):
                await send(brokers[number % 3], session, b"%d" % number)

        with anyio.move_on_after(2 * PATIENCE):
            async with anyio.create_task_group() as tasks:
                for number in range(12):
                    tasks.start_soon(fleet.loop, brokers[number % 3])
                for number in range(sessions):
                    tasks.start_soon(client, f"s{number}")
        expect(fleet.left == 0, f"all turns must be settled, {fleet.left} are not")
        expect(not fleet.overlaps, f"a session must have one live lease at most: {fleet.overlaps}")
        for session, done in fleet.done.items():
            records = await everything(brokers[0], session)
            sent = [r.offset for r in records if r.kind is Kind.TURN]
            ends = [int(r.body.split()[1]) for r in records if r.body.startswith(b"done")]
            expect(ends == sent, f"the turns {sent} of {session} must end in this order, once: {ends}")
            # In whatever order their workers heard of it.
            expect(sorted(done) == sent, f"of the turns {sent} of {session} each must be settled by one: {done}")
