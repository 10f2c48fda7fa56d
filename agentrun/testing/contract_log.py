"""Checks of appending: L1 to L4 and L7."""

from __future__ import annotations

import anyio
from msgspec import structs

from agentrun.broker import Broker, Kind, Pending, Tail
from agentrun.errors import Conflict, Duplicate, Fenced, TooLarge
from agentrun.testing.contract_base import Check, Environment, Settings, check, expect
from agentrun.testing.contract_players import (
    AGENT,
    Owner,
    connections,
    everything,
    gather_through,
    must_take,
    offsets,
    own,
    send,
    until,
)

CHECKS: list[Check] = []


def _same(one: Tail, other: Tail) -> bool:
    """Whether two ends are the same; an append's time may be an estimate."""
    return structs.replace(one, time=0.0) == structs.replace(other, time=0.0)


@check(CHECKS, "L1")
async def append_returns_the_new_end(env: Environment) -> None:
    """An append returns the session's new end, and `last` says the same from then on."""
    async with connections(env, 2) as (one, two):
        empty = await one.log.last("s")
        expect((empty.offset, empty.next, empty.pending) == (0, 1, Pending()), f"an empty session ends at 0: {empty}")
        tail = await send(one, "s")
        expect(tail.offset == 1 and tail.next == 2, f"the first record has offset 1: {tail}")
        expect(str(tail.pending) == "1" and tail.kind is Kind.TURN, f"the end must carry kind and pending: {tail}")
        for broker in (one, two):
            for fresh in (False, True):
                expect(_same(await broker.log.last("s", fresh=fresh), tail), "`last` must give what append returned")


@check(CHECKS, "L1")
async def records_come_back_as_they_were_stored(env: Environment) -> None:
    """Kind, bytes, agent, pending list, time and cursor of every kind of record come back."""
    body = bytes(range(256)) + b"\r\n\r\n"
    async with connections(env, 2) as (one, two):
        await send(one, "s", body)
        owner = await own(one, "s", 1)
        await owner.append(body, kind=Kind.DELTA)
        await send(one, "s", b"{}", kind=Kind.CANCEL)
        await owner.finish()
        records = await everything(two, "s")
        kinds = [Kind.TURN, Kind.EVENT, Kind.DELTA, Kind.CANCEL, Kind.EVENT]
        expect([r.kind for r in records] == kinds, f"kinds must come back: {records}")
        expect(records[0].body == body and records[2].body == body, "bodies must come back to the byte")
        lists = [str(r.pending) for r in records]
        expect(lists == ["1", "1a", "1a", "1a", ""], f"pending lists must come back: {lists}")
        expect([r.agent for r in records] == ["agent", None, None, None, None], "a TURN's agent must come back")
        times = [r.time for r in records]
        expect(times == sorted(times) and times[0] > 1e9, f"times are seconds since the epoch: {times}")
        tail = await two.log.last("s")
        expect((tail.cursor, tail.time) == (records[-1].cursor, times[-1]), "a Tail and its Record must agree")


@check(CHECKS, "L1")
async def now_is_the_time_that_records_are_stored_by(env: Environment) -> None:
    """Every connection knows the broker's clock."""
    async with connections(env, 2) as (one, two):
        before = one.now()
        await send(one, "s")
        (record,) = await everything(two, "s")
        after = two.now()
        expect(before - 0.5 < record.time < after + 0.5, f"stored at {record.time}, between {before} and {after}")


@check(CHECKS, "L1")
async def stale_append_is_refused(env: Environment) -> None:
    """An append after an end that is no longer the end is refused, and nothing is stored."""
    async with connections(env, 2) as (one, two):
        stale = await two.log.last("s")
        tail = await send(one, "s")
        for old in (stale, stale):
            try:
                await two.log.append("s", b"late", kind=Kind.CANCEL, after=old, pending=Pending())
            except Conflict as error:
                expect(error.tail is None or _same(error.tail, tail), f"Conflict.tail must be the end: {error.tail}")
            else:
                expect(False, "an append after an end that is out of date must raise Conflict")
        expect(offsets(await everything(one, "s")) == [1], "a refused append must store nothing")


@check(CHECKS, "L1")
async def one_of_many_at_the_same_end_wins(env: Environment) -> None:
    """Of many appends after the same end, on several connections at once, exactly one is stored."""
    outcomes: list[str] = []

    async def try_append(broker: Broker, after: Tail) -> None:
        try:
            await broker.log.append("s", b"x", kind=Kind.CANCEL, after=after, pending=after.pending)
            outcomes.append("stored")
        except Conflict:
            outcomes.append("conflict")

    async with connections(env, 3) as brokers:
        for turn in range(5):
            after = await brokers[0].log.last("s")
            outcomes.clear()
            async with anyio.create_task_group() as tasks:
                for number in range(18):
                    tasks.start_soon(try_append, brokers[number % 3], after)
            stored = outcomes.count("stored")
            expect(stored == 1, f"one of 18 appends after the same end must be stored, {stored} were")
            expect((await brokers[1].log.last("s")).offset == turn + 1, "one append must move the end by one")


