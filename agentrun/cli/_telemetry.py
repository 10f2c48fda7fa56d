"""Where a process begins to be seen: providers of OpenTelemetry's SDK, as its own environment variables ask for them.

``OTEL_TRACES_EXPORTER`` (``otlp``, ``none``) and ``OTEL_METRICS_EXPORTER`` (``otlp``, ``prometheus``, ``none``; several
with commas) say what; where only an endpoint is given (``OTEL_EXPORTER_OTLP_ENDPOINT`` or one of a signal's own), it is
``otlp`` for both. ``OTEL_SDK_DISABLED=true`` switches all of it off. Sampling, headers and the resource are the SDK's.
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
from opentelemetry import metrics, trace

from agentrun.cli.common import Fatal

log = logging.getLogger("agentrun.telemetry")

_KNOWN = {"TRACES": ("otlp", "none"), "METRICS": ("otlp", "prometheus", "none")}
_FLUSH = 5.0
"""Seconds that what is left to be exported may hold up the end of a process."""
_PORT = 9464
"""Where Prometheus' exporters of OpenTelemetry listen by its specification."""


@asynccontextmanager
async def seen_as(service: str) -> AsyncGenerator[None]:
    """Let what this process does be seen from outside while the context is open, if the environment asks for that.

    Where a program around this one has set providers already, they are left as they are.

    Raises:
        Fatal: An exporter that is not known, a package that is missing, or a port that is taken.
    """
    traces, measures = _asked("TRACES"), _asked("METRICS")
    if not traces and not measures:
        yield
        return
    ends: list[Callable[[], Any]] = []
    try:
        _start(service, traces, measures, ends)
    except ModuleNotFoundError as error:
        raise Fatal(f"OTEL_… asks for telemetry, which needs {error.name}: pip install 'agentrun[otel]'", 2) from error
    try:
        yield
    finally:
        await _end(ends)


async def _end(ends: Sequence[Callable[[], Any]]) -> None:
    """Let what is left be exported, for a while. A receiver that hangs holds up none of these threads' process."""
    threads = [threading.Thread(target=end, name="agentrun-telemetry-end", daemon=True) for end in ends]
    for thread in threads:
        thread.start()
    with anyio.move_on_after(_FLUSH, shield=True):
        while any(thread.is_alive() for thread in threads):  # noqa: ASYNC110 - a thread has no event
            await anyio.sleep(0.01)


def _asked(signal: str) -> list[str]:
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return []
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    default = "otlp" if any(os.environ.get(name) for name in endpoints) else "none"
    name = f"OTEL_{signal}_EXPORTER"
    found = [word.strip() for word in (os.environ.get(name) or default).split(",") if word.strip()]
    if unknown := [word for word in found if word not in _KNOWN[signal]]:
        raise Fatal(f"{name} is of {', '.join(_KNOWN[signal])}; not {', '.join(unknown)}", 2)
    return [word for word in found if word != "none"]


def _start(service: str, traces: list[str], measures: list[str], ends: list[Callable[[], Any]]) -> None:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # What the environment says of the resource wins.
    resource = Resource({"service.name": service, "service.instance.id": uuid.uuid4().hex}).merge(
        OTELResourceDetector().detect()
    )
    if traces and type(trace.get_tracer_provider()).__module__.startswith("opentelemetry.trace"):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        tracers = TracerProvider(resource=resource, shutdown_on_exit=False)  # it would wait for a minute
        tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        trace.set_tracer_provider(tracers)
        ends.append(tracers.shutdown)
    if measures and type(metrics.get_meter_provider()).__module__.startswith("opentelemetry.metrics"):
        readers: list[MetricReader] = []
        if "otlp" in measures:
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

            readers.append(PeriodicExportingMetricReader(OTLPMetricExporter()))
        if "prometheus" in measures:
            readers.append(_prometheus())
        meters = MeterProvider(readers, resource=resource, shutdown_on_exit=False)
        metrics.set_meter_provider(meters)
        ends.append(meters.shutdown)


def _prometheus() -> Any:
    """Serve ``/metrics`` from a thread of its own, so that it answers whatever the event loop does."""
    import prometheus_client
    from opentelemetry.exporter.prometheus import PrometheusMetricReader

    host = os.environ.get("OTEL_EXPORTER_PROMETHEUS_HOST") or "localhost"
    port = os.environ.get("OTEL_EXPORTER_PROMETHEUS_PORT") or str(_PORT)
    try:
        server, _ = prometheus_client.start_http_server(int(port), host)
    except (OSError, ValueError) as error:
        raise Fatal(
            f"cannot serve metrics at {host}:{port} (OTEL_EXPORTER_PROMETHEUS_HOST, …_PORT): {error}"
        ) from error
    log.info("metrics at http://%s:%d/metrics", host, server.server_address[1])
    return PrometheusMetricReader()
