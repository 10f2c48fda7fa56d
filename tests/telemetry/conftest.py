from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Tracer

from agentrun.telemetry import Telemetry
from agentrun.testing import Settings, memory_environments
from tests.telemetry.trees import tree
from tests.worker.fleet import LEASE, Fleet, fleet_on


class Seen:
    """What is exported.

    Attributes:
        tracers: Where spans go.
        telemetry: To be given to what is watched.
        backend: The tracer of the program that sends turns.
    """

    def __init__(self) -> None:
        self.spans = InMemorySpanExporter()
        self.reader = InMemoryMetricReader()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.spans))
        self.telemetry = Telemetry(self.tracers, MeterProvider([self.reader]))
        self.backend: Tracer = self.tracers.get_tracer("backend")

    @property
    def tree(self) -> str:
        return tree(self.spans.get_finished_spans())

    def metrics(self) -> dict[str, dict[tuple[tuple[str, object], ...], float]]:
        """The value of each instrument, by its attributes; of a histogram how many there were."""
        found: dict[str, dict[tuple[tuple[str, object], ...], float]] = {}
        data = self.reader.get_metrics_data()
        for resource in data.resource_metrics if data else ():
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    for point in metric.data.data_points:
                        at = tuple(sorted((point.attributes or {}).items()))
                        value = point.count if hasattr(point, "count") else point.value
                        found.setdefault(metric.name, {})[at] = value
        return found

    def counted(self, name: str) -> dict[tuple[tuple[str, object], ...], float]:
        """What an instrument has counted, without what still stands at 0."""
        return {at: value for at, value in self.metrics().get(name, {}).items() if value}


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
async def fleet(seen: Seen) -> AsyncGenerator[Fleet]:
    """Workers and a client on the broker in memory, all of which are watched."""
    async with (
        memory_environments(Settings(lease_ttl=LEASE)) as environment,
        fleet_on(environment, seen.telemetry) as fleet,
    ):
        yield fleet
