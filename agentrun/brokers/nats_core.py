"""What the parts of the NATS broker share: connections, what was found there, background tasks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from anyio.abc import TaskGroup

from agentrun.brokers.nats_layout import Layout, Route
from agentrun.brokers.nats_link import Link
from agentrun.errors import Misconfigured
from agentrun.wire import check_id

_ROUTES = 10_000
_STEP = 0.5
"""Seconds by which the wall clock must differ from the steady one, from one look to the next, to have been set."""

# One that goes on while the machine sleeps, as the server's does.
_STEADY = getattr(time, "CLOCK_BOOTTIME", None)


@dataclass
class Core:
    """Shared state of one `NatsBroker`."""

    namespace: str
    lease_ttl: float
    appends: Link
    queue: Link
    reads: Link
    layout: Layout | None = None
    skew: float = 0.0
    """The server's clock minus ours, in seconds."""
    _shift: float | None = None
    """The wall clock minus the steady one, when looked at last."""
    tasks: TaskGroup | None = None
    suspect: Callable[[], None] = lambda: None
    """Called where something suggests that the streams are no longer what was found."""
    _routes: dict[str, Route] = field(default_factory=dict[str, Route])

    @property
    def found(self) -> Layout:
        """The layout.

        Raises:
            Misconfigured: There is none yet.
        """
        if self.layout is None:
            raise Misconfigured(f"namespace {self.namespace} is not set up (or not checked): run `agentrun setup`")
        return self.layout

    @property
    def background(self) -> TaskGroup:
        """Where tasks run that outlive a call."""
        if self.tasks is None:
            raise RuntimeError("the broker is not open: use it inside `async with`")
        return self.tasks

    def route(self, session: str) -> Route:
        """Where the session's records are; checks the id."""
        route = self._routes.get(session)
        if route is None:
            check_id("session", session)
            if len(self._routes) >= _ROUTES:
                self._routes.clear()
            route = self._routes[session] = self.found.route(session)
        return route

    def now(self) -> float:
        """The server's time, as well as we know it. A wall clock that is slewed is followed, one that is set is not."""
        return self._local_time() + self.skew

    def set_time(self, server: float) -> None:
        """Learn what time it is at the server now."""
        self.skew = server - self._local_time()

    def _local_time(self) -> float:
        wall = time.time()
        shift = wall - (time.monotonic() if _STEADY is None else time.clock_gettime(_STEADY))
        if self._shift is not None and abs(shift - self._shift) > _STEP:
            self.skew -= shift - self._shift
        self._shift = shift
        return wall

    def forget_routes(self) -> None:
        """After the layout has changed."""
        self._routes.clear()
