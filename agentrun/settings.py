"""Settings: one frozen struct per kind of process, and the only place where defaults stand."""

from __future__ import annotations

from msgspec import Struct


class WorkerSettings(Struct, frozen=True, kw_only=True):
    """How a worker works. Times are in seconds."""

    concurrency: int = 50
    """Turns of one agent that run at once in this process."""
    lease: float = 30.0
    """Time after which a dead worker's turn is given to another. A lease must outlast a broker failover."""
    drain: float = 60.0
    """Time running turns get to end after SIGTERM; what is left is handed back, uncharged."""
    max_attempts: int = 5
    """Charged attempts after which a turn ends as failed."""
    retry_delay: float = 1.0
    """Wait before the second attempt after an unexpected error; doubles with each, up to 30."""
    cancel_grace: float = 2.0
    """Time a stopped agent gets to clean up before its turn is ended without it."""
    ask_hold: float = 30.0
    """Time a question is waited for with slot and lease kept; after it the turn is suspended."""
    buffer_events: int = 4096
    """Events (tokens) of one turn that may wait for the broker; then the agent is paused."""
    min_gap: float = 0.004
    """Least time between two appends of deltas of one session, so that senders always get in."""
    tick: float = 0.005
    """A busy worker aligns its appends to this tick (see docs/performance.md); 0 switches it off."""
    tick_above: int = 1500
    """Appends per second from which a worker counts as busy."""
    checkpoint: float = 0.4
    """Share of the deltas' time to live after which a long turn's message is stored whole."""
    block_report: float = 2.0
    """Time the event loop may be blocked before that is reported."""
    block_limit: float = 60.0
    """Time the event loop may be blocked before its leases are given up."""


class ClientSettings(Struct, frozen=True, kw_only=True):
    """How a client behaves. Times are in seconds."""

    max_queued: int = 64
    """Unsettled inputs a session may have; one more is refused with QueueFull."""
    cancel_live: float = 0.15
    """Time a running worker gets to answer a stop before the stop is also stored."""
    cancel_wait: float = 5.0
    """Time after which a stop without an outcome is reported as pending."""
    send_timeout: float = 30.0
    """Time after which a send whose outcome cannot be found out is given up."""