@check(CHECKS, "L2")
async def offsets_are_dense_under_concurrent_senders(env: Environment) -> None:
    """Many senders on several connections beside an owner: offsets 1, 2, 3 … and every record once."""
    async with connections(env, 3) as brokers:
        await send(brokers[0], "s", b"turn")
        owner = await own(brokers[0], "s", 1)

        async def sender(number: int) -> None:
            for i in range(8):
                await send(brokers[number % 3], "s", b"%d/%d" % (number, i), kind=Kind.CANCEL)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(owner.deltas, 40)
            for number in range(9):
                tasks.start_soon(sender, number)
        records = await everything(brokers[1], "s")
        expect(offsets(records) == list(range(1, len(records) + 1)), f"offsets must be dense: {offsets(records)}")
        bodies = sorted(r.body for r in records if r.kind is Kind.CANCEL)
        wanted = sorted(b"%d/%d" % (n, i) for n in range(9) for i in range(8))
        expect(bodies == wanted, "every record must be stored exactly once")
        tokens = [r.body for r in records if r.kind is Kind.DELTA]
        expect(tokens == [b"token %d" % n for n in range(40)], "the owner's records must be in its order")


@check(CHECKS, "L2")
async def sessions_count_for_themselves(env: Environment) -> None:
    """Every session has its own offsets, also where one session's id begins with another's."""
    async with connections(env, 1) as (broker,):
        for session in ("s", "s1", "s", "S", "s"):
            await send(broker, session, kind=Kind.CANCEL)
        ends = [(await broker.log.last(s)).offset for s in ("s", "s1", "S", "s2")]
        expect(ends == [3, 1, 1, 0], f"each session counts for itself: {ends}")


@check(CHECKS, "L2")
async def offsets_are_skipped_on_purpose(env: Environment) -> None:
    """Who restores a log that has holes appends after an end whose ``lost`` is higher; it is dense again from there."""
    async with connections(env, 2) as (one, two):
        empty = await one.log.last("s")
        tail = await send_after(one, structs.replace(empty, lost=4), Kind.CANCEL)
        expect(tail.offset == 5, f"four offsets were to be skipped, the record is at {tail.offset}")
        expect(_same(await two.log.last("s"), tail), "the end must be that record's, with nothing lost behind it")
        holed = structs.replace(tail, lost=2)
        tail = await send_after(one, holed, Kind.TURN)
        expect(tail.offset == 8, f"two more were to be skipped, the record is at {tail.offset}")
        for old in (empty, structs.replace(empty, lost=9), holed):
            try:
                await send_after(two, old, Kind.CANCEL)
            except Conflict:
                pass
            else:
                expect(False, f"an append after {old.offset} is late, however much it skips")
        owner = await own(two, "s", 8)
        await owner.deltas(2)
        await owner.finish()
        left = [5, 8, 9, 10, 11, 12]
        for deltas in (True, False):
            wanted = [o for o in left if deltas or o not in (10, 11)]
            found = offsets(await everything(one, "s", deltas=deltas))
            expect(found == wanted, f"offsets must be {wanted}: {found}")
            async with two.log.follow("s", after=6, deltas=deltas) as records:
                found = offsets(await gather_through(records, 12))
            expect(found == [o for o in wanted if o > 6], f"a follow must give what is behind its offset: {found}")


async def send_after(broker: Broker, after: Tail, kind: Kind) -> Tail:
    """Append an input of session s after this end."""
    turn = kind is Kind.TURN
    pending = after.pending.add(after.next) if turn else after.pending
    return await broker.log.append("s", b"x", kind=kind, after=after, pending=pending, agent=AGENT if turn else None)


@check(CHECKS, "L3", Settings(faults=True))
async def lost_ack_stores_once(env: Environment) -> None:
    """An append whose answer is lost returns the end it made: no second record, no false Conflict or Duplicate."""
    async with connections(env, 1) as (broker,):
        for dedupe in (None, "key"):
            after = await broker.log.last("s")
            await env.drop_next_ack(broker)
            tail = await broker.log.append(
                "s", b"x", kind=Kind.CANCEL, after=after, pending=after.pending, dedupe=dedupe
            )
            expect(tail.offset == after.next, f"the append must return its own offset {after.next}: {tail}")
        again = await broker.log.append("s", b"y", kind=Kind.CANCEL, after=tail, pending=tail.pending)
        expect(again.offset == 3, f"the end that was returned must be the end: {again}")
        found = [r.body for r in await everything(broker, "s")]
        expect(found == [b"x", b"x", b"y"], f"each append must be stored once: {found}")


