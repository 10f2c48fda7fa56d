"""Fan-out: what readers of one session are given, whenever they come, and what they cost."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import pytest

from agentrun import wire
from agentrun.broker import Broker, Kind, Pending, Record, Tail
from agentrun.brokers.memory import MemoryBroker, MemoryState
from agentrun.client import Client
from agentrun.errors import InvalidInput, SessionGone, Unavailable
from agentrun.gateway import hub as hub_module
from agentrun.gateway.hub import Closed, Hub, Item, Reading
from agentrun.settings import GatewaySettings
from agentrun.telemetry import Telemetry
from agentrun.testing.faults import Faults, FaultyBroker
from tests.worker.fleet import Part, Wrapped, eventually


class Log(Part):
    """Counts what is followed, and can go wrong."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.follows = 0
        self.following = 0
        self.reads = 0
        self.late: anyio.Event | None = None
        """Followers are told of nothing before it is set."""
        self.breaks: Exception | None = None

    @asynccontextmanager
    async def follow(self, session: str, **options: Any) -> AsyncGenerator[AsyncIterator[Sequence[Record]]]:
        self.follows += 1
        self.following += 1
        try:
            async with self.inner.follow(session, **options) as batches:
                yield self._told(batches)
        finally:
            self.following -= 1

    async def _told(self, batches: AsyncIterator[Sequence[Record]]) -> AsyncIterator[Sequence[Record]]:
        while True:
            if self.late is not None:
                await self.late.wait()
            batch = await anext(batches)
            if self.late is not None:
                await self.late.wait()
            if self.breaks is not None:
                raise self.breaks
            yield batch

    async def read(self, session: str, **options: Any) -> Sequence[Record]:
        self.reads += 1
        return await self.inner.read(session, **options)


class Bench:
    """A hub on a broker in memory."""

    def __init__(self, state: MemoryState, hub: Hub, log: Log, broker: Broker) -> None:
        self.state = state
        self.hub = hub
        self.log = log
        self.broker = broker
        self._at: dict[str, Tail] = {}

    async def store(self, *events: wire.KnownEvent | bytes, session: str = "s", kind: Kind | None = None) -> None:
        for event in events:
            body = event if isinstance(event, bytes) else wire.encode(event)
            if kind is None:
                of = {wire.TurnRequested: Kind.TURN, wire.TextDelta: Kind.DELTA}.get(type(event), Kind.EVENT)
            else:
                of = kind
            tail = await self.broker.log.last(session)
            pending = Pending()
            await self.broker.log.append(session, body, kind=of, after=tail, pending=pending, agent="a")

    async def words(self, count: int, session: str = "s", size: int = 3, turn: str = "t") -> None:
        for i in range(count):
            await self.store(wire.TextDelta(turn=turn, attempt=1, text=f"{i:x}".ljust(size), index=i), session=session)

    async def stored(self, after: int = 0, session: str = "s") -> list[tuple[int, Any]]:
        events = Client(self.broker).session(session).events(after, follow=False)
        return [(event.offset, json.loads(event.raw)) async for event in events]

    @property
    def feeds(self) -> dict[str, Any]:
        return self.hub._feeds


@asynccontextmanager
async def bench(
    *,
    faults: Faults | None = None,
    state: MemoryState | None = None,
    telemetry: Telemetry | None = None,
    **settings: Any,
) -> AsyncGenerator[Bench]:
    state = state or MemoryState()
    async with MemoryBroker(state=state) as broker:
        inner: Broker = FaultyBroker(broker, faults) if faults is not None else broker
        log = Log(inner.log)
        hub = Hub(Client(Wrapped(inner, log=log)), GatewaySettings(**settings), telemetry)
        async with anyio.create_task_group() as group:
            await group.start(hub.run)
            yield Bench(state, hub, log, broker)
            group.cancel_scope.cancel()


def pairs(items: Sequence[Item]) -> list[tuple[int, Any]]:
    found = [json.loads(item.json) for item in items]
    return [(item["offset"], item["event"]) for item in found]


