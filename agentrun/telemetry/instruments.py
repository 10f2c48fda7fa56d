"""The instruments of `agentrun.telemetry.names`, made once for each meter provider."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import metrics
from opentelemetry.context import Context
from opentelemetry.metrics import CallbackOptions, Counter, Histogram, Meter, Observation

from agentrun.telemetry.names import METRICS, SCOPE, Attr, Metric
from agentrun.telemetry.spans import lost

__all__ = ["AgentCounts", "Instruments", "Levels", "Tally"]

Levels = Callable[[], Iterable[tuple[float, Mapping[str, str]]]]
"""Tells what a gauge stands at, each value with its attributes. Called from any thread."""


class Tally:
    """A count that is read when it is collected: adding to it is an addition. Added to by one thread."""

    __slots__ = ("attributes", "value")

    def __init__(self, attributes: Mapping[str, str]) -> None:
        self.attributes = attributes
        self.value = 0


class AgentCounts:
    """What is counted of the turns of one agent, made once for all of them.

    Attributes:
        attributes: What tells the agent apart.
        turns: By how they ended.
        attempts: By how they ended.
        tokens: Tokens stored.
        appends: Records appended.
        bytes: Their bytes.
        text: The characters of text among these.
    """

    def __init__(self, instruments: Instruments, agent: str) -> None:
        self.attributes = {Attr.AGENT: agent}
        self.turns = _Outcomes(instruments, "turns", self.attributes)
        self.attempts = _Outcomes(instruments, "attempts", self.attributes)
        self.tokens = instruments.tally("tokens", self.attributes)
        self.appends = instruments.tally("appends", self.attributes)
        self.bytes = instruments.tally("append_bytes", self.attributes)
        self.text = instruments.tally("text_bytes", self.attributes)


class _Outcomes(dict[str, Tally]):
    """A count for each outcome; those that there may be are there from the beginning."""

    def __init__(self, instruments: Instruments, key: str, attributes: Mapping[str, str]) -> None:
        super().__init__()
        self._instruments = instruments
        self._key = key
        self._attributes = attributes
        for outcome in METRICS[key].outcomes:
            self[outcome]

    def __missing__(self, outcome: str) -> Tally:
        tally = self[outcome] = self._instruments.tally(self._key, {**self._attributes, Attr.OUTCOME: outcome})
        return tally


class Instruments:
    """All instruments of one meter.

    Args:
        provider: Where what is measured goes; None for the one that is set for the process.
        version: Ours.
    """

    def __init__(self, provider: metrics.MeterProvider | None, version: str) -> None:
        self._provider = provider
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        self._levels: dict[str, list[Levels]] = {}
        self._tallies: dict[str, dict[tuple[tuple[str, str], ...], Tally]] = {}
        self._agents: dict[str, AgentCounts] = {}
        meter = metrics.get_meter(SCOPE, version, meter_provider=provider)
        for key, metric in METRICS.items():
            self._make(meter, key, metric)

    def _make(self, meter: Meter, key: str, metric: Metric) -> None:
        name, unit, text = metric.name, metric.unit, metric.help
        match metric.kind:
            case "event counter":
                self._counters[key] = meter.create_counter(name, unit, text)
            case "histogram":
                self._histograms[key] = meter.create_histogram(
                    name, unit, text, explicit_bucket_boundaries_advisory=metric.buckets
                )
            case "counter":
                tallies = self._tallies[key] = {}
                meter.create_observable_counter(name, [_sums(tallies)], unit, text)
            case "gauge":
                levels = self._levels[key] = []
                meter.create_observable_gauge(name, [_readings(levels)], unit, text)

    @property
    def enabled(self) -> bool:
        """Whether anybody collects; if not, what costs something need not be done."""
        used = self._provider or metrics.get_meter_provider()
        return not type(used).__module__.startswith("opentelemetry.metrics")  # the API's own collect nothing

    def add(self, key: str, attributes: Mapping[str, str]) -> None:
        """Count an event."""
        self._add(key, 1, attributes)

    def expect(self, key: str, attributes: Mapping[str, str]) -> None:
        """Let a count stand at 0 from the beginning, of each outcome: only then is the first event an increase."""
        for outcome in METRICS[key].outcomes:
            self._add(key, 0, {**attributes, Attr.OUTCOME: outcome})
        if not METRICS[key].outcomes:
            self._add(key, 0, attributes)

    def _add(self, key: str, count: int, attributes: Mapping[str, str]) -> None:
        try:
            self._counters[key].add(count, attributes)
        except Exception:
            lost(METRICS[key].name)

    def record(
        self,
        key: str,
        value: float,
        attributes: Mapping[str, str | int] | None = None,
        context: Context | None = None,
    ) -> None:
        """Record an observation of a histogram; one that a clock set back made negative counts as 0.

        It leads to the span of ``context``, default the current one.
        """
        try:
            self._histograms[key].record(max(value, 0.0), attributes, context)
        except Exception:
            lost(METRICS[key].name)

    def of(self, agent: str) -> AgentCounts:
        """Return the counts of an agent's turns; they stand at 0 from the first call on."""
        counts = self._agents.get(agent)
        if counts is None:
            counts = self._agents[agent] = AgentCounts(self, agent)
        return counts

    def tally(self, key: str, attributes: Mapping[str, str] | None = None) -> Tally:
        """Return the count of these attributes, to be added to."""
        attributes = attributes or {}
        return self._tallies[key].setdefault(tuple(attributes.items()), Tally(attributes))

    @contextmanager
    def observing(self, levels: Mapping[str, Levels]) -> Generator[None]:
        """Let gauges be read while the context is open. What several tell of the same thing is added up."""
        for key, tell in levels.items():
            self._levels[key].append(tell)
        try:
            yield
        finally:
            for key, tell in levels.items():
                self._levels[key].remove(tell)


def _sums(tallies: dict[tuple[tuple[str, str], ...], Tally]) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def observe(options: CallbackOptions) -> Iterator[Observation]:
        for tally in tuple(tallies.values()):
            yield Observation(tally.value, tally.attributes)

    return observe


def _readings(levels: list[Levels]) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def observe(options: CallbackOptions) -> Iterator[Observation]:
        sums: dict[tuple[tuple[str, str], ...], float] = {}
        for tell in tuple(levels):
            for value, attributes in tell():
                at = tuple(attributes.items())
                sums[at] = sums.get(at, 0) + value
        for at, value in sums.items():
            yield Observation(value, dict(at))

    return observe
