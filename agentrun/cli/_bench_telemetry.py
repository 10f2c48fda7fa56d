"""The bench of being seen: what traces and metrics cost a worker that has more to do than it can."""

from __future__ import annotations

import statistics
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from subprocess import PIPE
from typing import Any

import anyio
import msgspec
from anyio.streams.buffered import BufferedByteReceiveStream

from agentrun.cli._bench_load import Cpu, Run, open_run
from agentrun.cli._bench_report import Figure
from agentrun.cli._bench_watch import SETTLE
from agentrun.client import Session

_SESSIONS = 100
_FASTER = 8
"""Times the rate of other benches: more than a worker can store."""
_LOOPS = 20
"""Sessions with turns of one token, the next as soon as the last has ended."""
_PAIRS = 4
"""Of so many rounds of other benches one pair of measurements is made here."""


async def bench_telemetry(run: Run) -> None:
    """A worker that is seen by nobody, and one that exports all there is, by turns, while the other one is idle."""
    found: dict[str, list[dict[str, float]]] = {"off": [], "on": []}
    async with _receiver() as receiver:
        seen = {
            "OTEL_SDK_DISABLED": "false",
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
            "OTEL_TRACES_SAMPLER": "always_on",
            "OTEL_METRIC_EXPORT_INTERVAL": "5000",
        }
        async with _side(run, "off", {"OTEL_SDK_DISABLED": "true"}) as off, _side(run, "on", seen) as on:
            pairs = max(1, run.options.rounds // _PAIRS)
            for number in range(pairs):
                # Each is first as often as the other: machines get slower, and faster.
                for side in (off, on) if number % 2 == 0 else (on, off):
                    name = "on" if side is on else "off"
                    run.say(f"telemetry: {name}, round {number + 1} of {pairs}")
                    found[name].append(await _measure(side, f"telemetry, {name}"))
    run.report.expect("telemetry: what was exported", sorted(receiver.received), ["/v1/metrics", "/v1/traces"])
    for name, rounds in found.items():
        run.report.add("telemetry", name, rounds=len(rounds), **_medians(rounds))
    both = zip(found["off"], found["on"], strict=True)
    shares = [{f"{key.removesuffix('_us')}_percent": 100 * on[key] / off[key] for key in off} for off, on in both]
    run.report.add("telemetry", "on, of off", **_medians(shares))


def _medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, Figure]:
    return {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}


class _Receiver:
    def __init__(self, url: str) -> None:
        self.url = url
        self.received: dict[str, int] = {}


@asynccontextmanager
async def _receiver() -> AsyncGenerator[_Receiver]:
    words = [sys.executable, "-m", "agentrun.cli._bench_receiver"]
    async with await anyio.open_process(words, stdin=PIPE, stdout=PIPE, stderr=None) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        said = BufferedByteReceiveStream(process.stdout)
        receiver = _Receiver((await said.receive_until(b"\n", 1000)).decode())
        yield receiver
        await process.stdin.aclose()
        rest = b"".join([chunk async for chunk in said])
        receiver.received = msgspec.json.decode(rest, type=dict[str, int])


@asynccontextmanager
async def _side(run: Run, name: str, env: Mapping[str, str]) -> AsyncGenerator[Run]:
    place = msgspec.structs.replace(run.place, namespace=f"{run.place.namespace}-{name}")
    async with open_run(run.options, run.report, place, run.say, workers=1, env=env) as side:
        yield side


async def _measure(run: Run, what: str) -> dict[str, float]:
    """Long answers as fast as they go, then turns of one token one after the other. Nobody reads the tokens."""
    return {**await _tokens(run, f"{what}, tokens"), **await _turns(run, f"{what}, turns")}


async def _tokens(run: Run, what: str) -> dict[str, float]:
    rate = run.options.rate * _FASTER
    words = max(2, int(run.options.seconds * rate))
    sessions = _new(run, run.options.sessions[0] if run.options.sessions else _SESSIONS)

    async def ask(session: Session) -> None:
        await _ask(run, session, words, rate, what)

    cpu = Cpu(run)
    took = await _together(sessions, ask)
    tokens = len(sessions) * words
    return {"tokens_per_s": tokens / took, **_worker(cpu, tokens, "token")}


async def _turns(run: Run, what: str) -> dict[str, float]:
    sessions = _new(run, _LOOPS)
    until = time.monotonic() + run.options.seconds / 2
    turns = 0

    async def ask(session: Session) -> None:
        nonlocal turns
        while time.monotonic() < until:
            await _ask(run, session, 1, run.options.rate, what)
            turns += 1

    cpu = Cpu(run)
    took = await _together(sessions, ask)
    return {"turns_per_s": turns / took, **_worker(cpu, turns, "turn")}


async def _ask(run: Run, session: Session, words: int, rate: int, what: str) -> None:
    turn = await session.send(f"bench {words} {rate}")
    result = await turn.result(SETTLE + 20 * run.options.seconds)
    run.report.expect(f"{what}: words of an answer", len(result.text.split()), words)


def _new(run: Run, count: int) -> list[Session]:
    prefix = f"t{uuid.uuid4().hex[:8]}"
    return [run.client.session(f"{prefix}-{number}", agent="echo") for number in range(count)]


async def _together(sessions: Sequence[Session], job: Callable[[Session], Coroutine[Any, Any, None]]) -> float:
    """Return how many seconds it took; the sessions are deleted afterwards."""
    began = time.monotonic()
    async with anyio.create_task_group() as group:
        for session in sessions:
            group.start_soon(job, session)
    took = time.monotonic() - began
    for session in sessions:
        await session.delete()
    return took


def _worker(cpu: Cpu, count: int, what: str) -> dict[str, float]:
    key = f"worker_cpu_per_{what}_us"
    used = cpu.per(count, what)[key]
    return {key: used} if isinstance(used, float) else {}
