"""Providers, as the environment asks for them; the form of log lines."""

from __future__ import annotations

import json
import logging
import socket
import sys

import pytest
from opentelemetry.sdk.trace import TracerProvider

from agentrun.cli import _telemetry
from agentrun.cli.common import Fatal
from agentrun.telemetry.context import at
from agentrun.telemetry.logs import JsonFormatter


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EXPORTER_OTLP_ENDPOINT", "TRACES_EXPORTER", "METRICS_EXPORTER", "SDK_DISABLED"):
        monkeypatch.delenv(f"OTEL_{name}", raising=False)


async def test_nothing_is_set_up_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    async with _telemetry.seen_as("x"):
        pass
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    async with _telemetry.seen_as("x"):
        pass


@pytest.mark.parametrize(
    ("variables", "traces", "metrics"),
    [
        ({}, [], []),
        ({"EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"}, ["otlp"], ["otlp"]),
        ({"EXPORTER_OTLP_TRACES_ENDPOINT": "http://localhost:4318/v1/traces"}, ["otlp"], []),
        ({"EXPORTER_OTLP_ENDPOINT": "http://localhost:4318", "METRICS_EXPORTER": "none"}, ["otlp"], []),
        ({"METRICS_EXPORTER": "prometheus, otlp"}, [], ["prometheus", "otlp"]),
        ({"TRACES_EXPORTER": "otlp", "SDK_DISABLED": "TRUE"}, [], []),
    ],
)
def test_what_the_environment_asks_for(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], traces: list[str], metrics: list[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"OTEL_{name}", value)
    assert _telemetry._asked("TRACES") == traces
    assert _telemetry._asked("METRICS") == metrics


async def test_an_exporter_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(Fatal, match="OTEL_TRACES_EXPORTER is of otlp, none; not zipkin"):
        async with _telemetry.seen_as("x"):
            pass


async def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.metrics", None)
    with pytest.raises(Fatal, match=r"pip install 'agentrun\[otel\]'"):
        async with _telemetry.seen_as("x"):
            pass


async def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("OTEL_METRICS_EXPORTER", "prometheus")
        monkeypatch.setenv("OTEL_EXPORTER_PROMETHEUS_PORT", str(port))
        with pytest.raises(Fatal, match=f"cannot serve metrics at localhost:{port}"):
            async with _telemetry.seen_as("x"):
                pass


def test_a_log_line_names_the_turn_and_the_trace() -> None:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    log = logging.Logger("agentrun.test")
    keep = Keep()
    keep.setFormatter(JsonFormatter())
    log.addHandler(keep)
    log.info("plain %s", "words")
    with TracerProvider().get_tracer("x").start_as_current_span("span") as span, at("s", "t", 2):
        try:
            raise ValueError("no")
        except ValueError:
            log.exception("it failed")
    first, second = map(json.loads, lines)
    assert first.pop("time").endswith("Z")
    assert first == {"level": "info", "logger": "agentrun.test", "message": "plain words"}
    assert (second["session"], second["turn"], second["attempt"]) == ("s", "t", 2)
    assert second["trace_id"] == f"{span.get_span_context().trace_id:032x}"
    assert second["span_id"] == f"{span.get_span_context().span_id:016x}"
    assert second["exception"].endswith("ValueError: no")
