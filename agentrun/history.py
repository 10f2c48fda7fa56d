"""The fold of a session's records: its turns, what each of them said, and the conversation for the model.

Everybody who needs to know how a session stands (worker, client, operator) applies its records, in order, to a
`History`. The fold is incremental, synchronous and the same for all.
"""

from __future__ import annotations

import itertools
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Literal

from agentrun import wire
from agentrun.chat import ChatMessage, input_to_chat, message_to_chat
from agentrun.errors import TurnNotFound
from agentrun.message import MessageBuilder

__all__ = [
    "ChatMessage",
    "History",
    "MessageBuilder",
    "Question",
    "State",
    "TurnView",
    "input_to_chat",
    "message_to_chat",
]

State = Literal[
    "queued",
    "running",
    "suspended",
    "retrying",
    "completed",
    "cancelled",
    "failed",
    "expired",
    "consumed",
    "rejected",
]

_ENDED = frozenset({"completed", "cancelled", "failed", "expired", "consumed", "rejected"})


@dataclass(slots=True, eq=False)
class Question:
    """One `InputRequired` of a turn. The first answer stored while it is open is the one that counts."""

    event: wire.InputRequired
    offset: int
    answer: wire.TurnAnswer | None = None
    answer_offset: int | None = None
    resumed: bool = False
    """The turn has taken the answer."""


