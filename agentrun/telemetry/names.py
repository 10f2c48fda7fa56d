"""Every name that leaves this project towards traces and metrics, in one place.

The GenAI conventions still move; what follows them, and what is ours, changes here and nowhere else. `METRICS` is also
what docs/observability.md lists, and what the dashboard and the alerts in ``deploy/`` are checked against.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Literal, NamedTuple

__all__ = [
    "ATTEMPT_OUTCOMES",
    "METRICS",
    "SAMPLE",
    "SCOPE",
    "TURN_OUTCOMES",
    "Attr",
    "Link",
    "Metric",
    "SpanEvent",
    "prometheus_name",
]

SCOPE = "agentrun"
"""Name of the tracer and of the meter."""


class Attr:
    """Attributes of spans and metrics."""

    # Of the conventions for messaging.
    SYSTEM = "messaging.system"
    OPERATION = "messaging.operation.name"
    OPERATION_TYPE = "messaging.operation.type"
    DESTINATION = "messaging.destination.name"
    MESSAGE_ID = "messaging.message.id"
    # Of the conventions for GenAI.
    GEN_AI_OPERATION = "gen_ai.operation.name"
    AGENT = "gen_ai.agent.name"
    CONVERSATION = "gen_ai.conversation.id"
    MODEL = "gen_ai.request.model"
    INPUT_MESSAGES = "gen_ai.input.messages"
    OUTPUT_MESSAGES = "gen_ai.output.messages"
    # General ones.
    ERROR_TYPE = "error.type"
    USER = "enduser.id"
    HTTP_METHOD = "http.request.method"
    HTTP_ROUTE = "http.route"
    HTTP_STATUS = "http.response.status_code"
    URL_PATH = "url.path"
    URL_SCHEME = "url.scheme"
    # Ours.
    TURN = "agentrun.turn"
    OFFSET = "agentrun.offset"
    ATTEMPT = "agentrun.attempt"
    WORKER = "agentrun.worker"
    ON_BUSY = "agentrun.on_busy"
    QUEUE_WAIT = "agentrun.queue.wait"
    TOKENS = "agentrun.tokens"
    OUTCOME = "agentrun.outcome"
    STOP_CAUSE = "agentrun.stop.cause"
    STOP_BY = "agentrun.stop.by"
    RECEIPT = "agentrun.receipt"
    REQUEST = "agentrun.request"
    TOOK_OVER = "agentrun.took_over"
    KIND = "agentrun.kind"
    LINK = "agentrun.link"
    """On a link: what it leads to; see `Link`."""


class Link(enum.StrEnum):
    """What a span's link leads to."""

    FIRST_ATTEMPT = "first_attempt"
    ANSWER = "answer"
    STOP = "stop"


class SpanEvent(enum.StrEnum):
    """Moments within a span. There is none for each token."""

    FIRST_TOKEN = "agentrun.first_token"  # noqa: S105
    STOPPED = "agentrun.stopped"
    TAKEN_OVER = "agentrun.taken_over"


class Metric(NamedTuple):
    """One instrument.

    Attributes:
        name: As OpenTelemetry has it.
        kind: ``counter`` and ``gauge`` are read when they are collected, so that counting costs an addition;
            ``event counter`` is for what is rare.
        unit: UCUM; a word in braces is a count of that.
        help: What it means.
        attributes: What it is told apart by.
        buckets: Of a histogram, in its unit.
        outcomes: Of a counter that is told apart by `Attr.OUTCOME`: those that there may be.
    """

    name: str
    kind: Literal["event counter", "counter", "gauge", "histogram"]
    unit: str
    help: str
    attributes: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    outcomes: tuple[str, ...] = ()


# Finest where most of what is measured lies, and on to where a timeout ends it.
_APPEND = (
    0.0002,
    0.0005,
    0.001,
    0.002,
    0.003,
    0.005,
    0.0075,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
)
_REQUEST = (0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_GAP = (0.002, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0, 3600.0)
_WAIT = (0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 3600.0)
_TURN = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 3600.0)
_SIZES = (1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0, 34.0, 55.0, 100.0, 250.0, 1000.0)

