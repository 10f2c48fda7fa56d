"""A session's log on another broker: the same records at the same offsets; nothing runs before all of it is there."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from agentrun import wire
from agentrun.broker import Broker, Kind, Pending, Record
from agentrun.errors import Fenced, InvalidInput, SessionBusy, SessionExists, SessionGone
from agentrun.gateway.revoked import SESSION as REVOKED
from agentrun.moving import RESERVED, Moved, all_sessions, export_session, import_sessions
from agentrun.testing import Settings
from agentrun.testing.contract_players import (
    connections,
    everything,
    gather_through,
    must_not_take,
    must_take,
    offsets,
    own,
    send,
    until,
)
from tests.moving.conftest import Named
from tests.moving.places import exported, imported, stream, two_places

WAYS = [("memory", "sqlite"), ("sqlite", "nats"), ("nats", "valkey"), ("valkey", "memory")]
JUNK = bytes(range(256)) + b"\r\n"


def shown(records: list[Record]) -> list[tuple[int, Kind, str | None, bytes]]:
    return [(r.offset, r.kind, r.agent, r.body) for r in records]


async def conversation(broker: Broker) -> None:
    """Two turns that ended, a stop, and two turns that wait."""
    for body in (b"one", JUNK, b"three", b"four"):
        await send(broker, "s", body)
    for number in (1, 2):
        owner = await own(broker, "s", number)
        await owner.deltas(3)
        await owner.append(JUNK)
        await owner.finish()
    await send(broker, "s", "ä\u2028\x00 \"'".encode(), kind=Kind.CANCEL)


async def deltas_gone(broker: Broker, left: int) -> None:
    async def gone() -> bool:
        return sum(r.kind is Kind.DELTA for r in await everything(broker, "s")) == left

    assert await until(gone)


@pytest.mark.parametrize(("source", "target"), WAYS)
async def test_a_log_with_holes_is_the_same_at_the_other_broker(named: Named, source: str, target: str) -> None:
    places = two_places(named(source), named(target), Settings(delta_ttl=1.0))
    async with places as (one, other), connections(one, 1) as (here,), connections(other, 1) as (there,):
        await conversation(here)
        await deltas_gone(here, left=0)
        owner = await own(here, "s", 3)
        await owner.append(b"before")
        await owner.append(b"released", change=Pending.release)
        await owner.lease.nack()
        before = await everything(here, "s")
        assert len(before) < before[-1].offset, "there are no holes to be kept"

        lines = await exported(here)
        assert await imported(there, lines) == [Moved("s", len(before), 0)]
        after = await everything(there, "s")
        assert shown(after) == shown(before)
        end, wanted = await there.log.last("s", fresh=True), await here.log.last("s")
        assert (end.offset, end.next, end.pending, end.kind) == (
            *(wanted.offset, wanted.next, wanted.pending, wanted.kind),
        )
        for seen in (0, 6, before[-2].offset):
            async with there.log.follow("s", after=seen) as records:
                found = offsets(await gather_through(records, end.offset))
            assert found == [r.offset for r in before if r.offset > seen]

        for number in (3, 4):
            owner = await own(there, "s", number)
            await owner.finish()
        await must_not_take(there, "all of it has ended")
        assert owner.tail.offset == end.offset + 4


@pytest.mark.parametrize(("source", "target"), WAYS)
async def test_it_goes_on_wherever_it_was_broken_off(named: Named, source: str, target: str) -> None:
    places = two_places(named(source), named(target))
    async with places as (one, other), connections(one, 1) as (here,), connections(other, 2) as (there, worker):
        await conversation(here)
        lines = await exported(here)
        stored = 0
        for cut in (1, 3, 4, 9, len(lines) - 1):
            with pytest.raises(InvalidInput, match=rf"line {cut + 1}: session s ends at .* lines at {cut - 1}:"):
                await imported(there, lines[:cut])
            assert len(await everything(there, "s")) == cut - 1
            stored = cut - 1
            await must_not_take(worker, "only a part is there", within=0.1)
        assert await imported(there, lines) == [Moved("s", len(lines) - 1 - stored, stored)]
        assert shown(await everything(there, "s")) == shown(await everything(here, "s"))
        await must_take(worker, "s", 3)
        assert await imported(there, lines) == [Moved("s", 0, len(lines) - 1)]


async def test_deltas_that_expired_in_a_half_import_are_not_missed(named: Named) -> None:
    for target in ("memory", "sqlite", "nats", "valkey"):
        places = two_places(named("memory"), named(target), Settings(delta_ttl=1.0))
        async with places as (one, other), connections(one, 1) as (here,), connections(other, 1) as (there,):
            await send(here, "s")
            owner = await own(here, "s", 1)
            await owner.deltas(4)
            await owner.finish()
            lines = await exported(here)
            with pytest.raises(InvalidInput, match="cut off"):
                await imported(there, lines[:6])
            await deltas_gone(there, left=0)
            (moved,) = await imported(there, lines)
            assert moved.refused is None
            kept = [1, 2, 7]
            assert offsets(await everything(there, "s", deltas=False)) == kept
            assert (await there.log.last("s")).next == 8


async def test_a_later_export_goes_on_and_an_earlier_one_is_no_end(named: Named) -> None:
    async with (
        two_places(named("memory"), named("sqlite")) as (one, other),
        connections(one, 1) as (here,),
        connections(other, 1) as (there,),
    ):
        await conversation(here)
        early = await exported(here)
        await send(here, "s", b"five")
        late = await exported(here)
        with pytest.raises(InvalidInput):
            await imported(there, late[:-1])
        (moved,) = await imported(there, early)
        assert "later export" in str(moved.refused)
        await must_not_take(there, "the last record is missing")
        assert [m.records for m in await imported(there, late)] == [1]
        await send(here, "s", b"six", kind=Kind.CANCEL)
        assert [m.records for m in await imported(there, await exported(here))] == [1]
        assert shown(await everything(there, "s")) == shown(await everything(here, "s"))


@pytest.mark.parametrize("target", ["memory", "sqlite", "nats", "valkey"])
async def test_another_session_of_that_name_is_left_alone(named: Named, target: str) -> None:
    places = two_places(named("memory"), named(target))
    async with places as (one, other), connections(one, 1) as (here,), connections(other, 1) as (there,):
        await conversation(here)
        await send(here, "t", b"theirs")
        await send(there, "s", b"one", kind=Kind.CANCEL)
        lines = await exported(here, "s", "t")
        refused, moved = await imported(there, lines)
        assert isinstance(refused.refused, SessionExists)
        assert "session s is there already, and is another from offset 1" in str(refused.refused)
        assert (refused.records, moved) == (0, Moved("t", 1, 0))
        assert len(await everything(there, "s")) == 1


async def test_what_differs_in_the_middle_or_was_trimmed_is_seen(named: Named) -> None:
    async with (
        two_places(named("memory"), named("memory")) as (one, other),
        connections(one, 1) as (here,),
        connections(other, 1) as (there,),
    ):
        await conversation(here)
        lines = await exported(here)
        await imported(there, lines)
        await one.trim("s", 6)
        trimmed = await exported(here)
        assert [m.refused for m in await imported(there, trimmed)] == [None]
        await there.log.delete("s")
        (moved,) = await imported(there, trimmed)
        assert (moved.refused, moved.records) == (None, len(trimmed) - 1)
        await there.log.delete("s")
        await send(there, "s", b"another")
        (moved,) = await imported(there, trimmed)
        assert "another from offset 7" in str(moved.refused)
        await there.log.delete("s")
        await imported(there, lines)
        for number in (8, 9, 10):
            (moved,) = await imported(there, [line for line in lines if b'"offset":%d,' % number not in line])
            kept = json.loads(lines[number])["kind"] != "out.delta"
            assert (moved.refused is not None) is kept, number


@pytest.mark.parametrize("target", ["memory", "sqlite", "nats", "valkey"])
async def test_who_writes_into_an_import_is_noticed(named: Named, target: str) -> None:
    places = two_places(named("memory"), named(target))
    async with places as (one, other), connections(one, 1) as (here,), connections(other, 1) as (there,):
        await conversation(here)
        lines = await exported(here)

        async def disturbed() -> AsyncIterator[bytes]:
            for number, line in enumerate(lines):
                if number == 4:
                    await send(there, "s", b"me too")
                yield line

        (moved,) = [moved async for moved in import_sessions(there, disturbed())]
        assert "written to by somebody else" in str(moved.refused)
        (again,) = await imported(there, lines)
        assert "another from offset 4" in str(again.refused)
        await there.log.delete("s")
        (moved,) = await imported(there, lines)
        assert moved.refused is None
        assert shown(await everything(there, "s")) == shown(await everything(here, "s"))


async def test_each_session_is_done_before_the_next_is_read(named: Named) -> None:
    async with (
        two_places(named("memory"), named("memory")) as (one, other),
        connections(one, 1) as (here,),
        connections(other, 1) as (there,),
    ):
        for name in ("a", "b"):
            await send(here, name)
        lines = await exported(here, "a", "b")
        read: list[bytes] = []

        async def counted() -> AsyncIterator[bytes]:
            async for line in stream(lines):
                read.append(line)
                yield line

        found = [(moved.session, len(read)) async for moved in import_sessions(there, counted())]
        assert found == [("a", 2), ("b", 4)]


# --------------------------------------------------------------------------------------------------- what is being run


def started(turn: str, worker: str) -> bytes:
    return wire.encode(wire.TurnStarted(turn=turn, attempt=1, worker=worker, lease="l"))


@pytest.mark.parametrize("source", ["memory", "sqlite", "nats", "valkey"])
async def test_what_is_run_is_refused_or_taken_from_its_worker(named: Named, source: str) -> None:
    places = two_places(named(source), named("sqlite"), Settings(delta_ttl=1.0, lease_ttl=5.0))
    async with places as (one, other), connections(one, 2) as (here, worker), connections(other, 1) as (there,):
        with pytest.raises(SessionGone, match="no records"):
            await exported(here)
        await send(here, "s", wire.encode(wire.TurnRequested(turn="t1", agent="agent", input="x")))
        owner = await own(worker, "s", 1)
        owner.tail = await worker.log.append(
            "s", started("t1", "w"), kind=Kind.EVENT, after=owner.tail, pending=owner.tail.pending
        )
        behind = await owner.deltas(5)
        await deltas_gone(here, left=0)
        with pytest.raises(SessionBusy, match="drain"):
            await exported(here)
        lines = await exported(here, force=True)
        with pytest.raises(Fenced):
            await owner.append(b"zombie")
        await imported(there, lines)
        last = (await everything(there, "s"))[-1]
        event = wire.decode(last.body)
        assert isinstance(event, wire.TurnLost)
        assert (event.turn, event.attempt, event.worker, event.by) == ("t1", 1, "w", "export")
        assert last.offset > behind.offset, "an offset would be given out a second time"
        lease = await must_take(there, "s", 1)
        assert str(lease.tail.pending) == "1"


async def test_a_session_that_is_deleted_meanwhile_is_not_exported(named: Named) -> None:
    for again in (0, 150):
        async with named("memory")(Settings()) as environment, environment.open() as broker:
            for _ in range(150):
                await send(broker, "s", kind=Kind.CANCEL)
            lines = export_session(broker, "s")
            assert b'"end":150' in await anext(lines)
            await broker.log.delete("s")
            for _ in range(again):
                await send(broker, "s", kind=Kind.CANCEL)
            with pytest.raises(SessionGone, match="export again"):
                async for _ in lines:
                    pass


async def test_a_half_imported_session_is_not_exported(named: Named) -> None:
    async with (
        two_places(named("memory"), named("memory")) as (one, other),
        connections(one, 1) as (here,),
        connections(other, 1) as (there,),
    ):
        await conversation(here)
        with pytest.raises(InvalidInput):
            await imported(there, (await exported(here))[:5])
        for force in (False, True):
            with pytest.raises(SessionBusy, match="half imported"):
                await exported(there, force=force)


# ------------------------------------------------------------------------------------------------------------ all


async def test_all_are_those_with_inputs_and_our_own(named: Named) -> None:
    assert REVOKED in RESERVED
    for source in ("memory", "sqlite", "nats", "valkey"):
        async with named(source)(Settings()) as environment, connections(environment, 1) as (broker,):
            assert await all_sessions(broker) == []
            for name in ("b", "a", RESERVED[1], "c"):
                await send(broker, name, kind=Kind.CANCEL if name in ("c", *RESERVED) else Kind.TURN)
            assert await all_sessions(broker) == [RESERVED[1], "a", "b"]


# ------------------------------------------------------------------------------------------------------------ lines


HEADER: dict[str, Any] = {"line": "session", "session": "s", "end": 2, "time": 1.0, "version": 1}
RECORD: dict[str, Any] = {"line": "record", "offset": 1, "kind": "in.cancel", "body": "x"}


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([b"{"], "line 1: a session's header or a record is expected"),
        ([b"\xff\xff"], "line 1: a session's header or a record is expected"),
        ([RECORD], "line 1: a session's header is expected here"),
        ([HEADER | {"session": "a/b"}], "line 1: a session's id must be"),
        ([HEADER | {"version": 2}], "line 1: version 2"),
        ([HEADER | {"end": 0}], "line 1: a session's end is an offset from 1 on"),
        ([HEADER | {"pending": "x"}], "line 1: not a list of pending inputs"),
        ([HEADER, b"", HEADER], "line 3: session s ends at offset 2, and its lines at 0"),
        ([HEADER, RECORD | {"kind": "in.nothing"}], r"line 2: .*kind"),
        ([HEADER, {k: v for k, v in RECORD.items() if k != "body"}], "line 2: a record has either a body or base64"),
        ([HEADER, RECORD | {"base64": ""}], "line 2: a record has either a body or base64"),
        ([HEADER, RECORD | {"agent": "a"}], r"line 2: a record in\.turn has an agent"),
        ([HEADER, RECORD | {"kind": "in.turn"}], r"line 2: a record in\.turn has an agent"),
        ([HEADER, RECORD, RECORD], "line 3: offsets grow .* 1 stands behind 1"),
        ([HEADER, RECORD | {"offset": 3}], "line 2: offsets grow .* up to 2"),
        ([HEADER, RECORD | {"body": "x" * 1_000_001}], "line 2: the record has 1000001 bytes, .* takes 1000000"),
        ([HEADER, RECORD], "line 3: session s ends at offset 2, and its lines at 1"),
        ([HEADER | {"end": 1}, RECORD, RECORD | {"offset": 2}], "line 3: a session's header is expected"),
    ],
)
async def test_a_bad_line_is_named(named: Named, lines: list[Any], says: str) -> None:
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    async with named("memory")(Settings()) as environment, environment.open() as broker:
        with pytest.raises(InvalidInput, match=says):
            await imported(broker, raw)


async def test_a_reader_may_change_how_it_is_written(named: Named) -> None:
    """Bodies are the same to the byte also when something else has written the JSON anew."""
    async with (
        two_places(named("memory"), named("memory")) as (one, other),
        connections(one, 1) as (here,),
        connections(other, 1) as (there,),
    ):
        await conversation(here)
        lines = [json.dumps(json.loads(line), sort_keys=True).encode() for line in await exported(here)]
        await imported(there, [b"\n", *lines, b"\n"])
        assert shown(await everything(there, "s")) == shown(await everything(here, "s"))
