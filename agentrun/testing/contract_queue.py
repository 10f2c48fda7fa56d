"""Checks of the queue's leases: Q1 and Q3 to Q9, and what an operator does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import anyio

from agentrun.broker import Broker, BrokerAdmin, Hold, Kind
from agentrun.errors import Fenced, Misconfigured
from agentrun.testing.contract_base import Check, Environment, Settings, check, expect
from agentrun.testing.contract_players import (
    AGENT,
    PATIENCE,
    PROMPT,
    QUIET,
    Owner,
    connections,
    everything,
    kept,
    must_not_take,
    must_take,
    own,
    send,
    take,
)

CHECKS: list[Check] = []


@check(CHECKS, "Q1")
async def input_is_shown_and_queued(env: Environment) -> None:
    """One append shows a turn to readers and queues it, for its agent and no other, as it was stored."""
    async with connections(env, 2, AGENT, "other") as (one, two):
        await send(one, "s", b"for agent")
        await send(one, "t", b"for other", agent="other")
        await send(one, "u", b"stop", kind=Kind.CANCEL)
        for agent, session in ((AGENT, "s"), ("other", "t")):
            lease = await must_take(two, session, 1, agent=agent)
            shown = await everything(two, session)
            expect([lease.record] == shown, f"the lease must carry the record that is shown: {lease.record}, {shown}")
            await (await Owner(two, lease).start()).finish()
            await must_not_take(two, f"agent {agent} has no other input", agent=agent)


@check(CHECKS, "Q1")
async def inputs_wait_for_their_queue(env: Environment) -> None:
    """An input that was sent before any worker opened its agent's queue is leased later."""
    async with env.open() as broker:
        await send(broker, "s", agent="late")
        await broker.turns.open("late")
        await must_take(broker, "s", 1, agent="late")


@check(CHECKS, "Q3")
async def busy_session_delays_no_other(env: Environment) -> None:
    """A session that is busy, with many inputs waiting, delays no other session."""
    async with connections(env, 2) as (one, two):
        for _ in range(30):
            await send(one, "busy")
        lease = await must_take(one, "busy", 1)
        async with kept(lease, one.capabilities.lease_ttl):
            await Owner(one, lease).start()
            for number in range(10):
                await send(one, f"s{number}")
            start = anyio.current_time()
            found = [await take(two) for _ in range(10)]
            took = anyio.current_time() - start
        sessions = sorted(lease.session for lease in found if lease)
        expect(sessions == sorted(f"s{n}" for n in range(10)), f"ten other sessions must be leased: {sessions}")
        expect(took < 2 * PROMPT, f"a busy session must not delay others, they took {took:.1f} s")


@check(CHECKS, "Q4")
async def lease_runs_out(env: Environment) -> None:
    """A lease that is not extended is given out again, to anyone, when its time is over and not before."""
    async with connections(env, 2) as (one, two):
        ttl = one.capabilities.lease_ttl
        await send(one, "s")
        await must_take(one, "s", 1)
        start = anyio.current_time()
        again = await own(two, "s", 1, within=ttl + PATIENCE)
        took = anyio.current_time() - start
        expect(0.8 * ttl < took < 3 * ttl + PROMPT, f"a lease of {ttl} s was given out again after {took:.2f} s")
        await again.finish()


@check(CHECKS, "Q4")
async def agents_have_their_own_lease_time(env: Environment) -> None:
    """`open` returns the lease time in force, an agent may have its own, and another one is refused."""
    async with connections(env, 2) as (one, two):
        ttl = one.capabilities.lease_ttl
        expect(await one.turns.open(AGENT) == ttl, "`open` must return the broker's lease time")
        expect(await one.turns.open("slow", lease_ttl=ttl * 3) == ttl * 3, "`open` must return the agent's lease time")
        expect(await two.turns.open("slow") == ttl * 3, "`open` must return what is in force")
        expect(await two.turns.open("slow", lease_ttl=ttl * 3) == ttl * 3, "the same lease time is no error")
        for agent, other in (("slow", ttl * 2), (AGENT, ttl * 2)):
            try:
                await two.turns.open(agent, lease_ttl=other)
            except Misconfigured:
                pass
            else:
                expect(False, f"the queue of {agent} has another lease time than {other}: Misconfigured")
        await send(one, "s", agent="slow")
        await must_take(one, "s", 1, agent="slow")
        await must_not_take(two, "the agent's lease time is three times as long", within=ttl * 1.5, agent="slow")


@check(CHECKS, "Q5")
async def extended_lease_is_given_out_once(env: Environment) -> None:
    """A turn that takes more than five lease times, extended from another thread, is given out once."""
    async with connections(env, 2) as (one, two):
        ttl = one.capabilities.lease_ttl
        await send(one, "s")
        lease = await must_take(one, "s", 1)
        async with kept(lease, ttl):
            owner = await Owner(one, lease).start()
            await must_not_take(two, "the lease is extended", within=ttl * 5.3)
            await owner.finish()
        await must_not_take(two, "the turn is settled")


