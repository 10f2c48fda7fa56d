"""Sessions written by hand, right or wrong, and what everybody would have noted of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from agentrun import wire
from agentrun.broker import Kind
from agentrun.history import MessageBuilder
from tests.chaos.agents import words_of
from tests.chaos.checker import Report, Rule, check
from tests.chaos.evidence import Acked, AnyNote, Began, Got, Joined, Left, Sent, Stored, digest

EPOCH = 1_700_000_000.0
"""The wall clock where the monotonic clock is 0."""


class Log:
    """One session. Whoever started last says what is said; each record is stored 0.1 s after the one before.

    Args:
        name: The session's id.
    """

    def __init__(self, name: str = "s") -> None:
        self.name = name
        self.records: list[tuple[Kind, bytes, str | None]] = []
        """Kind, body, and the worker that appended it."""
        self.notes: list[AnyNote] = []
        """Of senders."""
        self.builder = MessageBuilder()
        self._offsets: dict[str, int] = {}
        self._attempts: dict[str, int] = {}
        self._earlier: dict[str, wire.Message] = {}
        self._owner = self._worker = ""

    @property
    def end(self) -> int:
        """The last offset."""
        return len(self.records)

    def put(self, event: wire.KnownEvent | bytes, kind: Kind = Kind.EVENT, *, by: str | None = None) -> int:
        """Append an event as it is and return its offset."""
        body = event if isinstance(event, bytes) else wire.encode(event)
        self.records.append((kind, body, by if kind.input else by or self._worker))
        return self.end

    def send(self, turn: str, text: str = "count 3 0", *, on_busy: wire.OnBusy = "enqueue") -> int:
        """A sender sends a turn, and is told where it is."""
        offset = self.put(wire.TurnRequested(turn=turn, agent="chaos", input=text, on_busy=on_busy), Kind.TURN)
        self._offsets[turn] = offset
        self.notes.append(self.sent(turn, offset, text, on_busy))
        return offset

    def sent(self, turn: str, offset: int, text: str = "count 3 0", on_busy: str = "enqueue") -> Sent:
        """What a sender notes."""
        words = words_of(text)
        return Sent(
            session=self.name, turn=turn, offset=offset, on_busy=on_busy, text=text, words=words, at=self.end / 10
        )

    def stop(self, turn: str) -> int:
        """Somebody stores a stop."""
        return self.put(wire.TurnCancel(turn=turn), Kind.CANCEL)

    def start(self, turn: str, worker: str = "a-1", *, resumes: bool = False, attempt: int | None = None) -> int:
        """A worker claims the session for a turn."""
        if self._owner == turn and self.builder:
            self._earlier[turn] = self.builder.message
        left = self._earlier.get(turn)
        number = attempt or self._attempts.get(turn, 0) + 1
        self._attempts[turn] = number
        self._owner, self._worker = turn, worker
        self.builder = MessageBuilder(left if resumes else None)
        started = wire.TurnStarted(turn=turn, attempt=number, worker=worker, lease=f"{turn}-{number}", message=left)
        started.resumes_from = self.end if resumes else None
        return self.put(started)

    def out(self, event: wire.OutputEvent, *, by: str | None = None) -> int:
        """The owner appends an event of the turn."""
        event.turn, event.attempt = event.turn or self._owner, event.attempt or self._attempts[self._owner]
        self.builder.apply(event)
        transient = isinstance(event, (wire.TextDelta, wire.ReasoningDelta))
        return self.put(event, Kind.DELTA if transient else Kind.EVENT, by=by)

    def say(self, *words: str) -> int:
        """The owner says words, a record each."""
        for word in words:
            self.out(wire.TextDelta(text=word, index=self.builder.tokens))
        return self.end

    def terminal(
        self, cls: type[wire.Terminal], turn: str | None = None, *, by: str | None = None, **more: object
    ) -> int:
        """A turn ends: the owner's with what was said, any other as it is."""
        turn = turn or self._owner
        own = turn == self._owner and self.builder
        message = self.builder.message if own else self._earlier.get(turn, wire.Message())
        fields: dict[str, object] = {
            "turn": turn,
            "attempt": self._attempts.get(turn, 0),
            "turn_offset": self._offsets.get(turn, 0),
            "message": message,
        }
        return self.put(cls(**fields | more), by=by)

    def complete(self, *, by: str | None = None, **more: object) -> int:
        """The owner completes its turn."""
        return self.terminal(wire.TurnCompleted, None, by=by, **more)

    def whole(self, turn: str, text: str = "count 3 0") -> int:
        """A turn from its request to its end."""
        self.send(turn, text)
        self.start(turn)
        self.say("w0 ", "w1 ", "w2 ")
        return self.complete()

    # --------------------------------------------------------------------------------------------- what is noted of it

    def stored(self) -> list[AnyNote]:
        """The log in the end."""
        return [
            Stored(session=self.name, offset=n, kind=kind, body=body.decode(), stored=EPOCH + n / 10, at=1000.0)
            for n, (kind, body, _) in enumerate(self.records, 1)
        ]

    def acked(self) -> list[AnyNote]:
        """What workers were told."""
        return [
            Acked(worker=by, session=self.name, offset=n, hash=digest(body), at=n / 10)
            for n, (_, body, by) in enumerate(self.records, 1)
            if by is not None
        ]

    def read(self, reader: str = "r", after: int = 0, upto: int | None = None) -> list[AnyNote]:
        """What a reader notes that reads on from an offset, to another one or the end."""
        name, upto = f"{self.name}-{reader}", self.end if upto is None else upto
        notes: list[AnyNote] = [
            Joined(reader=name, session=self.name, transport="library", after=after, at=100.0 + after)
        ]
        pieces: list[str] = []
        for n, (_, body, _) in enumerate(self.records, 1):
            if b'"chunk"' in body:
                piece = msgspec.json.decode(body, type=wire.Chunk)
                pieces = [piece.data] if piece.index == 0 else [*pieces, piece.data]
                if piece.index < piece.total - 1:
                    continue
                body = "".join(pieces).encode() if len(pieces) == piece.total else body
            if after < n <= upto:
                notes.append(Got(reader=name, offset=n, hash=digest(body), at=100.0 + n))
        return notes

    def left(self, reader: str = "r") -> AnyNote:
        """What a reader notes that has read to the end."""
        return Left(reader=f"{self.name}-{reader}", whole=True, upto=self.end, at=500.0)

    def all_notes(self) -> list[AnyNote]:
        """Of senders, workers, two readers of which one comes back, and the log."""
        half = self.end // 2
        while half < self.end and b'"chunk"' in self.records[half - 1][1]:
            half += 1
        resumed = [*self.read("r2", upto=half), *self.read("r2", after=half)]
        return [*self.notes, *self.acked(), *self.read(), self.left(), *resumed, self.left("r2"), *self.stored()]