SAMPLE = 64
"""Of so many appends of tokens one is timed: an observation costs ten microseconds, all else of an append one."""


_ENDS = ("completed", "cancelled", "failed", "expired")
TURN_OUTCOMES = (*_ENDS, "consumed", "rejected")
"""How turns end: as their last event says, or without being run."""
ATTEMPT_OUTCOMES = (*_ENDS, "suspended", "retrying", "released", "fenced", "abandoned")
"""How attempts end."""
_SEND_OUTCOMES = ("ok", "IdTaken", "InvalidInput", "QueueFull", "SessionBusy", "TooLarge", "Unavailable")

_MEANING = {
    "consumed": "by a running turn that it steers",
    "rejected": "it cannot be used",
    "released": "handed over by a worker that drains",
    "fenced": "another worker took over",
    "abandoned": "cut off by an error in the worker",
}


def _list(outcomes: Sequence[str]) -> str:
    *most, last = [f"{name} ({_MEANING[name]})" if name in _MEANING else name for name in outcomes]
    return f"{', '.join(most)} or {last}"


class _Metrics:
    """The instruments, by the names that code has for them."""

    # What workers say.
    turns = Metric(
        "agentrun.turns",
        "counter",
        "{turn}",
        f"Turns that ended, by how: {_list(TURN_OUTCOMES)}.",
        (Attr.AGENT, Attr.OUTCOME),
        outcomes=TURN_OUTCOMES,
    )
    turn_duration = Metric(
        "agentrun.turn.duration",
        "histogram",
        "s",
        "From the request's being stored to the turn's end, waiting and all attempts included.",
        (Attr.AGENT, Attr.OUTCOME),
        _TURN,
    )
    attempts = Metric(
        "agentrun.attempts",
        "counter",
        "{attempt}",
        f"Attempts that ended, by how: {_list(ATTEMPT_OUTCOMES)}.",
        (Attr.AGENT, Attr.OUTCOME),
        outcomes=ATTEMPT_OUTCOMES,
    )
    queue_wait = Metric(
        "agentrun.queue.wait",
        "histogram",
        "s",
        "From an input's being stored to the claim by a worker: of a turn's request, or of the answer that woke it.",
        (Attr.AGENT,),
        _WAIT,
    )
    first_token = Metric(
        "agentrun.time_to_first_token",
        "histogram",
        "s",
        "From the request's being stored to the first token's being stored, of first attempts.",
        (Attr.AGENT,),
        _FIRST,
    )
    token_gap = Metric(
        "agentrun.time_between_tokens",
        "histogram",
        "s",
        "Time between two tokens, the mean of an attempt; recorded once for each attempt with two tokens or more.",
        (Attr.AGENT,),
        _GAP,
    )
    takeovers = Metric(
        "agentrun.takeovers",
        "event counter",
        "{takeover}",
        "Attempts that began where another worker's had ended without a last word: it died, or was cut off.",
        (Attr.AGENT,),
    )
    fenced = Metric(
        "agentrun.fenced",
        "event counter",
        "{attempt}",
        "Attempts of this worker that were fenced off: another owns the session, and what they appended was refused.",
        (Attr.AGENT,),
    )
    tokens = Metric("agentrun.tokens", "counter", "{token}", "Tokens stored, as agents emitted them.", (Attr.AGENT,))
    appends = Metric(
        "agentrun.appends",
        "counter",
        "{record}",
        "Records that turns appended. Tokens per append: how many are merged into one record.",
        (Attr.AGENT,),
    )
    append_bytes = Metric(
        "agentrun.append.bytes",
        "counter",
        "By",
        "Bytes of those records. Divided by agentrun.text.bytes: the write amplification.",
        (Attr.AGENT,),
    )
    text_bytes = Metric(
        "agentrun.text.bytes", "counter", "By", "Characters of text among them, counted as a byte each.", (Attr.AGENT,)
    )
    append_batch = Metric(
        "agentrun.append.batch",
        "histogram",
        "{token}",
        f"Tokens merged into one record; of one append of tokens in {SAMPLE}.",
        (),
        _SIZES,
    )
    append_duration = Metric(
        "agentrun.append.duration",
        "histogram",
        "s",
        "From an append's being sent to its being acknowledged, by kind of record and outcome; of what workers append. "
        f"Of appends of tokens that succeed, one in {SAMPLE}.",
        (Attr.KIND, Attr.OUTCOME),
        _APPEND,
    )
    running = Metric("agentrun.worker.running", "gauge", "{turn}", "Turns this worker has in hand.", (Attr.AGENT,))
    slots = Metric(
        "agentrun.worker.slots",
        "gauge",
        "{turn}",
        "Turns this worker takes at once; 0 while it drains.",
        (Attr.AGENT,),
    )
    waiting = Metric(
        "agentrun.queue.waiting",
        "gauge",
        "{turn}",
        "The lag: inputs stored and not yet given to a worker, of the whole fleet; looked up every 15 s.",
        (Attr.AGENT,),
    )
    leased = Metric(
        "agentrun.queue.leased",
        "gauge",
        "{turn}",
        "Inputs given to workers and not settled, of the whole fleet; looked up every 15 s.",
        (Attr.AGENT,),
    )
    dead = Metric(
        "agentrun.dead_turns",
        "event counter",
        "{turn}",
        "Turns that gave up and went on the list of dead ones (agentrun dead list).",
        (Attr.AGENT,),
    )
    # What clients say, gateways among them.
    sends = Metric(
        "agentrun.sends",
        "event counter",
        "{turn}",
        "Turns sent, by outcome: ok, or the error's name.",
        (Attr.AGENT, Attr.OUTCOME),
        outcomes=_SEND_OUTCOMES,
    )
    send_duration = Metric(
        "agentrun.send.duration", "histogram", "s", "From the call to the turn's being stored.", (Attr.AGENT,), _APPEND
    )
    cancel_duration = Metric(
        "agentrun.cancel.duration",
        "histogram",
        "s",
        "From a stop to its receipt, by what that says.",
        (Attr.RECEIPT,),
        _REQUEST,
    )
    # What gateways say.
    http_duration = Metric(
        "http.server.request.duration",
        "histogram",
        "s",
        "HTTP requests; of a stream, until its headers are sent.",
        (Attr.HTTP_METHOD, Attr.HTTP_ROUTE, Attr.HTTP_STATUS),
        _REQUEST,
    )
    readers = Metric("agentrun.gateway.readers", "gauge", "{reader}", "Streams, long polls and sockets that read.")
    watched = Metric("agentrun.gateway.sessions", "gauge", "{session}", "Sessions with a subscription at the broker.")
    resumes = Metric("agentrun.gateway.resumes", "counter", "{read}", "Reads that went on from an offset a client had.")
    gaps = Metric(
        "agentrun.gateway.gaps",
        "counter",
        "{event}",
        "Gap events given to readers: records that had expired and that nothing stands for.",
    )
    slow_readers = Metric(
        "agentrun.gateway.slow_readers",
        "counter",
        "{reader}",
        "Readers that fell behind what is kept for them, or were cut off since they took nothing; they resume.",
    )
    events = Metric("agentrun.gateway.events", "counter", "{event}", "Events given to readers.")


METRICS: dict[str, Metric] = {name: value for name, value in vars(_Metrics).items() if isinstance(value, Metric)}
"""All of them, by the name that code has for each."""

_UNITS = {"s": "seconds", "By": "bytes"}


def prometheus_name(metric: Metric) -> str:
    """Return the name under which it is found in Prometheus; of a histogram, without ``_bucket`` and its like."""
    name = metric.name.replace(".", "_")
    unit = _UNITS.get(metric.unit, "")
    if unit and not name.endswith(f"_{unit}"):
        name = f"{name}_{unit}"
    return f"{name}_total" if metric.kind.endswith("counter") else name
