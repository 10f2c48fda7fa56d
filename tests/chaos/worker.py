"""A worker that dies where it is chosen to: between what it does and what it learns of it.

It is the library's worker on the library's broker. What it is told is stored, it notes. SIGUSR1: it dies soon, at the
next points of its code that the dice choose. SIGUSR2: its wall clock jumps; the second time, back.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import anyio
import uvloop
from msgspec import Struct

from agentrun import brokers
from agentrun.broker import Broker, Kind, Lease, Pending, Tail
from agentrun.settings import WorkerSettings
from agentrun.testing.faults import Faults, FaultyBroker
from agentrun.worker import Worker
from tests.chaos.agents import AGENTS
from tests.chaos.evidence import Acked, Notebook, digest
from tests.chaos.mutants import MUTANTS, break_promise
from tests.chaos.process import die_with_parent

POINTS = {
    "append.before": 0.0002,
    "append.after": 0.0002,
    "leased": 0.003,
    "ack.before": 0.003,
    "ack.after": 0.003,
    "nack.before": 0.005,
    "nack.after": 0.005,
    "extend.before": 0.001,
    "extend.after": 0.001,
}
"""Where a worker may die, and with what chance each time it gets there."""

_INTERNAL = "agentrun--"
"""Sessions that the library keeps for itself begin so; no user's turns are in them."""
_BURST = 0.05
"""The chance at each point once it has been told to die soon."""
_JUMPS = (-3600.0, -20.0, 20.0, 3600.0)


class Points:
    """Kills the process at some of the points it comes by.

    Args:
        chances: By the names of `POINTS`.
        dice: Decides.
    """

    def __init__(self, chances: Mapping[str, float], dice: random.Random) -> None:
        self._chances = chances
        self._dice = dice
        self._least = 0.0

    def burst(self) -> None:
        """Die soon."""
        self._least = _BURST

    def pass_by(self, point: str) -> None:
        """Die here, or not. As by the kernel: nothing is cleaned up, nothing is flushed."""
        if self._dice.random() < max(self._chances[point], self._least):
            os.kill(os.getpid(), signal.SIGKILL)


class NotingBroker:
    """A broker that notes each record that its worker was told is stored.

    Args:
        inner: A connected broker.
        book: Where they are noted.
        worker: The worker's name.
        points: Where it may die.
    """

    def __init__(self, inner: Broker, book: Notebook, worker: str, points: Points) -> None:
        self._inner = inner
        self.log = _NotingLog(inner.log, book, worker, points)
        self.turns = _DeadlyQueue(inner.turns, points)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        pass


class _NotingLog:
    def __init__(self, inner: Any, book: Notebook, worker: str, points: Points) -> None:
        self._inner = inner
        self._book = book
        self._worker = worker
        self._points = points

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def append(
        self, session: str, body: bytes, *, kind: Kind, after: Tail, pending: Pending, **more: Any
    ) -> Tail:
        self._points.pass_by("append.before")
        tail = await self._inner.append(session, body, kind=kind, after=after, pending=pending, **more)
        if not session.startswith(_INTERNAL):
            self._book.note(Acked(worker=self._worker, session=session, offset=tail.offset, hash=digest(body)))
        self._points.pass_by("append.after")
        return tail


class _DeadlyQueue:
    def __init__(self, inner: Any, points: Points) -> None:
        self._inner = inner
        self._points = points

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def lease(self, agent: str, *, wait: float) -> Lease | None:
        lease = await self._inner.lease(agent, wait=wait)
        if lease is None:
            return None
        self._points.pass_by("leased")
        return _DeadlyLease(lease, self._points)


class _DeadlyLease:
    def __init__(self, inner: Lease, points: Points) -> None:
        self._inner = inner
        self._points = points

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def extend(self) -> None:
        self._points.pass_by("extend.before")
        self._inner.extend()
        self._points.pass_by("extend.after")

    async def ack(self) -> None:
        self._points.pass_by("ack.before")
        await self._inner.ack()
        self._points.pass_by("ack.after")

    async def nack(self, *, delay: float = 0.0) -> None:
        self._points.pass_by("nack.before")
        await self._inner.nack(delay=delay)
        self._points.pass_by("nack.after")


