"""What a worker's memory does while the broker is away, and that nothing is lost by it.

    python -m tests.bench.outage --turns 50 --rate 200 --outage 20 --buffer 1000

A NATS server of its own is suspended (SIGSTOP) in mid-answer and goes on later; the worker is a process of its own.
"""

from __future__ import annotations

import argparse
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import msgspec

from agentrun import wire
from agentrun.brokers.server import NatsServer
from agentrun.client import Client
from tests.e2e.processes import Cli, new_cli

BEFORE = 5.0
AFTER = 5.0
"""Seconds the agents talk before the outage, and would after one that paused nobody."""


class Figures(msgspec.Struct):
    """Memory in MiB, times in seconds."""

    turns: int
    buffer_events: int
    rss_before: float
    rss_most_during: float
    rss_most_after: float
    rss_at_the_end: float
    said_during_most: int
    """Tokens one agent said while the broker was away, at the most: what its buffer takes."""
    first_stored_after: float
    """Until a token was stored again."""
    lost: int
    doubled: int
    attempts: int
    cpu_during: float
    """Seconds of CPU the worker took while the broker was away."""


@dataclass
class Sampler:
    """A process's memory, ten times a second."""

    pid: int
    samples: list[tuple[float, float]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self._stop.wait(0.1):
            self.samples.append((time.monotonic(), rss(self.pid)))

    def stop(self) -> None:
        self._stop.set()

    def most(self, begin: float, end: float) -> float:
        return max(mib for at, mib in self.samples if begin <= at <= end)


def rss(pid: int) -> float:
    """Resident memory of a process, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) / 1024


def cpu(pid: int) -> float:
    """Seconds of CPU a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def measure(turns: int, rate: int, outage: float, buffer: int) -> Figures:
    """Run it."""
    with NatsServer() as server:
        cli = new_cli(server.url)
        try:
            flags = ("--lease", "60", "--concurrency", str(turns), "--buffer-events", str(buffer))
            worker = cli.worker("w", *flags)
            return _measure(cli, server, worker.process.pid, turns, rate, outage, buffer)
        finally:
            server.resume()
            cli.end()


def _measure(cli: Cli, server: NatsServer, pid: int, turns: int, rate: int, outage: float, buffer: int) -> Figures:
    words = int(rate * (BEFORE + outage + AFTER))
    names = [f"s{n}" for n in range(turns)]

    async def send_all(client: Client) -> None:
        for name in names:
            await client.session(name, agent="echo").send(f"bench {words} {rate}", id="t")

    cli.ask(send_all)
    for name in names:
        cli.events_until(name, "text.delta")
    sampler = Sampler(pid)
    thread = threading.Thread(target=sampler.run)
    thread.start()
    try:
        time.sleep(BEFORE)
        away, used = time.monotonic(), cpu(pid)
        server.suspend()
        time.sleep(outage)
        used = cpu(pid) - used
        back = time.monotonic()
        stored_before = time.time()
        server.resume()
        seen = cli.ask(lambda client: _read(client, names, stored_before))
        end = time.monotonic()
    finally:
        sampler.stop()
        thread.join()
    said = [[(int(i), int(at) / 1e9) for i, at in re.findall(r"w(\d+)@(\d+) ", text)] for text in seen.texts]
    return Figures(
        turns=turns,
        buffer_events=buffer,
        rss_before=sampler.most(away - 1, away),
        rss_most_during=sampler.most(away, back),
        rss_most_after=sampler.most(back, end),
        rss_at_the_end=rss(pid),
        said_during_most=max(sum(away < at < back for _, at in one) for one in said),
        first_stored_after=seen.first_stored - stored_before,
        lost=sum(words - len({i for i, _ in one}) for one in said),
        doubled=sum(len(one) - len({i for i, _ in one}) for one in said),
        attempts=seen.attempts,
        cpu_during=used,
    )


@dataclass
class Seen:
    """What the sessions hold in the end."""

    texts: list[str] = field(default_factory=list)
    attempts: int = 0
    first_stored: float = float("inf")


async def _read(client: Client, names: list[str], since: float) -> Seen:
    seen = Seen()
    for name in names:
        pieces: list[str] = []
        with anyio.fail_after(180):
            async for event in client.turn(name, "t").events():
                if isinstance(event.data, wire.TextDelta):
                    pieces.append(event.data.text)
                    if event.time > since:
                        seen.first_stored = min(seen.first_stored, event.time)
                seen.attempts += isinstance(event.data, wire.TurnStarted)
        seen.texts.append("".join(pieces))
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=50)
    parser.add_argument("--rate", type=int, default=200)
    parser.add_argument("--outage", type=float, default=20.0)
    parser.add_argument("--buffer", type=int, default=4096)
    given = parser.parse_args()
    figures = measure(given.turns, given.rate, given.outage, given.buffer)
    print(msgspec.json.format(msgspec.json.encode(figures), indent=2).decode())


if __name__ == "__main__":
    main()
