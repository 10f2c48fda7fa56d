"""The benches of coming back: readers that resume or join late, and workers that die."""

from __future__ import annotations

import random
import time
import uuid
from collections import Counter
from collections.abc import Sequence

import anyio

from agentrun import wire
from agentrun.cli._bench_load import Run, store
from agentrun.cli._bench_report import quantile, spread
from agentrun.cli._bench_watch import Digest, TurnSeen, Watch
from agentrun.client import Session, Turn


def _between(low: float, high: float) -> float:
    return random.uniform(low, high)  # noqa: S311 - spreads load, no secret


# -------------------------------------------------------------------------------------------------------------- resume


async def bench_resume(run: Run) -> None:
    """How long a reader that comes back needs to be where the session is."""
    events = run.options.events
    run.say(f"resume: storing a session of {events} events, and one beside it")
    sessions = [run.client.session(f"r{uuid.uuid4().hex[:8]}") for _ in range(2)]
    async with anyio.create_task_group() as group:
        for session in sessions:
            group.start_soon(store, run.client.broker.log, session.id, events)
    run.say("resume: reading it")
    for case, after in (("all", 0), ("from the middle", events // 2), ("the last 100", max(0, events - 100))):
        took: list[float] = []
        first: list[float] = []
        for number in range(run.options.rounds + 1):
            begin = time.monotonic()
            arrived, exact = await _read_from(sessions[0], after, events)
            run.report.expect(f"resume, {case}: the events after {after}, each once and in order", exact, True)
            if number:  # the first round is the warm-up
                took.append((time.monotonic() - begin) * 1e3)
                first.append((arrived - begin) * 1e3)
        middle = quantile(took, 0.5) or 0.0
        run.report.add(
            "resume",
            case,
            events=events - after,
            **spread("first_event", first),
            **spread("whole", took),
            events_per_s=(events - after) * 1e3 / middle,
        )
    for session in sessions:
        await session.delete()
    await _late_joiners(run)


async def _read_from(session: Session, after: int, end: int) -> tuple[float, bool]:
    """Follow from ``after`` to ``end``; when the first event came, and whether all came, once and in order."""
    arrived = 0.0
    expected = after
    async with session.follow(after) as events:
        async for event in events:
            arrived = arrived or time.monotonic()
            expected += 1
            if event.offset != expected:
                return arrived, False
            data = event.data
            if isinstance(data, wire.TextDelta) and data.text != f"w{expected - 3} ":
                return arrived, False
            if event.offset == end:
                break
    return arrived, expected == end


async def _late_joiners(run: Run) -> None:
    """Readers that join one running session at random moments; each must have all of it."""
    readers, rate = run.options.readers or 100, run.options.rate
    words = max(2, int(run.options.seconds * rate))
    run.say(f"resume: {readers} readers join a running session")
    digests: list[str] = []
    caught_up: list[float] = []
    async with run.watches(1) as (watch,):
        turn = await watch.session.send(f"bench {words} {rate}")
        await watch.until_begun(turn)

        async def join() -> None:
            await anyio.sleep(_between(0, 0.9 * words / rate))
            begin, known = time.monotonic(), watch.offset
            digest, at = await _read_turn(run.client.session(watch.session.id), turn, known)
            digests.append(digest)
            caught_up.append((at - begin) * 1e3)

        async with anyio.create_task_group() as group:
            for _ in range(readers):
                group.start_soon(join)
        run.check(await watch.until_ended(turn), "resume, late joiners", words)
        stored = Digest()
        async for event in watch.session.events(follow=False):
            stored.add(event)
    same = Counter(digests)[stored.text]
    run.report.expect("resume, late joiners with exactly the stored events", same, readers)
    run.report.add(
        "resume",
        f"{readers} join late",
        events=stored.count,
        **spread("caught_up", caught_up),
        exact=f"{same} of {readers}",
    )


async def _read_turn(session: Session, turn: Turn, known: int) -> tuple[str, float]:
    """Read from the beginning to the turn's end; what was read, and when it had come up to ``known``."""
    digest = Digest()
    caught_up = 0.0
    async with session.follow() as events:
        async for event in events:
            digest.add(event)
            if event.offset >= known and not caught_up:
                caught_up = time.monotonic()
            if isinstance(event.data, wire.TERMINAL) and event.turn == turn.id:
                break
    return digest.text, caught_up


# ------------------------------------------------------------------------------------------------------------ takeover


async def bench_takeover(run: Run) -> None:
    """From the SIGKILL of a worker in mid-answer to the next token, by another worker."""
    count = (run.options.sessions or (10,))[0]
    gaps: list[float] = []
    bystanders = 0
    lost = doubled = 0
    for number in range(run.options.kills):
        run.say(f"takeover: kill {number + 1} of {run.options.kills}, {count} sessions")
        async with run.watches(count) as watches:
            turns = await _kill_one(run, watches, gaps)
        bystanders += sum(len(seen.started) == 1 for seen in turns)
        lost += sum(seen.words.lost for seen in turns)
        doubled += sum(seen.words.doubled for seen in turns)
        await run.fleet.start(run.client)
    run.report.add(
        "takeover",
        f"lease {run.options.lease:g} s",
        kills=run.options.kills,
        turns_taken_over=len(gaps),
        turns_not_concerned=bystanders,
        next_token_min_s=min(gaps, default=None),
        next_token_p50_s=quantile(gaps, 0.5),
        next_token_max_s=max(gaps, default=None),
        lost=lost,
        doubled=doubled,
    )


async def _kill_one(run: Run, watches: Sequence[Watch], gaps: list[float]) -> list[TurnSeen]:
    """Run a turn in each session, kill the worker that runs most of them, and see all of them to their end."""
    rate = run.options.rate
    words = 3 * rate
    turns = [await watch.session.send(f"bench {words} {rate}") for watch in watches]
    seen = [await watch.until_begun(turn) for watch, turn in zip(watches, turns, strict=True)]
    await anyio.sleep(_between(0.5, 1.0))
    busiest = Counter(turn.started[0][0].worker for turn in seen).most_common(1)[0][0]
    pid = next(worker.pid for worker in await run.fleet.workers(run.client) if worker.worker == busiest)
    killed = time.monotonic_ns()
    run.fleet.kill(pid)
    for watch, turn in zip(watches, turns, strict=True):
        await watch.until_ended(turn, within=60 + 3 * run.options.lease)
    for turn in seen:
        run.check(turn, "takeover", words)
        if turn.started[0][0].worker == busiest:
            run.report.expect("takeover: attempts at a turn whose worker died", len(turn.started), 2)
            gaps.append((turn.restarted - killed) / 1e9)
        else:
            run.report.expect("takeover: attempts at a turn of another worker", len(turn.started), 1)
    return seen
