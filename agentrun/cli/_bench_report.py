"""What benches report: rows of figures, and every count that is not as promised."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from msgspec import Struct, field
from rich.console import Console
from rich.table import Table

Figure = float | int | str | None


class Row(Struct):
    """One case of one bench. A figure's name ends in its unit; None: not measurable here."""

    bench: str
    case: str
    figures: dict[str, Figure]


class Report(Struct):
    """All of it. ``violations`` holds a line for each promise that was seen broken; empty is what is expected."""

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list[Row])
    violations: list[str] = field(default_factory=list[str])
    worker_log: str = ""
    """What the workers had to say; silence is what is expected."""

    def add(self, bench: str, case: str, **figures: Figure) -> None:
        """Add a row."""
        self.rows.append(Row(bench, case, {name: _rounded(value) for name, value in figures.items()}))

    def expect(self, what: str, found: object, expected: object) -> None:
        """Note a violation if ``found`` is not what was promised."""
        if found != expected:
            self.violations.append(f"{what}: {found}, expected {expected}")


def _rounded(value: Figure) -> Figure:
    if not isinstance(value, float):
        return value
    return round(value, 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1)


def quantile(values: Iterable[float], q: float) -> float | None:
    """The value below which the share ``q`` of the values lies (nearest rank); None of no values."""
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)] if ordered else None


def spread(name: str, values: Sequence[float], *, unit: str = "ms") -> dict[str, float | None]:
    """The median and the 99th percentile, as figures."""
    return {f"{name}_p50_{unit}": quantile(values, 0.5), f"{name}_p99_{unit}": quantile(values, 0.99)}


def machine(server: str) -> dict[str, Any]:
    """What the figures are measured on."""
    return {
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "server": server,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def show_machine(console: Console, machine: dict[str, Any]) -> None:
    """Print the line about the machine."""
    console.print(
        f"[dim]{machine['cores']} cores, Python {machine['python']}, {machine['system']}, {machine['server']}, "
        f"load {machine['load']}; one run, expect ±20 %[/dim]"
    )


def show_rows(console: Console, rows: Sequence[Row]) -> None:
    """Print each bench's rows as a table: a column for each case, so that it fits a terminal."""
    for _, group in groupby(rows, lambda row: row.bench):
        _show_table(console, list(group))


def _show_table(console: Console, rows: Sequence[Row]) -> None:
    table = Table(title=rows[0].bench, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("")
    for row in rows:
        table.add_column(row.case, justify="right")
    for name in dict.fromkeys(name for row in rows for name in row.figures):
        cells = (row.figures.get(name) for row in rows)
        table.add_row(_label(name), *("–" if cell is None else f"{cell}" for cell in cells))
    console.print()
    console.print(table)


_UNITS = {"ms": "ms", "us": "µs", "s": "s", "percent": "%"}


def _label(name: str) -> str:
    words = name.replace("_per_", "/").split("_")
    if words[-1] in _UNITS:
        words = [*words[:-1], f"[dim]{_UNITS[words[-1]]}[/dim]"]
    return " ".join(words)
