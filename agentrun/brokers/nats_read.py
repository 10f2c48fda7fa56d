"""Reading a session's records from its stream: single gets, pages, the search for an offset."""

from __future__ import annotations

import math
import sys
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

import anyio
import msgspec
from msgspec import Struct

from agentrun.broker import Kind, Record, Tail
from agentrun.brokers.nats_core import Core
from agentrun.brokers.nats_layout import Route, Stored, parse_headers, parse_time, stored_of
from agentrun.brokers.nats_link import PATIENCE, ApiError, NotConnected, status
from agentrun.errors import BrokerError, Misconfigured, Unavailable

BATCH = 500
BATCH_BYTES = 1 << 20
BATCHES_AT_ONCE = 16
"""Times BATCH_BYTES (and one record over) stays well below what a server keeps for a client, or the client for us."""
CATCH_UPS_AT_ONCE = 32
"""Followers of a stream that read at once. After a reconnect all of them want to: thousands of requests at a time would
be answered too late, sent again, and be ever more."""
LED = 3.0
"""Seconds since it heard of most of the servers for which a leader is believed to lead. They say something every
second, and those that hear nothing of it elect another after four. One that has lost the way to one server only may be
replaced through the others, and hears of that with their next word."""
SPARSE = 200
"""A session is sparse where it has less than one of so many records of its stream."""
NEAR = 32
"""A search ends when at most so many records too many would be read."""

_seq = attrgetter("seq")


class _ApiMessage(Struct, frozen=True):
    subject: str
    seq: int
    time: str
    hdrs: bytes = b""
    data: bytes = b""


class _ApiGet(Struct, frozen=True):
    message: _ApiMessage


class _ApiClock(Struct, frozen=True):
    ts: str


class _Replica(Struct, frozen=True):
    active: int = 0
    """Nanoseconds since the leader heard of it."""


class _Cluster(Struct, frozen=True):
    replicas: list[_Replica] = []


class _ApiLed(Struct, frozen=True):
    cluster: _Cluster = _Cluster()


class Place(NamedTuple):
    """A sequence from which on to read, and the offset of the session's record before it (0: there is none)."""

    start: int
    known: int = 0


class Page(NamedTuple):
    """Records in order, from where to go on, and whether that was all there is."""

    records: Sequence[Record]
    next: Place
    complete: bool


@dataclass
class _Lane:
    """One filter of a read, and how far the read of it has come."""

    filter: str
    next: int
    end: int
    """The sequence of the last message there was."""
    most: int = BATCH
    """How many to ask for: never more than there are, if that is known."""
    found: list[Stored] = field(default_factory=list[Stored])

    @property
    def done(self) -> bool:
        return self.next > self.end


def _lanes(route: Route, ends: Sequence[Stored], newest: Stored, place: Place, deltas: bool) -> Sequence[_Lane]:
    # D24: to find that there is no further message for a filter with a wildcard, a server looks at all that the whole
    # stream has stored since (20 to 50 ms at 500,000 records, in which this connection's other requests wait). Of a
    # single subject it knows the last one. So the subjects are read one by one, or no more is asked for than there is.
    delta = f"{route.base}.{Kind.DELTA.value}"
    wanted = [s for s in ends if deltas or s.subject != delta]
    start = place.start
    most = max(newest.offset - place.known, 1)
    if sum(s.seq >= start for s in ends) == most:
        return [_Lane(s.subject, s.seq + 1, s.seq, found=[s]) for s in wanted if s.seq >= start]
    if any(s.subject == delta and s.seq >= start for s in wanted) and newest.seq - start < most * SPARSE:
        return [_Lane(route.all, start, newest.seq, most)]
    return [_Lane(s.subject, start, s.seq) for s in wanted]


