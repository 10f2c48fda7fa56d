"""What senders are seen to do: turns, answers and stops."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager

from opentelemetry import context, trace
from opentelemetry.trace import SpanKind

from agentrun import wire
from agentrun.telemetry import Telemetry
from agentrun.telemetry.context import carried, span_of
from agentrun.telemetry.names import Attr
from agentrun.telemetry.spans import Told

__all__ = ["answering", "sending", "stopping"]


@contextmanager
def sending(
    telemetry: Telemetry, system: str, session: str, request: wire.TurnRequested, given: Mapping[str, str]
) -> Generator[Told]:
    """The sending of a turn, whose trace fields are set; ``given`` are those of who sends it, if he names any."""
    attributes = {
        Attr.SYSTEM: system,
        Attr.OPERATION: "send",
        Attr.OPERATION_TYPE: "send",
        Attr.DESTINATION: request.agent,
        Attr.MESSAGE_ID: request.turn,
        Attr.AGENT: request.agent,
        Attr.CONVERSATION: session,
        Attr.TURN: request.turn,
        Attr.ON_BUSY: request.on_busy,
    }
    if request.user:
        attributes[Attr.USER] = request.user
    began = time.monotonic()
    outcome = "ok"
    with _span(telemetry, f"send {request.agent}", SpanKind.PRODUCER, attributes, given) as span:
        request.trace = carried(given)
        try:
            yield span
        except Exception as error:
            outcome = type(error).__name__
            raise
        finally:
            telemetry.instruments.add("sends", {Attr.AGENT: request.agent, Attr.OUTCOME: outcome})
            if outcome == "ok":
                took = time.monotonic() - began
                telemetry.instruments.record("send_duration", took, {Attr.AGENT: request.agent})


@contextmanager
def answering(telemetry: Telemetry, system: str, session: str, answer: wire.TurnAnswer) -> Generator[Told]:
    """The answering of a question; the trace fields of the answer are set."""
    attributes = _attributes(system, "answer", session, answer.turn) | {Attr.REQUEST: answer.request}
    with _span(telemetry, "answer", SpanKind.PRODUCER, attributes, {}) as span:
        answer.trace = carried({})
        yield span


@contextmanager
def stopping(telemetry: Telemetry, system: str, session: str, stop: wire.TurnCancel) -> Generator[_Stopping]:
    """The stopping of turns; the trace fields of the stop are set."""
    attributes = _attributes(system, "cancel", session, stop.turn)
    if stop.by:
        attributes[Attr.STOP_BY] = stop.by
    with _span(telemetry, "cancel", SpanKind.CLIENT, attributes, {}) as span:
        stop.trace = carried({})
        yield _Stopping(telemetry, span)


class _Stopping:
    def __init__(self, telemetry: Telemetry, span: Told) -> None:
        self._telemetry = telemetry
        self._span = span

    def receipt(self, status: str, offset: int, took: float) -> None:
        """Say what became of it."""
        self._span.set({Attr.RECEIPT: status, Attr.OFFSET: offset})
        self._telemetry.instruments.record("cancel_duration", took, {Attr.RECEIPT: status})


def _attributes(system: str, operation: str, session: str, turn: str | None) -> dict[str, str]:
    attributes = {
        Attr.SYSTEM: system,
        Attr.OPERATION: operation,
        Attr.OPERATION_TYPE: "send",
        Attr.CONVERSATION: session,
    }
    if turn:
        attributes[Attr.TURN] = turn
    return attributes


@contextmanager
def _span(
    telemetry: Telemetry, name: str, kind: SpanKind, attributes: Mapping[str, str], given: Mapping[str, str]
) -> Generator[Told]:
    """A span as the current one, below the one that ``given`` names, or else below the current one.

    Of an error its type is told, and nothing that may be content.
    """
    parent = span_of(given) if given else context.get_current()
    span = telemetry.spans.begin(name, parent, kind, attributes)
    token = context.attach(trace.set_span_in_context(span.span, parent))
    try:
        yield span
    except BaseException as error:
        span.failed(type(error).__name__)
        raise
    finally:
        context.detach(token)
        span.end()