class _WallClock:
    """What ``time.time`` says in this process."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._shift = 0.0
        self._real = time.time
        time.time = self.now

    def now(self) -> float:
        return self._real() + self._shift

    def jump(self) -> None:
        self._shift = 0.0 if self._shift else self._dice.choice(_JUMPS)
        logging.getLogger("tests.chaos").warning("the wall clock is now %+.0f s off", self._shift)


class Options(Struct, frozen=True, kw_only=True):
    """What a worker is started with."""

    name: str
    life: int
    url: str
    namespace: str
    folder: Path
    seed: int
    lease: float
    concurrency: int
    mutant: str | None
    points: Mapping[str, float]
    faults: float

    @property
    def arguments(self) -> list[str]:
        """The same, as arguments of ``python -m``."""
        points = ",".join(f"{name}={chance}" for name, chance in self.points.items())
        mutant = ["--mutant", self.mutant] if self.mutant else []
        return [
            "tests.chaos.worker", "--name", self.name, "--life", str(self.life), "--url", self.url,
            "--namespace", self.namespace, "--folder", str(self.folder), "--seed", str(self.seed),
            "--lease", str(self.lease), "--concurrency", str(self.concurrency), "--points", points,
            "--faults", str(self.faults), *mutant,
        ]  # fmt: skip

    @classmethod
    def parse(cls) -> Self:
        """Read them from the command line."""
        parser = argparse.ArgumentParser(prog="python -m tests.chaos.worker")
        parser.add_argument("--name", required=True)
        parser.add_argument("--life", type=int, default=1, help="how often it was started")
        parser.add_argument("--url", required=True)
        parser.add_argument("--namespace", required=True)
        parser.add_argument("--folder", type=Path, required=True, help="for its notes")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--lease", type=float, default=3.0, help="seconds")
        parser.add_argument("--concurrency", type=int, default=16)
        parser.add_argument("--mutant", choices=MUTANTS, help="the promise it breaks")
        parser.add_argument("--points", type=_chances, default=POINTS, help="name=chance,… of dying there")
        parser.add_argument("--faults", type=float, default=1.0, help="factor of the chances of lost acks and the like")
        return cls(**vars(parser.parse_args()))


def _chances(text: str) -> dict[str, float]:
    given = {name: float(chance) for name, _, chance in (item.partition("=") for item in text.split(",") if item)}
    if unknown := given.keys() - POINTS.keys():
        raise argparse.ArgumentTypeError(f"no points: {', '.join(unknown)}")
    return dict.fromkeys(POINTS, 0.0) | given


def _faults(options: Options, seed: int) -> Faults:
    factor = options.faults
    return Faults(
        lose_ack=0.002 * factor,
        delay=0.01 * factor,
        delay_max=0.5,
        lose_extend=0.05 * factor,
        lose_settle=0.01 * factor,
        repeat_lease=0.01 * factor,
        seed=seed,
    )


async def run(options: Options) -> None:
    """Work until told to stop, or dead."""
    name = f"{options.name}-{options.life}"
    dice = random.Random(f"{options.seed} {name}")
    points = Points(options.points, dice)
    clock = _WallClock(dice)
    signal.signal(signal.SIGUSR1, lambda *_: points.burst())
    signal.signal(signal.SIGUSR2, lambda *_: clock.jump())
    book = Notebook(options.folder, name)
    settings = WorkerSettings(
        concurrency=options.concurrency,
        lease=options.lease,
        drain=2.0,
        retry_delay=0.2,
        cancel_grace=1.0,
        ask_hold=1.0,
    )
    async with brokers.connect(options.url, namespace=options.namespace) as broker:
        faulty = FaultyBroker(broker, _faults(options, dice.randrange(1 << 30)))
        await Worker(NotingBroker(faulty, book, name, points), AGENTS, settings=settings, name=name).serve()


if __name__ == "__main__":
    die_with_parent()
    logging.basicConfig(
        stream=sys.stderr,
        level="INFO",
        format="%(asctime)s.%(msecs)03d %(levelname)-7s %(message)s",
        datefmt="%H:%M:%S",
    )
    given = Options.parse()
    if given.mutant:
        break_promise(given.mutant)
    anyio.run(run, given, backend_options={"loop_factory": uvloop.new_event_loop})
