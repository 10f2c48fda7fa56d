"""Decides from the notes of a run whether the promises were kept: `check`.

Each session is checked by itself. Its log must be one that a fleet of correct workers could have written
(`tests.chaos.walk`), and it must agree with all that its senders, readers and workers were told.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

import msgspec
from msgspec import Struct

from tests.chaos.evidence import (
    Acked,
    AnyNote,
    Began,
    Deleted,
    Fault,
    Got,
    Joined,
    Left,
    Said,
    Sent,
    Steered,
    Stopped,
    Stored,
    Unended,
)
from tests.chaos.figures import Figures, Times, aligned
from tests.chaos.rules import Rule, Violation
from tests.chaos.session import (
    Reader,
    Session,
    Stretch,
    check_acks,
    check_density,
    check_readers,
    check_said,
    check_sends,
    check_steering,
    check_stops,
)
from tests.chaos.walk import Stall, Takeover, Walk

__all__ = ["Report", "Rule", "Violation", "check"]

_HARMLESS = ("clock jump", "die at points", "terminate")
"""Faults that take nobody's turns; if a worker dies of one, that is noted as well."""
_SAME = 0.5
"""Seconds within which two faults are one: a signal, and that it worked."""
_LISTED = 20
"""Violations of one rule that the table lists."""


class Report(Struct):
    """What came out: the figures of the run, and every rule that was broken."""

    figures: Figures
    violations: list[Violation]

    @property
    def table(self) -> str:
        """The figures as text, and below them the violations, the first of each rule."""
        lines = [aligned(self.figures.rows())]
        for rule in Rule:
            broken = [violation for violation in self.violations if violation.rule is rule]
            if broken:
                lines += ["", f"{rule.name}: {rule} ({len(broken):,} times broken)"]
                lines += [f"  {violation}" for violation in broken[:_LISTED]]
        return "\n".join(lines)

    @property
    def json(self) -> bytes:
        """The figures as JSON."""
        return msgspec.json.encode(self.figures)


def check(notes: Iterable[AnyNote]) -> Report:
    """Check a run. Every note is looked at once; those of one process must come in the order they were written."""
    run = _Run()
    for note in notes:
        run.take(note)
    return run.report()


