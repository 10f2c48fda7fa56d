"""Reading what is stored of a session: the records that stay and the deltas, joined by their offsets."""

from __future__ import annotations

from typing import NamedTuple

from agentrun.brokers.valkey_core import Core, Stored
from agentrun.brokers.valkey_scripts import READ
from agentrun.errors import RecordsLost, SessionGone

BYTES = 4 << 20
"""Bytes of one page, about: the server does nothing else while it reads."""


class Page(NamedTuple):
    """Some records, in order. ``complete``: those are all there are; ``first``: the time of the session's first."""

    records: list[Stored]
    complete: bool
    first: int


async def page(
    core: Core, session: str, *, after: int, deltas: bool, limit: int, cursor: int = 0, first: int = 0
) -> Page:
    """Records above ``after``.

    Args:
        core: The broker's.
        session: The session's id.
        after: An offset.
        deltas: Whether deltas are wanted.
        limit: How many at most.
        cursor: That of the record at ``after``, if it is known that it was stored; else 0.
        first: When the session began, if it is known; else 0.

    Raises:
        SessionGone: The session that was known was deleted since.
        RecordsLost: The server has lost what was known, or has another record in its place.
    """
    place = core.place(session)
    wanted = (str(after), str(cursor), "1" if deltas else "0", str(limit), str(BYTES), str(first))
    args = (place.prefix, session, *wanted)
    what, given, began, *halves = await core.run(READ, place.key, args)
    if what == b"gone":
        raise SessionGone(f"session {session} was deleted")
    if what == b"lost":
        raise RecordsLost(session, after, int(given))
    events, events_all, tokens, tokens_all = halves
    kept, some = [Stored.parse(x) for x in events], [Stored.parse(x) for x in tokens]
    # What comes after the end of an incomplete half may lie between records of the other one.
    through = min(
        int(given) if events_all else kept[-1].record.offset,
        int(given) if tokens_all else some[-1].record.offset,
    )
    found = sorted((s for s in (*kept, *some) if s.record.offset <= through), key=lambda s: s.record.offset)
    complete = bool(events_all and tokens_all) and len(found) <= limit
    return Page(found[:limit], complete, int(began))
