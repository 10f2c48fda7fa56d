"""Reading what is stored of a session: the records that stay and the deltas, joined by their offsets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from agentrun.brokers.valkey_core import Core, Stored
from agentrun.brokers.valkey_scripts import READ
from agentrun.errors import RecordsLost, SessionGone

BYTES = 4 << 20
"""Bytes of one page, about: the server does nothing else while it reads."""


class Page(NamedTuple):
    """Some records, in order. ``complete``: those are all there are."""

    records: list[Stored]
    complete: bool


async def page(core: Core, session: str, *, after: int, cursor: int, deltas: bool, limit: int) -> Page:
    """Records above ``after``.

    Args:
        core: The broker's.
        session: The session's id.
        after: An offset.
        cursor: That of the record at ``after``, if it is known that it was stored; else 0.
        deltas: Whether deltas are wanted.
        limit: How many at most.

    Raises:
        SessionGone: ``cursor`` was given, and the session was deleted since.
        RecordsLost: ``cursor`` was given, and the server has lost that record, or has another one in its place.
    """
    place = core.place(session)
    args = (place.prefix, session, str(after), str(cursor), "1" if deltas else "0", str(limit), str(BYTES))
    what, given, events, events_all, tokens, tokens_all = _padded(await core.run(READ, place.key, args))
    if what == b"gone":
        raise SessionGone(f"session {session} was deleted")
    if what == b"lost":
        raise RecordsLost(session, after, int(given))
    kept, some = [Stored.parse(x) for x in events], [Stored.parse(x) for x in tokens]
    # What comes after the end of an incomplete half may lie between records of the other one.
    through = min(
        int(given) if events_all else kept[-1].record.offset,
        int(given) if tokens_all else some[-1].record.offset,
    )
    found = sorted((s for s in (*kept, *some) if s.record.offset <= through), key=lambda s: s.record.offset)
    complete = bool(events_all and tokens_all) and len(found) <= limit
    return Page(found[:limit], complete)


def _padded(reply: Sequence[object]) -> tuple[bytes, bytes, list[bytes], int, list[bytes], int]:
    what, given, *rest = reply
    events, events_all, tokens, tokens_all = rest or ([], 1, [], 1)
    return what, given, events, events_all, tokens, tokens_all  # type: ignore[return-value]
