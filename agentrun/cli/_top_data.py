"""What ``agentrun top`` knows of a fleet: samples, and the rates between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from agentrun.broker import QueueStats
from agentrun.worker import RunningTurn, WorkerInfo

__all__ = ["Fleet", "Run", "Seen"]

SILENT = 3.0
"""Seconds after which a worker that does not answer is shown as silent."""
GONE = 15.0
"""Seconds after which it is not shown any more."""
_SMOOTH = 0.4
"""How much a new rate counts against what was shown."""


@dataclass
class Run:
    """A running turn.

    Attributes:
        info: As its worker told it last.
        worker: Who runs it.
        rate: Tokens a second.
    """

    info: RunningTurn
    worker: str
    rate: float = 0.0

    @property
    def key(self) -> tuple[str, str]:
        """Session and turn."""
        return self.info.session, self.info.turn


@dataclass
class Seen:
    """A worker.

    Attributes:
        info: As it told it last.
        heard: When that was, on the monotonic clock.
        rate: Tokens a second of all its turns.
    """

    info: WorkerInfo
    heard: float
    rate: float = 0.0

    def silent(self, now: float) -> float | None:
        """For how long it has been silent, if for too long."""
        return now - self.heard if now - self.heard > SILENT else None


@dataclass
class Fleet:
    """The fleet, as the samples so far tell it.

    Attributes:
        workers: By name.
        runs: The running turns, the oldest first.
        queues: The agents' queues.
        error: Why the last look failed, if it did.
    """

    workers: dict[str, Seen] = field(default_factory=dict[str, Seen])
    runs: list[Run] = field(default_factory=list[Run])
    queues: list[QueueStats] = field(default_factory=list[QueueStats])
    error: str | None = None

    def sample(self, now: float, workers: Iterable[WorkerInfo], queues: Sequence[QueueStats]) -> None:
        """Take in what the fleet says at ``now``, on the monotonic clock."""
        self.error = None
        self.queues = sorted(queues, key=lambda queue: queue.agent)
        before = {(run.worker, *run.key, run.info.attempt): run for run in self.runs}
        silent = [run for run in self.runs if run.worker not in {info.worker for info in workers}]
        found: list[Run] = []
        for info in workers:
            last = self.workers.get(info.worker)
            seconds = now - last.heard if last is not None else 0.0
            runs = [Run(turn, info.worker) for turn in info.running]
            for run in runs:
                known = before.get((run.worker, *run.key, run.info.attempt))
                run.rate = _rate(run.info, known, seconds)
            found += runs
            self.workers[info.worker] = Seen(info, now, sum(run.rate for run in runs))
        self.workers = {name: seen for name, seen in sorted(self.workers.items()) if now - seen.heard <= GONE}
        # What a worker that is silent was running may still run, or be taken over: then it is told by another.
        told = {run.key for run in found}
        found += [run for run in silent if run.worker in self.workers and run.key not in told]
        self.runs = sorted(found, key=lambda run: (-run.info.seconds, run.key))

    def failed(self, error: str) -> None:
        """Take note that the fleet could not be asked."""
        self.error = error

    @property
    def rate(self) -> float:
        """Tokens a second of the whole fleet."""
        return sum(run.rate for run in self.runs)

    @property
    def slots(self) -> int:
        """Of all workers that take turns."""
        return sum(seen.info.slots for seen in self.workers.values() if not seen.info.draining)

    @property
    def waiting(self) -> int:
        """Inputs that no worker has been given."""
        return sum(queue.waiting for queue in self.queues)


def _rate(info: RunningTurn, known: Run | None, seconds: float) -> float:
    if known is None or seconds <= 0:
        return info.tokens / info.seconds if info.seconds > 0 else 0.0
    now = max(info.tokens - known.info.tokens, 0) / seconds
    return known.rate + _SMOOTH * (now - known.rate)
