"""What a worker is seen to do with a turn: ``process`` and ``invoke_agent`` spans, and what is counted on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import msgspec
from msgspec import Struct
from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind

from agentrun import wire
from agentrun.telemetry import Telemetry
from agentrun.telemetry.context import at, carried, link_to, span_of
from agentrun.telemetry.names import SAMPLE, Attr, Link, SpanEvent
from agentrun.telemetry.spans import Told, lost

__all__ = ["Facts", "Stopped", "Watch", "model_known", "settled", "turn_ended"]

_INVOCATION = context.create_key("agentrun-invocation")
_FAILED = ("failed", "retrying", "fenced", "abandoned")
"""Outcomes of an attempt that are errors."""


class Facts(Struct, frozen=True, kw_only=True):
    """What is known of an attempt when it begins.

    Attributes:
        system: The broker's name.
        worker: Who runs it.
        session: The session's id.
        request: The turn's request.
        attempt: Which attempt it is; 0 where the turn ends without one.
        first: Trace fields of the first attempt, if this is another.
        answers: Trace fields of the answers that woke the turn.
        sent: When the request was stored, in seconds since the epoch by the broker's clock.
        due: When the input that carries the turn was stored, if it can be claimed only once.
        took_over: Whether the attempt before ended without a last word.
    """

    system: str
    session: str
    request: wire.TurnRequested
    worker: str
    attempt: int = 0
    first: Mapping[str, str] = {}
    answers: Sequence[Mapping[str, str]] = ()
    sent: float = 0.0
    due: float | None = None
    took_over: bool = False


class Stopped(NamedTuple):
    """Why an agent is stopped, by whom, and the trace fields of the stop."""

    cause: str
    by: str | None
    fields: Mapping[str, str]


class Watch:
    """Watches one attempt.

    Args:
        telemetry: Where it is told.
        facts: What is known of it.
        clock: Tells the broker's time.
        content: Whether what was asked and said may be told.
    """

    def __init__(
        self, telemetry: Telemetry, facts: Facts, *, clock: Callable[[], float], content: bool = False
    ) -> None:
        self._facts = facts
        self._telemetry = telemetry
        self._metrics = telemetry.instruments
        self._clock = clock
        self._content = content
        self._counts = telemetry.instruments.of(facts.request.agent)
        self._wait: float | None = None
        self._count = 0
        self._first = self._last = 0.0
        self._first_count = 0
        self._stopped = self._claimed = self._ended = False
        sender = span_of(facts.request.trace)
        self._span = _process(telemetry, facts, sender)
        self._context = trace.set_span_in_context(self._span.span, sender)
        self._invoked: tuple[Told, int] | None = None

    @property
    def fields(self) -> dict[str, str]:
        """The attempt's trace fields, for its `TurnStarted`."""
        return carried({}, self._context)

    @property
    def active(self) -> bool:
        """Whether anybody looks: if not, there is no need to tell of each append."""
        return self._metrics.enabled or self._span.span.is_recording()

    def claimed(self) -> None:
        """Take note that the session is ours. An attempt that does not come to this is told to nobody."""
        facts = self._facts
        self._claimed = True
        if facts.due is not None:
            self._wait = max(self._clock() - facts.due, 0.0)
            self._metrics.record("queue_wait", self._wait, self._counts.attributes)
        if facts.took_over:
            self._span.event(SpanEvent.TAKEN_OVER)
            self._metrics.add("takeovers", self._counts.attributes)

    @contextmanager
    def current(self) -> Generator[None]:
        """The attempt as the current span, and as what is logged about."""
        facts = self._facts
        token = context.attach(self._context)
        try:
            with at(facts.session, facts.request.turn, facts.attempt):
                yield
        finally:
            context.detach(token)

    @contextmanager
    def invoking(self, messages: Sequence[Mapping[str, object]]) -> Generator[None]:
        """The agent at work, as the current span: what its author's code and libraries do is below it."""
        facts = self._facts
        attributes: dict[str, str] = {
            Attr.GEN_AI_OPERATION: "invoke_agent",
            Attr.AGENT: facts.request.agent,
            Attr.CONVERSATION: facts.session,
            Attr.TURN: facts.request.turn,
        }
        if self._content:
            attributes |= _content(Attr.INPUT_MESSAGES, messages)
        span = self._telemetry.spans.begin(f"invoke_agent {facts.request.agent}", None, SpanKind.INTERNAL, attributes)
        token = context.attach(context.set_value(_INVOCATION, span, trace.set_span_in_context(span.span)))
        try:
            yield
        except Exception as error:
            span.failed(_kind_of(error))
            if self._content:
                span.raised(error)
            raise
        finally:
            context.detach(token)
            if self._content and not self._ended:
                self._invoked = (span, time.time_ns())  # what it said is known when all of it is stored
            else:
                span.end()

    def appended(self, tokens: int, size: int, text: int) -> None:
        """Take note of a record: its tokens, its bytes, its characters of text."""
        self._counts.appends.value += 1
        self._counts.bytes.value += size
        if not tokens:
            return
        self._counts.tokens.value += tokens
        self._counts.text.value += text
        self._last = time.monotonic()
        if not self._count:
            self._first, self._first_count = self._last, tokens
            self._span.event(SpanEvent.FIRST_TOKEN)
            if self._facts.attempt == 1:
                self._metrics.record("first_token", self._clock() - self._facts.sent, self._counts.attributes)
        self._count += tokens
        if not self._counts.appends.value % SAMPLE:
            self._metrics.record("append_batch", tokens)

    def stopped(self, stop: Stopped) -> None:
        """Take note that the agent is being stopped, and by whom; the first time counts."""
        if not self._stopped:
            self._stopped = True
            _mark_stopped(self._span, stop)

    def close(self) -> None:
        """The attempt is over, with a last word or without: then it was cut off, by an error in the worker, say."""
        if self._claimed and not self._ended:
            self.ended("abandoned")

    def ended(self, outcome: str, *, error: str | None = None, said: wire.Message | None = None) -> None:
        """Take note of how the attempt ended."""
        self._ended = True
        if self._invoked is not None:
            span, when = self._invoked
            if said is not None:
                span.set(_content(Attr.OUTPUT_MESSAGES, said.parts))
            span.end(when)
        _end(self._span, outcome, error, self._count, self._wait)
        self._counts.attempts[outcome].value += 1
        if outcome == "fenced":
            self._metrics.add("fenced", self._counts.attributes)
        if self._count > self._first_count:
            gap = (self._last - self._first) / (self._count - self._first_count)
            self._metrics.record("token_gap", gap, self._counts.attributes)


