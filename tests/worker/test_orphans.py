"""What nobody alive holds is looked for: when it is handed over, and what is left alone."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from agentrun import wire
from agentrun.broker import Hold, Kind, Tail
from agentrun.errors import SessionGone, Unavailable
from agentrun.orphans import Orphans
from tests.worker.fleet import Fleet, Part, Wrapped, eventually

HOLD = Hold("words", "s", 1, "token")


class Watch:
    """One that looks, at a queue that has given out what it is told, and counts its looks."""

    def __init__(self, fleet: Fleet, *, place: int = 0, every: float = 0.05) -> None:
        self.given = [HOLD]
        self.held: set[tuple[str, int]] = set()
        self.looks = 0
        self.handed_over: list[tuple[int, Hold]] = []
        """After which look."""
        self.ends_read = 0
        self.lost: Exception | None = None
        """Raised by the next read."""
        self.away = 0
        self.before_look: Callable[[], Awaitable[None]] = checkpoint
        self.settled = anyio.Event()
        self.looks_now: Callable[[], bool] = lambda: True
        watch = self

        class Turns:
            async def given_out(self, _agent: str) -> Sequence[Hold]:
                watch.looks += 1
                await watch.before_look()
                if watch.away:
                    watch.away -= 1
                    raise Unavailable("as planned")
                return watch.given

        class Log(Part):
            async def last(self, session: str) -> Any:
                watch.ends_read += 1
                return await self.inner.last(session)

            async def read(self, session: str, *, after: int) -> Any:
                if watch.lost is not None:
                    error, watch.lost = watch.lost, None
                    raise error
                return await self.inner.read(session, after=after)

        self.orphans = Orphans(
            Wrapped(fleet.broker, turns=Turns(), log=Log(fleet.broker.log)),
            every=every,
            places=lambda: {"words": place} if self.looks_now() else {},
            held=lambda: self.held,
            hand_over=self._hand_over,
        )

    async def _hand_over(self, hold: Hold) -> None:
        self.handed_over.append((self.looks, hold))
        await self.settled.wait()

    @asynccontextmanager
    async def looking(self) -> AsyncGenerator[None]:
        async with anyio.create_task_group() as group:
            group.start_soon(self.orphans.run)
            yield
            group.cancel_scope.cancel()

    async def after(self, looks: int) -> None:
        """Wait until it has looked so often again, and is done with it."""
        until = self.looks + looks + 1
        await eventually(lambda: self.looks >= until)


async def send(fleet: Fleet) -> None:
    await fleet.session(agent="words").send("x", id="t")


async def begin(fleet: Fleet) -> Tail:
    log = fleet.broker.log
    tail = await log.last("s")
    started = wire.encode(wire.TurnStarted(turn="t", attempt=1, worker="w", lease="lease"))
    return await log.append("s", started, kind=Kind.EVENT, after=tail, pending=tail.pending.claim(1))


@pytest.mark.parametrize("place", [0, 1, 2])
async def test_it_is_handed_over_once_and_later_by_those_who_look_after_others(memory_fleet: Fleet, place: int) -> None:
    await send(memory_fleet)
    watch = Watch(memory_fleet, place=place)
    async with watch.looking():
        await watch.after(8)
        assert watch.handed_over == [(2 + place, HOLD)]
        watch.settled.set()
        await eventually(lambda: len(watch.handed_over) > 1)  # it is given out still: it was given to a dead one again


async def test_what_is_held_between_two_looks_is_counted_anew(memory_fleet: Fleet) -> None:
    await send(memory_fleet)
    watch = Watch(memory_fleet, place=2)
    async with watch.looking():
        for _ in range(3):
            await watch.after(1)
            watch.held = {("s", 1)}
            await watch.after(1)
            watch.held = set()
        assert watch.handed_over == []
        await eventually(lambda: watch.handed_over != [])


async def test_a_look_counts_also_after_a_short_break(memory_fleet: Fleet) -> None:
    await send(memory_fleet)
    watch = Watch(memory_fleet, every=0.3)
    breaks = iter([True, False, False])
    watch.looks_now = lambda: next(breaks, True)
    async with watch.looking():
        await eventually(lambda: watch.handed_over != [])
    assert watch.handed_over == [(2, HOLD)]


async def test_a_look_does_not_count_after_a_long_break(memory_fleet: Fleet) -> None:
    await send(memory_fleet)
    watch = Watch(memory_fleet)
    over = False
    watch.looks_now = lambda: over or watch.looks == 0
    async with watch.looking():
        await eventually(lambda: watch.looks == 1)
        await anyio.sleep(0.4)
        over = True
        await eventually(lambda: watch.handed_over != [])
    assert watch.handed_over == [(3, HOLD)]


async def test_it_is_left_alone_while_somebody_writes_to_its_session(memory_fleet: Fleet) -> None:
    await send(memory_fleet)
    tail = await begin(memory_fleet)
    log = memory_fleet.broker.log
    watch = Watch(memory_fleet)

    async def write() -> None:
        nonlocal tail
        if watch.looks <= 5:
            delta = wire.encode(wire.TextDelta(turn="t", attempt=1, text="x", index=watch.looks - 1))
            tail = await log.append("s", delta, kind=Kind.DELTA, after=tail, pending=tail.pending)

    watch.before_look = write
    async with watch.looking():
        await eventually(lambda: watch.handed_over != [])
    assert watch.handed_over == [(6, HOLD)]


async def test_what_waits_for_an_answer_is_left_alone(memory_fleet: Fleet) -> None:
    await send(memory_fleet)
    tail = await begin(memory_fleet)
    event = wire.encode(wire.TurnSuspended(turn="t", attempt=1, requests=["r"], message=wire.Message()))
    await memory_fleet.broker.log.append("s", event, kind=Kind.EVENT, after=tail, pending=tail.pending.park())
    watch = Watch(memory_fleet)
    async with watch.looking():
        await watch.after(5)
    assert watch.handed_over == []
    assert watch.ends_read >= 5


async def test_what_is_settled_but_named_still_is_looked_at_once(memory_fleet: Fleet) -> None:
    await send(memory_fleet)
    tail = await begin(memory_fleet)
    event = wire.encode(wire.TurnCompleted(turn="t", attempt=1, turn_offset=1))
    log = memory_fleet.broker.log
    await log.append("s", event, kind=Kind.EVENT, after=tail, pending=tail.pending.settle(1))
    watch = Watch(memory_fleet)
    async with watch.looking():
        await watch.after(5)
        assert watch.ends_read == 1
        watch.given = []
        await watch.after(2)
        await log.delete("s")
        await send(memory_fleet)
        watch.given = [HOLD]  # the same offset, of a session that was begun again
        await eventually(lambda: watch.handed_over != [])


async def test_one_look_at_a_session_tells_of_all_its_inputs(memory_fleet: Fleet) -> None:
    await send(memory_fleet)
    await memory_fleet.session(agent="words").send("y")
    watch = Watch(memory_fleet)
    watch.given = [HOLD, HOLD._replace(offset=2)]
    async with watch.looking():
        await eventually(lambda: len(watch.handed_over) == 2)
    assert watch.handed_over == [(2, hold) for hold in watch.given]
    assert watch.ends_read == 2


async def test_what_a_replica_does_not_know_yet_is_not_taken_for_settled(memory_fleet: Fleet) -> None:
    watch = Watch(memory_fleet)
    async with watch.looking():
        await watch.after(3)
        assert watch.handed_over == []
        await send(memory_fleet)  # as a server that had lagged behind
        await eventually(lambda: watch.handed_over != [])


async def test_a_session_that_has_lost_records_is_counted_anew(memory_fleet: Fleet) -> None:
    await send(memory_fleet)
    watch = Watch(memory_fleet)
    await begin(memory_fleet)

    async def lose() -> None:
        if watch.looks == 2:
            await memory_fleet.session(agent="words").send("y")  # so that what came since is read
            watch.lost = SessionGone("as planned")

    watch.before_look = lose
    async with watch.looking():
        await eventually(lambda: watch.handed_over != [])
    assert watch.handed_over == [(4, HOLD)]


async def test_a_broker_that_is_away_is_asked_again(memory_fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    await send(memory_fleet)
    watch = Watch(memory_fleet)
    watch.away = 3
    async with watch.looking():
        await eventually(lambda: watch.handed_over != [])
    assert watch.handed_over == [(5, HOLD)]
    assert caplog.text.count("is tried again: as planned") == 3
