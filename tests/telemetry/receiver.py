"""What collectors have a port for: OTLP over HTTP, kept for a test to look at."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self, cast

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from tests.telemetry.trees import tree

PATIENCE = 20.0


class Receiver:
    """An OTLP receiver at a free port, a context manager. Its threads are its own.

    Attributes:
        spans: What came, in order, from all processes.
        metrics: The last that came of each, by process (``service.instance.id``) and name.
        encodings: ``content-encoding`` and path of each request.
    """

    def __init__(self, *, hangs: bool = False) -> None:
        self.spans: list[ReadableSpan] = []
        self.metrics: dict[tuple[str, str], Metric] = {}
        self.encodings: set[tuple[str, str]] = set()
        self.requests = 0
        self._hangs = hangs
        self._over = threading.Event()
        self._moved = threading.Condition()
        self._server = _Server(("127.0.0.1", 0), self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        """The endpoint of all signals."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def take(self, path: str, encoding: str, body: bytes) -> None:
        with self._moved:
            self.requests += 1
            self._moved.notify_all()
        if self._hangs:
            self._over.wait()
            return
        if encoding == "gzip":
            body = gzip.decompress(body)
        with self._moved:
            self.encodings.add((encoding, path))
            if path == "/v1/traces":
                self.spans += _spans_in(ExportTraceServiceRequest.FromString(body))
            elif path == "/v1/metrics":
                self._measured(ExportMetricsServiceRequest.FromString(body))
            self._moved.notify_all()

    def _measured(self, request: ExportMetricsServiceRequest) -> None:
        for resource in request.resource_metrics:
            who = str(_attributes(resource.resource.attributes).get("service.instance.id"))
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    self.metrics[who, metric.name] = metric

    # -------------------------------------------------------------------------------------------- what a test asks

    def until(self, done: Any, timeout: float = PATIENCE) -> None:
        """Wait until ``done()`` holds."""
        end = time.monotonic() + timeout
        with self._moved:
            while not done():
                left = end - time.monotonic()
                assert left > 0, f"it did not come; there are {sorted({span.name for span in self.spans})}"
                self._moved.wait(left)

    def of(self, traces: Iterable[int]) -> list[ReadableSpan]:
        """The spans of some traces."""
        wanted = set(traces)
        with self._moved:
            return [span for span in self.spans if span.context and span.context.trace_id in wanted]

    def tree(self, traces: Iterable[int], spans: int) -> str:
        """These traces as a tree of text, once so many spans of them have come."""
        traces = list(traces)
        try:
            self.until(lambda: len(self.of(traces)) >= spans)
        except AssertionError:
            return tree(self.of(traces))  # which says more than that something is missing
        return tree(self.of(traces))

    def counted(self, name: str, who: str) -> dict[tuple[tuple[str, object], ...], float]:
        """What a process last said of a counter, by its attributes."""
        with self._moved:
            metric = self.metrics.get((who, name))
        if metric is None:
            return {}
        return {
            tuple(sorted(_attributes(point.attributes).items())): point.as_int or point.as_double
            for point in metric.sum.data_points
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = False

    def __init__(self, address: tuple[str, int], receiver: Receiver) -> None:
        super().__init__(address, _Handler)
        self.receiver = receiver

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A process that is killed in mid-sentence is no error of the receiver's."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60.0
    server: _Server

    def do_POST(self) -> None:
        self.close_connection = True  # so that no thread waits for another request
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.receiver.take(self.path, self.headers.get("content-encoding", ""), body)
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", "0")
        self.send_header("connection", "close")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""


# ------------------------------------------------------------------------------------------ protobuf as the SDK has it


def _spans_in(request: ExportTraceServiceRequest) -> list[ReadableSpan]:
    return [
        _span(span, Resource(_attributes(resource.resource.attributes)))
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _span(span: trace_pb2.Span, resource: Resource) -> ReadableSpan:
    return ReadableSpan(
        span.name,
        context=_context(span.trace_id, span.span_id),
        parent=_context(span.trace_id, span.parent_span_id) if span.parent_span_id else None,
        resource=resource,
        attributes=_attributes(span.attributes),
        events=[Event(event.name, _attributes(event.attributes), event.time_unix_nano) for event in span.events],
        links=[Link(_context(link.trace_id, link.span_id), _attributes(link.attributes)) for link in span.links],
        kind=SpanKind(span.kind - 1),
        status=Status(StatusCode(span.status.code)),
        start_time=span.start_time_unix_nano,
        end_time=span.end_time_unix_nano,
    )


def _context(trace: bytes, span: bytes) -> SpanContext:
    return SpanContext(int.from_bytes(trace), int.from_bytes(span), True, TraceFlags(1))


def _attributes(pairs: Sequence[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return tuple(_value(item) for item in value.array_value.values)
    return getattr(value, cast("str", kind))
