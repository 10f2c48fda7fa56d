"""What a gateway is seen to do: a span and a duration for each request, and counts of what readers are given.

A request's trace context and baggage are the current ones while it is handled, so that what it sends, stops or answers
is below it. Of a request its route is told, its path and its status; nothing of its query, which may hold a token, and
nothing of its body.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, Span, SpanKind
from starlette.routing import BaseRoute, Match, Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentrun.telemetry import Telemetry
from agentrun.telemetry.context import read_from
from agentrun.telemetry.instruments import Instruments
from agentrun.telemetry.names import Attr
from agentrun.telemetry.spans import Told

__all__ = ["Counts", "Observed", "context_of"]

_CONTEXT = "agentrun.context"
_METHODS = frozenset(("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"))
_QUIET = ("/healthz", "/readyz")
"""Asked every few seconds by what watches the process: without spans."""
_SWITCHED = 101
_REFUSED = 403
"""What a server makes of a WebSocket that is closed before it is accepted."""


class Counts:
    """What is counted of readers. Counting is an addition.

    Attributes:
        events: Events given to readers.
        gaps: `Gap` events among them.
        resumes: Reads that went on from an offset a client had.
        slow: Readers that fell behind, or were cut off since they took nothing.
    """

    def __init__(self, instruments: Instruments) -> None:
        self.events = instruments.tally("events")
        self.gaps = instruments.tally("gaps")
        self.resumes = instruments.tally("resumes")
        self.slow = instruments.tally("slow_readers")


class Observed:
    """An application whose requests are seen, unless a program around it sees to that: then they are part of its spans.

    A span ends when the headers of the response are sent, or a WebSocket is accepted: a stream that goes on for hours
    holds none. What is sent over a WebSocket is below its handshake.

    Args:
        app: The application.
        routes: Its routes, by which requests are named.
        telemetry: Where it is told.
    """

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute], telemetry: Telemetry) -> None:
        self._app = app
        self._routes = [route for route in routes if isinstance(route, (Route, WebSocketRoute))]
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, as ASGI has it."""
        if scope["type"] not in ("http", "websocket") or _seen_already():
            await self._app(scope, receive, send)
            return
        token = context.attach(_sent_with(scope))
        try:
            if self._telemetry.enabled:
                await self._observe(scope, receive, send)
            else:
                await self._app(scope, receive, send)
        finally:
            context.detach(token)

    async def _observe(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = _Request(self._telemetry, scope, self._route_of(scope))

        async def noting(message: Message) -> None:
            match message["type"]:
                case "http.response.start" | "websocket.http.response.start":
                    request.end(message["status"])
                case "websocket.accept":
                    request.end(_SWITCHED)
                case "websocket.close":
                    request.end(_REFUSED)
                case _:
                    pass
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception as error:
            request.end(500, type(error).__name__)
            raise
        finally:
            request.end(None)  # nobody waits for a response any more

    def _route_of(self, scope: Scope) -> str | None:
        partial: str | None = None
        for route in self._routes:
            match, _ = route.matches(scope)
            if match is Match.FULL:
                return route.path_format
            if match is Match.PARTIAL and partial is None:
                partial = route.path_format
        return partial


class _Request:
    """One request, until its response begins."""

    def __init__(self, telemetry: Telemetry, scope: Scope, route: str | None) -> None:
        self._instruments = telemetry.instruments
        self._scope = scope
        self._began = time.monotonic()
        self._ended = False
        method = scope.get("method", "GET")
        method = method if method in _METHODS else "_OTHER"
        self._attributes: dict[str, str | int] = {Attr.HTTP_METHOD: method}
        name = "HTTP" if method == "_OTHER" else method
        if route is not None:
            # Where it is mounted below a path with parameters, that path names no route.
            mount: str = "" if scope.get("path_params") else scope.get("root_path", "")
            self._attributes[Attr.HTTP_ROUTE] = mount + route
            name = f"{name} {mount}{route}"
        self._span: Told | None = None
        if route not in _QUIET:
            more = {Attr.URL_SCHEME: scope.get("scheme", "http"), Attr.URL_PATH: scope["path"]}
            self._span = telemetry.spans.begin(name, None, SpanKind.SERVER, {**self._attributes, **more})
            self._be_below(self._span.span)

    def end(self, status: int | None, error: str | None = None) -> None:
        """Take note of the response, or that there is none; the first time counts."""
        if self._ended:
            return
        self._ended = True
        if status is not None:
            self._attributes[Attr.HTTP_STATUS] = status
        self._instruments.record("http_duration", time.monotonic() - self._began, self._attributes)
        span, self._span = self._span, None
        if span is None:
            return
        if status is not None:
            span.set({Attr.HTTP_STATUS: status})
            if status >= 500:
                span.failed(error or str(status))
        span.end()
        # Its name is enough for what comes below it: the span itself is not kept for as long as a reader stays.
        self._be_below(NonRecordingSpan(span.span.get_span_context()))

    def _be_below(self, span: Span) -> None:
        here = self._scope[_CONTEXT] = trace.set_span_in_context(span)
        context.attach(here)  # for this request's task alone; what was before it comes back when that ends


def context_of(scope: Scope) -> Context:
    """Return the context that a request was handled in, when it has been; else the current one."""
    return scope.get(_CONTEXT) or context.get_current()


def _seen_already() -> bool:
    """Whether a program around this one has a span for the request, or decided that it is to have none."""
    span = trace.get_current_span()
    there = span.get_span_context()
    return span.is_recording() or (there.is_valid and not there.trace_flags.sampled)


def _sent_with(scope: Scope) -> Context:
    """The context that the request's headers name. A span that was current when the server was started is not meant."""
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        key, text = name.decode("latin-1"), value.decode("latin-1")
        headers[key] = f"{headers[key]},{text}" if key in headers else text
    return read_from(headers, trace.set_span_in_context(trace.INVALID_SPAN))
