"""The bench of size: many sessions, long ones, and a long queue."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import anyio

from agentrun import wire
from agentrun.broker import BrokerAdmin, Kind, Pending, SessionLog, Tail
from agentrun.cli._bench_load import Run, open_run
from agentrun.cli._bench_report import Figure, quantile, spread
from agentrun.cli._bench_watch import SETTLE
from agentrun.client import Session

_SESSIONS = (1_000, 10_000, 100_000)
_EVENTS = (1_000, 10_000, 100_000)
_QUEUED, _QUEUED_SESSIONS, _WORKERS = 10_000, 2_000, 4
_AT_ONCE = 128
_FEW, _SOME = 2, 7
"""Tokens of a stored session; of each tenth, that is read."""
_LISTED = 50
_LONG_ROUNDS = 3
"""How often what takes long is measured."""


class _Shape(NamedTuple):
    """A long session: what it is called, and the tokens of each of its turns."""

    name: str
    words: int


_SHAPES = (_Shape("200 events a turn", 197), _Shape("5 events a turn", 2))


async def bench_scale(run: Run) -> None:
    """How what is done to one session grows with all that is stored, with its own length, and with the queue."""
    small = 100 if run.options.small else 1
    await _many(run, run.options.sessions or tuple(n // small for n in _SESSIONS))
    await _long(run, tuple(n // small for n in _EVENTS))
    await _queue(run, _QUEUED // small, _QUEUED_SESSIONS // small)


async def _store_turn(log: SessionLog, session: str, tail: Tail, number: int, words: int) -> Tail:
    """Write a turn as a worker would, without its pauses."""
    turn = f"t{number}"
    offset = tail.next
    body = wire.encode(wire.TurnRequested(turn=turn, agent="nobody", input="bench"))
    pending = tail.pending.add(offset)
    tail = await log.append(session, body, kind=Kind.TURN, after=tail, pending=pending, agent="nobody")
    body = wire.encode(wire.TurnStarted(turn=turn, attempt=1, worker="bench", lease="1"))
    tail = await log.append(session, body, kind=Kind.EVENT, after=tail, pending=tail.pending.claim(offset))
    for i in range(words):
        body = wire.encode(wire.TextDelta(turn=turn, attempt=1, text=f"w{i} ", index=i))
        tail = await log.append(session, body, kind=Kind.DELTA, after=tail, pending=tail.pending)
    message = wire.Message([wire.TextPart(_text(words))])
    body = wire.encode(wire.TurnCompleted(turn=turn, attempt=1, turn_offset=offset, message=message))
    return await log.append(session, body, kind=Kind.EVENT, after=tail, pending=Pending())


def _text(words: int) -> str:
    return "".join(f"w{i} " for i in range(words))


async def _timed(rounds: int, job: Callable[[], Awaitable[None]]) -> list[float]:
    """Milliseconds of each round; one before them is the warm-up."""
    took: list[float] = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        await job()
        took.append((time.perf_counter() - begin) * 1e3)
    return took[1:]


def _memory(pid: int | None) -> float | None:
    """Megabytes a process has in memory; None where the system does not say."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS:")), None)


async def _at_once(count: int, job: Callable[[int], Awaitable[None]], *, first: int = 0) -> None:
    left = iter(range(first, count))

    async def work() -> None:
        for number in left:
            await job(number)

    async with anyio.create_task_group() as group:
        for _ in range(_AT_ONCE):
            group.start_soon(work)


# ------------------------------------------------------------------------------------------------------- many sessions


async def _many(run: Run, counts: Sequence[int]) -> None:
    """One stream with ever more sessions in it, and what one of them costs."""
    log = run.client.broker.log

    async def store(number: int) -> None:
        await _store_turn(log, f"m{number}", Tail(), 0, _FEW if number % 10 else _SOME)

    stored = 0
    for count in sorted(counts):
        run.say(f"scale: storing {count} sessions")
        begin = time.monotonic()
        await _at_once(count, store, first=stored)
        took = time.monotonic() - begin
        appended = (count - stored) * (3 + _FEW) + (count - stored) // 10 * (_SOME - _FEW)
        stored = count
        run.say(f"scale: using {count} sessions")
        run.report.add(
            "scale: sessions in one stream",
            f"{count}",
            **await _one_of(run, count),
            stored_records_per_s=appended / took if took else None,
            server_memory_MB=_memory(run.place.server),
        )


