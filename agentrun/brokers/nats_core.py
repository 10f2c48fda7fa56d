"""What the parts of the NATS broker share: connections, what was found there, background tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from anyio.abc import TaskGroup

from agentrun.brokers.clock import ServerClock
from agentrun.brokers.nats_layout import Layout, Route
from agentrun.brokers.nats_link import Link
from agentrun.errors import Misconfigured
from agentrun.wire import check_id

_ROUTES = 10_000


@dataclass
class Core:
    """Shared state of one `NatsBroker`."""

    namespace: str
    lease_ttl: float
    appends: Link
    queue: Link
    reads: Link
    layout: Layout | None = None
    clock: ServerClock = field(default_factory=ServerClock)
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
        """The server's time, as well as we know it."""
        return self.clock.now()

    def forget_routes(self) -> None:
        """After the layout has changed."""
        self._routes.clear()
