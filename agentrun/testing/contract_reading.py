"""Checks of reading: L5."""

from __future__ import annotations

import random

import anyio

from agentrun.broker import Broker, Kind, Record, Tail
from agentrun.errors import SessionGone
from agentrun.testing.contract_base import Check, Environment, Settings, check, expect
from agentrun.testing.contract_players import (
    QUIET,
    connections,
    everything,
    gather_through,
    must_not_take,
    offsets,
    own,
    send,
    until,
)

CHECKS: list[Check] = []


async def _mixed(broker: Broker, session: str) -> tuple[list[int], list[int]]:
    """A turn with many tokens, stops among them; gives the offsets of all and of those that are no deltas."""
    tail = await send(broker, session)
    owner = await own(broker, session, tail.offset)
    for _ in range(4):
        await owner.deltas(8)
        await send(broker, session, b"stop", kind=Kind.CANCEL)
    await owner.finish()
    records = await everything(broker, session)
    return offsets(records), offsets([r for r in records if r.kind is not Kind.DELTA])


@check(CHECKS, "L5")
async def read_pages(env: Environment) -> None:
    """`read` gives up to ``limit`` records above ``after``, in order; fewer than ``limit`` means that is all."""
    async with connections(env, 1) as (broker,):
        expect(list(await broker.log.read("s")) == [], "an empty session reads as nothing")
        for _ in range(25):
            await send(broker, "s", kind=Kind.CANCEL)
        pages: list[list[int]] = []
        after = 0
        while not pages or len(pages[-1]) == 10:
            pages.append(offsets(await broker.log.read("s", after=after, limit=10)))
            after = pages[-1][-1]
        expect(pages == [list(range(1, 11)), list(range(11, 21)), list(range(21, 26))], f"pages of ten: {pages}")
        expect(list(await broker.log.read("s", after=25)) == [], "after the end there is nothing")
        expect(list(await broker.log.read("s", after=99)) == [], "beyond the end there is nothing")


@check(CHECKS, "L5")
async def deltas_can_be_left_out(env: Environment) -> None:
    """Reading and following with ``deltas=False`` leaves out DELTA records and only those; stops are kept."""
    async with connections(env, 2) as (one, two):
        all_offsets, kept = await _mixed(one, "s")
        expect(all_offsets == list(range(1, 40)), f"what was written must be read: {all_offsets}")
        found = offsets(await everything(two, "s", deltas=False))
        expect(found == kept, f"without deltas these must be read: {kept}, not {found}")
        first = offsets(await two.log.read("s", deltas=False, limit=3))
        expect(first == kept[:3], f"``limit`` counts what is given: {first}")
        async with two.log.follow("s", deltas=False) as records:
            history = await gather_through(records, kept[-1])
            tail = await send(one, "s")
            owner = await own(one, "s", tail.offset)
            await owner.deltas(5)
            await send(one, "s", b"stop", kind=Kind.CANCEL)
            await owner.finish()
            live = await gather_through(records, owner.tail.offset)
        expect(offsets(history) == kept, f"a follow without deltas must give {kept}: {offsets(history)}")
        kinds = [r.kind for r in live]
        expect(kinds == [Kind.TURN, Kind.EVENT, Kind.CANCEL, Kind.EVENT], f"live, without deltas: {kinds}")


@check(CHECKS, "L5")
async def follow_joins_history_and_live(env: Environment) -> None:
    """A follow gives what is stored and then what comes, also on another connection, equal to what `read` gives."""
    async with connections(env, 2) as (one, two):
        for number in range(5):
            await send(one, "s", b"%d" % number, kind=Kind.CANCEL)
        await send(one, "other", kind=Kind.CANCEL)
        async with two.log.follow("s") as records:
            found = await gather_through(records, 5)
            for number in range(5, 10):
                await send(one, "s", b"%d" % number, kind=Kind.CANCEL)
                await send(one, "other", kind=Kind.CANCEL)
                found += await gather_through(records, number + 1)
        expect(found == await everything(one, "s"), "what a follow gives must be what a later reader reads")


@check(CHECKS, "L5")
async def follow_from_an_offset(env: Environment) -> None:
    """A follow begins behind ``after``, with or without its cursor; beyond the end it waits for that offset."""
    async with connections(env, 2) as (one, two):
        tails = [await send(one, "s", kind=Kind.CANCEL) for _ in range(20)]
        for after in (0, 1, 7, 19, 20):
            for cursor in {0, tails[after - 1].cursor if after else 0}:
                async with two.log.follow("s", after=after, cursor=cursor) as records:
                    tails.append(await send(one, "s", kind=Kind.CANCEL))
                    found = offsets(await gather_through(records, tails[-1].offset))
                expect(
                    found == list(range(after + 1, tails[-1].offset + 1)),
                    f"a follow after {after} (cursor {cursor}) must give all behind it: {found}",
                )
        beyond = tails[-1].offset + 3
        async with two.log.follow("s", after=beyond) as records:
            for _ in range(4):
                await send(one, "s", kind=Kind.CANCEL)
            found = offsets(await gather_through(records, beyond + 1))
        expect(found == [beyond + 1], f"a follow after {beyond} must begin at {beyond + 1}: {found}")