def turn_ended(telemetry: Telemetry, facts: Facts, outcome: str, *, now: float) -> None:
    """Count a turn's end, at ``now`` by the broker's clock."""
    turns = telemetry.instruments.of(facts.request.agent).turns[outcome]
    turns.value += 1
    if facts.sent:
        telemetry.instruments.record("turn_duration", now - facts.sent, turns.attributes)


def settled(telemetry: Telemetry, facts: Facts, outcome: str, *, now: float, stop: Stopped | None = None) -> None:
    """Tell of a turn that ends without being run: stopped or overdue while it waited, or given up."""
    span = _process(telemetry, facts, span_of(facts.request.trace))
    if stop is not None:
        _mark_stopped(span, stop)
    _end(span, outcome, None, 0)
    turn_ended(telemetry, facts, outcome, now=now)


def model_known(model: str) -> None:
    """Let the span of the agent that is at work say which model it asks."""
    span = context.get_value(_INVOCATION)
    if isinstance(span, Told):
        span.set({Attr.MODEL: model})


def _process(telemetry: Telemetry, facts: Facts, sender: Context) -> Told:
    request = facts.request
    attributes: dict[str, str | int | bool] = {
        Attr.SYSTEM: facts.system,
        Attr.OPERATION: "process",
        Attr.OPERATION_TYPE: "process",
        Attr.DESTINATION: request.agent,
        Attr.MESSAGE_ID: request.turn,
        Attr.AGENT: request.agent,
        Attr.CONVERSATION: facts.session,
        Attr.TURN: request.turn,
        Attr.ON_BUSY: request.on_busy,
        Attr.ATTEMPT: facts.attempt,
        Attr.WORKER: facts.worker,
    }
    if facts.took_over:
        attributes[Attr.TOOK_OVER] = True
    links = [link_to(facts.first, {Attr.LINK: Link.FIRST_ATTEMPT})]
    links += [link_to(fields, {Attr.LINK: Link.ANSWER}) for fields in facts.answers]
    there = [link for link in links if link is not None]
    return telemetry.spans.begin(f"process {request.agent}", sender, SpanKind.CONSUMER, attributes, there)


def _mark_stopped(span: Told, stop: Stopped) -> None:
    attributes = {Attr.STOP_CAUSE: stop.cause}
    if stop.by:
        attributes[Attr.STOP_BY] = stop.by
    span.set(attributes)
    span.event(SpanEvent.STOPPED, attributes)
    span.link(link_to(stop.fields, {Attr.LINK: Link.STOP}))


def _end(span: Told, outcome: str, error: str | None, tokens: int, wait: float | None = None) -> None:
    attributes: dict[str, str | int | float] = {Attr.OUTCOME: outcome, Attr.TOKENS: tokens}
    if wait is not None:
        attributes[Attr.QUEUE_WAIT] = wait
    span.set(attributes)
    if outcome in _FAILED:
        span.failed(error or outcome)
    span.end()


def _content(name: str, what: object) -> dict[str, str]:
    """Return what was asked or said as an attribute; none where it cannot be JSON, nested too deeply say."""
    try:
        return {name: msgspec.json.encode(what).decode()}
    except Exception:
        lost(name)
        return {}


def _kind_of(error: Exception) -> str:
    """Return the code of an author's error, if it has one, else the name of its type."""
    try:
        code: object = getattr(error, "code", None)
    except Exception:  # it is whatever the author wrote
        code = None
    return str(code) if code and isinstance(code, (str, int)) else type(error).__name__
