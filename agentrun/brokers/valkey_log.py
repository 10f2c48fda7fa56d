"""The sessions' records in Valkey."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple

from agentrun.broker import Kind, Pending, Record, Tail
from agentrun.brokers.checks import check_record
from agentrun.brokers.valkey_core import MAX_BODY, Core, Stored, code_of, tail_of
from agentrun.brokers.valkey_follow import Follower
from agentrun.brokers.valkey_link import log
from agentrun.brokers.valkey_read import page
from agentrun.brokers.valkey_scripts import APPEND, DELETE, TAIL
from agentrun.errors import Conflict, Duplicate, RecordsLost
from agentrun.wire import check_id

REMEMBERED = 7 * 86400
"""Seconds for which a deletion is told from a loss."""


class _Append(NamedTuple):
    session: str
    after: Tail
    dedupe: str | None


class ValkeyLog:
    """`agentrun.broker.SessionLog` on Valkey."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._writers = itertools.count()

    async def last(self, session: str, *, fresh: bool = False) -> Tail:
        """See `SessionLog.last`. It is the server's own word, and as fresh as the server is."""
        place = self._core.place(session)
        return tail_of(await self._core.run(TAIL, place.key, (place.prefix, session)))

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
        """See `SessionLog.append`.

        Raises:
            RecordsLost: The session's end at the server is before ``after``: it has lost what it had acknowledged.
        """
        check_record(kind, agent, body, MAX_BODY)
        place, found = self._core.place(session), self._core.found
        args = (
            place.prefix,
            session,
            self._core.topics,
            str(after.offset),
            str(after.next - 1),
            str(after.cursor),
            code_of(kind),
            str(pending),
            check_id("agent", agent) if agent is not None else "-",
            dedupe or "",
            str(round(found.dedupe_window * 1000)),
            str(round(found.delta_ttl * 1000)),
            f"{self._core.id}.{next(self._writers):x}",
            body,
        )
        # Sent again under the same writer's name, the script finds its own record.
        reply = await self._core.run(APPEND, place.key, args, patience=timeout)
        return _outcome(_Append(session, after, dedupe), reply)

    async def read(self, session: str, *, after: int = 0, deltas: bool = True, limit: int = 1000) -> Sequence[Record]:
        """See `SessionLog.read`."""
        out: list[Record] = []
        while len(out) < limit:
            at = out[-1].offset if out else after
            found = await page(self._core, session, after=at, deltas=deltas, limit=limit - len(out))
            out += [stored.record for stored in found.records]
            if found.complete:
                break
        return out

    def follow(
        self, session: str, *, after: int = 0, deltas: bool = True, cursor: int = 0
    ) -> AbstractAsyncContextManager[AsyncIterator[Sequence[Record]]]:
        """See `SessionLog.follow`.

        Raises:
            RecordsLost: From the iterator: the server has lost records that were delivered.
        """
        return Follower(self._core, session, after, cursor, deltas)

    async def delete(self, session: str) -> None:
        """See `SessionLog.delete`.

        Raises:
            Unavailable: It was not deleted, or that is not known.
        """
        place = self._core.place(session)
        args = (place.prefix, session, self._core.topics, str(REMEMBERED * 1000))
        # Sent again late, it could remove what began anew meanwhile.
        await self._core.run_unless_done(DELETE, place.key, args)


def _outcome(call: _Append, reply: list[Any]) -> Tail:
    match reply:
        case [b"stored", line]:
            return Stored.parse(line).record.tail
        case [b"duplicate", offset]:
            raise Duplicate(call.dedupe or "", int(offset))
        case [b"lost", given]:
            lost = RecordsLost(call.session, call.after.offset, int(given))
            log.error("%s", lost)
            raise lost
        case [_, *end]:
            tail = tail_of(end)
            raise Conflict(f"session {call.session} is at offset {tail.offset}, not {call.after.offset}", tail)
        case _:
            raise AssertionError(reply)
