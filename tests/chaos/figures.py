"""What a run amounted to: its figures, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable

from msgspec import Struct, field


class Times(Struct, frozen=True):
    """Seconds that something took, each time that it happened."""

    count: int = 0
    p50: float = 0.0
    p99: float = 0.0
    max: float = 0.0

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Times:
        """Sum up; percentiles are times that were measured, not between two of them."""
        times = sorted(seconds)
        if not times:
            return cls()

        def at(share: float) -> float:
            return times[max(math.ceil(share * len(times)) - 1, 0)]

        return cls(len(times), at(0.5), at(0.99), times[-1])

    def __str__(self) -> str:
        if not self.count:
            return "none"
        return f"{self.count:,}: p50 {self.p50:.3f} s, p99 {self.p99:.3f} s, max {self.max:.3f} s"


class Figures(Struct, kw_only=True):
    """The figures of a run. Times are in seconds."""

    seed: int = 0
    minutes: float = 0.0
    sessions: int = 0
    deleted: int = 0
    """Sessions that were deleted; of them nothing else is counted, and nothing is checked."""
    turns: dict[str, int] = field(default_factory=dict[str, int])
    """By what became of them; ``unended`` is a violation."""
    events: int = 0
    attempts: int = 0
    acked: int = 0
    readers: dict[str, int] = field(default_factory=dict[str, int])
    """By transport."""
    read: int = 0
    """Events that readers were given, and whose bodies were compared."""
    resumes: int = 0
    faults: dict[str, int] = field(default_factory=dict[str, int])
    takeovers: Times = Times()
    """From the fault that befell a worker (where none is known: from its last record) to the next attempt's start."""
    cancels: Times = Times()
    """How long those waited whose stop was receipted as ``cancelled``."""
    receipts: dict[str, int] = field(default_factory=dict[str, int])
    longest_stall: float = 0.0
    stalled: str = ""
    """Where that was."""
    violations: dict[str, int] = field(default_factory=dict[str, int])
    """By rule."""

    def rows(self) -> list[tuple[str, str]]:
        """The lines of the table."""
        return [
            ("seed", str(self.seed)),
            ("minutes", f"{self.minutes:.1f}"),
            ("sessions", f"{self.sessions:,}, and {self.deleted:,} deleted, which are left out"),
            ("turns", _counts(self.turns)),
            ("attempts", f"{self.attempts:,}"),
            ("events stored", f"{self.events:,}, {self.acked:,} of them known to be acknowledged"),
            ("readers", _counts(self.readers)),
            ("events read", f"{self.read:,}, over {self.resumes:,} resumes"),
            ("faults", _counts(self.faults)),
            ("takeovers", str(self.takeovers)),
            ("stops", _counts(self.receipts)),
            ("cancelled in", str(self.cancels)),
            ("longest stall", f"{self.longest_stall:.3f} s {self.stalled}".rstrip()),
            ("violations", _counts(self.violations)),
        ]


def _counts(counts: dict[str, int]) -> str:
    if not counts:
        return "none"
    total = f"{sum(counts.values()):,}: " if len(counts) > 1 else ""
    return total + ", ".join(f"{name} {n:,}" for name, n in sorted(counts.items()))


def aligned(rows: list[tuple[str, str]]) -> str:
    """Two columns as text."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