@dataclass(slots=True, eq=False)
class TurnView:
    """One turn as the log tells it. `History.apply` updates it in place."""

    id: str
    offset: int
    """Where its request stands; 0 where that was trimmed."""
    agent: str = ""
    request: wire.TurnRequested | None = None
    state: State = "queued"
    attempt: int = 0
    """The highest attempt started; 0 before the first."""
    worker: str | None = None
    """Who runs it, or ran it last."""
    sent: float = 0.0
    """When its request was stored, in seconds since the epoch by the broker's clock; 0 if that is not known."""
    first_trace: dict[str, str] = field(default_factory=dict[str, str])
    """Trace context of its first attempt, if that told of one."""
    last_out: int = 0
    """Offset of its last output record, 0 if it has none."""
    usage: wire.Usage | None = None
    error: wire.ErrorInfo | None = None
    """Why it failed; while it is retrying, why the last attempt did."""
    finish_reason: str | None = None
    by: str | None = None
    reason: str | None = None
    rolled_back: bool = False
    ended_at: int | None = None
    """Offset of the record that ended it."""
    consumed_by: str | None = None
    steers: list[str] = field(default_factory=list[str])
    """The turns this one has consumed, in that order."""
    questions: dict[str, Question] = field(default_factory=dict[str, Question])
    stop: wire.TurnCancel | None = None
    """The first stored stop that concerns it: for it alone, or for all turns sent before."""
    interrupted_by: str | None = None
    """The first later turn that was sent to interrupt (or roll back) this one before it had ended."""
    rollback: bool = False
    """Whether that one asked for a rollback."""
    replaced_by: str | None = None
    """The first later turn that was sent in place of this one or of one before it: this one's exchange is no part of
    the conversation any more. Whatever becomes of that later turn: its sender saw the conversation go on without."""
    suspended_until: float | None = None
    retry_at: float | None = None
    _own: MessageBuilder = field(default_factory=MessageBuilder)
    _own_incomplete: bool = False
    _earlier: wire.Message = field(default_factory=wire.Message)
    _earlier_incomplete: bool = False
    _uncharged: int = 0

    @property
    def ended(self) -> bool:
        """Whether nothing more comes of it."""
        return self.state in _ENDED

    @property
    def charged(self) -> int:
        """How many attempts count against the limit: all but those that were handed back or suspended."""
        return self.attempt - self._uncharged

    @property
    def message(self) -> wire.Message:
        """What a reader should show now. What an earlier attempt said stays until the current one says something."""
        return self._own.message if self._own else self._earlier

    @property
    def incomplete(self) -> bool:
        """Whether `message` lacks what a hole held that nothing could fill.

        A message that is incomplete must not be stored as what the attempts left (`TurnStarted.message`): a reader
        would take it for all there was.
        """
        return self._own_incomplete or (self._earlier_incomplete and not self._own)

    @property
    def tokens(self) -> int:
        """Tokens of the current attempt."""
        return self._own.tokens

    def _authoritative(self, message: wire.Message) -> None:
        # An empty message never blanks what is shown.
        if message.parts:
            self._own.replace(message)
            self._own_incomplete = False

    def lose(self) -> None:
        """Take note of a hole in the current attempt that nothing fills. `History` calls it."""
        self._own_incomplete = True

    def output(self, offset: int, event: wire.OutputEvent | wire.Snapshot, time: float) -> None:
        """Apply an output record of this turn's current attempt. `History` calls it."""
        if isinstance(event, wire.TurnStarted):
            self._started(event)
        elif isinstance(event, wire.TERMINAL):
            self._terminal(offset, event)
        else:
            self.attempt = max(self.attempt, event.attempt)
            match event:
                case wire.Snapshot() | wire.TurnCheckpoint():
                    self._authoritative(event.message)
                case wire.InputRequired():
                    self.questions.setdefault(event.request, Question(event, offset))
                case wire.TurnResumed():
                    if question := self.questions.get(event.request):
                        question.resumed = True
                case wire.TurnSuspended():
                    self._authoritative(event.message)
                    self._pause("suspended", event.usage, charged=False)
                    self.suspended_until = event.until
                case wire.TurnRetrying():
                    self._pause("retrying", event.usage, charged=True)
                    self.error = event.error
                    self.retry_at = time + event.after
                case wire.TurnReleased():
                    self._pause("queued", event.usage, charged=False)
                case wire.TurnLost():
                    pass  # as if nobody had noticed yet: it goes on with the next attempt
                case _:
                    self._own.apply(event)
        self.last_out = offset

    def _started(self, event: wire.TurnStarted) -> None:
        told = event.message is not None and bool(event.message.parts)
        self._earlier_incomplete = self.incomplete and not told
        self._earlier = event.message if event.message is not None and told else self.message
        resumes = event.resumes_from is not None
        self._own = MessageBuilder(self._earlier if resumes else None)
        self._own_incomplete = self._earlier_incomplete and resumes
        self.state = "running"
        if self.attempt == 0:
            self.first_trace = event.trace
        self.attempt = event.attempt
        self.worker = event.worker
        self.error = self.suspended_until = self.retry_at = None

    def _pause(self, state: State, usage: wire.Usage | None, *, charged: bool) -> None:
        if self.state == "running" and not charged:
            self._uncharged += 1
        self.state = state
        self.usage = usage or self.usage

    def _terminal(self, offset: int, event: wire.Terminal) -> None:
        self._authoritative(event.message)
        self.usage = event.usage or self.usage
        self.ended_at = offset
        self.error = self.suspended_until = self.retry_at = None
        match event:
            case wire.TurnCompleted():
                self.state = "completed"
                self.finish_reason = event.finish_reason
            case wire.TurnCancelled():
                self.state = "cancelled"
                self.by, self.reason, self.rolled_back = event.by, event.reason, event.rolled_back
            case wire.TurnFailed():
                self.state = "failed"
                self.error = event.error
            case wire.TurnExpired():
                self.state = "expired"
                self.reason = event.reason