class Reader:
    """Reads records. What it returns was stored; it may lag behind only where a method says so."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._batches = anyio.Semaphore(BATCHES_AT_ONCE)
        self._catching_up: dict[str, anyio.Semaphore] = {}

    def catching_up(self, route: Route) -> anyio.Semaphore:
        """What a follower holds while it reads. A stream that does not answer holds up its own followers only."""
        if route.stream not in self._catching_up:
            self._catching_up[route.stream] = anyio.Semaphore(CATCH_UPS_AT_ONCE)
        return self._catching_up[route.stream]

    async def get(self, route: Route, query: Mapping[str, Any], *, leader: bool = False) -> Stored | None:
        """One message, from the stream's leader or from any of its servers (which may lag behind)."""
        if leader and self._core.found.replicas > 1:
            reply = await self._core.reads.api(f"STREAM.MSG.GET.{route.stream}", query)
            if isinstance(reply, ApiError):
                return self._absent(reply, route)
            message = msgspec.json.decode(reply, type=_ApiGet).message
            return Stored(
                message.subject, message.seq, parse_time(message.time), parse_headers(message.hdrs), message.data
            )
        msg = await self._core.reads.ask(f"$JS.API.DIRECT.GET.{route.stream}", msgspec.json.encode(query))
        if status(msg) or msg.headers is None:
            return None
        return stored_of(msg.headers, msg.data)

    async def confirm(self, route: Route) -> None:
        """See that the leader that has answered just now was the leader still, so that what it lacks is not there.

        Raises:
            Unavailable: It may have been replaced without its knowledge: for about ten seconds a leader that is cut off
                goes on answering from what it has.
        """
        if self._core.found.replicas == 1:
            return
        reply = await self._core.reads.api(f"STREAM.INFO.{route.stream}")
        if isinstance(reply, ApiError):
            raise Unavailable(f"stream {route.stream}: {reply.description}")
        replicas = msgspec.json.decode(reply, type=_ApiLed).cluster.replicas
        heard = sum(replica.active < LED * 1e9 for replica in replicas)
        if 2 * (heard + 1) <= len(replicas) + 1:
            raise Unavailable(f"stream {route.stream}: its leader hears too few of the other servers")

    def _absent(self, error: ApiError, route: Route) -> None:
        if error.code == 404 and error.err_code != 10059:
            return
        if error.code >= 500:
            raise Unavailable(f"stream {route.stream}: {error.description}")
        raise Misconfigured(f"stream {route.stream}: {error.description}")

    async def newest(self, route: Route, filter: str = "", *, leader: bool = False) -> Stored | None:
        """The session's last message, or the last on ``filter``."""
        return await self.get(route, {"last_by_subj": filter or route.all}, leader=leader)

    async def tail(self, route: Route, *, leader: bool = False) -> Tail:
        """The session's end."""
        newest = await self.newest(route, leader=leader)
        if newest is None:
            return Tail()
        r = newest.record()
        return Tail(r.offset, r.pending, r.cursor, r.time, await self._lost(route, r), r.kind, r.kept)

    async def _lost(self, route: Route, last: Record) -> int:
        # D9: deltas after the last record may have been given offsets and have expired since.
        ttl = self._core.found.delta_ttl
        if last.kind is Kind.DELTA or not last.pending.running or self._core.now() - last.time < ttl / 2:
            return 0
        reply = await self._core.reads.api(f"STREAM.INFO.{route.stream}")
        if isinstance(reply, ApiError):
            raise Unavailable(f"stream {route.stream}: {reply.description}")
        age = parse_time(msgspec.json.decode(reply, type=_ApiClock).ts) - last.time
        return math.ceil(age * 1000) + 1000 if age > ttl - 1 else 0

    # --------------------------------------------------------------------------------------------- pages

    async def page(
        self, route: Route, place: Place, limit: int, *, deltas: bool = True, ends: Sequence[Stored] | None = None
    ) -> Page:
        """Up to ``limit`` records from a place on. ``ends`` are the session's `ends`, if they were just looked up.

        ``complete``: everything stored before the call that is below ``next`` was seen, and nothing is above it.
        """
        if ends is None:
            ends = await self.ends(route)
        start = place.start
        newest = max(ends, key=_seq, default=None)
        if newest is None or newest.seq < start:
            return Page((), place, True)
        found = await self._fetch(route, _lanes(route, ends, newest, place, deltas), limit)
        # What came after `newest` is left to the next page: not all filters may have seen its time.
        found = [s for s in found if s.seq <= newest.seq]
        complete = len(found) < limit
        last = newest if complete else found[-1]
        return Page([s.record() for s in found], Place(last.seq + 1, last.offset), complete)

    async def ends(self, route: Route) -> list[Stored]:
        """The last message on each of the session's subjects, as a server has it that does not lag behind."""
        pause = 0.01
        with anyio.move_on_after(PATIENCE):
            while True:
                newest = None
                if self._core.found.replicas > 1 and (newest := await self.newest(route, leader=True)) is None:
                    return []
                ends, left = await self._batch(route.stream, {"multi_last": [route.all]})
                if left == 0 and (newest is None or any(s.seq >= newest.seq for s in ends)):
                    return ends
                await anyio.sleep(pause)
                pause = min(pause * 2, 0.25)
        raise Unavailable(f"stream {route.stream}: no server had the session's end within {PATIENCE} s")

    async def _fetch(self, route: Route, lanes: Sequence[_Lane], limit: int) -> list[Stored]:
        """The first messages of the lanes together, up to ``limit`` of them."""
        pause = 0.01
        patience = time.monotonic() + PATIENCE
        while True:
            open_lanes = [lane for lane in lanes if not lane.done]
            # Up to here no lane has more to come.
            reach = min((lane.next for lane in open_lanes), default=sys.maxsize)
            if not open_lanes or sum(bisect_left(lane.found, reach, key=_seq) for lane in lanes) >= limit:
                found = sorted((s for lane in lanes for s in lane.found if s.seq < reach), key=_seq)
                return found[:limit]
            behind = [lane for lane in open_lanes if lane.next == reach]
            if any(await self._each(route, behind, limit)):
                patience = time.monotonic() + PATIENCE
            elif time.monotonic() > patience:
                raise Unavailable(f"stream {route.stream}: no server had all records within {PATIENCE} s")
            else:
                await anyio.sleep(pause)
                pause = min(pause * 2, 0.25)

    async def _each(self, route: Route, lanes: Sequence[_Lane], limit: int) -> list[bool]:
        if len(lanes) == 1:
            return [await self._advance(route, lanes[0], limit)]
        progress: list[bool] = []
        failures: list[BrokerError] = []

        async def advance(lane: _Lane) -> None:
            try:
                progress.append(await self._advance(route, lane, limit))
            except BrokerError as error:  # raised below, not wrapped in a group
                failures.append(error)

        async with anyio.create_task_group() as group:
            for lane in lanes:
                group.start_soon(advance, lane)
        if failures:
            raise failures[0]
        return progress

    async def _advance(self, route: Route, lane: _Lane, limit: int) -> bool:
        """Read the lane's next messages; whether there were any, or it has come to its end."""
        size = min(BATCH, limit, lane.most)
        query = {"seq": lane.next, "batch": size, "max_bytes": BATCH_BYTES, "next_by_subj": lane.filter}
        found, left = await self._batch(route.stream, query)
        if found:
            lane.found += found
            lane.next = found[-1].seq + 1
        lane.most = left or BATCH
        if left == 0 and not lane.done:
            # This server lags behind, or the lane's last messages have expired since: the leader knows.
            last = await self.newest(route, lane.filter, leader=True)
            lane.end = 0 if last is None else last.seq
        return bool(found) or lane.done

    async def between(self, stream: str, filter: str, first: int, last: int, *, newest: int) -> Sequence[Stored]:
        """The messages for a filter from one sequence to another, the newest of them; costs reading all.

        Raises:
            Unavailable: No server answers.
        """
        kept: deque[Stored] = deque(maxlen=newest)
        patience = time.monotonic() + PATIENCE
        while first <= last:
            query = {"seq": first, "batch": BATCH, "max_bytes": BATCH_BYTES, "next_by_subj": filter}
            found, left = await self._batch(stream, query)
            if found:
                patience = time.monotonic() + PATIENCE
                first = found[-1].seq + 1
                kept.extend(stored for stored in found if stored.seq <= last)
            if left == 0:
                break
            if time.monotonic() > patience:
                raise Unavailable(f"stream {stream}: no server answers")
        return kept

    async def _batch(self, stream: str, query: Mapping[str, Any]) -> tuple[list[Stored], int | None]:
        """The messages a server has for the query, and how many are left there; None if that is not known."""
        async with self._batches:
            try:
                replies, end = await self._core.reads.collect(
                    f"$JS.API.DIRECT.GET.{stream}", msgspec.json.encode(query), timeout=5.0
                )
            except NotConnected:
                await anyio.sleep(0.1)
                return [], None
        found: list[Stored] = []
        before = 0
        for msg in replies:
            assert msg.headers is not None
            if int(msg.headers["Nats-Last-Sequence"]) != before:
                return found, None  # a reply was lost: go on from here
            found.append(stored_of(msg.headers, msg.data))
            before = found[-1].seq
        if end is None or status(end) == "503":
            if not found:
                await anyio.sleep(0.1)
            return found, None
        headers = end.headers or {}
        if status(end) == "404":
            return found, 0
        if int(headers.get("Nats-Last-Sequence", "0")) != before:
            return found, None  # the last one was
        return found, int(headers.get("Nats-Num-Pending", "0"))

    # -------------------------------------------------------------------------------------------- seeking

    async def seek(self, route: Route, after: int, ends: Sequence[Stored]) -> Place:
        """A place from which on all offsets above ``after`` come, with few others before them.

        ``ends``: the session's `ends`. Costs one get for each halving (or better) of the distance, and one more.
        """
        if after <= 0:
            return Place(1)
        marks = sorted((s.seq, s.offset) for s in ends)
        if not marks:
            return Place(1)
        if marks[-1][1] <= after:
            return Place(marks[-1][0] + 1, marks[-1][1])
        high: tuple[int, int] = next(mark for mark in marks if mark[1] > after)
        low: tuple[int, int] = max((mark for mark in marks if mark[1] <= after), default=(0, 0))
        if low[0] == 0:
            first = await self.get(route, {"seq": 1, "next_by_subj": route.all})
            if first is None or first.offset > after:
                return Place(1)
            low = (first.seq, first.offset)
        turn = 0
        while after - low[1] > NEAR and high[0] - low[0] > 1:
            turn += 1
            if turn % 2:
                # Offsets grow about evenly with the sequence; aim a little early.
                share = (after - low[1] - NEAR // 2) / (high[1] - low[1])
                guess = low[0] + int(share * (high[0] - low[0]))
            else:
                guess = (low[0] + high[0]) // 2
            guess = min(max(guess, low[0] + 1), high[0] - 1)
            found = await self.get(route, {"seq": guess, "next_by_subj": route.all})
            if found is not None and found.offset <= after:
                low = (found.seq, found.offset)
            elif found is None or found.seq >= high[0]:
                high = (guess, high[1])
            else:
                high = (guess, found.offset)
        return Place(low[0] + 1, low[1])

    async def start(self, route: Route, after: int, cursor: int) -> Place:
        """`seek`, spared when ``cursor`` is indeed the position of the record at ``after``."""
        if cursor > 0 and after > 0:
            hint = await self.get(route, {"seq": cursor})
            if hint is not None and hint.subject.startswith(f"{route.base}.") and hint.offset == after:
                return Place(cursor + 1, after)
        return await self.seek(route, after, await self.ends(route) if after > 0 else ())