class _Run:
    def __init__(self) -> None:
        self._figures = Figures()
        self._violations: list[Violation] = []
        self._sessions: defaultdict[str, Session] = defaultdict(Session)
        self._deleted: set[str] = set()
        self._readers: dict[str, Reader] = {}
        self._transports: dict[str, str] = {}
        self._workers: dict[str, int] = {}
        self._faults: defaultdict[str, list[float]] = defaultdict(list)
        self._counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._began: Began | None = None
        self._first = self._last = 0.0
        self._takeovers: list[Takeover] = []

    # ------------------------------------------------------------------------------------------------------- taking in

    def take(self, note: AnyNote) -> None:
        """Take in one note."""
        match note:
            case Stored():
                self._sessions[note.session].records.add(note)
                return
            case Got():
                self._got(note)
            case Acked():
                session = self._sessions[note.session]
                session.ackers.append(self._workers.setdefault(note.worker, len(self._workers)))
                session.ack_offsets.append(note.offset)
                session.ack_hashes.append(int(note.hash, 16))
            case Joined():
                self._joined(note)
            case Left() if note.whole:
                self._reader(note.reader).upto = note.upto
            case Began():
                self._began = note
            case Fault():
                self._counts["faults"][note.kind.partition(",")[0]] += 1  # without the reason why it was not done
                if not note.kind.startswith(_HARMLESS):
                    self._faults[note.target.partition(" to ")[0]].append(note.at)
            case Deleted():
                self._deleted.add(note.session)
            case Unended():
                self._sessions[note.session].unended.append(note)
                return
            case _:
                self._of_client(note)
        self._first = min(self._first or note.at, note.at)
        self._last = max(self._last, note.at)

    def _of_client(self, note: AnyNote) -> None:
        match note:
            case Sent():
                self._sessions[note.session].sent.append(note)
            case Stopped():
                self._sessions[note.session].stopped.append(note)
            case Steered():
                self._sessions[note.session].steered.append(note)
            case Said():
                self._sessions[note.session].said.append(note)
                self._transports.setdefault(note.reader, "ai sdk")
            case _:
                pass

    def _reader(self, name: str) -> Reader:
        if (reader := self._readers.get(name)) is None:
            reader = self._readers[name] = Reader(name)
        return reader

    def _joined(self, note: Joined) -> None:
        reader = self._reader(note.reader)
        if not reader.stretches:
            self._sessions[note.session].readers.append(reader)
        reader.stretches.append(Stretch(note.at, note.after))
        self._transports[note.reader] = note.transport

    def _got(self, note: Got) -> None:
        reader = self._reader(note.reader)
        if not reader.stretches:
            self._broken(Rule.READER, "?", f"reader {note.reader} was given offset {note.offset} before it had asked")
            return
        stretch = reader.stretches[-1]
        stretch.offsets.append(note.offset)
        # A snapshot or a gap, which nobody may be given in a run, is noted without.
        stretch.hashes.append(int(note.hash or "0", 16))

    # ------------------------------------------------------------------------------------------------------- deciding

    def _broken(self, rule: Rule, session: str, what: str) -> None:
        self._violations.append(Violation(rule, session, what))

    def report(self) -> Report:
        """Check all sessions, and sum up."""
        figures, names = self._figures, list(self._workers)
        for name in sorted(self._sessions):
            if name not in self._deleted:
                self._check_session(name, self._sessions[name], names)
        began = self._began
        figures.seed = began.seed if began is not None else 0
        figures.minutes = (self._last - (began.at if began is not None else self._first)) / 60
        figures.deleted = len(self._deleted)
        figures.turns = dict(self._counts["turns"])
        figures.faults = dict(self._counts["faults"])
        figures.receipts = dict(self._counts["receipts"])
        figures.readers = dict(Counter(self._transports.values()))
        figures.takeovers = Times.of(self._seconds(takeover) for takeover in self._takeovers)
        figures.violations = dict(Counter(violation.rule.name for violation in self._violations))
        figures.cancels = Times.of(
            note.took
            for name, session in self._sessions.items()
            for note in session.stopped
            if note.status == "cancelled" and name not in self._deleted
        )
        return Report(figures, self._violations)

    def _seconds(self, takeover: Takeover) -> float:
        """From the last fault that befell the worker while it ran the attempt; if there is none, from its last word."""
        if self._began is None:
            return takeover.until - takeover.last
        epoch = self._began.epoch - self._began.at
        process = takeover.worker.rpartition("-")[0]  # a worker's name tells which life of its process it is
        faults = [
            at + epoch
            for name in (takeover.worker, process, "all workers")
            for at in self._faults.get(name, ())
            if takeover.began <= at + epoch <= takeover.until
        ]
        fatal = min((at for at in faults if at > max(faults) - _SAME), default=takeover.last)
        return takeover.until - fatal

    def _check_session(self, name: str, session: Session, workers: list[str]) -> None:
        def broken(rule: Rule, what: str) -> None:
            self._broken(rule, name, what)

        check_density(session.records, broken)
        walk = Walk(broken, acker=session.acker(workers), sent={note.turn: note for note in session.sent})
        walk.run(session.records)
        check_acks(session, workers, broken)
        check_sends(session, walk.turns, broken)
        check_stops(session, walk.turns, broken)
        check_steering(session, walk.turns, broken)
        check_said(session, walk.turns, broken)
        check_readers(session, broken)
        for note in session.unended:
            broken(Rule.QUIET, f"it did not come to rest, pending is {note.pending}")
        self._sum_up(name, session, walk)

    def _sum_up(self, name: str, session: Session, walk: Walk) -> None:
        figures = self._figures
        if session.records:
            figures.sessions += 1
        figures.events += len(session.records)
        figures.acked += len(session.ack_offsets)
        figures.attempts += sum(turn.attempts for turn in walk.turns.values())
        for turn in walk.turns.values():
            outcome = turn.end.partition(".")[2] or "unended"
            self._counts["turns"][outcome] += 1
        for note in session.stopped:
            self._counts["receipts"][note.status] += 1
        for reader in session.readers:
            figures.resumes += len(reader.stretches) - 1
            figures.read += sum(len(stretch.offsets) for stretch in reader.stretches)
        self._takeovers += walk.takeovers
        self._longest(name, walk.stall)

    def _longest(self, session: str, stall: Stall) -> None:
        if stall.seconds > self._figures.longest_stall:
            self._figures.longest_stall = stall.seconds
            self._figures.stalled = f"(session {session}, turn {stall.turn}, until offset {stall.offset})"
