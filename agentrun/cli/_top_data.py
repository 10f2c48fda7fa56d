"""What ``agentrun top`` knows of a fleet: samples, and the rates between them. Pure: it is given the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        rate: Tokens a second; 0 while its worker is silent.
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
        unheard: For how many seconds it was asked and did not answer.
    """

    info: WorkerInfo
    heard: float
    rate: float = 0.0
    unheard: float = 0.0


class Fleet:
    """The fleet, as the samples so far tell it.

    Silence is counted only while the broker can be asked: when it comes back, so do the workers, each in its time.

    Args:
        every: Seconds between two samples. A worker may miss one without being called silent.

    Attributes:
        workers: By name.
        runs: The running turns, the oldest first.
        queues: The agents' queues.
        dead: How many turns gave up, as far as that is known.
        error: What is wrong with the last look, if anything is.
        known: Whether the fleet was ever asked with success.
    """

    def __init__(self, every: float = 1.0) -> None:
        self.workers: dict[str, Seen] = {}
        self.runs: list[Run] = []
        self.queues: list[QueueStats] = []
        self.dead: int | None = None
        self.error: str | None = None
        self.known = False
        self._silent = max(SILENT, 2 * every)
        self._gone = max(GONE, 5 * every)
        self._looked = 0.0

    def sample(
        self, now: float, workers: Sequence[WorkerInfo], queues: Sequence[QueueStats], error: str | None = None
    ) -> None:
        """Take in what the fleet says at ``now``, on the monotonic clock."""
        missed = min(now - self._looked, self._silent) if self.known else 0.0
        self.known, self._looked, self.error = True, now, error
        self.queues = sorted(queues, key=lambda queue: queue.agent)
        before = {(run.worker, *run.key, run.info.attempt): run for run in self.runs}
        found: dict[tuple[str, str], Run] = {}
        answered = {info.worker: info for info in workers}
        for info in answered.values():
            last = self.workers.get(info.worker)
            seconds = now - last.heard if last is not None else 0.0
            seen = self.workers[info.worker] = Seen(info, now)
            for turn in info.running:
                run = Run(turn, info.worker, _rate(turn, before.get(_id(info, turn)), seconds))
                seen.rate += run.rate
                # Told by two: the one that was taken over does not know yet.
                if (other := found.get(run.key)) is None or other.info.attempt < turn.attempt:
                    found[run.key] = run
        for seen in self.workers.values():
            if seen.info.worker not in answered:
                seen.unheard += missed
                seen.rate = 0.0
        self.workers = {name: seen for name, seen in sorted(self.workers.items()) if seen.unheard < self._gone}
        for run in self.runs:
            # What a silent worker was running may still run, or be taken over: then it is told by another.
            if run.worker in self.workers and run.worker not in answered:
                found.setdefault(run.key, Run(run.info, run.worker))
        self.runs = sorted(found.values(), key=lambda run: (-run.info.seconds, run.key))

    def failed(self, now: float, error: str) -> None:
        """Take note that the fleet could not be asked."""
        self.error, self._looked = error, now

    def silent(self, seen: Seen) -> bool:
        """Whether a worker has not answered for too long."""
        return seen.unheard >= self._silent

    @property
    def rate(self) -> float:
        """Tokens a second of the whole fleet."""
        return sum(run.rate for run in self.runs)

    @property
    def slots(self) -> tuple[int, int]:
        """Slots in use, and all there are; of a worker that drains, only those in use."""
        used = total = 0
        for seen in self.workers.values():
            if not self.silent(seen):
                running = len(seen.info.running)
                used += running
                total += running if seen.info.draining else seen.info.slots
        return used, total

    @property
    def waiting(self) -> int:
        """Inputs that no worker has been given."""
        return sum(queue.waiting for queue in self.queues)


def _id(worker: WorkerInfo, turn: RunningTurn) -> tuple[str, str, str, int]:
    return worker.worker, turn.session, turn.turn, turn.attempt


def _rate(turn: RunningTurn, known: Run | None, seconds: float) -> float:
    if known is None or seconds <= 0:
        return turn.tokens / turn.seconds if turn.seconds > 0 else 0.0
    now = max(turn.tokens - known.info.tokens, 0) / seconds
    return known.rate + _SMOOTH * (now - known.rate)