def judge(logs: Log | Sequence[Log], *more: AnyNote) -> Report:
    """Check all that is noted of sessions, and some notes more."""
    logs = [logs] if isinstance(logs, Log) else logs
    return check([Began(seed=7, at=0.0, epoch=EPOCH), *(n for log in logs for n in log.all_notes()), *more])


def replaced(notes: Iterable[AnyNote], index: int, **fields: object) -> list[AnyNote]:
    """The notes, with one of them altered."""
    changed = list(notes)
    changed[index] = msgspec.structs.replace(changed[index], **fields)
    return changed


def broken(log: Log, *more: AnyNote) -> set[Rule]:
    """Return which rules are broken."""
    return {violation.rule for violation in judge(log, *more).violations}


def broken_in(notes: Iterable[AnyNote]) -> set[Rule]:
    """Return which rules are, by notes."""
    return {violation.rule for violation in check(notes).violations}


def started(*words: str, text: str = "count 3 0") -> Log:
    """A session whose first turn has said some words."""
    log = Log()
    log.send("t1", text)
    log.start("t1")
    log.say(*words)
    return log


# ---------------------------------------------------------------------------------------------------- correct sessions


def plain() -> Log:
    log = Log("plain")
    log.whole("t1")
    log.whole("t2")
    return log


def cancelled() -> Log:
    """One turn is stopped while it runs; one that waits, by the owner of the other."""
    log = Log("cancelled")
    log.send("t1")
    log.start("t1")
    log.say("w0 ", "w1 ")
    log.send("t2")
    log.send("t3")
    log.stop("t2")
    log.terminal(wire.TurnCancelled, "t2")
    log.say("w2 ")
    log.terminal(wire.TurnCancelled)
    log.start("t3")
    log.say("w0 ", "w1 ", "w2 ")
    log.complete()
    return log


def steered() -> Log:
    log = Log("steered")
    log.send("t1", "steer 2 0")
    log.start("t1")
    log.say("w0 ")
    offset = log.send("t2", "left w9 please", on_busy="steer")
    log.out(wire.SteerConsumed(steer="t2", offset=offset))
    log.say("[steered: left w9 please] ", "w1 ")
    log.complete()
    return log


