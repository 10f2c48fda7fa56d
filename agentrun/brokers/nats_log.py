"""The session log on JetStream: compare-and-append, and finding out what became of an append whose answer was lost."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from functools import lru_cache
from typing import NamedTuple

import anyio
import msgspec
from msgspec import Struct

from agentrun.broker import Kind, Pending, Record, Tail
from agentrun.brokers.checks import check_record
from agentrun.brokers.nats_core import Core
from agentrun.brokers.nats_follow import Follower
from agentrun.brokers.nats_layout import (
    EXPECTED,
    EXPECTED_SUBJECT,
    HEADROOM,
    KEPT,
    OFFSET,
    PENDING,
    WRITER,
    Route,
    Stored,
)
from agentrun.brokers.nats_link import ApiError, Msg, NotConnected, status
from agentrun.brokers.nats_read import NEAR, Reader
from agentrun.errors import Conflict, Duplicate, InvalidInput, Misconfigured, SessionGone, TooLarge, Unavailable
from agentrun.wire import check_id

_FIRST_TRY = 0.5
_LONGEST_TRY = 2.0
_FIRST_PAUSE = 0.02
_LONGEST_PAUSE = 0.25

WRONG_LAST = 10071
IN_FLIGHT = (10164, 10158)
"""A clustered stream is still storing a record of this session, or of this key: its fate is known soon."""
TOO_LARGE = 10054


class _Ack(Struct, frozen=True):
    seq: int = 0
    duplicate: bool = False
    error: ApiError | None = None


_decode_ack = msgspec.json.Decoder(_Ack).decode


@lru_cache(1024)
def _pending_text(pending: Pending) -> str:
    text = str(pending)
    if len(text) > HEADROOM - 1500:
        raise TooLarge(len(text), HEADROOM - 1500, "list of pending inputs")
    return text


class _Append(NamedTuple):
    """One append, as it is sent; every try sends the same bytes, so that at most one of them can be stored."""

    session: str
    route: Route
    subject: str
    block: bytes
    writer: str
    body: bytes
    after: Tail
    kind: Kind
    pending: Pending
    dedupe: str | None


class NatsLog:
    """`agentrun.broker.SessionLog` on JetStream."""

    def __init__(self, core: Core, reader: Reader) -> None:
        self._core = core
        self._reader = reader
        self._writer = os.urandom(4).hex()
        self._calls = itertools.count(1)

    async def last(self, session: str, *, fresh: bool = False) -> Tail:
        """See `SessionLog.last`."""
        route = self._core.route(session)
        tail = await self._reader.tail(route, leader=fresh)
        if fresh:
            await self._reader.confirm(route)
        return tail

    async def append(
        self,
        session: str,
        body: bytes,
        *,
        kind: Kind,
        after: Tail,
        pending: Pending,
        agent: str | None = None,
        dedupe: str | None = None,
        timeout: float = 30.0,
    ) -> Tail:
        """See `SessionLog.append`."""
        call = self._prepare(session, body, kind, after, pending, agent, dedupe)
        if after.pending.running and after.kind is not Kind.DELTA:
            await self._check_age(call)
        deadline = time.monotonic() + timeout
        wait, pause = _FIRST_TRY, _FIRST_PAUSE
        doubt = False
        """Whether an earlier try may have been stored, or may yet be."""
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Unavailable(f"no outcome of an append to session {session} in {timeout} s: {self._why()}")
            try:
                reply = await self._core.appends.exchange(
                    call.subject, call.body, timeout=min(wait, left), block=call.block
                )
            except NotConnected:
                if self._core.appends.client.is_closed:
                    raise Unavailable(self._core.appends.gone) from None
            else:
                end = await self._outcome(call, reply, doubt)
                if end is not None:
                    return end
                doubt = doubt or reply is None
                wait = min(wait * 2, _LONGEST_TRY)
            await anyio.sleep(min(pause * random.uniform(0.5, 1.0), max(deadline - time.monotonic(), 0)))  # noqa: S311
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _why(self) -> str:
        return "no answer" if self._core.appends.connected else self._core.appends.gone

    def _prepare(
        self,
        session: str,
        body: bytes,
        kind: Kind,
        after: Tail,
        pending: Pending,
        agent: str | None,
        dedupe: str | None,
    ) -> _Append:
        layout = self._core.found
        check_record(kind, agent, body, layout.max_body)
        route = self._core.route(session)
        subject = f"{route.base}.{kind.value}"
        if kind is Kind.TURN and agent is not None:
            subject = f"{subject}.{check_id('agent', agent)}"
        writer = f"{self._writer}-{next(self._calls):x}"
        # By hand, since this runs for every token.
        block = (
            f"NATS/1.0\r\n{EXPECTED}: {after.cursor}\r\n{EXPECTED_SUBJECT}: {route.all}\r\n"
            f"{OFFSET}: {after.next}\r\n{WRITER}: {writer}\r\n"
        )
        kept = 0 if after.offset == 0 else after.kept
        if kept is not None:
            block += f"{KEPT}: {kept}\r\n"
        if pending:
            block += f"{PENDING}: {_pending_text(pending)}\r\n"
        if kind is Kind.DELTA:
            block += f"Nats-TTL: {layout.ttl_header}\r\n"
        if dedupe is not None:
            if not (0 < len(dedupe) <= 256 and dedupe.isascii() and dedupe.isprintable() and dedupe.strip() == dedupe):
                raise InvalidInput(f"a dedupe key is 1 to 256 printable ASCII characters, not {dedupe[:80]!r}")
            block += f"Nats-Msg-Id: {session}:{dedupe}\r\n"
        encoded = f"{block}\r\n".encode("ascii")
        return _Append(session, route, subject, encoded, writer, body, after, kind, pending, dedupe)

    def _stored(self, call: _Append, seq: int) -> Tail:
        # The time is our reading of the server's clock; the record's own is in it for whoever reads it.
        after = call.after
        kept = (0 if after.offset == 0 else after.kept) if call.kind is Kind.DELTA else after.next
        return Tail(after.next, call.pending, seq, self._core.now(), 0, call.kind, kept)

    async def _check_age(self, call: _Append) -> None:
        # D9: compare-and-set cannot see deltas that were stored after this end and have expired. An end that is old
        # enough for that is refused unless it was read recently (its `lost` says up to when).
        after, ttl = call.after, self._core.found.delta_ttl
        if self._core.now() - after.time - after.lost / 1000 < ttl / 2:
            return
        tail = await self._reader.tail(call.route, leader=True)
        if tail.cursor == after.cursor and tail.lost - after.lost > (ttl - 1) * 1000:
            raise Conflict(f"deltas may have been stored behind offset {after.offset}, and have expired", tail)

    async def _outcome(self, call: _Append, reply: Msg | None, doubt: bool) -> Tail | None:
        """The new end, or None: send it again (or for the first time)."""
        if reply is None or status(reply):
            return None
        ack = _decode_ack(reply.data)
        error = ack.error
        if error is None:
            return await self._duplicate(call, ack.seq) if ack.duplicate else self._stored(call, ack.seq)
        if error.err_code == WRONG_LAST:
            return await self._moved_on(call, doubt)
        if error.err_code == TOO_LARGE:
            raise TooLarge(len(call.body), self._core.found.max_body)
        if error.err_code in IN_FLIGHT or error.code >= 500:
            return None
        raise Misconfigured(f"stream {call.route.stream} refuses a record: {error.description} ({error.err_code})")

    async def _duplicate(self, call: _Append, seq: int) -> Tail:
        assert call.dedupe is not None
        first = await self._reader.get(call.route, {"seq": seq}, leader=True)
        if first is None:
            await self._reader.confirm(call.route)
            raise SessionGone(f"{call.dedupe!r} was stored in session {call.session}, and deleted since")
        if first.headers.get(WRITER) == call.writer:
            return self._stored(call, seq)
        raise Duplicate(call.dedupe, first.offset)

    async def _moved_on(self, call: _Append, doubt: bool) -> Tail | None:
        if doubt:
            query = {"seq": call.after.cursor + 1, "next_by_subj": call.route.all}
            first = await self._reader.get(call.route, query, leader=True)
            if first is not None and first.headers.get(WRITER) == call.writer:
                return self._stored(call, first.seq)
        tail = await self._reader.tail(call.route, leader=True)
        if tail.cursor == call.after.cursor and tail.offset == call.after.offset:
            return None
        raise Conflict(f"session {call.session} is at offset {tail.offset}, not {call.after.offset}", tail)

    async def read(self, session: str, *, after: int = 0, deltas: bool = True, limit: int = 1000) -> Sequence[Record]:
        """See `SessionLog.read`."""
        route = self._core.route(session)
        ends: Sequence[Stored] | None = await self._reader.ends(route)
        place = await self._reader.seek(route, after, ends)
        out: list[Record] = []
        while len(out) < limit:
            # Some more, since the search may begin that much too early.
            page = await self._reader.page(route, place, limit - len(out) + NEAR, deltas=deltas, ends=ends)
            out += [r for r in page.records if r.offset > after]
            if page.complete:
                break
            place, ends = page.next, None
        return out[:limit]

    def follow(
        self, session: str, *, after: int = 0, deltas: bool = True, cursor: int = 0
    ) -> AbstractAsyncContextManager[AsyncIterator[Sequence[Record]]]:
        """See `SessionLog.follow`."""
        route = self._core.route(session)
        return Follower(self._reader, self._core.reads, route, session, after, cursor, deltas)

    async def delete(self, session: str) -> None:
        """See `SessionLog.delete`."""
        route = self._core.route(session)
        reply = await self._core.reads.api(f"STREAM.PURGE.{route.stream}", {"filter": route.all})
        if isinstance(reply, ApiError):
            raise Unavailable(f"session {session} was not deleted: {reply.description}")
