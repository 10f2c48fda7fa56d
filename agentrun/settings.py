"""Settings: one frozen struct per kind of process, and the only place where defaults stand."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct


class WorkerSettings(Struct, frozen=True, kw_only=True):
    """How a worker works. Times are in seconds."""

    concurrency: int = 50
    """Turns of one agent that run at once in this process."""
    lease: float = 30.0
    """Time after which a dead worker's turn is given to another, at the latest. It must outlast a broker failover."""
    lost_after: float = 2.5
    """Silence after which workers take another one for dead and hand its turns over; 0: only the lease counts."""
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
    trace_content: bool = False
    """Whether traces hold what was asked and answered; without it they hold no word of it."""


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


class GatewaySettings(Struct, frozen=True, kw_only=True):
    """How a gateway serves. Times are in seconds."""

    agent: str | None = None
    """To whom turns go whose sender names no agent. Default: the only one the broker has a queue for."""
    page: bool = False
    """Whether ``/`` is the web page."""
    list_sessions: bool = False
    """Whether ``GET /v1/sessions`` lists what the broker holds; its cost grows with the number of sessions."""
    keep_alive: float = 15.0
    """Silence on a stream after which a comment is sent, so that proxies leave it open."""
    stream_seconds: float = 600.0
    """Time after which a stream ends cleanly and its client resumes, less up to a tenth at random; 0 for never."""
    durable_seconds: float = 60.0
    """The same for SSE in the dialect of Durable Streams, whose clients expect about a minute."""
    retry: float = 0.5
    """What an EventSource is told to wait before it connects again, and up to twice that at random."""
    long_poll: float = 60.0
    """The longest wait a long poll may ask for."""
    send_timeout: float = 30.0
    """Time in which a client must take what is sent to it, or it is disconnected."""
    outage: float = 5.0
    """Time the broker may be away before answers that cannot say so otherwise are broken off."""
    ring_events: int = 2048
    """Events of a watched session kept in memory for its readers."""
    ring_bytes: int = 1 << 20
    """Bytes of a watched session kept in memory for its readers; the newest event is kept whatever its size."""
    linger: float = 5.0
    """Time a session goes on being watched after its last reader has left."""
    max_body: int = 1 << 20
    """Bytes a request may have."""
    max_header: int = 32 << 10
    """Bytes a request's headers may have together."""
    rate: float = 50.0
    """Requests per second of one token, on average."""
    burst: int = 100
    """Requests of one token at once."""
    max_streams: int = 100
    """Streams one token may have open."""
    max_failures: int = 30
    """Requests without a good token that one address may send in a minute."""
    origins: tuple[str, ...] = ()
    """Web origins besides the gateway's own that may use it, such as ``https://app.example``."""
    ai_on_busy: Literal["enqueue", "reject", "interrupt"] = "enqueue"
    """AI SDK: what a new message does while the chat has work, unless it says so itself."""
    ai_version: int = 7
    """AI SDK: the major version of the package ``ai`` of the clients: 5, 6 or 7 (from 7.0.149 on)."""
    ai_static_tools: tuple[str, ...] = ()
    """AI SDK: tools whose parts are ``tool-<name>``; those of all others are ``dynamic-tool``."""
    ai_metadata: bool = True
    """AI SDK: whether a message's metadata tells the tokens it used."""
