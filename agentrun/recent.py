"""The sessions whose turns a worker has just run: their next turn reads only what is new."""

from __future__ import annotations

from collections import OrderedDict

from msgspec import Struct

from agentrun.broker import Record, Tail
from agentrun.history import History

LIMIT = 64 << 20
"""What all of them together may weigh, in bytes; they take about as much memory."""
_OVERHEAD = 500


class Known(Struct, frozen=True):
    """A session as it was folded to ``tail``; ``weight`` is that of its records."""

    history: History
    tail: Tail
    weight: int = 0


NOTHING = Known(History(), Tail())
"""What is known of a session that was not met yet."""


def weight(*bodies: bytes) -> int:
    """What records weigh: their bytes, and something for what is made of each."""
    return sum(len(body) + _OVERHEAD for body in bodies)


class Recent:
    """Folded sessions by their ids; those that were not used for longest are forgotten first.

    What is kept is a hint: whoever uses it sees to it that the log still has the record at its tail (`goes_on`).
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._known: OrderedDict[str, Known] = OrderedDict()
        self._weight = 0

    def get(self, session: str) -> Known | None:
        """What is known of the session."""
        known = self._known.get(session)
        if known is not None:
            self._known.move_to_end(session)
        return known

    def put(self, session: str, known: Known) -> None:
        """Keep what is known, unless it can be of no use: no cursor to tell by, or turns that are under way."""
        self.forget(session)
        if known.tail.cursor == 0 or not known.history.calm:
            return
        self._known[session] = known
        self._weight += known.weight
        while self._weight > self._limit:
            self.forget(next(iter(self._known)))

    def forget(self, session: str) -> None:
        """Drop what is known of the session."""
        known = self._known.pop(session, None)
        if known is not None:
            self._weight -= known.weight


def goes_on(known: Known, first: Record | None) -> bool:
    """Whether ``first`` is the record at the tail. A deleted session that began again has other cursors."""
    return first is not None and (first.offset, first.cursor) == (known.tail.offset, known.tail.cursor)