@check(CHECKS, "Q6")
async def ack_is_for_ever(env: Environment) -> None:
    """An input that was acked is not leased again, also while it is pending (a parked head)."""
    async with connections(env, 2) as (one, two):
        await send(one, "s")
        await send(one, "t")
        for session in ("s", "t"):
            lease = await take(one)
            assert lease
            owner = await Owner(one, lease).start()
            await (owner.park() if session == "s" else owner.finish())
        await must_not_take(two, "both inputs were acked", within=one.capabilities.lease_ttl * 1.3)


@check(CHECKS, "Q6")
async def nack_waits_for_its_delay(env: Environment) -> None:
    """An input handed back with a delay comes back when it has passed and not before; without one, at once."""
    delay = 0.7
    async with connections(env, 2) as (one, two):
        await send(one, "s")
        lease = await must_take(one, "s", 1)
        start = anyio.current_time()
        await lease.nack(delay=delay)
        lease = await must_take(two, "s", 1)
        took = anyio.current_time() - start
        expect(took > delay * 0.95, f"handed back for {delay} s, leased again after {took:.2f} s")
        start = anyio.current_time()
        await lease.nack()
        await must_take(one, "s", 1)
        took = anyio.current_time() - start
        expect(took < PROMPT, f"handed back without a delay, leased again after {took:.2f} s only")


@check(CHECKS, "Q7")
async def lease_waits_no_longer_than_asked(env: Environment) -> None:
    """`lease` on an empty queue returns None within its time, and takes nothing that came too late."""
    async with connections(env, 1) as (broker,):
        for wait in (0.0, 0.3):
            start = anyio.current_time()
            lease = await broker.turns.lease(AGENT, wait=wait)
            took = anyio.current_time() - start
            expect(lease is None and took < wait + PROMPT, f"lease(wait={wait}) gave {lease} after {took:.2f} s")
        await send(broker, "s")
        await must_take(broker, "s", 1, within=PROMPT)


@check(CHECKS, "Q7", Settings(lease_ttl=3.0))
async def each_lease_gives_one_input(env: Environment) -> None:
    """Leases asked for at once, on one connection and several, each give another input."""
    found: list[tuple[str, int]] = []

    async def lease_one(broker: Broker) -> None:
        if lease := await take(broker):
            found.append((lease.session, lease.record.offset))

    async with connections(env, 2) as brokers:
        async with anyio.create_task_group() as tasks:
            for broker in brokers * 6:
                tasks.start_soon(lease_one, broker)
            for number in range(12):
                await send(brokers[0], f"s{number}")
        wanted = sorted((f"s{n}", 1) for n in range(12))
        expect(sorted(found) == wanted, f"twelve leases must give twelve inputs: {sorted(found)}")


@check(CHECKS, "Q8", Settings(lease_ttl=3.0))
async def waiting_lease_wakes_up(env: Environment) -> None:
    """A lease that waits is given an input promptly when one is sent, and when the one before it settles."""
    async with connections(env, 3) as (one, two, three):
        for number in range(3):
            session = f"s{number}"
            await _prompt(two, session, 1, partial(send, three, session))
        for _ in range(3):
            await send(one, "queue")
        owner = await own(one, "queue", 1)
        await _prompt(two, "queue", 2, owner.finish)


async def _prompt(broker: Broker, session: str, offset: int, act: Callable[[], Awaitable[object]]) -> None:
    """Check that a lease that waits already is given this input promptly once ``act`` was called."""
    acted = float("inf")

    async def wait() -> None:
        lease = await must_take(broker, session, offset)
        took = anyio.current_time() - acted
        expect(took < PROMPT, f"input {offset} of {session} became ready and was leased {took:.2f} s later")
        await (await Owner(broker, lease).start()).finish()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.sleep(0.15)
        acted = anyio.current_time()
        await act()


@check(CHECKS, "Q9", Settings(lease_ttl=30.0))
async def dead_holder_s_input_is_handed_back(env: Environment) -> None:
    """What a connection holds, leased or early, is given out again at once when another one hands it back."""
    async with connections(env, 1) as (dead,):
        for _ in range(2):
            await send(dead, "s")
        lease = await must_take(dead, "s", 1)
        zombie = await Owner(dead, lease).start()
        with anyio.move_on_after(QUIET):
            await dead.turns.lease(AGENT, wait=QUIET)  # the second one may be given to it, to be kept
        early = list(dead.turns.early())
        expect({(h.session, h.offset) for h in early} <= {("s", 2)}, f"only the second input may be kept: {early}")
        async with connections(env, 1) as (peer,):
            end = await peer.log.last("s")
            await peer.log.append("s", b"lost", kind=Kind.EVENT, after=end, pending=end.pending.release())
            for hold in (Hold(AGENT, "s", 1, lease.token), *early):
                await peer.turns.hand_back(hold)
            owner = await own(peer, "s", 1)
            try:
                await zombie.append(b"late")
            except Fenced:
                pass
            else:
                expect(False, "who was handed over is fenced off")
            await owner.finish()
            await (await own(peer, "s", 2)).finish()