async def _one_of(run: Run, count: int) -> dict[str, Figure]:
    rounds = run.options.rounds
    # Each is asked for once: what is measured is a session that nobody has looked at for long.
    cold = iter(random.sample(range(count), count))

    async def first_token() -> None:
        session = run.client.session(f"m{next(cold)}", agent="echo")
        turn = await session.send("x")
        async for event in turn.events():
            if isinstance(event.data, wire.TextDelta):
                return

    # The first look at each makes the server load the part of its file that it is in; then they are looked at again.
    names = [f"m{random.randrange(0, count, 10)}" for _ in range(rounds + 1)]  # noqa: S311 - spreads load, no secret
    turn_by_turn = itertools.cycle(names)

    def read() -> Session:
        return run.client.session(next(turn_by_turn))

    async def events() -> None:
        seen = [event.offset async for event in read().events(follow=False)][: 3 + _SOME]
        run.report.expect(f"scale, {count} sessions: offsets", seen, list(range(1, 4 + _SOME)))

    async def middle() -> None:
        async for event in read().events(5, follow=False):
            run.report.expect(f"scale, {count} sessions: the offset behind 5", event.offset, 6)
            return

    async def history() -> None:
        turns = list((await read().history()).turns.values())
        run.report.expect(f"scale, {count} sessions: the answer", turns[0].message.text, _text(_SOME))

    async def listing() -> None:
        assert isinstance(run.client.broker, BrokerAdmin)
        names = await run.client.broker.sessions(limit=_LISTED)
        run.report.expect(f"scale, {count} sessions: listed", len(names), min(_LISTED, count))

    return {
        **spread("first_look", await _timed(rounds, history)),
        **spread("history", await _timed(rounds, history)),
        **spread("all_10_events", await _timed(rounds, events)),
        **spread("from_the_middle", await _timed(rounds, middle)),
        # Last, since it makes the sessions longer.
        **spread("send_to_first_token", await _timed(min(rounds, count - 1), first_token)),
        "list_50_p50_ms": quantile(await _timed(_LONG_ROUNDS, listing), 0.5),
    }


# ------------------------------------------------------------------------------------------------------- long sessions


async def _long(run: Run, sizes: Sequence[int]) -> None:
    """Sessions that grow side by side, in one stream, and what their length costs."""
    log = run.client.broker.log
    numbers = {shape: itertools.count() for shape in _SHAPES}
    figures: dict[_Shape, dict[int, dict[str, Figure]]] = {shape: {} for shape in _SHAPES}

    async def grow(shape: _Shape, size: int) -> None:
        name = _long_name(shape)
        tail = await log.last(name)
        while tail.offset < size:
            tail = await _store_turn(log, name, tail, next(numbers[shape]), shape.words)

    for size in sizes:
        run.say(f"scale: storing sessions of {size} events")
        async with anyio.create_task_group() as group:
            for shape in _SHAPES:
                group.start_soon(grow, shape, size)
        for shape in _SHAPES:
            run.say(f"scale: using a session of {size} events, {shape.name}")
            session = run.client.session(_long_name(shape), agent="echo")
            end = (await log.last(session.id)).offset
            figures[shape][size] = await _use_long(run, session, end)
    for shape, of_size in figures.items():
        for size, found in of_size.items():
            run.report.add(f"scale: a session, {shape.name}", f"{size} events", **found)


def _long_name(shape: _Shape) -> str:
    return f"long-{shape.words}"


