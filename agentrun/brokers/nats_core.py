"""What the parts of the NATS broker share: connections, and where the records of a session are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from agentrun.brokers.nats_layout import Layout, Route
from agentrun.brokers.nats_link import Link
from agentrun.brokers.shared import Shared
from agentrun.wire import check_id

_ROUTES = 10_000


@dataclass(kw_only=True)
class Core(Shared[Layout]):
    """Shared state of one `NatsBroker`."""

    appends: Link
    queue: Link
    reads: Link
    suspect: Callable[[], None] = lambda: None
    """Called where something suggests that the streams are no longer what was found."""
    _routes: dict[str, Route] = field(default_factory=dict[str, Route])

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
