"""Keeps leases alive from a thread of its own, whatever the agents do to the event loop."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Self

from agentrun.broker import Lease

log = logging.getLogger("agentrun.worker")


class Keeper:
    """Extends the leases it holds every third of their time, and watches the event loop.

    A loop blocked for ``report`` seconds is reported once, with what it is doing; after ``limit`` seconds the leases
    are no longer extended, so that other workers take the turns over.

    Args:
        every: Seconds between two extensions.
        report: Seconds.
        limit: Seconds.
    """

    def __init__(self, every: float, *, report: float, limit: float) -> None:
        self._every = every
        self._report = report
        self._limit = limit
        self._leases: set[Lease] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._alive = time.monotonic()
        self.blocked = 0
        """How often the loop was found blocked."""
        self.on_hold: Callable[[], None] | None = None
        """Called when a lease is held from now on."""
        self.given_up = False
        """Whether it has been blocked for so long that the leases are not extended."""

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._alive = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="agentrun-keeper", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def hold(self, lease: Lease) -> None:
        """Extend the lease from now on."""
        with self._lock:
            self._leases.add(lease)
        if self.on_hold is not None:
            self.on_hold()

    def drop(self, lease: Lease) -> None:
        """Stop extending the lease."""
        with self._lock:
            self._leases.discard(lease)

    @property
    def leases(self) -> list[Lease]:
        """What is held now."""
        with self._lock:
            return list(self._leases)

    def _run(self) -> None:
        step = min(self._every, self._report) / 2
        next_extension = time.monotonic() + self._every
        reported = False
        while not self._stop.wait(step):
            now = time.monotonic()
            blocked = now - self._alive
            if blocked < self._report:
                reported = False
            elif not reported:
                reported = True
                self._say_blocked(blocked)
            if now >= next_extension:
                next_extension = now + self._every
                if blocked < self._limit:
                    self._extend()
                    self.given_up = False
                elif not self.given_up:
                    self.given_up = True
                    log.error("the event loop has been blocked for %.0f s: its leases are given up", blocked)
            try:
                self._loop.call_soon_threadsafe(self._mark)
            except RuntimeError:
                return

    def _mark(self) -> None:
        self._alive = time.monotonic()

    def _extend(self) -> None:
        for lease in self.leases:
            try:
                lease.extend()
            except Exception:
                # One lease that cannot be extended must not cost the others.
                log.exception("the lease of session %s could not be extended", lease.session)

    def _say_blocked(self, seconds: float) -> None:
        self.blocked += 1
        frame = sys._current_frames().get(self._loop_thread)  # pyright: ignore[reportPrivateUsage]
        where = "".join(traceback.format_stack(frame, limit=8)) if frame is not None else "unknown\n"
        log.warning(
            "the event loop has been blocked for %.1f s: an agent computes or waits without await (move it to "
            "anyio.to_thread.run_sync). Leases are kept for %.0f s in all. It is at:\n%s",
            seconds,
            self._limit,
            where,
        )