@check(CHECKS, "L3", Settings(faults=True))
async def lost_ack_with_another_record_behind(env: Environment) -> None:
    """An append whose answer is lost is no Conflict although others appended before it was found out."""
    tails: list[Tail] = []

    async with connections(env, 2) as (one, two):

        async def append() -> None:
            tails.append(await one.log.append("s", b"x", kind=Kind.CANCEL, after=Tail(), pending=Pending()))

        async def stored() -> bool:
            return (await two.log.last("s")).offset == 1

        await env.drop_next_ack(one)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(append)
            await until(stored)
            await send(two, "s", b"y", kind=Kind.CANCEL)
        expect(tails[0].offset == 1, f"the append stored offset 1 and must say so: {tails}")
        found = [r.body for r in await everything(two, "s")]
        expect(found == [b"x", b"y"], f"each append must be stored once: {found}")


@check(CHECKS, "L4")
async def repeated_input_is_a_duplicate(env: Environment) -> None:
    """An input stored under a key is refused with the offset of the first, whatever came since."""
    async with connections(env, 2) as (one, two):
        await send(one, "s", b"first", dedupe="other")
        tail = await send(one, "s", b"second", dedupe="key")
        await send(one, "s", b"third", kind=Kind.CANCEL)
        for broker in (one, two):
            for after in (tail, await broker.log.last("s"), Tail()):
                try:
                    await broker.log.append(
                        "s", b"again", kind=Kind.CANCEL, after=after, pending=after.pending, dedupe="key"
                    )
                except Duplicate as error:
                    expect(error.offset == 2, f"Duplicate.offset must be that of the first: {error.offset}")
                except Conflict:
                    expect(after.offset < 3, "a caller that knows the end must learn that its input is stored")
                else:
                    expect(False, "an input under a key that is stored must raise Duplicate")
        expect(len(await everything(one, "s")) == 3, "a duplicate must not be stored")
        expect((await send(two, "t", dedupe="key")).offset == 1, "another session's keys are its own")


@check(CHECKS, "L4")
async def concurrent_repeats_store_once(env: Environment) -> None:
    """The same input sent at once over several connections is stored and queued once."""
    outcomes: list[int] = []

    async def try_send(broker: Broker, key: str) -> None:
        try:
            outcomes.append((await send(broker, "s", dedupe=key)).offset)
        except Duplicate as error:
            outcomes.append(error.offset)

    async with connections(env, 3) as brokers:
        for number in range(1, 6):
            outcomes.clear()
            async with anyio.create_task_group() as tasks:
                for broker in brokers * 2:
                    tasks.start_soon(try_send, broker, f"key{number}")
            expect(outcomes == [number] * 6, f"all six must learn offset {number}: {outcomes}")
        expect(len(await everything(brokers[0], "s")) == 5, "five keys, five records")


@check(CHECKS, "L1")
async def too_large_is_refused(env: Environment) -> None:
    """A body at the limit is stored; one byte more raises TooLarge with the limit, and stores nothing."""
    async with connections(env, 1) as (broker,):
        limit = broker.capabilities.max_body
        tail = await send(broker, "s", b"x" * limit, kind=Kind.CANCEL)
        try:
            await send(broker, "s", b"x" * (limit + 1), kind=Kind.CANCEL)
        except TooLarge as error:
            expect((error.size, error.limit) == (limit + 1, limit), f"TooLarge must say size and limit: {error}")
        else:
            expect(False, f"a body of {limit + 1} bytes must raise TooLarge")
        records = await everything(broker, "s")
        expect([len(r.body) for r in records] == [limit], "the record at the limit, and no other, must be stored")
        expect(_same(await broker.log.last("s"), tail), "a refused append must not move the end")


@check(CHECKS, "L7")
async def superseded_owner_is_refused(env: Environment) -> None:
    """An owner whose lease ran out meets Conflict once another has claimed the session, and stores nothing more."""
    async with connections(env, 2) as (one, two):
        await send(one, "s")
        old = await own(one, "s", 1)
        await old.deltas(3)
        new = await Owner(two, await must_take(two, "s", 1)).start()
        try:
            await old.append(b"zombie", kind=Kind.DELTA)
        except Fenced:
            pass
        else:
            expect(False, "the old owner's append must be refused")
        await new.finish()
        bodies = [r.body for r in await everything(one, "s")]
        expect(b"zombie" not in bodies, "nothing of the old owner must be stored after the takeover")
