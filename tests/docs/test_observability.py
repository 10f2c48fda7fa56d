"""The document on traces, metrics and logs says what the code has; the names for Prometheus are what is exported."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import prometheus_client
import pytest
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client.metrics_core import Metric as Family

from agentrun.cli import _telemetry
from agentrun.telemetry import Telemetry
from agentrun.telemetry.context import at
from agentrun.telemetry.instruments import Instruments
from agentrun.telemetry.logs import JsonFormatter
from agentrun.telemetry.names import METRICS, Link, SpanEvent, prometheus_name
from agentrun.telemetry.table import with_table

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "observability.md").read_text()


def section(title: str) -> str:
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_table_of_metrics_is_what_the_code_has() -> None:
    assert with_table(TEXT) == TEXT, "python -m agentrun.telemetry.table docs/observability.md"


def test_the_command_writes_the_table(tmp_path: Path) -> None:
    copy = tmp_path / "observability.md"
    copy.write_text(re.sub(r"^\| `agentrun.turns` .*\n", "", TEXT, flags=re.MULTILINE))
    subprocess.run([sys.executable, "-m", "agentrun.telemetry.table", str(copy)], cwd=ROOT, check=True, timeout=50)
    assert copy.read_text() == TEXT
    with pytest.raises(ValueError, match="<!-- metrics -->"):
        with_table("no place for it")


@pytest.fixture
def exported() -> Iterator[dict[str, Family]]:
    """What Prometheus' exporter makes of an observation of every metric, by its name there."""
    provider = MeterProvider([PrometheusMetricReader()])
    instruments = Telemetry(meter_provider=provider).instruments
    with instruments.observing({key: lambda key=key: [(1, attributes_of(key))] for key in kind_of("gauge")}):
        observe(instruments)
        families = {}
        for family in prometheus_client.REGISTRY.collect():
            name = f"{family.name}_total" if family.type == "counter" else family.name
            families[name] = family
        yield families
    provider.shutdown()


def kind_of(kind: str) -> list[str]:
    return [key for key, metric in METRICS.items() if metric.kind == kind]


def attributes_of(key: str) -> dict[str, str]:
    return dict.fromkeys(METRICS[key].attributes, "x")


def observe(instruments: Instruments) -> None:
    for key in kind_of("event counter"):
        instruments.add(key, attributes_of(key))
    for key in kind_of("counter"):
        instruments.tally(key, attributes_of(key)).value += 1
    for key in kind_of("histogram"):
        instruments.record(key, 1.0, attributes_of(key))


@pytest.mark.parametrize("key", METRICS)
def test_the_name_in_prometheus_is_what_is_exported(exported: dict[str, Family], key: str) -> None:
    metric = METRICS[key]
    family = exported[prometheus_name(metric)]
    assert family.type == metric.kind.removeprefix("event ")
    for sample in family.samples:
        ours = {name for name in sample.labels if not name.startswith("otel_scope_")} - {"le"}
        assert ours == {name.replace(".", "_") for name in metric.attributes}


def test_every_variable_is_told_with_what_it_may_be() -> None:
    source = Path(_telemetry.__file__).read_text()
    rows = section("Switching it on")
    for name in re.findall(r"OTEL_[A-Z_]*[A-Z]", source):
        assert f"`{name}" in rows, name
    for signal, words in _telemetry._KNOWN.items():
        (row,) = re.findall(rf"^\| `OTEL_{signal}_EXPORTER` \|(.*)$", rows, re.MULTILINE)
        assert set(re.findall(r"`(\w+)`", row)) == set(words)


def test_the_lines_for_a_backend_set_up_a_provider() -> None:
    (code, *_) = re.findall(r"```python\n(.*?)```", section("Switching it on"), re.DOTALL)
    code += "from agentrun.telemetry import default\nassert default().enabled\n"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=50)


@pytest.mark.parametrize("name", [*SpanEvent, *Link])
def test_every_span_event_and_link_is_told(name: str) -> None:
    assert f"`{name}`" in section("One trace")


def test_the_keys_of_a_log_line_are_told() -> None:
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "hello", (), (ValueError, ValueError(), None))
    with TracerProvider().get_tracer("x").start_as_current_span("x"), at("s", "t", 1):
        line = json.loads(JsonFormatter().format(record))
    rows = [line.split("|")[1] for line in section("Logs").splitlines() if line.startswith("| `")]
    assert re.findall(r"`(\w+)`", "".join(rows)) == list(line)