class History:
    """A session, folded from its records.

    Attributes:
        offset: The last offset applied.
        turns: All turns, in the order sent.
    """

    def __init__(self) -> None:
        self.offset = 0
        self.turns: dict[str, TurnView] = {}
        self._unended: dict[str, TurnView] = {}
        self._at: dict[int, TurnView] = {}
        self._answers: dict[int, TurnView] = {}
        self._running: TurnView | None = None
        self._joiner = wire.Joiner()

    @property
    def open(self) -> list[TurnView]:
        """The turns that have not ended, in the order sent. What it costs does not grow with those that have."""
        return list(self._unended.values())

    @property
    def calm(self) -> bool:
        """Whether every turn has ended, or waits for its first attempt and nothing was said of it since it was sent."""
        return all(v.state == "queued" and not v.attempt and not v.stop and not v.interrupted_by for v in self.open)

    def fork(self) -> History:
        """Return a history that goes on from here by itself; this one must be `calm`, and is not to be gone on with.

        Turns that have ended are shared, so it costs a fraction of a microsecond each.
        """
        other = History()
        other.offset = self.offset
        for v in self.open:
            other._unended[v.id] = TurnView(v.id, v.offset, v.agent, v.request, sent=v.sent, replaced_by=v.replaced_by)
        fresh = other._unended
        other.turns = self.turns | fresh
        other._at = self._at | {view.offset: view for view in fresh.values()}
        other._answers = {offset: fresh.get(view.id, view) for offset, view in self._answers.items()}
        return other

    def at(self, offset: int) -> TurnView | None:
        """Return the turn whose request stands at ``offset``; None for anything else, a repeated request included."""
        return self._at.get(offset)

    def answered_by(self, offset: int) -> TurnView | None:
        """Return the turn that the answer or the stop at ``offset`` was for.

        For a stop of all turns it is the oldest one that had not ended. Whether an answer counts is told by
        `Question.answer_offset`: another may have come first, or the question may not be open.
        """
        return self._answers.get(offset)

    def apply(self, offset: int, event: wire.AnyEvent, *, time: float = 0.0) -> TurnView | None:
        """Take in the next record, stored at ``time``, and return the turn it concerns.

        A `Snapshot` or `Gap` is applied at the offset it reaches ``to``. An offset that was applied before changes
        nothing, nor does output of an attempt that was superseded or of a turn that has ended.
        """
        if offset <= self.offset:
            return None
        self.offset = offset
        whole = self._joiner.feed(event)
        match whole:
            case None | wire.Chunk():
                return self.turns.get(event.turn) if isinstance(event, wire.Chunk) else None
            case wire.TurnRequested():
                return self._requested(offset, whole, time)
            case wire.TurnAnswer():
                return self._answered(offset, whole)
            case wire.TurnCancel():
                return self._stopped(offset, whole)
            case wire.InputRejected():
                return self._rejected(offset, whole)
            case wire.Gap():
                if self._running is not None:
                    self._running.lose()
                return self._running
            case wire.UnknownEvent():
                return None
            case _:
                return self._output(offset, whole, time)

    def messages(self, *, until: str | None = None) -> list[ChatMessage]:
        """Return the conversation as chat messages for a provider.

        With ``until``: every exchange before that turn, then the turn's own input (also where it was replaced), without
        what it has answered so far (`message_to_chat` of its message, for an agent that goes on from there). Without:
        everything.

        An exchange is the user's input, the inputs of the turns it consumed (steering), then the assistant's answer
        with its tool results: the model may have seen the steering in mid-answer, but that place cannot be told to
        every provider. A turn that was cancelled, failed or expired keeps its input and what it said. Left out are
        turns that were replaced, were rolled back, were rejected, or wait for their first attempt.

        Raises:
            TurnNotFound: There is no turn ``until``.
        """
        if until is not None and until not in self.turns:
            raise TurnNotFound(f"the session has no turn {until!r}")
        chat: list[ChatMessage] = []
        for view in self.turns.values():
            if view.id == until:
                return chat + self._said_by_user(view, *self._steers(view))
            waiting = view.state == "queued" and view.attempt == 0
            gone = view.rolled_back or view.replaced_by is not None
            if waiting or gone or view.state in ("rejected", "consumed"):
                continue
            chat += self._said_by_user(view, *(s for s in self._steers(view) if s.replaced_by is None))
            chat += message_to_chat(view.message)
        return chat

    def _steers(self, view: TurnView) -> list[TurnView]:
        return [self.turns[steer] for steer in view.steers]

    def _said_by_user(self, *views: TurnView) -> list[ChatMessage]:
        return [m for v in views if v.request is not None for m in _apart(input_to_chat(v.request.input))]

    def _requested(self, offset: int, event: wire.TurnRequested, time: float) -> TurnView:
        if known := self.turns.get(event.turn):
            return known
        if event.on_busy in ("interrupt", "rollback"):
            for view in self.open:
                if view.interrupted_by is None:
                    view.interrupted_by = event.turn
                    view.rollback = event.on_busy == "rollback"
        self._replace(event)
        view = TurnView(event.turn, offset, event.agent, event, sent=time)
        self.turns[event.turn] = self._unended[event.turn] = self._at[offset] = view
        return view

    def _replace(self, event: wire.TurnRequested) -> None:
        if event.replaces not in self.turns:
            return
        # By the order they were sent in, not by offset: where requests were trimmed, several turns have offset 0.
        after = itertools.dropwhile(lambda view: view.id != event.replaces, self.turns.values())
        for view in after:
            view.replaced_by = view.replaced_by or event.turn

    def _answered(self, offset: int, event: wire.TurnAnswer) -> TurnView | None:
        view = self.turns.get(event.turn)
        if view is None:
            return None
        self._answers[offset] = view
        question = view.questions.get(event.request)
        if question is not None and question.answer is None and not view.ended:
            question.answer, question.answer_offset = event, offset
        return view

    def _stopped(self, offset: int, event: wire.TurnCancel) -> TurnView | None:
        if event.all:
            views = self.open
        else:
            view = self.turns.get(event.turn or "")
            views = [] if view is None else [view]
        for view in views:
            if view.stop is None and not view.ended:
                view.stop = event
        if not views:
            return None
        self._answers[offset] = views[0]
        return views[0]

    def _rejected(self, offset: int, event: wire.InputRejected) -> TurnView | None:
        if (view := self._at.get(event.offset)) is not None:
            if not view.ended:
                view.state = "rejected"
                view.reason = event.reason
                view.ended_at = view.last_out = offset
                self._unended.pop(view.id, None)
            return view
        view = self._answers.get(event.offset)
        for question in view.questions.values() if view is not None else ():
            if question.answer_offset == event.offset:
                # An answer that cannot be used leaves the question open.
                question.answer = question.answer_offset = None
        return view

    def _output(self, offset: int, event: wire.OutputEvent | wire.Snapshot, time: float) -> TurnView | None:
        if not event.turn:
            return None
        view = self.turns.get(event.turn)
        if view is None:
            # Its request was trimmed.
            request = event.turn_offset if isinstance(event, wire.TERMINAL) else 0
            view = self.turns[event.turn] = self._unended[event.turn] = TurnView(event.turn, request)
        ends = isinstance(event, wire.TERMINAL)
        if view.ended or (event.attempt < view.attempt and not ends):
            return view
        if isinstance(event, wire.SteerConsumed):
            self._consumed(offset, view, event)
        view.output(offset, event, time)
        if ends:
            self._unended.pop(view.id, None)
        if view.state == "running":
            self._running = view
        elif self._running is view:
            self._running = None
        return view

    def _consumed(self, offset: int, by: TurnView, event: wire.SteerConsumed) -> None:
        steer = self.turns.get(event.steer)
        if steer is None or steer.ended:
            return
        steer.state = "consumed"
        steer.consumed_by = by.id
        steer.ended_at = offset
        self._unended.pop(steer.id, None)
        by.steers.append(steer.id)


def _apart(messages: list[ChatMessage]) -> list[ChatMessage]:
    """Copy them: what an author does to its messages is not to be found in the next turn's."""
    try:
        return deepcopy(messages)
    except RecursionError:
        return messages  # nobody's conversation is as deep as that
