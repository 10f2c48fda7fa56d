"""The benches of running turns: how fast they start, stream and stop, side by side."""

from __future__ import annotations

import os
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
from msgspec import Struct

from agentrun import wire
from agentrun.broker import Kind, Pending, SessionLog, Tail
from agentrun.cli._bench_inside import InsideFleet
from agentrun.cli._bench_report import Figure, Report, quantile, spread
from agentrun.cli._bench_watch import TurnSeen, Watch
from agentrun.cli._fleet import Fleet, cpu_seconds
from agentrun.cli._place import Place
from agentrun.client import Client, connect

_AGENT = "echo"
_WORKER = "workers.echo:echo"
_SLOTS = 256


class Options(Struct, frozen=True, kw_only=True):
    """What the command was asked for; ``sessions`` None: as many as the bench has by default."""

    sessions: tuple[int, ...] | None
    workers: int
    seconds: float
    rate: int
    rounds: int
    lease: float
    kills: int
    events: int
    readers: int | None
    clients: tuple[int, ...]
    small: bool


class Run(Struct):
    """One bench under way."""

    options: Options
    report: Report
    place: Place
    client: Client
    fleet: Fleet
    say: Callable[[str], None]

    @asynccontextmanager
    async def watches(self, count: int, *, warm: bool = True) -> AsyncGenerator[list[Watch]]:
        """Give new sessions that are followed; each has run a turn if ``warm``. They are deleted afterwards."""
        prefix = f"b{uuid.uuid4().hex[:8]}"
        watches = [Watch(self.client.session(f"{prefix}-{i}", agent=_AGENT)) for i in range(count)]
        async with anyio.create_task_group() as group:
            for watch in watches:
                await group.start(watch.run)
            if warm:
                await _each(watches, _warm)
            yield watches
            group.cancel_scope.cancel()
        for watch in watches:
            self.report.expect(f"jumps in the offsets of {watch.session.id}", watch.jumps, 0)
            await watch.session.delete()

    def rounds(self, sessions: int) -> int:
        """How often each of so many sessions repeats what is measured; fewer times where they are many."""
        return max(1, self.options.rounds * 10 // max(sessions, 10))

    def check(self, seen: TurnSeen, what: str, words: int | None) -> None:
        """Report what is missing or double in a turn that has ended; ``words`` None: it was stopped."""
        if words is not None:
            seen.words.end(words)
            self.report.expect(f"{what}: how the turn ended", seen.end.type if seen.end else None, "turn.completed")
        self.report.expect(f"{what}: words lost", seen.words.lost, 0)
        self.report.expect(f"{what}: words doubled", seen.words.doubled, 0)
        self.report.expect(f"{what}: the stored answer is the streamed one", seen.as_stored, True)


@asynccontextmanager
async def open_run(
    options: Options,
    report: Report,
    place: Place,
    say: Callable[[str], None],
    *,
    lease: float = 30.0,
    workers: int | None = None,
    env: Mapping[str, str] | None = None,
) -> AsyncGenerator[Run]:
    """Start the workers of one bench, in a namespace for their lease time (queues keep theirs)."""
    count = options.workers if workers is None else workers
    namespace = f"{place.namespace}-{lease:g}".replace(".", "_")
    place = await msgspec.structs.replace(place, namespace=namespace).setup()
    say(f"starting {count} worker processes")
    made = (
        Fleet(place, _WORKER, lease=lease, concurrency=_SLOTS, env=env)
        if options.workers
        else InsideFleet(place, _WORKER, lease=lease, concurrency=_SLOTS)
    )
    async with (
        connect(place.url, namespace=place.namespace) as client,
        made as fleet,
    ):
        await fleet.start(client, count)
        try:
            yield Run(options, report, place, client, fleet, say)
        finally:
            report.worker_log += fleet.said()


async def store(log: SessionLog, session: str, events: int) -> None:
    """Write a session of so many events as a worker would, without its pauses."""
    turn = "stored"
    body = wire.encode(wire.TurnRequested(turn=turn, agent="nobody", input="bench"))
    tail = await log.append(session, body, kind=Kind.TURN, after=Tail(), pending=Pending().add(1), agent="nobody")
    body = wire.encode(wire.TurnStarted(turn=turn, attempt=1, worker="bench", lease="1"))
    tail = await log.append(session, body, kind=Kind.EVENT, after=tail, pending=tail.pending.claim(1))
    for i in range(events - 3):
        body = wire.encode(wire.TextDelta(turn=turn, attempt=1, text=f"w{i} ", index=i))
        tail = await log.append(session, body, kind=Kind.DELTA, after=tail, pending=tail.pending)
    message = wire.Message([wire.TextPart("".join(f"w{i} " for i in range(events - 3)))])
    body = wire.encode(wire.TurnCompleted(turn=turn, attempt=1, turn_offset=1, message=message))
    await log.append(session, body, kind=Kind.EVENT, after=tail, pending=tail.pending.settle(1))


async def _warm(watch: Watch) -> None:
    turn = await watch.session.send("bench 3 50")
    await watch.until_ended(turn)


class Cpu:
    """Processor time used from now on, by the workers, the server, and this process or those named instead of it.

    A worker within this process is part of it: both together are ``process``.
    """

    def __init__(self, run: Run, **others: int) -> None:
        workers = {"worker": list(run.fleet.pids)} if run.fleet.pids else {}
        readers = {name: [pid] for name, pid in others.items()} or {"reader" if workers else "process": [os.getpid()]}
        self._pids = {**workers, "server": [run.place.server], **readers}
        self._start = self._read()
        self._began = time.monotonic()

    def _read(self) -> dict[str, float | None]:
        out: dict[str, float | None] = {}
        for name, pids in self._pids.items():
            used = [cpu_seconds(pid) for pid in pids]
            out[name] = None if None in used else sum(value for value in used if value is not None)
        return out

    def per(self, count: int, what: str) -> dict[str, Figure]:
        """Microseconds for each of ``count``, and the share of the machine that was in use."""
        used: dict[str, float | None] = {}
        for name, end in self._read().items():
            start = self._start[name]
            used[name] = None if start is None or end is None else end - start
        out: dict[str, Figure] = {
            f"{name}_cpu_per_{what}_us": None if value is None else value * 1e6 / max(count, 1)
            for name, value in used.items()
        }
        known = [value for value in used.values() if value is not None]
        machine = (time.monotonic() - self._began) * (os.cpu_count() or 1)
        out["cpu_in_use_percent"] = 100 * sum(known) / machine if len(known) == len(used) else None
        return out


async def _each(watches: Sequence[Watch], job: Callable[[Watch], Coroutine[Any, Any, None]]) -> None:
    async with anyio.create_task_group() as group:
        for watch in watches:
            group.start_soon(job, watch)


def _between(low: float, high: float) -> float:
    return random.uniform(low, high)  # noqa: S311 - spreads load, no secret


# --------------------------------------------------------------------------------------------------------------- turns


async def bench_turns(run: Run) -> None:
    """From `send` to the first token, with no model in between; and how many turns a second."""
    for count in run.options.sessions or (1, 20, 50):
        run.say(f"turns: {count} sessions")
        async with run.watches(count) as watches:
            paced = await _paced(run, watches)
        run.report.add("turns", f"{count} sessions", **paced, **await _closed_loop(run, count))


async def _paced(run: Run, watches: Sequence[Watch]) -> dict[str, Figure]:
    """Turns of a second with a pause between them: what a person sees while so many others stream."""
    acks: list[float] = []
    started: list[float] = []
    first: list[float] = []
    rate = run.options.rate

    async def job(watch: Watch) -> None:
        await anyio.sleep(_between(0, 1))
        for _ in range(run.rounds(len(watches))):
            begin = time.monotonic_ns()
            turn = await watch.session.send(f"bench {rate} {rate}")
            acks.append((time.monotonic_ns() - begin) / 1e6)
            seen = await watch.until_ended(turn)
            run.check(seen, f"turns, {len(watches)} sessions", rate)
            started.append((seen.started[0][1] - begin) / 1e6)
            first.append((seen.first - begin) / 1e6)
            await anyio.sleep(_between(0, 1))

    await _each(watches, job)
    return {
        "turns_measured": len(first),
        **spread("send_stored", acks),
        **spread("turn_started", started),
        "first_token_p50_ms": quantile(first, 0.5),
        "first_token_p90_ms": quantile(first, 0.9),
        "first_token_p99_ms": quantile(first, 0.99),
    }


async def _closed_loop(run: Run, count: int) -> dict[str, Figure]:
    """Turns of one token, the next as soon as the last has ended; a new session after ten."""
    done = 0
    cpu = Cpu(run)
    begin = time.monotonic()
    until = begin + run.options.seconds / 2

    async def job() -> None:
        nonlocal done
        while time.monotonic() < until:
            async with run.watches(1, warm=False) as (watch,):
                for _ in range(10):
                    turn = await watch.session.send(f"bench 1 {run.options.rate}")
                    run.check(await watch.until_ended(turn), f"turns in a loop, {count} sessions", 1)
                    done += 1

    async with anyio.create_task_group() as group:
        for _ in range(count):
            group.start_soon(job)
    return {"turns_per_s": done / (time.monotonic() - begin), **cpu.per(done, "turn")}


# -------------------------------------------------------------------------------------------------------------- tokens


async def bench_tokens(run: Run) -> None:
    """From the agent's `yield` to the reader, for every token."""
    for count in run.options.sessions or (1, 20, 50, 100, 200):
        case = f"{count} sessions"
        run.say(f"tokens: {case} of {run.options.rate} tokens a second")
        run.report.add("tokens", case, **await stream_words(run, count, f"tokens, {case}"))


async def stream_words(run: Run, count: int, what: str) -> dict[str, Figure]:
    """Have so many sessions stream for a while, each with a reader in this process, and say what these saw."""
    rate = run.options.rate
    words = max(2, int(run.options.seconds * rate))
    async with run.watches(count) as watches:
        turns: list[TurnSeen] = []

        async def job(watch: Watch) -> None:
            await anyio.sleep(_between(0, min(1.0, run.options.seconds / 4)))
            turn = await watch.session.send(f"bench {words} {rate}")
            turns.append(await watch.until_ended(turn, within=60 + 10 * run.options.seconds))

        cpu = Cpu(run)
        await _each(watches, job)
        used = cpu.per(count * words, "token")
        for seen in turns:
            run.check(seen, what, words)
        return {**_token_figures(turns, words), **used}


def _token_figures(turns: Sequence[TurnSeen], words: int) -> dict[str, Figure]:
    # The agent's clock says when each token was due; what it does not reach is the worker's fault.
    rates = [(words - 1) * 1e9 / max(seen.last_stamp - seen.first_stamp, 1) for seen in turns]
    arrivals = [(words - 1) * 1e9 / max(seen.last_arrival - seen.first, 1) for seen in turns]
    delays = [delay / 1e6 for seen in turns for delay in seen.delays]
    return {
        "tokens": sum(seen.words.seen for seen in turns),
        **spread("latency", delays),
        "latency_max_ms": max(delays, default=None),
        "slowest_turn_tokens_per_s": min(rates),
        "arriving_tokens_per_s": sum(arrivals),
        "appends_per_token": sum(seen.appends for seen in turns) / max(len(delays), 1),
        "lost": sum(seen.words.lost for seen in turns),
        "doubled": sum(seen.words.doubled for seen in turns),
    }


# -------------------------------------------------------------------------------------------------------------- cancel


class _Stop(Struct):
    receipt: float
    stopped: float
    last_token: float
    status: str


async def bench_cancel(run: Run) -> None:
    """From the call of `cancel` to the receipt, and to the end at a reader, while the answer streams."""
    for count in run.options.sessions or (1, 20, 50):
        run.say(f"cancel: {count} sessions")
        async with run.watches(count) as watches:
            stops: list[_Stop] = []

            async def job(watch: Watch, stops: list[_Stop] = stops, count: int = count) -> None:
                stops.extend([await _stop(run, watch, count) for _ in range(run.rounds(count))])

            await _each(watches, job)
            kinds = Counter(stop.status for stop in stops)
            run.report.expect(f"cancel, {count} sessions: receipts", dict(kinds), {"cancelled": len(stops)})
            run.report.add(
                "cancel",
                f"{count} sessions",
                stops_measured=len(stops),
                **spread("receipt", [stop.receipt for stop in stops]),
                **spread("stopped", [stop.stopped for stop in stops]),
                last_token_after_call_max_ms=max(stop.last_token for stop in stops),
                receipts=", ".join(f"{number} {kind}" for kind, number in kinds.items()),
            )


async def _stop(run: Run, watch: Watch, sessions: int) -> _Stop:
    # About ten stops a second in all, however many stream.
    pause = max(1.0, sessions / 10)
    turn = await watch.session.send(f"bench 1000000 {run.options.rate}")
    await watch.until_begun(turn)
    await anyio.sleep(_between(0.3 * pause, 1.7 * pause))
    begin = time.monotonic_ns()
    receipt = await turn.cancel(by="bench")
    received = time.monotonic_ns()
    seen = await watch.until_ended(turn)
    run.check(seen, "cancel", None)
    run.report.expect("cancel: the offset in the receipt", receipt.offset, seen.end.offset if seen.end else None)
    run.report.expect("cancel: words after the receipt", seen.last_stamp > received, False)
    return _Stop(
        receipt=(received - begin) / 1e6,
        stopped=(seen.ended - begin) / 1e6,
        last_token=(seen.last_stamp - begin) / 1e6,
        status=receipt.status,
    )
