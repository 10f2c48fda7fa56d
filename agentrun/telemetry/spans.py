"""The door to OpenTelemetry: whatever fails behind it (a processor, an exporter, an encoder) fails no turn."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping, Sequence

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanKind, Status, StatusCode
from opentelemetry.util.types import AttributeValue

from agentrun.telemetry.names import Attr

__all__ = ["Spans", "Told", "lost"]

log = logging.getLogger("agentrun.telemetry")

_lost: set[str] = set()


def lost(what: str) -> None:
    """Log the exception that is being handled; ``what`` is not told because of it. Loud once for each such thing."""
    level = logging.DEBUG if what in _lost else logging.WARNING
    _lost.add(what)
    log.log(level, "telemetry failed, which changes nothing else; lost: %s", what, exc_info=True)


class Spans:
    """Begins spans.

    Args:
        tracer: Where they go.
    """

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer

    def begin(
        self,
        name: str,
        parent: Context | None,
        kind: SpanKind,
        attributes: Mapping[str, AttributeValue],
        links: Sequence[Link] = (),
    ) -> Told:
        """Begin a span below the one of ``parent``, default the current one. Where it cannot be, that one goes on."""
        try:
            return Told(self._tracer.start_span(name, parent, kind, _fit(attributes), links))
        except Exception:
            lost("the beginning of a span")
            return Told(NonRecordingSpan(trace.get_current_span(parent).get_span_context()))


class Told:
    """A span of ours. Nothing of it fails.

    Attributes:
        span: OpenTelemetry's, to be made the current one.
    """

    __slots__ = ("span",)

    def __init__(self, span: Span) -> None:
        self.span = span

    def set(self, attributes: Mapping[str, AttributeValue]) -> None:
        """Set attributes."""
        try:
            self.span.set_attributes(_fit(attributes))
        except Exception:
            lost("attributes of a span")

    def event(self, name: str, attributes: Mapping[str, AttributeValue] | None = None) -> None:
        """Add an event."""
        try:
            self.span.add_event(name, attributes and _fit(attributes))
        except Exception:
            lost("an event of a span")

    def link(self, link: Link | None) -> None:
        """Add a link, if there is one."""
        if link is None:
            return
        try:
            self.span.add_link(link.context, link.attributes)
        except Exception:
            lost("a link of a span")

    def failed(self, kind: str) -> None:
        """Mark it as an error. Of an error its kind is told, and nothing that may be content."""
        self.set({Attr.ERROR_TYPE: kind})
        try:
            self.span.set_status(Status(StatusCode.ERROR))
        except Exception:
            lost("the status of a span")

    def raised(self, error: Exception) -> None:
        """Tell all of an exception."""
        try:
            text = "".join(traceback.format_exception(error))
            self.span.record_exception(error, _fit({"exception.message": str(error), "exception.stacktrace": text}))
        except Exception:
            lost("an exception")

    def end(self, when: int | None = None) -> None:
        """End it, now or at a time in nanoseconds since the epoch."""
        try:
            self.span.end(when)
        except Exception:
            lost("the end of a span")


def _fit(attributes: Mapping[str, AttributeValue]) -> Mapping[str, AttributeValue]:
    """Return them fit for an exporter: half a character in one of them, and it would drop all spans it has in hand."""
    for value in attributes.values():
        if isinstance(value, str) and not value.isascii():
            break
    else:
        return attributes
    return {
        name: value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
        for name, value in attributes.items()
    }
