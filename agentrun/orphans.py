"""What the queue has given out and no living worker holds: looked for, and handed over (design.md, D22).

Whoever dies is handed over by those who knew what it held. They may have died with it; or nobody ever knew, because the
broker gave an input to a process that was already gone, or a message that gave one back was lost. Such an input stands
still until its lease runs out, unless somebody asks the queue.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from typing import NamedTuple

import anyio

from agentrun.broker import Broker, Hold, SessionLog, Tail
from agentrun.errors import AgentrunError, SessionGone

log = logging.getLogger("agentrun.worker")

Key = tuple[str, int]
"""An input: its session, and its offset there."""

AGREED = 2
"""Looks that must find an input so before it is handed over; one more for each worker that looks before this one."""

_AT_ONCE = 8
_SOON = 5
"""What a pause is divided by while this worker does not look: soon after it is to, its first look is over."""
_FRESH = 4
"""Pauses for which what was found at a look counts: a broker that is away for a moment does not make all begin anew."""


class _Suspect(NamedTuple):
    hold: Hold
    tail: Tail
    """The session's end when the input was first found so."""
    looks: int


class Orphans:
    """Looks again and again for inputs that nobody alive holds.

    Of the workers that could, only a few look: what it costs does not grow with the fleet.

    Args:
        broker: The worker's.
        every: Seconds between two looks: in this time whoever is alive says what it holds.
        places: The agents whose inputs are to be looked for now, and how many workers look before this one.
        held: What the living hold.
        hand_over: Hands an input over, unless the log says that it is not to be; logs its own failures.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        every: float,
        places: Callable[[], Mapping[str, int]],
        held: Callable[[], Set[Key]],
        hand_over: Callable[[Hold], Awaitable[None]],
    ) -> None:
        self._broker = broker
        self._every = every
        self._places = places
        self._held = held
        self._hand_over = hand_over
        self._slots = anyio.Semaphore(_AT_ONCE)
        self._suspects: dict[Key, _Suspect] = {}
        self._settled: set[Key] = set()
        """Of what the queue still names, what the log has settled: some brokers cannot tell."""
        self._under_way: set[Key] = set()
        self._looked = 0.0

    async def run(self) -> None:
        """Look for ever."""
        async with anyio.create_task_group() as group:
            while True:
                places = self._places()
                for hold in await self._look(places):
                    self._under_way.add((hold.session, hold.offset))
                    group.start_soon(self._adopt, hold)
                await anyio.sleep(self._every if places else self._every / _SOON)

    async def _adopt(self, hold: Hold) -> None:
        try:
            await self._hand_over(hold)
        finally:
            self._under_way.discard((hold.session, hold.offset))

    async def _look(self, places: Mapping[str, int]) -> list[Hold]:
        """Look once; return what is to be handed over."""
        if not places:
            return []
        given: dict[Key, Hold] = {}
        try:
            for agent in places:
                given |= {(hold.session, hold.offset): hold for hold in await self._broker.turns.given_out(agent)}
        except AgentrunError as error:
            log.warning("what nobody holds any more cannot be found out, and is tried again: %s", error)
            return []
        # A session that was deleted and begun again may have another input there: it waits until its lease runs out.
        self._settled &= given.keys()
        known = self._held() | self._settled | self._under_way
        now = time.monotonic()
        before = self._suspects if now - self._looked < _FRESH * self._every else {}
        self._suspects, self._looked = {}, now
        unknown: defaultdict[str, list[Hold]] = defaultdict(list)
        for key, hold in given.items():
            if key not in known:
                unknown[hold.session].append(hold)
        async with anyio.create_task_group() as group:
            for session, holds in unknown.items():
                group.start_soon(self._examine, session, holds, before)
        found = [s.hold for s in self._suspects.values() if s.looks >= AGREED + places[s.hold.agent]]
        for hold in found:
            del self._suspects[hold.session, hold.offset]
        if found:
            log.warning("no worker holds %d inputs that were given out: handing them over", len(found))
        return found

    async def _examine(self, session: str, holds: Sequence[Hold], before: Mapping[Key, _Suspect]) -> None:
        """Note of a session's inputs those that are pending, if nobody has written to it."""
        try:
            async with self._slots:
                tail = await self._broker.log.last(session)
                for hold in holds:
                    await self._judge(hold, tail, before.get((session, hold.offset)))
        except SessionGone as error:
            log.debug("session %s: %s; its inputs are looked at anew", session, error)
        except AgentrunError as error:
            log.debug("session %s cannot be looked at, and is at the next look: %s", session, error)
            self._suspects |= {key: before[key] for hold in holds if (key := (session, hold.offset)) in before}

    async def _judge(self, hold: Hold, tail: Tail, before: _Suspect | None) -> None:
        key = hold.session, hold.offset
        if tail.offset < hold.offset:
            pass  # who answered lags behind, or the session was deleted
        elif hold.offset not in tail.pending:
            self._settled.add(key)
        elif tail.pending.parked and tail.pending.ready(hold.offset):
            pass  # it waits for an answer, or a time
        elif before is None or await self._wrote(hold.session, before.tail, tail):
            self._suspects[key] = _Suspect(hold, tail, 1)
        else:
            self._suspects[key] = _Suspect(hold, before.tail, before.looks + 1)

    async def _wrote(self, session: str, since: Tail, tail: Tail) -> bool:
        return tail.offset != since.offset and await wrote_since(self._broker.log, session, since)


async def wrote_since(log: SessionLog, session: str, tail: Tail) -> bool:
    """Whether an owner has appended behind this end: it is not dead, or another one has the session."""
    records = await log.read(session, after=tail.offset)
    return any(not record.kind.input for record in records)