async def read_to(reading: Reading, offset: int, within: float = 10) -> list[tuple[int, Any]]:
    found: list[tuple[int, Any]] = []
    with anyio.fail_after(within):
        while not found or found[-1][0] < offset:
            found += pairs(await reading.next(1.0))
    return found


async def last(bench: Bench) -> int:
    return (await bench.broker.log.last("s")).offset


async def told(feed: Any, offset: int) -> None:
    await eventually(lambda: feed.end >= offset)


async def nobody_reads(bench: Bench) -> None:
    await eventually(lambda: all(feed.readers == 0 for feed in bench.feeds.values()))


# ------------------------------------------------------------------------------------------------------------ items


def items_of(*bodies: bytes, kind: Kind = Kind.TURN) -> list[Item]:
    from agentrun.reading import Event, _sent

    data = [_sent(body) if kind.input else None for body in bodies]
    return [Item(Event(i, body, time=1.5, decoded=d)) for i, (body, d) in enumerate(zip(bodies, data, strict=True), 1)]


def test_an_item_is_what_is_stored_byte_by_byte() -> None:
    body = (
        b'{"type":"turn.requested", "turn":"t","agent":"a","input":"\\u00e9 \xc3\xa9",'
        b'"x":[1.0,10000000000000000000000]}'
    )
    (item,) = items_of(body)
    assert item.json == b'{"offset":1,"time":1.500,"event":' + body + b"}"
    assert item.sse == b"id: 1\ndata: " + item.json + b"\n\n"


def test_line_breaks_between_tokens_do_not_break_a_frame() -> None:
    (item,) = items_of(b'{"type":"x.later",\r\n "text":"a\\nb",\r"more":1\n}', kind=Kind.EVENT)
    assert item.sse.count(b"\n") == 3
    assert b"\r" not in item.sse
    data = item.sse.split(b"\n")[1].removeprefix(b"data: ")
    assert json.loads(data)["event"] == {"type": "x.later", "text": "a\nb", "more": 1}


JUNK = (
    b"",
    b"junk",
    b"\xff\xfe",
    b"null",
    b"[]",
    b'"text"',
    b"{}",
    b'{"type":1}',
    b'{"type":null}',
    b'{"type":"x.y"',
    b'{"type":"x.y"}}',
    b'{"type":"x.y"},{"offset":2',
    b'{"type":"x.y","text":"\xff"}',
    b'{"type":"x.y","n":NaN}',
    b'{"type":"x.y","n":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"type":"turn.requested","turn":"t","agent":"a","input":"\xff"}',
)


@pytest.mark.parametrize("kind", [Kind.TURN, Kind.CANCEL, Kind.EVENT, Kind.DELTA])
async def test_whatever_stands_in_a_log_items_are_json(kind: Kind) -> None:
    async with bench(ring_events=8) as b, b.hub.read("s") as early:
        await b.store(*JUNK, kind=kind)
        async with b.hub.read("s") as late:
            for reading in (early, late):
                found = await read_to(reading, len(JUNK))
                assert found == [(i, {"type": "unusable"}) for i in range(1, len(JUNK) + 1)]


async def test_an_owners_event_that_a_sender_appended_is_a_forgery() -> None:
    forged = wire.TurnCompleted(turn="t", attempt=1, turn_offset=1, message=wire.Message(parts=[]))
    async with bench() as b, b.hub.read("s") as live:
        await b.store(wire.TurnRequested(turn="t", agent="a", input="x"))
        await b.store(forged, kind=Kind.TURN)
        await b.store(forged, kind=Kind.CANCEL)
        await b.store(forged)
        async with b.hub.read("s") as late:
            for reading in (live, late):
                types = [event["type"] for _, event in await read_to(reading, 4)]
                assert types == ["turn.requested", "unusable", "unusable", "turn.completed"]


async def test_an_unknown_type_is_passed_on() -> None:
    async with bench() as b, b.hub.read("s") as reading:
        await b.store(b'{"type":"turn.pondered","turn":"t","depth":3}', kind=Kind.EVENT)
        assert await read_to(reading, 1) == [(1, {"type": "turn.pondered", "turn": "t", "depth": 3})]