def answered() -> Log:
    """It asks, is suspended, and goes on when it is answered; another answer comes too late."""
    log = Log("answered")
    log.send("t1", "approve 2 0")
    log.start("t1")
    log.say("I need approval. ")
    log.out(wire.InputRequired(request="q", kind="approval"))
    log.out(wire.TurnSuspended(requests=["q"], message=log.builder.message))
    answer = log.put(wire.TurnAnswer(turn="t1", request="q", value=True), Kind.TURN)
    late = log.put(wire.TurnAnswer(turn="t1", request="q", value=False), Kind.TURN)
    log.put(wire.InputRejected(turn="t1", offset=late, code="not_waiting", reason="it has its answer"), by="b-1")
    log.start("t1", "b-1", resumes=True)
    log.out(wire.TurnResumed(request="q", answer=answer))
    log.say("w0 ", "w1 ")
    log.out(wire.TurnCheckpoint(message=log.builder.message))
    log.complete()
    return log


def taken_over(*, resumes: bool = True) -> Log:
    """Its worker dies in mid-answer."""
    log = Log("taken-over" if resumes else "started-over")
    log.send("t1")
    log.start("t1", "a-1")
    log.say("w0 ", "w1 ")
    log.start("t1", "b-1", resumes=resumes)
    log.say(*(["w2 "] if resumes else ["w0 ", "w1 ", "w2 "]))
    log.complete()
    return log


def lost() -> Log:
    """Its worker is found dead; the next one dies before it says a word, and the turn is stopped then."""
    log = Log("lost")
    log.send("t1")
    log.start("t1", "a-1")
    log.say("w0 ")
    log.put(b'{"type":"turn.lost","turn":"t1","attempt":1,"worker":"a-1","by":"c-1"}', by="c-1")
    log.start("t1", "b-1")
    log.stop("t1")
    log.terminal(wire.TurnCancelled, message=wire.Message([wire.TextPart("w0 ")]), by="c-1")
    return log


def retried() -> Log:
    """An attempt fails, the next is handed back, the third says it all."""
    log = Log("retried")
    log.send("t1")
    log.start("t1")
    log.say("w0 ")
    log.out(wire.TurnRetrying(error=wire.ErrorInfo("agent_error", "broken", retryable=True), after=0.1))
    log.start("t1")
    log.say("w0 ", "w1 ")
    log.out(wire.TurnReleased())
    log.start("t1", "b-1", resumes=True)
    log.say("w2 ")
    log.complete()
    return log


def interrupted() -> Log:
    """A later turn stops one that runs and one that waits; the latter is ended by who comes next."""
    log = Log("interrupted")
    log.send("t1", "stubborn 0")
    log.start("t1")
    log.say("w0 ")
    log.send("t2", "hello")
    log.send("t3", on_busy="interrupt")
    log.terminal(wire.TurnCancelled)
    log.terminal(wire.TurnCancelled, "t2", by="b-1")
    log.start("t3", "b-1")
    log.say("w0 ", "w1 ", "w2 ")
    log.complete()
    return log


def refused() -> Log:
    """Turns that end without an attempt: one has expired, one cannot be used; and one that fails."""
    log = Log("refused")
    log.send("t1")
    bad = log.send("t2")
    log.send("t3", "fail")
    log.terminal(wire.TurnExpired, "t1", by="a-1")
    log.put(wire.InputRejected(turn="t2", offset=bad, code="not_waiting", reason="no such agent"), by="a-1")
    log.start("t3")
    log.say("I fail. ")
    log.terminal(wire.TurnFailed, error=wire.ErrorInfo("asked_for", "as you asked"))
    return log


def in_pieces() -> Log:
    """Its end is too large for one record; a worker dies between the pieces, and an input stands there too."""
    log = Log("in-pieces")
    log.send("t1")
    log.start("t1")
    log.say("w0 ", "w1 ", "w2 ")
    end = wire.TurnCompleted(turn="t1", attempt=1, turn_offset=1, message=log.builder.message, finish_reason="x" * 1500)
    first = wire.split(end, 1024)[0]
    log.put(first)
    log.start("t1", "b-1", resumes=True)
    end.attempt = 2
    one, *others = wire.split(end, 1024)
    assert others
    log.put(one)
    log.send("t2", "hello")
    for piece in others:
        log.put(piece)
    log.start("t2", "b-1")
    log.say("hello")
    log.complete()
    return log


def correct() -> list[Log]:
    """A session of each sort."""
    overs = [taken_over(), taken_over(resumes=False)]
    return [
        plain(), cancelled(), steered(), answered(), *overs, lost(), retried(), interrupted(), refused(), in_pieces(),
    ]  # fmt: skip
