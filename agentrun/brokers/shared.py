"""What the parts of a broker with a server share, whatever the server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from anyio.abc import TaskGroup

from agentrun.background import Background
from agentrun.brokers.clock import ServerClock
from agentrun.errors import Misconfigured


class Partitioned(Protocol):
    """What was found at a server: each broker has its own."""

    @property
    def partitions(self) -> int:
        """Over how many partitions the sessions are spread."""
        ...


LayoutT = TypeVar("LayoutT", bound=Partitioned)


@dataclass(kw_only=True)
class Shared(Generic[LayoutT]):
    """The state of one broker's connection to a server."""

    namespace: str
    lease_ttl: float
    layout: LayoutT | None = None
    """What was found there; None: nothing yet, or nobody looked."""
    clock: ServerClock = field(default_factory=ServerClock)
    tasks: Background = field(default_factory=Background)

    @property
    def found(self) -> LayoutT:
        """The layout.

        Raises:
            Misconfigured: There is none yet.
        """
        if self.layout is None:
            raise Misconfigured(f"namespace {self.namespace} is not set up (or not checked): run `agentrun setup`")
        return self.layout

    @property
    def background(self) -> TaskGroup:
        """Where tasks run that outlive a call.

        Raises:
            RuntimeError: The broker is not open.
        """
        if not self.tasks.running:
            raise RuntimeError("the broker is not open: use it inside `async with`")
        return self.tasks.group