# ---------------------------------------------------------------------------------------------------------- fan-out


async def test_all_readers_share_one_subscription_and_its_items() -> None:
    async with bench() as b:
        await b.words(5)
        found: list[Sequence[Item]] = []

        async def reader() -> None:
            async with b.hub.read("s", after=5) as reading:
                ready.append(True)
                found.append(await reading.next(10))

        ready: list[bool] = []
        async with anyio.create_task_group() as group:
            for _ in range(100):
                group.start_soon(reader)
            await eventually(lambda: len(ready) == 100)
            assert b.hub.watched == 1
            await b.words(1)
        assert b.log.follows == 1
        assert len(found) == 100
        assert len({id(item) for items in found for item in items}) == 1
        async with b.hub.read("other"):
            assert (b.log.follows, b.hub.watched) == (2, 2)


@pytest.mark.parametrize("seed", range(6))
async def test_readers_that_join_anywhere_get_the_log_and_nothing_else(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = random.Random(seed)
    monkeypatch.setattr(hub_module, "_TAKE", dice.choice([1, 3, 512]))
    end = 300
    async with bench(ring_events=dice.choice([4, 64, 2048]), linger=0.05) as b:

        async def write() -> None:
            while await last(b) < end:
                await b.words(dice.choice([1, 1, 1, 20]))
                await anyio.sleep(dice.choice([0, 0, 0.001, 0.01]))

        async def read() -> None:
            """An EventSource: it comes back with its offset whenever its stream ends."""
            after = first = dice.randint(0, min(await last(b), end - 1))
            seen: list[tuple[int, Any]] = []
            while after < end:
                with suppress(Closed):
                    async with b.hub.read("s", after=after) as reading:
                        for _ in range(dice.randint(1, 50)):
                            items = pairs(await reading.next(dice.choice([0, 0.01, 1])))
                            seen += items
                            after = items[-1][0] if items else after
                            assert after == reading.offset
                            if after >= end:
                                break
                            await anyio.sleep(dice.choice([0, 0, 0.002]))
            assert [offset for offset, _ in seen] == list(range(first + 1, seen[-1][0] + 1))
            results.append((first, seen))

        results: list[tuple[int, list[tuple[int, Any]]]] = []
        with anyio.fail_after(30):
            async with anyio.create_task_group() as group:
                group.start_soon(write)
                for _ in range(10):
                    group.start_soon(read)
                    await anyio.sleep(dice.random() * 0.02)
        events = await b.stored()
        for first, seen in results:
            assert seen == events[first : first + len(seen)]
        assert len(results) == 10
        await nobody_reads(b)


async def test_a_reader_that_falls_behind_is_told_so_and_resumes_exactly() -> None:
    async with bench(ring_events=16) as b:
        await b.words(3)
        async with b.hub.read("s", after=3) as slow, b.hub.read("s", after=3) as quick:
            await b.words(1)
            assert (await read_to(slow, 4))[-1][0] == 4
            for _ in range(50):
                await b.words(1)
                await read_to(quick, quick.offset + 1)
            with pytest.raises(Closed) as closed:
                await slow.next(1)
            assert closed.value.reason == "slow"
            assert slow.offset == 4
        async with b.hub.read("s", after=slow.offset) as resumed:
            assert await read_to(resumed, 54) == await b.stored(after=4)
        assert b.log.follows == 1


async def test_what_is_kept_of_a_session_is_bounded() -> None:
    async with bench(ring_events=32, ring_bytes=10_000) as b, b.hub.read("s"):
        feed = b.feeds["s"]
        for size in (3, 400, 3, 3000):
            for _ in range(60):
                await b.words(1, size=size)
                await told(feed, await last(b))
                kept = sum(len(item.event.raw) for item in feed.items)
                assert len(feed.items) <= 32
                assert kept <= 10_000
        await b.words(1, size=50_000)
        await told(feed, await last(b))
        assert len(feed.items) == 1, "the newest is kept, whatever its size"
        await b.words(1)
        await told(feed, await last(b))
        assert len(feed.items) == 1


async def test_a_session_is_watched_a_while_longer_and_then_anew() -> None:
    async with bench(linger=0.3) as b:
        async with b.hub.read("s"):
            pass
        await anyio.sleep(0.1)
        async with b.hub.read("s"):
            await anyio.sleep(0.5)
        assert (b.log.follows, b.hub.watched) == (1, 1)
        await eventually(lambda: b.hub.watched == 0)
        await eventually(lambda: b.log.following == 0)
        await b.words(3)
        async with b.hub.read("s") as reading:
            assert await read_to(reading, 3) == await b.stored()
        assert b.log.follows == 2


# ----------------------------------------------------------------------------------------------------- where to begin


async def test_an_offset_is_that_of_an_event_seen() -> None:
    async with bench() as b:
        await b.words(3)
        with pytest.raises(InvalidInput, match="after"):
            async with b.hub.read("s", after=-1):
                pass
        with pytest.raises(SessionGone):
            async with b.hub.read("s", after=4):
                pass
        async with b.hub.read("s", after=3) as reading:
            assert await reading.next(0.05) == ()
            assert reading.at_end
        await nobody_reads(b)


async def test_a_client_that_was_told_more_elsewhere_is_told_nothing_twice() -> None:
    """Another gateway may have been told of events before this one was."""
    async with bench() as b, b.hub.read("s") as first:
        b.log.late = anyio.Event()
        await b.words(10)
        async with b.hub.read("s", after=7) as reading:
            assert await reading.next(0.05) == ()
            b.log.late.set()
            assert [offset for offset, _ in await read_to(reading, 10)] == [8, 9, 10]
        assert [offset for offset, _ in await read_to(first, 10)] == list(range(1, 11))


async def test_half_an_event_at_the_end_keeps_nobody_from_waiting() -> None:
    """Its writer has died between the pieces, and nobody has taken over."""
    message = wire.Message(parts=[wire.TextPart("x" * 5000)])
    done = wire.TurnCompleted(turn="t", attempt=1, turn_offset=1, message=message)
    pieces = wire.split(done, 2000)
    assert len(pieces) > 2
    async with bench() as b:
        await b.words(2)
        await b.store(*pieces[:2], kind=Kind.EVENT)
        async with b.hub.read("s") as reading:
            assert [offset for offset, _ in await read_to(reading, 2)] == [1, 2]
            reads = b.log.reads
            began = anyio.current_time()
            assert await reading.next(1.5) == ()
            assert 1.4 < anyio.current_time() - began < 3
            assert b.log.reads - reads < 20
            await b.store(*pieces[2:], kind=Kind.EVENT)
            (event,) = await read_to(reading, 2 + len(pieces))
            assert event[1] == json.loads(wire.encode(done))
            await b.words(1)
            assert [offset for offset, _ in await read_to(reading, 3 + len(pieces))] == [3 + len(pieces)]


async def test_expired_deltas_come_as_a_snapshot_from_the_log_and_live() -> None:
    now = [1000.0]
    state = MemoryState(delta_ttl=10.0, clock=lambda: now[0])
    async with bench(state=state, ring_events=4) as b:
        await b.store(wire.TurnRequested(turn="t", agent="a", input="x"))
        await b.store(wire.TurnStarted(turn="t", attempt=1, worker="w", lease="l"))
        await b.words(4)
        now[0] += 20
        async with b.hub.read("s", after=2) as live:  # its feed begins behind what has expired
            said = wire.Message(parts=[wire.TextPart("".join(f"{i:x}".ljust(3) for i in range(4)))])
            await b.store(wire.TurnCompleted(turn="t", attempt=1, turn_offset=1, message=said))
            end = await last(b)
            for _ in range(8):
                await b.store(wire.TurnRequested(turn=f"u{_}", agent="a", input="x"))
            async with b.hub.read("s") as late:
                for reading, skipped in ((live, 2), (late, 0)):
                    found = await read_to(reading, end + 8)
                    assert [event["type"] for _, event in found][: 4 - skipped] == [
                        "turn.requested",
                        "turn.started",
                        "snapshot",
                        "turn.completed",
                    ][skipped:]
                    offset, snapshot = found[2 - skipped]
                    assert (snapshot["from"], snapshot["to"], offset) == (3, end - 1, end - 1)
                    assert snapshot["message"]["parts"] == [{"type": "text", "text": said.text}]
                    assert [o for o, _ in found[3 - skipped :]] == list(range(end, end + 9))


# --------------------------------------------------------------------------------------------------------- its end


async def test_a_deletion_ends_every_reader_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "_TAKE", 2)
    async with bench(ring_events=4) as b:
        await b.words(20)
        async with b.hub.read("s", after=20) as waiting, b.hub.read("s") as older:
            assert len(await older.next(1)) == 2
            ended: list[str] = []

            async def wait() -> None:
                with pytest.raises(SessionGone):
                    await waiting.next(10)
                ended.append("waiting")

            async with anyio.create_task_group() as group:
                group.start_soon(wait)
                await anyio.sleep(0.05)
                await b.broker.log.delete("s")
            with pytest.raises(SessionGone):
                await read_to(older, 21)
        assert ended == ["waiting"]
        async with b.hub.read("s") as anew:
            await b.words(2)
            assert [offset for offset, _ in await read_to(anew, 2)] == [1, 2]


