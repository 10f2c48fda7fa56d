"""One session's log, walked through from its first record to its last: who may say what, and when.

The rules are applied to decoded events and know nothing of how workers decide. Only what a message is, once its events
are given, is left to the library's fold.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
from msgspec import Struct

from agentrun import wire
from agentrun.broker import Kind
from agentrun.errors import InvalidInput
from agentrun.history import History, MessageBuilder
from tests.chaos.evidence import Sent
from tests.chaos.records import Entry
from tests.chaos.rules import Rule

LOST = "turn.lost"
_LAST_WORDS = ("turn.suspended", "turn.retrying", "turn.released", LOST)
"""What ends an attempt, but not its turn."""
_WORD = re.compile(r"w(\d+)")
_STEERED = re.compile(r"\[steered: .*?\] ", re.DOTALL)
_STARTS_OVER = "stubborn"
"""What an agent counts anew in each attempt, behind what the attempts before have said."""

SEVERAL = "several workers"
"""Who appended a record that more than one worker took for its own: two had the same to say."""


class _Names(Struct):
    """What an event of a type that the library does not know has all the same, if it is an owner's."""

    turn: str | None = None
    attempt: int = 0


_names = msgspec.json.Decoder(_Names)


@dataclass(slots=True, eq=False)
class Turn:
    """One turn, as its session's log has it."""

    id: str
    offset: int
    request: wire.TurnRequested
    attempts: int = 0
    end: str = ""
    """The type of the event that ended it."""
    ended_at: int = 0
    consumed_by: str | None = None
    text: str = ""
    """Of the message it ended with."""
    stop: str = ""
    """The first stored stop, or the first later turn that interrupts it, in words."""
    asked: set[str] = field(default_factory=set[str])
    open: set[str] = field(default_factory=set[str])
    """Questions that wait for an answer."""


@dataclass(slots=True, eq=False)
class _Attempt:
    turn: Turn
    number: int
    worker: str
    builder: MessageBuilder
    began: float
    last: float
    """When its last record was stored."""
    tokens: int = 0
    superseded: str = ""
    """Who has appended since as the owner, in words."""


class Takeover(NamedTuple):
    """An attempt that another followed though it had not come to an end by itself."""

    turn: str
    worker: str
    began: float
    last: float
    until: float


class Stall(NamedTuple):
    """A silence while a turn was running, and the offset of the record that ended it."""

    seconds: float
    turn: str
    offset: int