@check(CHECKS, "L5")
async def many_readers_join_while_it_is_written(env: Environment) -> None:
    """Readers that join a fast writer at any moment and any offset get all behind it: no loss, no duplicate."""
    count, readers = 300, 200
    chance = random.Random(7)  # noqa: S311 - a fixed choice, nothing secret
    last = count + 2
    async with connections(env, 3) as brokers:
        await send(brokers[0], "s")
        owner = await own(brokers[0], "s", 1)

        async def read(broker: Broker, at: int, after: int) -> None:
            async with brokers[0].log.follow("s", after=at - 1) as records:
                await anext(records)  # the writer has come to where this reader joins
            async with broker.log.follow("s", after=after) as records:
                found = offsets(await gather_through(records, last))
            wanted = list(range(after + 1, last + 1))
            expect(found == wanted, f"a reader after {after} that joined at {at} must get all: {_first(found, wanted)}")

        async with anyio.create_task_group() as tasks:
            for number in range(readers):
                at = chance.randint(1, count)
                tasks.start_soon(read, brokers[number % 3], at, chance.randint(0, at))
            for number in range(count):
                await owner.append(b"%d" % number, kind=Kind.DELTA)
                if number % 10 == 0:
                    await anyio.sleep(0.002)


def _first(found: list[int], wanted: list[int]) -> str:
    for number, (one, two) in enumerate(zip(found, wanted, strict=False)):
        if one != two:
            return f"…{found[max(0, number - 3) : number + 3]}… instead of …{wanted[max(0, number - 3) : number + 3]}…"
    return f"{len(found)} records instead of {len(wanted)}"


@check(CHECKS, "L5")
async def stops_are_remembered(env: Environment) -> None:
    """A stop is read by whoever comes later, in its place in the order."""
    async with connections(env, 1) as (one,):
        await send(one, "s")
        owner = await own(one, "s", 1)
        await owner.deltas(3)
        await send(one, "s", b"stop", kind=Kind.CANCEL)
        await owner.deltas(3)
    async with connections(env, 1) as (late,):
        for deltas in (True, False):
            found = await late.log.read("s", after=2, deltas=deltas)
            stops = [(r.offset, r.body) for r in found if r.kind is Kind.CANCEL]
            expect(stops == [(6, b"stop")], f"the stop must be at offset 6 (deltas={deltas}): {stops}")


@check(CHECKS, "L5", Settings(faults=True))
async def follow_survives_a_broken_connection(env: Environment) -> None:
    """A follow whose connection breaks goes on, and gives what was stored meanwhile once and in order."""
    async with connections(env, 2) as (one, two), two.log.follow("s") as records:
        await send(one, "s", kind=Kind.CANCEL)
        found = await gather_through(records, 1)
        for _ in range(2):
            await env.cut(two)
            tails = [await send(one, "s", kind=Kind.CANCEL) for _ in range(5)]
            found += await gather_through(records, tails[-1].offset)
        expect(offsets(found) == list(range(1, 12)), f"each record once, in order: {offsets(found)}")


async def _true(condition: bool) -> bool:
    return condition


@check(CHECKS, "L5")
async def deleted_session_ends_its_followers(env: Environment) -> None:
    """After a deletion nothing is read or leased, offsets start at 1 again, and who followed gets SessionGone."""
    async with connections(env, 2) as (one, two):
        for _ in range(3):
            await send(one, "s")
        await send(one, "kept")
        gone: list[bool] = []
        seen: list[Record] = []

        async def follow() -> None:
            async with two.log.follow("s") as records:
                try:
                    async for some in records:
                        seen.extend(some)
                except SessionGone:
                    gone.append(True)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow)
            await until(lambda: _true(len(seen) == 3))
            await one.log.delete("s")
            expect(list(await one.log.read("s")) == [], "a deleted session reads as nothing")
            expect((await one.log.last("s")).next == 1, "a deleted session ends at 0")
            fresh = await one.log.append("s", b"new", kind=Kind.CANCEL, after=Tail(), pending=Tail().pending)
            expect(fresh.offset == 1, f"a session begins at 1 again after its deletion: {fresh}")
            await until(lambda: _true(bool(gone)))
            tasks.cancel_scope.cancel()
        expect(gone, "who follows a session that is deleted must get SessionGone, at the latest at its next record")
        expect(offsets(seen) == [1, 2, 3], f"a follower must not mix the old session with the new: {offsets(seen)}")
        kept = await own(two, "kept", 1)
        await kept.finish()
        await must_not_take(two, "the inputs of a deleted session are gone", within=QUIET)
