"""What everybody was told about one session, and whether its log agrees."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tests.chaos.evidence import Said, Sent, Steered, Stopped, Unended
from tests.chaos.records import Records, Shown
from tests.chaos.rules import Rule
from tests.chaos.walk import SEVERAL, Turn

Report = Callable[[Rule, str], None]


@dataclass(slots=True)
class Stretch:
    """What a reader was given from one joining to the next."""

    at: float
    after: int
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    hashes: array[int] = field(default_factory=lambda: array("Q"))


@dataclass(slots=True)
class Reader:
    """A reader of a session, over all its connections."""

    name: str
    stretches: list[Stretch] = field(default_factory=list[Stretch])
    upto: int = 0
    """Up to which offset it must have everything."""


@dataclass(slots=True)
class Session:
    """All notes about one session."""

    records: Records = field(default_factory=Records)
    sent: list[Sent] = field(default_factory=list[Sent])
    stopped: list[Stopped] = field(default_factory=list[Stopped])
    steered: list[Steered] = field(default_factory=list[Steered])
    said: list[Said] = field(default_factory=list[Said])
    unended: list[Unended] = field(default_factory=list[Unended])
    readers: list[Reader] = field(default_factory=list[Reader])
    ackers: array[int] = field(default_factory=lambda: array("H"))
    """Numbers of workers; `ack_offsets` and `ack_hashes` are what each was told is stored."""
    ack_offsets: array[int] = field(default_factory=lambda: array("Q"))
    ack_hashes: array[int] = field(default_factory=lambda: array("Q"))

    def acker(self, workers: list[str]) -> dict[int, str]:
        """Return which worker was told that it had appended the record at an offset."""
        acker: dict[int, str] = {}
        for number, offset in zip(self.ackers, self.ack_offsets, strict=True):
            name = workers[number]
            acker[offset] = name if acker.get(offset, name) == name else SEVERAL
        return acker


def check_density(records: Records, report: Report) -> None:
    """The n-th record has offset n."""
    expected = 1
    for offset in records.offsets:
        if offset != expected:
            report(Rule.DENSE, f"the record after {expected - 1} has offset {offset}, expected {expected}")
        expected = offset + 1


def check_acks(session: Session, workers: list[str], report: Report) -> None:
    """What a worker was told is stored, is: with that body, at that offset."""
    stored = dict(zip(session.records.offsets, session.records.hashes, strict=True))
    wrong = [
        (offset, workers[number], "another record is" if offset in stored else "nothing is")
        for number, offset, hashed in zip(session.ackers, session.ack_offsets, session.ack_hashes, strict=True)
        if stored.get(offset) != hashed
    ]
    if wrong:
        offset, worker, instead = min(wrong)
        report(
            Rule.ACKED,
            f"{len(wrong)} acknowledged records are not stored, the first is that of worker {worker} at {offset}, "
            f"where {instead}",
        )


def check_sends(session: Session, turns: Mapping[str, Turn], report: Report) -> None:
    """What was accepted stands where every ``send`` of it said."""
    for sent in session.sent:
        turn = turns.get(sent.turn)
        if turn is None:
            report(Rule.SENT, f"turn {sent.turn} was accepted at {sent.offset} and is not stored")
        elif turn.offset != sent.offset:
            report(Rule.SENT, f"turn {turn.id} was accepted at {sent.offset} and is stored at {turn.offset}")
        elif isinstance(turn.request.input, str) and turn.request.input != sent.text:
            report(Rule.SENT, f"turn {turn.id} was sent as {sent.text!r} and is stored as {turn.request.input!r}")


def check_stops(session: Session, turns: Mapping[str, Turn], report: Report) -> None:
    """The receipts of stops are true."""
    cancelled = {turn.ended_at for turn in turns.values() if turn.end == "turn.cancelled"}
    accepted: dict[str, float] = {}
    for sent in session.sent:
        accepted[sent.turn] = min(accepted.get(sent.turn, sent.at), sent.at)
    for stop in session.stopped:
        if not stop.turn:
            fault = None if stop.status != "cancelled" or stop.offset in cancelled else "no turn was cancelled there"
        elif stop.status == "not_found":
            early = accepted.get(stop.turn, math.inf) < stop.at - stop.took
            fault = "its turn had been accepted before" if early else None
        else:
            fault = _receipt(stop, turns.get(stop.turn))
        if fault is not None:
            what = f"turn {stop.turn}" if stop.turn else "all turns"
            report(Rule.STOP, f"a stop of {what} came back {stop.status} at {stop.offset}, but {fault}")


def _receipt(stop: Stopped, turn: Turn | None) -> str | None:
    """Return what is wrong with the receipt for a turn that was found."""
    if turn is None:
        return "no such turn is stored"
    ends = {"cancelled": turn.end == "turn.cancelled", "already_ended": bool(turn.end)}
    # What is pending says nothing yet; that each turn ends is another rule.
    if stop.status == "pending" or (ends[stop.status] and turn.ended_at == stop.offset):
        return None
    return f"it ended at {turn.ended_at} ({turn.end})" if turn.end else "it has not ended"


def check_steering(session: Session, turns: Mapping[str, Turn], report: Report) -> None:
    """Who was told that steering was taken, or was not, was told what the log says."""
    for steered in session.steered:
        turn = turns.get(steered.turn)
        if turn is None:
            report(Rule.STEERED, f"turn {steered.turn} steered, but is not stored")
        elif turn.consumed_by != steered.consumed_by:
            told, is_so = (f"taken by {by}" if by else "not taken" for by in (steered.consumed_by, turn.consumed_by))
            report(Rule.STEERED, f"the sender of {turn.id} was told that it was {told}, but it was {is_so}")


def check_said(session: Session, turns: Mapping[str, Turn], report: Report) -> None:
    """A reader that is given no offsets has the text that a turn ended with."""
    for said in session.said:
        turn = turns.get(said.turn)
        if turn is None:
            report(Rule.SAID, f"reader {said.reader} was given an answer of turn {said.turn}, which is not stored")
        elif said.text != turn.text and not (turn.asked and turn.text.startswith(said.text)):
            # A stream ends also where the agent asks: then it has what was said until then.
            at = next((i for i, (a, b) in enumerate(zip(said.text, turn.text, strict=False)) if a != b), None)
            at = min(len(said.text), len(turn.text)) if at is None else at
            report(
                Rule.SAID,
                f"reader {said.reader} of turn {turn.id} has {len(said.text)} characters of text, stored are "
                f"{len(turn.text)}; from {at} on it has {said.text[at : at + 40]!r}, not {turn.text[at : at + 40]!r}",
            )


def check_readers(session: Session, report: Report) -> None:
    """Each reader was given the log, from where it asked."""
    if not session.readers:
        return
    shown = Shown(session.records)
    for reader in session.readers:
        if (fault := _read(reader, shown)) is not None:
            report(Rule.READER, f"reader {reader.name} {fault}")


def _read(reader: Reader, shown: Shown) -> str | None:
    """Return what is wrong with what a reader was given; what comes after the first fault says nothing."""
    last: int | None = None
    for stretch in sorted(reader.stretches, key=lambda stretch: stretch.at):
        if last is not None and stretch.after != last:
            return f"resumed behind {stretch.after}, but had everything up to {last}"
        last = stretch.after
        place = bisect_right(shown.offsets, stretch.after)
        for offset, hashed in zip(stretch.offsets, stretch.hashes, strict=True):
            if place >= len(shown.offsets):
                return f"was given an event at {offset}, but {last} is the last that is stored"
            if offset != shown.offsets[place]:
                return f"was given {offset} after {last}, expected {shown.offsets[place]}"
            if hashed != shown.hashes[place]:
                return f"was given another event at {offset} than the one that is stored"
            last = offset
            place += 1
    if (last or 0) < reader.upto:
        return f"read to the end, but has nothing behind {last or 0}; the end is {reader.upto}"
    return None
