"""The table of metrics in docs/observability.md, made of `METRICS`.

``python -m agentrun.telemetry.table docs/observability.md`` writes it anew, between its markers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from agentrun.telemetry.names import METRICS, Metric, prometheus_name

__all__ = ["table", "with_table"]

_BEGIN, _END = "<!-- metrics -->\n", "<!-- /metrics -->\n"


def table() -> str:
    """Return the table, in Markdown."""
    rows = ["| OpenTelemetry | Prometheus | kind | unit | attributes | meaning |", "|---|---|---|---|---|---|"]
    return "\n".join([*rows, *map(_row, METRICS.values())]) + "\n"


def with_table(text: str) -> str:
    """Return a document with what stands between its markers replaced by the table.

    Raises:
        ValueError: The document has no such markers.
    """
    before, begun, rest = text.partition(_BEGIN)
    _, ended, after = rest.partition(_END)
    if not begun or not ended:
        raise ValueError(f"the table has its place between {_BEGIN.strip()} and {_END.strip()}")
    return before + _BEGIN + table() + _END + after


def _row(metric: Metric) -> str:
    attributes = ", ".join(f"`{name}`" for name in metric.attributes)
    kind = metric.kind.removeprefix("event ")
    cells = (f"`{metric.name}`", f"`{prometheus_name(metric)}`", kind, f"`{metric.unit}`", attributes, metric.help)
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