async def _use_long(run: Run, session: Session, end: int) -> dict[str, Figure]:
    what = f"scale, {session.id} of {end} events"

    async def read(after: int, count: int) -> None:
        seen = 0
        async for event in session.events(after, follow=False):
            seen += 1
            if event.offset != after + seen:
                break
            if seen == count:
                return
        run.report.expect(f"{what}: events behind {after}, each once and in order", seen, count)

    async def seek() -> None:
        await read(random.randrange(end - 1), 1)  # noqa: S311 - spreads load, no secret

    async def history() -> None:
        folded = await session.history()
        run.report.expect(f"{what}: turns that have ended", folded.open, [])

    async def last() -> None:
        await read(max(end - 100, 0), min(end, 100))

    async def start() -> float:
        begin = time.perf_counter()
        turn = await session.send("x")
        # To its end, so that the next one need not wait.
        took = [time.perf_counter() - begin async for event in turn.events() if event.type == "turn.started"]
        return took[0] * 1e3

    figures: dict[str, Figure] = {
        **spread("seek", await _timed(run.options.rounds, seek)),
        "last_100_p50_ms": quantile(await _timed(run.options.rounds, last), 0.5),
        "history_p50_ms": quantile(await _timed(_LONG_ROUNDS, history), 0.5),
    }
    begin = time.perf_counter()
    await read(0, end)
    whole = (time.perf_counter() - begin) * 1e3
    starts = [await start() for _ in range(3 * _LONG_ROUNDS)]
    return {
        **figures,
        "all_events_ms": whole,
        "all_events_per_s": end * 1e3 / whole,
        "first_start_ms": starts[0],
        "next_start_p50_ms": quantile(starts[1:], 0.5),
    }


# --------------------------------------------------------------------------------------------------------- a long queue


async def _queue(run: Run, turns: int, sessions: int) -> None:
    """So many turns that wait, and then the workers come."""
    async with open_run(run.options, run.report, run.place, run.say, workers=0) as idle:
        admin = idle.client.broker
        assert isinstance(admin, BrokerAdmin)
        await admin.turns.open("echo")
        idle.say(f"scale: sending {turns} turns to {sessions} sessions")
        begin = time.monotonic()
        each = turns // sessions

        async def send(number: int) -> None:
            for place in range(each):
                await idle.client.session(f"q{number}", agent="echo").send(f"x{place}", id=f"t{place}")

        await _at_once(sessions, send)
        sending = time.monotonic() - begin
        idle.report.expect("scale, queue: turns that wait", await _lag(admin), (turns, 0))
        await idle.fleet.start(idle.client, _WORKERS)
        begin = time.monotonic()
        most = 0
        idle.say(f"scale: {_WORKERS} workers run {turns} turns")
        with anyio.move_on_after(SETTLE + turns / 5):
            while (lag := await _lag(admin)) != (0, 0):
                most = max(most, lag[1])
                await anyio.sleep(0.1)
        took = time.monotonic() - begin
        idle.report.expect("scale, queue: turns that wait at the end", await _lag(admin), (0, 0))
        in_order = await _in_order(idle, sessions, each)
        idle.report.expect("scale, queue: turns run once, in the order sent", in_order, turns)
        idle.report.add(
            "scale: a queue",
            f"{turns} turns of {sessions} sessions, {_WORKERS} workers",
            sent_per_s=turns / sending,
            turns_per_s=turns / took,
            run_in_order=in_order,
            most_leased=most,
        )


async def _lag(admin: BrokerAdmin) -> tuple[int, int]:
    """What ``agentrun status`` shows of the queue: waiting, leased."""
    (queue,) = [queue for queue in await admin.stats() if queue.agent == "echo"]
    return queue.waiting, queue.leased


async def _in_order(run: Run, sessions: int, each: int) -> int:
    """How many turns have completed in one attempt, none before the one sent before it."""
    good = 0

    async def look(number: int) -> None:
        nonlocal good
        before = 0
        for place, view in enumerate((await run.client.session(f"q{number}").history()).turns.values()):
            ended = view.ended_at or 0
            exact = (view.id, view.state, view.attempt, view.message.text) == (f"t{place}", "completed", 1, f"x{place}")
            if exact and ended > before:
                good += 1
            before = ended

    await _at_once(sessions, look)
    return good
