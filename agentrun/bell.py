"""Waking many at once, cheaply."""

from __future__ import annotations

import asyncio

__all__ = ["Bell", "Ear"]

_LATE = 0.002
"""Timers are precise to a millisecond, either way. One that rang too early would be set anew over and over."""


class Bell:
    """Wakes all who listen to it.

    An event and a cancel scope for each wait do the same, at many times the cost: for a reader of many streams, or many
    readers of one, most of what a token costs.
    """

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: dict[Ear, None] = {}

    def ring(self) -> None:
        """Wake those who wait now."""
        if self._waiting:
            waiting, self._waiting = self._waiting, {}
            for ear in waiting:
                ear._wake(True)  # pyright: ignore[reportPrivateUsage]


class Ear:
    """One who listens to a bell, time and again. Most waits are short, so the timer is kept from one to the next."""

    __slots__ = ("_bell", "_future", "_timer", "_timer_at", "_until")

    def __init__(self, bell: Bell) -> None:
        self._bell = bell
        self._future: asyncio.Future[bool] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._until = 0.0

    async def wait(self, seconds: float) -> bool:
        """Wait for the next ring, for so many seconds at most; return whether it rang. One wait at a time."""
        loop = asyncio.get_running_loop()
        self._until = loop.time() + seconds
        if self._timer is None or self._timer_at > self._until:
            self._start(loop)
        self._future = loop.create_future()
        waiting = self._bell._waiting  # pyright: ignore[reportPrivateUsage]
        waiting[self] = None
        try:
            return await self._future
        finally:
            self._future = None
            self._bell._waiting.pop(self, None)  # pyright: ignore[reportPrivateUsage]

    def close(self) -> None:
        """Stop the timer; not needed for anything but the memory it holds."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        self.close()
        self._timer_at = self._until
        self._timer = loop.call_at(self._until + _LATE, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._future is not None:
            if loop.time() >= self._until:
                self._wake(False)
            else:
                self._start(loop)

    def _wake(self, rang: bool) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(rang)