@check(CHECKS, "Q10", Settings(lease_ttl=30.0))
async def given_out_names_what_the_dead_hold(env: Environment) -> None:
    """What a connection was given is named to another one, which can hand it back; what is settled is not."""
    names = [f"s{number}" for number in range(5)]
    async with connections(env, 2) as (dead, peer):
        for name in names:
            await send(dead, name)
        first = await take(dead)
        assert first
        await (await Owner(dead, first).start()).finish()
        lease = await take(dead)
        assert lease
        await Owner(dead, lease).start()
        given = {(hold.session, hold.offset): hold for hold in await peer.turns.given_out(AGENT)}
        wanted = (lease.session, lease.record.offset)
        expect(wanted in given, f"{wanted} was given out, and named are only {list(given)}")
        pending = [
            hold.session for hold in given.values() if hold.offset in (await peer.log.last(hold.session)).pending
        ]
        expect(first.session not in pending, f"{first.session} is settled")
        end = await peer.log.last(lease.session)
        await peer.log.append(lease.session, b"lost", kind=Kind.EVENT, after=end, pending=end.pending.release())
        await peer.turns.hand_back(given[wanted])
        for _ in range(len(names) - 1):
            again = await take(peer)
            assert again, f"after {wanted} was handed back, all but {first.session} are to be leased"
            await (await Owner(peer, again).start()).finish()
        expect(not (await peer.log.last(lease.session)).pending, f"{wanted} was handed back, and not leased")


@check(CHECKS, "Q9")
async def settled_input_is_not_handed_back(env: Environment) -> None:
    """Handing back what was settled since changes nothing."""
    async with connections(env, 2) as (one, two):
        await send(one, "s")
        lease = await must_take(one, "s", 1)
        await (await Owner(one, lease).start()).finish()
        await two.turns.hand_back(Hold(AGENT, "s", 1, lease.token))
        await must_not_take(two, "the turn is settled")


@check(CHECKS, "Q1", Settings(lease_ttl=3.0))
async def operator_sees_queues(env: Environment) -> None:
    """`setup` is idempotent, and `stats` counts what waits and what is leased."""
    async with connections(env, 1) as (broker,):
        if not isinstance(broker, BrokerAdmin):
            raise TypeError("a broker must implement BrokerAdmin: setup(), stats() and sessions()")
        await broker.setup()
        expect(await broker.setup(dry_run=True) == [], "after setup() there is nothing left to set up")
        for number in range(3):
            await send(broker, f"s{number}")
        lease = await take(broker)
        assert lease
        await Owner(broker, lease).start()
        await anyio.sleep(QUIET)
        stats = {s.agent: s for s in await broker.stats()}
        expect(AGENT in stats, f"stats() must tell of every open queue: {stats}")
        mine = stats[AGENT]
        # A broker may count an input that was given out and handed back on either side.
        expect(mine.waiting + mine.leased == 3 and mine.leased >= 1, f"three inputs, one of them leased: {mine}")
        ttl = broker.capabilities.lease_ttl
        expect(mine.lease_ttl == ttl, f"stats() must give the lease time, {ttl} s: {mine}")


@check(CHECKS, "Q1")
async def operator_sees_sessions(env: Environment) -> None:
    """`sessions` names each session that holds an input once, whatever became of it, until it is deleted."""
    async with connections(env, 1, AGENT, "other") as (broker,):
        if not isinstance(broker, BrokerAdmin):
            raise TypeError("a broker must implement BrokerAdmin: setup(), stats() and sessions()")
        expect(await broker.sessions() == [], "nothing was sent yet, and there are sessions")
        names = [f"s{number}" for number in range(12)]
        for name in names:
            await send(broker, name)
        await send(broker, names[0], agent="other")
        await broker.log.last("nothing")
        for _ in range(len(names)):
            lease = await take(broker)
            assert lease
            owner = await Owner(broker, lease).start()
            await owner.deltas(1)
            await owner.finish()
        found = await broker.sessions()
        expect(sorted(found) == sorted(names), f"sent to {names}, and there are {found}")
        some = await broker.sessions(limit=5)
        expect(len(some) == len(set(some)) == 5 and set(some) < set(names), f"asked for 5 of {names}, got {some}")
        await broker.log.delete(names[3])
        expect(names[3] not in await broker.sessions(), f"{names[3]} was deleted, and is still there")
