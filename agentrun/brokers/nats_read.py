"""Reading a session's records from its stream: single gets, pages, the search for an offset."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
NEAR = 32
"""A search ends when at most so many records too many would be read."""


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


class Page(NamedTuple):
    """Records in order, from where to go on, and whether that was all there is."""

    records: Sequence[Record]
    next: int
    complete: bool


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

    async def page(self, route: Route, start: int, limit: int, *, deltas: bool = True) -> Page:
        """Up to ``limit`` records from sequence ``start`` on.

        ``complete``: everything stored before the call that is below ``next`` was seen, and nothing is above it.
        """
        newest = await self.newest(route, leader=True)
        if newest is None or newest.seq < start:
            return Page((), start, True)
        if deltas:
            found = await self._fetch(route, route.all, start, limit, newest.seq)
        else:
            found: list[Stored] = []

            failures: list[BrokerError] = []

            async def take(filter: str) -> None:
                try:
                    target = await self._target(route, filter, newest)
                    stored = await self._fetch(route, filter, start, limit, target)
                except BrokerError as error:  # raised below, not wrapped in a group
                    failures.append(error)
                else:
                    # What came after `newest` is left to the next page: the other filter may not have seen its time.
                    found.extend(s for s in stored if s.seq <= newest.seq)

            async with anyio.create_task_group() as group:
                group.start_soon(take, f"{route.base}.in.>")
                group.start_soon(take, f"{route.base}.out.turn")
            if failures:
                raise failures[0]
            found.sort(key=lambda s: s.seq)
            del found[limit:]
        complete = len(found) < limit
        after = max(newest.seq, found[-1].seq if found else 0) if complete else found[-1].seq
        return Page([s.record() for s in found], after + 1, complete)

    async def _target(self, route: Route, filter: str, newest: Stored) -> int:
        # A sequence the answer must reach, to be known as coming from a server that does not lag behind.
        if self._core.found.replicas == 1:
            return 0
        last = await self.newest(route, filter, leader=True)
        return 0 if last is None else last.seq

    async def _fetch(self, route: Route, filter: str, start: int, limit: int, target: int) -> list[Stored]:
        out: list[Stored] = []
        pause = 0.01
        with anyio.move_on_after(PATIENCE):
            while len(out) < limit:
                found, more = await self._batch(route, filter, start, min(limit - len(out), BATCH))
                out += found
                if found:
                    start = found[-1].seq + 1
                if more:
                    continue
                if start > target:
                    return out
                # This server lags behind, or the target has expired since: the leader knows.
                await anyio.sleep(pause)
                pause = min(pause * 2, 0.25)
                last = await self.newest(route, filter, leader=True)
                target = 0 if last is None else last.seq
            return out
        raise Unavailable(f"stream {route.stream}: no server had all records within {PATIENCE} s")

    async def _batch(self, route: Route, filter: str, start: int, size: int) -> tuple[list[Stored], bool]:
        """Messages from ``start`` on and whether there are more."""
        query = msgspec.json.encode(
            {"seq": start, "batch": size, "max_bytes": BATCH_BYTES, "next_by_subj": filter},
        )
        async with self._batches:
            try:
                replies, end = await self._core.reads.collect(f"$JS.API.DIRECT.GET.{route.stream}", query, timeout=5.0)
            except NotConnected:
                await anyio.sleep(0.1)
                return [], True
        found: list[Stored] = []
        before = 0
        for msg in replies:
            assert msg.headers is not None
            if int(msg.headers["Nats-Last-Sequence"]) != before:
                return found, True  # a reply was lost: go on from here
            found.append(stored_of(msg.headers, msg.data))
            before = found[-1].seq
        if end is None or status(end) == "503":
            if not found:
                await anyio.sleep(0.1)
            return found, True
        headers = end.headers or {}
        if status(end) == "404":
            return found, False
        lost_last = int(headers.get("Nats-Last-Sequence", "0")) != before
        return found, lost_last or int(headers.get("Nats-Num-Pending", "0")) > 0

    # -------------------------------------------------------------------------------------------- seeking

    async def seek(self, route: Route, after: int) -> int:
        """A sequence from which on all offsets above ``after`` come, with few others before them.

        Costs two gets and one for each halving (or better) of the distance.
        """
        if after <= 0:
            return 1
        last = await self.newest(route)
        if last is None:
            return 1
        if last.offset <= after:
            return last.seq + 1
        first = await self.get(route, {"seq": 1, "next_by_subj": route.all})
        if first is None or first.offset > after:
            return 1
        low: tuple[int, int] = (first.seq, first.offset)
        high: tuple[int, int] = (last.seq, last.offset)
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
        return low[0] + 1

    async def start(self, route: Route, after: int, cursor: int) -> int:
        """`seek`, spared when ``cursor`` is indeed the position of the record at ``after``."""
        if cursor > 0 and after > 0:
            hint = await self.get(route, {"seq": cursor})
            if hint is not None and hint.subject.startswith(f"{route.base}.") and hint.offset == after:
                return cursor + 1
        return await self.seek(route, after)
