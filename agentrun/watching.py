"""What telemetry is told of turns, read from a session's fold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from agentrun import wire
from agentrun.broker import Broker, Record
from agentrun.cancel import Cause, Stop
from agentrun.history import History, TurnView
from agentrun.telemetry import Telemetry
from agentrun.telemetry.attempt import Facts, Stopped, Watch, settled, turn_ended
from agentrun.telemetry.names import Attr

__all__ = ["Watcher", "outcome_of", "stopped"]


class Watcher(NamedTuple):
    """Tells of the turns of one worker.

    Attributes:
        telemetry: Where it is told.
        broker: The worker's.
        worker: Its name.
        content: Whether what is asked and said may be told.
    """

    telemetry: Telemetry
    broker: Broker
    worker: str
    content: bool

    def attempt(self, session: str, view: TurnView, carrier: Record) -> Watch:
        """Begin to watch the next attempt at a turn, which ``carrier`` brings on; its request is in the log."""
        answers = [q.answer.trace for q in view.questions.values() if q.answer is not None and not q.resumed]
        first_time = view.attempt == 0 or carrier.offset != view.offset
        facts = self._facts(
            session,
            view,
            attempt=view.attempt + 1,
            answers=[fields for fields in answers if fields],
            due=carrier.time if first_time and carrier.time else None,
            took_over=view.state == "running",
        )
        assert facts is not None
        return Watch(self.telemetry, facts, clock=self.broker.now, content=self.content)

    def turn_ended(self, session: str, view: TurnView, event: wire.Terminal) -> None:
        """Count the end of a turn that was run."""
        if (facts := self._facts(session, view)) is not None:
            turn_ended(self.telemetry, facts, outcome_of(event), now=self.broker.now())

    def stored(self, session: str, history: History, event: wire.OutputEvent) -> None:
        """Tell of a turn that ended without being run, if this event says so; it is applied to ``history``."""
        stop: Stopped | None = None
        match event:
            case wire.SteerConsumed():
                view, outcome = history.turns.get(event.steer), "consumed"
            case wire.InputRejected():
                view, outcome = history.at(event.offset), "rejected"
            case wire.TurnCompleted() | wire.TurnCancelled() | wire.TurnFailed() | wire.TurnExpired():
                view, outcome = history.turns.get(event.turn), outcome_of(event)
                if view is not None and isinstance(event, wire.TurnCancelled):
                    stop = _stop_of(view, history)
            case _:
                return
        if view is not None and (facts := self._facts(session, view, attempt=view.attempt)) is not None:
            settled(self.telemetry, facts, outcome, now=self.broker.now(), stop=stop)

    def dead(self, agent: str) -> None:
        """Count a turn that goes on the list of dead ones."""
        self.telemetry.instruments.add("dead", {Attr.AGENT: agent})

    def _facts(
        self,
        session: str,
        view: TurnView,
        *,
        attempt: int = 0,
        answers: list[dict[str, str]] | None = None,
        due: float | None = None,
        took_over: bool = False,
    ) -> Facts | None:
        if view.request is None:
            return None  # trimmed: nobody knows any more whose it was
        return Facts(
            system=self.broker.capabilities.name,
            session=session,
            request=view.request,
            worker=self.worker,
            attempt=attempt,
            first=view.first_trace,
            answers=answers or (),
            sent=view.sent,
            due=due,
            took_over=took_over,
        )


def outcome_of(event: wire.OutputEvent) -> str:
    """Return how an attempt, or a turn, ended that has this as its last word: ``completed`` of `TurnCompleted`."""
    return event.type.partition(".")[2]


def stopped(stop: Stop) -> Stopped:
    """Return what is told of a stop."""
    return Stopped(stop.cause.name.lower(), stop.by, stop.trace)


def _stop_of(view: TurnView, history: History) -> Stopped:
    if view.stop is not None:
        return Stopped(Cause.CANCEL.name.lower(), view.stop.by, view.stop.trace)
    later = history.turns.get(view.interrupted_by or "")
    cause = Cause.ROLLBACK if view.rollback else Cause.INTERRUPT
    trace: Mapping[str, str] = later.request.trace if later is not None and later.request is not None else {}
    return Stopped(cause.name.lower(), view.interrupted_by, trace)