class Walk:
    """Goes through one session.

    Args:
        report: Is told of each broken rule, in words.
        acker: Which worker was told that the record at an offset is its own, as far as known.
        sent: What is known of how turns were sent, by their ids.
    """

    def __init__(
        self, report: Callable[[Rule, str], None], *, acker: Mapping[int, str], sent: Mapping[str, Sent]
    ) -> None:
        self.turns: dict[str, Turn] = {}
        self.takeovers: list[Takeover] = []
        self.stall = Stall(0.0, "", 0)
        self._report = report
        self._acker = acker
        self._sent = sent
        self._at: dict[int, Turn] = {}
        self._answers: dict[int, tuple[str, str]] = {}
        self._inputs: set[int] = set()
        self._queue: list[Turn] = []
        self._first_open = 0
        self._attempt: _Attempt | None = None
        self._lost: dict[str, _Attempt] = {}
        self._history = History()
        self._joiner = wire.Joiner()

    def run(self, entries: Iterable[Entry]) -> None:
        """Take in the whole session."""
        for place, entry in enumerate(entries, 1):
            try:
                event = wire.decode(entry.body)
            except InvalidInput as error:
                self._report(Rule.READABLE, f"the record at {entry.offset} cannot be read: {error}")
                continue
            legal = self._input(entry, event) if entry.kind.input else self._output(entry, event)
            if legal:
                # By its place: the fold lets pass what does not have a higher offset.
                self._history.apply(place, event, time=entry.stored)
        for turn in self._queue:
            if not turn.end:
                self._report(
                    Rule.ENDS, f"turn {turn.id}, sent at {turn.offset}, has not ended after {turn.attempts} attempts"
                )

    # ------------------------------------------------------------------------------------------------------- inputs

    def _input(self, entry: Entry, event: wire.AnyEvent) -> bool:
        self._inputs.add(entry.offset)
        match event:
            case wire.TurnRequested() if entry.kind is Kind.TURN:
                return self._requested(entry, event)
            case wire.TurnAnswer() if entry.kind is Kind.TURN:
                self._answers[entry.offset] = (event.turn, event.request)
            case wire.TurnCancel():
                turns = self._queue[self._first_open :] if event.all else [self.turns.get(event.turn or "")]
                self._stopped(turns, f"the stop at {entry.offset}")
            case _:
                self._report(Rule.READABLE, f"{event.type} at {entry.offset} is no input, but stands as {entry.kind}")
                return False
        return True

    def _requested(self, entry: Entry, event: wire.TurnRequested) -> bool:
        if (known := self.turns.get(event.turn)) is not None:
            self._report(Rule.SENT, f"turn {event.turn} is stored twice, at {known.offset} and at {entry.offset}")
            return False
        if event.on_busy in ("interrupt", "rollback"):
            self._stopped(self._queue[self._first_open :], f"the {event.on_busy} at {entry.offset}")
        turn = self.turns[event.turn] = self._at[entry.offset] = Turn(event.turn, entry.offset, event)
        self._queue.append(turn)
        return True

    def _stopped(self, turns: Iterable[Turn | None], why: str) -> None:
        for turn in turns:
            if turn is not None and not turn.end:
                turn.stop = turn.stop or why

    # ------------------------------------------------------------------------------------------------------ outputs

    def _output(self, entry: Entry, event: wire.AnyEvent) -> bool:
        if isinstance(event, wire.Chunk):
            try:
                whole = self._joiner.feed(event)
            except InvalidInput:
                whole = event
            if whole is None:
                return self._piece(entry, event)
            if isinstance(whole, wire.Chunk):
                self._report(Rule.READABLE, f"the event in pieces that ends at {entry.offset} is not whole")
                return False
            event = whole
        match event:
            case wire.TurnStarted():
                return self._started(entry, event)
            case wire.InputRejected():
                return self._rejected(entry, event)
            case wire.TurnCompleted() | wire.TurnCancelled() | wire.TurnFailed() | wire.TurnExpired():
                return self._terminal(entry, event)
            case wire.TurnRequested() | wire.TurnAnswer() | wire.TurnCancel() | wire.Snapshot() | wire.Gap():
                self._report(Rule.READABLE, f"{event.type} at {entry.offset} is not what an owner stores")
                return False
            case _:
                return self._owned(entry, event)

    def _piece(self, entry: Entry, piece: wire.Chunk) -> bool:
        """Pieces of an end may come from whoever writes it; those of all else from the owner."""
        turn = self.turns.get(piece.turn)
        if turn is not None and not turn.end and piece.attempt == turn.attempts:
            if self._is_current(turn, piece.attempt):
                self._heard(entry)
            return True
        self._report(Rule.OWNER, f"a piece at {entry.offset} {self._not_owned(piece.turn, piece.attempt)}")
        return False

    def _is_current(self, turn: Turn, number: int) -> bool:
        attempt = self._attempt
        return attempt is not None and attempt.turn is turn and attempt.number == number

    def _not_owned(self, turn: str, number: int) -> str:
        """Say why an attempt may not say anything."""
        claims = f"is of attempt {number} at turn {turn}, but "
        if (known := self.turns.get(turn)) is None:
            return claims + "no such turn was sent"
        if known.end:
            return claims + f"that turn has ended at {known.ended_at} ({known.end})"
        if self._attempt is None:
            return claims + "no attempt is under way"
        if self._attempt.superseded:
            return claims + f"{self._attempt.superseded} has taken the session over since"
        return claims + f"attempt {self._attempt.number} at turn {self._attempt.turn.id} is under way"

    def _by_another(self, entry: Entry, worker: str) -> str | None:
        """Return who has appended a record, where that is known to be another worker."""
        by = self._acker.get(entry.offset, worker)
        return None if by in (worker, SEVERAL) else by

    def _supersede(self, entry: Entry) -> None:
        """Whoever appends an end or a rejection without a claim has fenced the owner off, if it is not the owner."""
        if self._attempt is not None and (by := self._by_another(entry, self._attempt.worker)):
            self._attempt.superseded = f"worker {by}, at {entry.offset},"

    def _heard(self, entry: Entry) -> None:
        """The attempt under way has said something: measure its silence."""
        attempt = self._attempt
        assert attempt is not None
        self._silence(attempt, entry)
        attempt.last = entry.stored

    def _silence(self, attempt: _Attempt, entry: Entry) -> None:
        seconds = entry.stored - attempt.last
        if seconds > self.stall.seconds and not attempt.turn.open:
            self.stall = Stall(seconds, attempt.turn.id, entry.offset)

    # ------------------------------------------------------------------------------------------------------- claims

    def _started(self, entry: Entry, event: wire.TurnStarted) -> bool:
        turn = self.turns.get(event.turn)
        if turn is None or turn.end:
            self._report(Rule.OWNER, f"turn.started at {entry.offset} {self._not_owned(event.turn, event.attempt)}")
            return False
        attempt, first = self._attempt, self._first_unended()
        if attempt is not None and attempt.turn is not turn:
            self._report(
                Rule.OWNER,
                f"turn {turn.id} is started at {entry.offset} while attempt {attempt.number} at turn "
                f"{attempt.turn.id} is under way",
            )
        elif first is not turn:
            self._report(
                Rule.ORDER,
                f"turn {turn.id}, sent at {turn.offset}, is started at {entry.offset}, but turn {first.id}, sent "
                f"before at {first.offset}, has not ended",
            )
        if event.attempt != turn.attempts + 1:
            self._report(
                Rule.ATTEMPTS,
                f"attempt {event.attempt} at turn {turn.id} begins at {entry.offset}, expected {turn.attempts + 1}",
            )
        if turn.stop:
            self._report(Rule.STOP, f"turn {turn.id} is started at {entry.offset} in spite of {turn.stop}")
        if by := self._by_another(entry, event.worker):
            self._report(Rule.OWNER, f"the claim of worker {event.worker} at {entry.offset} was appended by {by}")
        self._take_over(entry, turn)
        turn.attempts = max(turn.attempts, event.attempt)
        left = self._history.turns[turn.id].message
        if event.message is not None:
            self._same(entry, event, event.message, left)
        builder = MessageBuilder(left if event.resumes_from is not None else None)
        self._attempt = _Attempt(turn, event.attempt, event.worker, builder, entry.stored, entry.stored)
        return True

    def _first_unended(self) -> Turn:
        while self._queue[self._first_open].end:
            self._first_open += 1
        return self._queue[self._first_open]

    def _take_over(self, entry: Entry, turn: Turn) -> None:
        before = self._attempt if self._attempt is not None and self._attempt.turn is turn else None
        if (before := before or self._lost.pop(turn.id, None)) is not None:
            self.takeovers.append(Takeover(turn.id, before.worker, before.began, before.last, entry.stored))
            self._silence(before, entry)

    # --------------------------------------------------------------------------------------------- what an owner says

    def _owned(self, entry: Entry, event: wire.OutputEvent | wire.UnknownEvent) -> bool:
        try:
            id, number = _names_of(event)
        except msgspec.ValidationError as error:
            self._report(Rule.READABLE, f"{event.type} at {entry.offset} cannot be read: {error}")
            return False
        attempt = self._attempt
        turn = self.turns.get(id)
        current = turn is not None and self._is_current(turn, number)
        # Peers say that a worker is dead, also after one of them has appended something else.
        if turn is None or attempt is None or not current or (attempt.superseded and event.type != LOST):
            self._report(Rule.OWNER, f"{event.type} at {entry.offset} {self._not_owned(id, number)}")
            return False
        by = self._by_another(entry, attempt.worker)
        if by and event.type != LOST:
            self._report(
                Rule.OWNER,
                f"{event.type} at {entry.offset} of attempt {number} at turn {turn.id}, which worker {attempt.worker} "
                f"runs, was appended by {by}",
            )
            return False
        self._says(entry, event, attempt)
        if event.type in _LAST_WORDS:
            self._pauses(entry, event, attempt)
        else:
            self._heard(entry)
        return True

    def _says(self, entry: Entry, event: wire.AnyEvent, attempt: _Attempt) -> None:
        match event:
            case wire.TextDelta() | wire.ReasoningDelta():
                if event.index != attempt.tokens:
                    self._report(
                        Rule.TOKENS, f"{event.type} at {entry.offset} has index {event.index}, not {attempt.tokens}"
                    )
                attempt.tokens = event.index + event.count
            case wire.TurnCheckpoint():
                self._same(entry, event, event.message, attempt.builder.message)
            case wire.TurnSuspended():
                self._same(entry, event, event.message, self._said(attempt.turn))
            case wire.InputRequired():
                if event.request not in attempt.turn.asked:
                    attempt.turn.open.add(event.request)
                attempt.turn.asked.add(event.request)
            case wire.TurnResumed():
                self._resumed(entry, event, attempt.turn)
            case wire.SteerConsumed():
                self._consumed(entry, event, attempt.turn)
            case _:
                pass
        attempt.builder.apply(event)

    def _pauses(self, entry: Entry, event: wire.AnyEvent, attempt: _Attempt) -> None:
        turn = attempt.turn
        if event.type == LOST:
            self._lost[turn.id] = attempt
        else:
            self._silence(attempt, entry)
            if turn.stop:
                self._report(Rule.STOP, f"turn {turn.id} has {event.type} at {entry.offset} in spite of {turn.stop}")
        self._attempt = None

    def _resumed(self, entry: Entry, event: wire.TurnResumed, turn: Turn) -> None:
        if event.request not in turn.open:
            state = "has been answered before" if event.request in turn.asked else "was never asked"
            self._report(Rule.ANSWERS, f"turn.resumed at {entry.offset}: question {event.request} {state}")
        elif self._answers.get(event.answer) != (turn.id, event.request):
            self._report(
                Rule.ANSWERS, f"turn.resumed at {entry.offset}: no answer to {event.request} stands at {event.answer}"
            )
        turn.open.discard(event.request)

    def _consumed(self, entry: Entry, event: wire.SteerConsumed, by: Turn) -> None:
        steer = self.turns.get(event.steer)
        if steer is None or steer.end:
            state = "was never sent" if steer is None else f"has ended at {steer.ended_at} ({steer.end})"
            self._report(Rule.ENDS, f"steer.consumed at {entry.offset}: turn {event.steer} {state}")
            return
        if steer.request.on_busy != "steer" or steer.attempts or steer.offset < by.offset:
            self._report(
                Rule.STEERED,
                f"steer.consumed at {entry.offset} takes turn {steer.id}, which was sent at {steer.offset} to "
                f"{steer.request.on_busy} and has had {steer.attempts} attempts, into turn {by.id} of {by.offset}",
            )
        if steer.offset != event.offset:
            self._report(
                Rule.STEERED,
                f"steer.consumed at {entry.offset}: turn {steer.id} is at {steer.offset}, not {event.offset}",
            )
        steer.consumed_by = by.id
        steer.end, steer.ended_at = event.type, entry.offset

    # --------------------------------------------------------------------------------------------------------- ends

    def _rejected(self, entry: Entry, event: wire.InputRejected) -> bool:
        self._supersede(entry)
        turn = self._at.get(event.offset)
        if turn is None:
            if event.offset not in self._inputs:
                self._report(Rule.ENDS, f"input.rejected at {entry.offset}: there is no input at {event.offset}")
            return True
        if turn.end or turn.attempts:
            if event.code != "already_ended" or not turn.end:
                self._report(
                    Rule.ENDS,
                    f"turn {turn.id} is rejected at {entry.offset} after {turn.end or f'{turn.attempts} attempts'}",
                )
            return False
        turn.end, turn.ended_at = event.type, entry.offset
        return True

    def _terminal(self, entry: Entry, event: wire.Terminal) -> bool:
        turn = self.turns.get(event.turn)
        if turn is None or turn.end:
            state = "was never sent" if turn is None else f"has ended at {turn.ended_at} ({turn.end})"
            self._report(Rule.ENDS, f"{event.type} at {entry.offset}: turn {event.turn} {state}")
            return False
        attempt = self._attempt if self._is_current(turn, event.attempt) else None
        completed = isinstance(event, wire.TurnCompleted)
        # Only an owner completes. All other ends may come from whoever holds the lease, or owns the session.
        if event.attempt != turn.attempts or (completed and (attempt is None or attempt.superseded)):
            self._report(Rule.OWNER, f"{event.type} at {entry.offset} {self._not_owned(turn.id, event.attempt)}")
            return False
        if attempt is None:
            self._supersede(entry)
        elif completed and (by := self._by_another(entry, attempt.worker)):
            self._report(
                Rule.OWNER,
                f"turn {turn.id}, which worker {attempt.worker} runs, is completed at {entry.offset} by {by}",
            )
        if event.turn_offset != turn.offset:
            self._report(
                Rule.ENDS,
                f"{event.type} at {entry.offset} names offset {event.turn_offset}, turn {turn.id} is at {turn.offset}",
            )
        said = attempt.builder.message if completed and attempt is not None else self._said(turn)
        self._same(entry, event, event.message, said)
        self._check_words(entry, turn, event)
        turn.end, turn.ended_at, turn.text = event.type, entry.offset, event.message.text
        if attempt is not None:
            self._silence(attempt, entry)
            self._attempt = None
        return True

    def _said(self, turn: Turn) -> wire.Message:
        """What a reader is shown of a turn: what the attempt under way has said, or else what earlier ones had."""
        attempt = self._attempt
        if attempt is not None and attempt.turn is turn and attempt.builder:
            return attempt.builder.message
        return self._history.turns[turn.id].message

    def _same(self, entry: Entry, event: wire.AnyEvent, message: wire.Message, said: wire.Message) -> None:
        if message != said:
            self._report(
                Rule.FOLD,
                f"the message in {event.type} at {entry.offset} is {_brief(message)}, its records say {_brief(said)}",
            )

    def _check_words(self, entry: Entry, turn: Turn, event: wire.Terminal) -> None:
        sent = self._sent.get(turn.id)
        if sent is None or _WORD.search(sent.text):
            return  # what is only echoed is not counted
        text = _STEERED.sub("", event.message.text)
        if sent.words is not None:
            whole = "".join(f"w{i} " for i in range(sent.words))
            completed = isinstance(event, wire.TurnCompleted)
            if text == whole or (not completed and whole.startswith(text)):
                return
            wanted = f"{'all' if completed else 'a beginning'} of w0 … w{sent.words - 1}"
            self._report(Rule.TEXT, f"turn {turn.id} ends at {entry.offset} with {_clip(text)}, expected {wanted}")
            return
        numbers = [int(number) for number in _WORD.findall(text)]
        starts = turn.attempts if sent.text.startswith(_STARTS_OVER) else 1
        expected = 0
        for place, number in enumerate(numbers):
            if number == 0 and expected and starts > 1:
                starts, expected = starts - 1, 0
            if number != expected:
                self._report(
                    Rule.TEXT, f"turn {turn.id} ends at {entry.offset}, its word {place} is w{number}: {_clip(text)}"
                )
                return
            expected += 1


def _names_of(event: wire.OutputEvent | wire.UnknownEvent) -> tuple[str, int]:
    """Return of which turn and attempt an event is."""
    names = _names.decode(event.raw) if isinstance(event, wire.UnknownEvent) else event
    return names.turn or "", names.attempt


def _clip(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:50]} … {text[-50:]}")


def _brief(message: wire.Message) -> str:
    return f"{len(message.parts)} parts with the text {_clip(message.text)}"
