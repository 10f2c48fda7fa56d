"""What is seen from outside: spans, metrics, and the context that travels with a turn.

The library uses OpenTelemetry's API only: without a provider every call here does next to nothing. Where a process
begins (`agentrun.cli`) or in a program of yours, a provider of the SDK is set, and everything is there.

One tree for each turn::

    your span → send → process (attempt 1) → invoke_agent → your agent's spans, litellm's …
                     → process (attempt 2), linked to attempt 1 → invoke_agent → …

The context travels in the events themselves (``trace``): no broker needs headers for it, and a turn that was suspended
for a week still belongs to the trace of who sent it. So baggage can be read by all who may read the session.
"""

from __future__ import annotations

import functools
import importlib.metadata

from opentelemetry import metrics, trace

from agentrun.telemetry.instruments import Instruments
from agentrun.telemetry.names import SCOPE
from agentrun.telemetry.spans import Spans

__all__ = ["Telemetry", "default"]


class Telemetry:
    """Spans and a set of instruments. Nothing that is told here, and fails, fails who tells it.

    Args:
        tracer_provider: Where spans go; default is the provider that is set for the process.
        meter_provider: Where metrics go; likewise.
    """

    def __init__(
        self,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
    ) -> None:
        self.version = importlib.metadata.version("agentrun")
        self._tracers = tracer_provider
        self.spans = Spans(trace.get_tracer(SCOPE, self.version, tracer_provider))
        self.instruments = Instruments(meter_provider, self.version)

    @property
    def enabled(self) -> bool:
        """Whether anybody looks, at spans or metrics; if not, what costs something need not be done."""
        used = self._tracers or trace.get_tracer_provider()
        api_only = type(used).__module__.startswith("opentelemetry.trace")  # the API's own record nothing
        return self.instruments.enabled or not api_only


@functools.cache
def default() -> Telemetry:
    """Return the one that uses the providers of the process, also those that are set later."""
    return Telemetry()
