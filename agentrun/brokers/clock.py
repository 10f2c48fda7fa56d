"""A server's clock, as well as it is known here."""

from __future__ import annotations

import time

_STEP = 0.5
"""Seconds by which the wall clock must differ from the steady one, from one look to the next, to have been set."""

# One that goes on while the machine sleeps, as the server's does.
_STEADY = getattr(time, "CLOCK_BOOTTIME", None)


class ServerClock:
    """Tells a server's time. The local wall clock is followed where it is slewed, and not where it is set."""

    def __init__(self) -> None:
        self._skew = 0.0
        """The server's clock minus ours, in seconds."""
        self._shift: float | None = None
        """The wall clock minus the steady one, when looked at last."""

    def now(self) -> float:
        """The server's time, in seconds since the epoch."""
        return self._local() + self._skew

    def set(self, server: float) -> None:
        """Learn what time it is at the server now."""
        self._skew = server - self._local()

    def _local(self) -> float:
        wall = time.time()
        shift = wall - (time.monotonic() if _STEADY is None else time.clock_gettime(_STEADY))
        if self._shift is not None and abs(shift - self._shift) > _STEP:
            self._skew -= shift - self._shift
        self._shift = shift
        return wall
