"""What a bench notes of a session that it follows: what came when, and whether anything is missing or double."""

from __future__ import annotations

import hashlib
import time
from array import array

import anyio
from anyio.abc import TaskStatus

from agentrun import wire
from agentrun.client import Event, Session, Turn

SETTLE = 60.0
"""Seconds after which a turn that should have ended, or begun, is given up on."""


class Words:
    """Checks the words ``w0``, ``w1@<ns>`` … of an answer as they come.

    Attributes:
        seen: How many came, each counted once.
        lost: Words that were left out.
        doubled: Words that came again.
    """

    def __init__(self) -> None:
        self.seen = 0
        self.lost = 0
        self.doubled = 0
        self._next = 0

    def word(self, word: str) -> None:
        """Take the next word."""
        number = int(word[1:].partition("@")[0])
        if number == self._next:
            self._next += 1
            self.seen += 1
        elif number < self._next:
            self.doubled += 1
        else:
            self.lost += number - self._next
            self._next = number + 1
            self.seen += 1

    def end(self, expected: int) -> None:
        """Count what is missing at the end."""
        self.lost += max(0, expected - self._next)
        self._next = max(self._next, expected)


class Digest:
    """What was read, down to a hash: equal for readers that got the same bytes at the same offsets."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.count = 0

    def add(self, event: Event) -> None:
        """Take the next event."""
        self._hash.update(b"%d %b\n" % (event.offset, event.raw))
        self.count += 1

    @property
    def text(self) -> str:
        """The hash."""
        return self._hash.hexdigest()


class TurnSeen:
    """One turn, as the reader saw it. Times are of the monotonic clock, in nanoseconds; 0: not seen."""

    def __init__(self) -> None:
        self.started: list[tuple[wire.TurnStarted, int]] = []
        self.first = 0
        self.restarted = 0
        """When the first words of a later attempt came."""
        self.ended = 0
        self.end: Event | None = None
        self.words = Words()
        self.text: list[str] = []
        self.appends = 0
        self.delays = array("q")
        """From a word's own stamp to its arrival."""
        self.first_stamp = 0
        self.last_stamp = 0
        self.last_arrival = 0
        self.moved = anyio.Event()

    def take(self, event: Event, now: int) -> None:
        """Note an event that arrived now."""
        data = event.data
        if isinstance(data, wire.TextDelta):
            self._take_text(data, now)
            return
        if isinstance(data, wire.TurnStarted):
            self.started.append((data, now))
        elif isinstance(data, wire.TERMINAL):
            self.ended = now
            self.end = event
        self._bell()

    def _take_text(self, data: wire.TextDelta, now: int) -> None:
        self.appends += 1
        self.last_arrival = now
        self.text.append(data.text)
        for word in data.text.split():
            self.words.word(word)
            self.last_stamp = int(word.partition("@")[2])
            self.delays.append(now - self.last_stamp)
        if not self.first:
            self.first = now
            self.first_stamp = self.last_stamp
            self._bell()
        if data.attempt > 1 and not self.restarted:
            self.restarted = now
            self._bell()

    def _bell(self) -> None:
        self.moved.set()
        self.moved = anyio.Event()

    @property
    def as_stored(self) -> bool:
        """Whether the answer in the turn's last record is what was streamed."""
        end = self.end.data if self.end is not None else None
        return isinstance(end, wire.TERMINAL) and end.message.text == "".join(self.text)


class Watch:
    """Follows a session from its beginning.

    Attributes:
        turns: By their ids.
        jumps: Offsets that did not follow the one before by one.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.turns: dict[str, TurnSeen] = {}
        self.jumps = 0
        self.offset = 0

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Follow, for ever."""
        async with self.session.follow() as events:
            task_status.started()
            async for event in events:
                now = time.monotonic_ns()
                if event.offset != self.offset + 1:
                    self.jumps += 1
                self.offset = event.offset
                if event.turn is not None:
                    self.turn(event.turn).take(event, now)

    def turn(self, id: str) -> TurnSeen:
        """What was seen of a turn."""
        seen = self.turns.get(id)
        if seen is None:
            seen = self.turns[id] = TurnSeen()
        return seen

    async def until_begun(self, turn: Turn) -> TurnSeen:
        """Wait for a turn's first words.

        Raises:
            TimeoutError: They did not come within a minute.
        """
        seen = self.turn(turn.id)
        with anyio.fail_after(SETTLE):
            while not seen.first:
                await seen.moved.wait()
        return seen

    async def until_ended(self, turn: Turn, *, within: float = SETTLE) -> TurnSeen:
        """Wait for a turn's end.

        Raises:
            TimeoutError: It did not come in time.
        """
        seen = self.turn(turn.id)
        with anyio.fail_after(within):
            while not seen.ended:
                await seen.moved.wait()
        return seen