async def test_who_reads_older_events_is_given_none_of_a_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "_TAKE", 2)
    async with bench() as b:
        await b.words(2000)
        async with b.hub.read("s") as older:
            assert len(await older.next(1)) == 2
            await b.broker.log.delete("s")
            await b.store(*[b'{"type":"x.new"}'] * 1500, kind=Kind.EVENT)
            found: list[Item] = []
            with suppress(SessionGone), anyio.fail_after(10):
                while True:
                    found += await older.next(1)
            assert all(item.event.type == "text.delta" for item in found)


async def test_a_deletion_told_late_gives_nothing_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker may tell a follower of a quiet session only after a minute that the session is gone."""
    monkeypatch.setattr(hub_module, "_BELIEVED", 0.1)
    async with bench() as b, b.hub.read("s") as first:
        await b.words(5)
        await read_to(first, 5)
        b.log.late = anyio.Event()
        await b.broker.log.delete("s")
        await anyio.sleep(0.2)
        async with b.hub.read("s") as anew:
            assert await anew.next(0.05) == ()
        with pytest.raises(SessionGone):
            await first.next(1)
        with pytest.raises(SessionGone):
            async with b.hub.read("s", after=5):
                pass
        b.log.late.set()


async def test_who_deletes_a_session_can_tell_its_readers_at_once() -> None:
    async with bench() as b:
        b.hub.gone("s")  # nobody reads it
        async with b.hub.read("s") as reading:
            await b.words(5)
            await read_to(reading, 5)
            b.log.late = anyio.Event()
            await b.broker.log.delete("s")
            b.hub.gone("s")
            with pytest.raises(SessionGone):
                await reading.next(1)
            async with b.hub.read("s") as anew:
                assert await anew.next(0) == ()


async def test_a_hub_that_closes_ends_every_reader_cleanly() -> None:
    async with bench(ring_events=4) as b:
        await b.words(20)
        async with b.hub.read("s") as older, b.hub.read("s", after=20) as waiting:
            reasons: list[str] = []

            async def wait(reading: Reading) -> None:
                with pytest.raises(Closed) as closed:
                    await read_to(reading, 21)
                reasons.append(closed.value.reason)

            async with anyio.create_task_group() as group:
                group.start_soon(wait, waiting)
                await anyio.sleep(0.05)
                b.hub.close()
                group.start_soon(wait, older)
            assert reasons == ["drain"] * 2


async def test_a_reader_that_may_no_longer_read_is_ended() -> None:
    async with bench() as b:
        await b.words(1)
        allowed = {"ann", "bob"}
        async with (
            b.hub.read("s", after=1, valid=lambda: "ann" in allowed) as ann,
            b.hub.read("s", after=1, valid=lambda: "bob" in allowed) as bob,
        ):
            allowed.discard("ann")
            b.hub.wake()
            await b.words(1)
            with pytest.raises(Closed) as closed:
                await ann.next(1)
            assert closed.value.reason == "revoked"
            assert len(await bob.next(1)) == 1


# ---------------------------------------------------------------------------------------------------- what goes wrong


async def test_an_outage_is_told_and_loses_nothing() -> None:
    async with bench(faults=Faults(), outage=0.3) as b:
        faulty: Any = b.log.inner
        line = faulty._line
        async with b.hub.read("s") as reading:
            await b.words(3)
            assert len(await read_to(reading, 3)) == 3
            line.cut(60)
            await b.words(3)
            await eventually(lambda: b.hub.lost)
            assert await reading.next(0.1) == ()
            with pytest.raises(Unavailable):
                async with b.hub.read("other"):
                    pass
            async with b.hub.read("s", after=1) as joined:  # what is in memory is given still
                assert [offset for offset, _ in await read_to(joined, 3)] == [2, 3]
            line.mend()
            assert await read_to(reading, 6) == await b.stored(after=3)
            await eventually(lambda: not b.hub.lost)
        await nobody_reads(b)
        assert b.log.follows == 1


async def test_an_outage_while_older_events_are_read_is_told_and_they_can_be_read_afterwards() -> None:
    async with bench(faults=Faults()) as b:
        faulty: Any = b.log.inner
        await b.words(1500)
        async with b.hub.read("s") as reading:
            found = pairs(await reading.next(1))
            faulty._line.cut(60)
            failed = False
            while not failed:
                try:
                    found += pairs(await reading.next(1))
                except Unavailable:
                    failed = True
            assert len(found) < 1500
            faulty._line.mend()
            found += await read_to(reading, 1500)
        assert found == await b.stored()


async def test_a_feed_that_breaks_leaves_nobody_waiting(caplog: pytest.LogCaptureFixture) -> None:
    async with bench() as b:
        await b.words(2)
        async with b.hub.read("s", after=2) as reading:
            b.log.breaks = RuntimeError("of an unexpected kind")
            await b.words(1)
            with pytest.raises(Unavailable, match="read again"), anyio.fail_after(20):
                await reading.next(10)
            with pytest.raises(Unavailable):
                await reading.next(10)
        assert "of an unexpected kind" in caplog.text
        b.log.breaks = None
        async with b.hub.read("s", after=2) as reading:
            assert [offset for offset, _ in await read_to(reading, 3)] == [3]


async def test_a_broker_that_is_away_from_the_start_fails_readers_and_keeps_none() -> None:
    async with bench(faults=Faults()) as b:
        faulty: Any = b.log.inner
        faulty._line.cut(60)
        for i in range(50):
            with pytest.raises(Unavailable):
                async with b.hub.read(f"s{i}"):
                    pass
        assert b.hub.watched == 0
        faulty._line.mend()
        async with b.hub.read("s1") as reading:
            await b.words(1, session="s1")
            assert len(await reading.next(5)) == 1


@pytest.mark.parametrize("seed", range(3))
async def test_readers_cancelled_at_any_point_are_forgotten(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(seed)
    monkeypatch.setattr(hub_module, "_TAKE", 5)
    monkeypatch.setattr(hub_module, "_BELIEVED", 0.0)
    async with bench(ring_events=8, linger=0.02) as b:
        await b.words(100)

        async def read(steps: int) -> None:
            with anyio.CancelScope() as scope:
                async with b.hub.read("s", after=dice.randint(0, 100)) as reading:
                    while True:
                        group.start_soon(cancel_after, scope, steps)
                        await reading.next(5)

        async def cancel_after(scope: anyio.CancelScope, steps: int) -> None:
            for _ in range(steps):
                await anyio.lowlevel.checkpoint()
            scope.cancel()

        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                for steps in range(60):
                    with anyio.CancelScope() as outer:
                        group.start_soon(cancel_after, outer, steps % 20)
                        async with b.hub.read("s", after=steps) as reading:
                            await reading.next(5)
                            await reading.next(5)
                            await anyio.sleep(1)
                    group.start_soon(read, steps % 20)
                    await b.words(1)
        await nobody_reads(b)
        await eventually(lambda: b.hub.watched == 0)
        await eventually(lambda: b.log.following == 0)
