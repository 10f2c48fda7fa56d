"""Why and how a running turn stops."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping

import anyio
from msgspec import Struct


class Cause(enum.IntEnum):
    """Why a turn's agent is stopped; a higher cause overrides a lower one until the turn has ended."""

    DRAIN = 1
    """The worker shuts down and hands the turn over."""
    SUSPEND = 2
    """It waits for an answer; slot and lease are given back."""
    DEADLINE = 3
    """Its time is over."""
    INTERRUPT = 4
    """A later turn with ``on_busy="interrupt"``."""
    ROLLBACK = 5
    """A later turn with ``on_busy="rollback"``."""
    CANCEL = 6
    """Somebody said stop."""
    FENCED = 7
    """Another owner took the session over; nothing more can be said."""

    @property
    def ends(self) -> bool:
        """Whether the turn has ended by it; else another attempt follows."""
        return Cause.DEADLINE <= self <= Cause.CANCEL


class Stop(Struct, frozen=True):
    """One request to stop."""

    cause: Cause
    by: str | None = None
    reason: str | None = None
    trace: Mapping[str, str] = {}
    """Trace context of who stops it."""


class StopSwitch:
    """Stops one agent, at once and for good.

    The scope's cancellation is level-triggered: an agent, or a library under it, that swallows it meets it again at
    its next await. The flag (``stop``) is what is looked at between tokens.
    """

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self.stop: Stop | None = None
        self.changed = anyio.Event()
        self.on_pull: Callable[[Stop], None] | None = None

    def pull(self, stop: Stop) -> None:
        """Stop the agent; of several causes the highest counts, of equal ones the first."""
        if self.stop is None or stop.cause > self.stop.cause:
            self.stop = stop
        self.scope.cancel()
        self.changed.set()
        if self.on_pull is not None:
            self.on_pull(stop)
