"""Checks of what disappears and what stays: L6, trimming, restarts."""

from __future__ import annotations

from agentrun.broker import Broker, Kind, Pending
from agentrun.errors import Conflict
from agentrun.testing.contract_base import Check, Environment, Settings, check, expect
from agentrun.testing.contract_players import (
    PATIENCE,
    Owner,
    connections,
    everything,
    gather_through,
    kept,
    must_not_take,
    must_take,
    offsets,
    own,
    send,
    until,
)

CHECKS: list[Check] = []


async def _deltas_gone(broker: Broker, session: str) -> None:
    async def gone() -> bool:
        return all(r.kind is not Kind.DELTA for r in await everything(broker, session))

    within = PATIENCE + broker.capabilities.delta_ttl
    expect(await until(gone, within=within), "deltas must disappear after their time to live")


@check(CHECKS, "L6", Settings(delta_ttl=1.0))
async def expired_deltas_are_a_jump(env: Environment) -> None:
    """Deltas stay their time and then disappear; what is left keeps its offset, for readers and followers."""
    async with connections(env, 2) as (one, two):
        tail = await send(one, "s")
        owner = await own(one, "s", tail.offset)
        await owner.deltas(3)
        await owner.append(b"tool")
        await owner.deltas(2)
        await owner.finish()
        expect(offsets(await everything(two, "s")) == list(range(1, 10)), "deltas must stay for their time to live")
        await _deltas_gone(two, "s")
        left = [1, 2, 6, 9]
        for deltas in (True, False):
            found = offsets(await everything(two, "s", deltas=deltas))
            expect(found == left, f"what has not expired keeps its offset: {left}, not {found}")
        for after in (0, 4, 8):
            async with two.log.follow("s", after=after) as records:
                found = offsets(await gather_through(records, 9))
            wanted = [o for o in left if o > after]
            expect(found == wanted, f"a follow after {after} must give {wanted}: {found}")
        tail = await send(one, "s")
        expect(tail.offset == 10, f"a session that ends in a record that stays loses no offset: {tail}")


@check(CHECKS, "L6", Settings(delta_ttl=1.0, lease_ttl=2.0))
async def offsets_are_never_given_out_twice(env: Environment) -> None:
    """Where a session's last deltas expired, its end says so, old ends are refused, and offsets go on above them."""
    async with connections(env, 2) as (one, two), two.log.follow("s") as records:
        await send(one, "s")
        lease = await must_take(one, "s", 1)
        async with kept(lease, 2.0):
            owner = await Owner(one, lease).start()
            before = owner.tail
            behind = await owner.deltas(5)
            seen = await gather_through(records, behind.offset)
            await _deltas_gone(two, "s")
            end = await two.log.last("s")
            expect(end.offset == 2 and end.lost >= 5, f"five offsets may have been given out behind 2: {end}")
            for old in (before, behind):
                try:
                    await two.log.append("s", b"x", kind=Kind.CANCEL, after=old, pending=old.pending)
                except Conflict:
                    pass
                else:
                    expect(False, f"an append after {old.offset} must be refused: deltas came and expired since")
            tail = await send(two, "s", b"stop", kind=Kind.CANCEL)
            expect(tail.offset > behind.offset, f"offsets up to {behind.offset} were given out: {tail}")
            await owner.finish()
            expect(owner.tail.offset == tail.offset + 1, f"from there on offsets are dense again: {owner.tail}")
            seen += await gather_through(records, owner.tail.offset)
    wanted = [*range(1, 8), tail.offset, tail.offset + 1]
    expect(offsets(seen) == wanted, f"a follower must see the jump and nothing else: {offsets(seen)}")


@check(CHECKS, "L5")
async def trimmed_beginning_is_a_jump(env: Environment) -> None:
    """Records removed at the beginning show as a jump; the rest keeps its offsets."""
    async with connections(env, 1) as (broker,):
        for _ in range(10):
            await send(broker, "s", kind=Kind.CANCEL)
        await env.trim("s", 4)
        for after in (0, 2, 4):
            found = offsets(await broker.log.read("s", after=after))
            expect(found == list(range(5, 11)), f"what is left keeps its offsets: {found}")
            async with broker.log.follow("s", after=after) as records:
                found = offsets(await gather_through(records, 10))
            expect(found == list(range(5, 11)), f"a follow after {after} must give what is left: {found}")
        expect((await send(broker, "s", kind=Kind.CANCEL)).offset == 11, "trimming must not move the end")


@check(CHECKS, "L1")
async def restart_keeps_what_is_durable(env: Environment) -> None:
    """A durable broker has every record and every queued input after a restart; another one starts empty."""
    async with connections(env, 1) as (broker,):
        for _ in range(2):
            await send(broker, "s")
        owner = await own(broker, "s", 1)
        await owner.finish()
        await send(broker, "t", dedupe="key")
        stored = await everything(broker, "s")
    await env.restart()
    async with connections(env, 1) as (broker,):
        if not broker.capabilities.durable:
            expect(await everything(broker, "s") == [], "a broker that is not durable must start empty")
            expect((await broker.log.last("s")).pending == Pending(), "nothing is pending in an empty broker")
            await must_not_take(broker, "the broker is not durable and was restarted")
            return
        expect(await everything(broker, "s") == stored, "a durable broker must have every record after a restart")
        leases = [await must_take_any(broker) for _ in range(2)]
        expect(sorted(leases) == [("s", 2), ("t", 1)], f"what was queued must be leased after a restart: {leases}")


async def must_take_any(broker: Broker) -> tuple[str, int]:
    """Lease any input, run it and say which it was."""
    lease = await broker.turns.lease("agent", wait=PATIENCE)
    expect(lease, "an input must be leased, nothing came")
    assert lease
    owner = await Owner(broker, lease).start()
    await owner.finish()
    return lease.session, lease.record.offset
