"""What reaches a session while a turn of it runs: stops, answers, steering, later turns, deadlines."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

import anyio
import anyio.lowlevel
import msgspec

from agentrun import wire
from agentrun.broker import Kind, Pending, Record
from agentrun.cancel import Cause, Stop, StopSwitch
from agentrun.errors import Fenced, InvalidInput
from agentrun.history import History, TurnView
from agentrun.plan import OVERDUE, cancelled, input_of, reject, stopped, terminal_fields, unfit
from agentrun.publish import Publisher
from agentrun.writer import Change


class Inbox:
    """The inputs of a session whose owner is at work, and what the running turn takes of them.

    Args:
        history: The session, folded; every input that comes is applied to it.
        view: The running turn, of ``history``.
        carrier: The offset of the leased input.
        switch: Stops the agent.
        clock: Tells the broker's time.
    """

    def __init__(
        self, history: History, view: TurnView, carrier: int, switch: StopSwitch, clock: Callable[[], float]
    ) -> None:
        self._ended_as: wire.Terminal | None = None
        self._ended_at = 0
        self._history = history
        self._view = view
        self._carrier = carrier
        self._switch = switch
        self._clock = clock
        self._publisher: Publisher | None = None
        self._taken: set[str] = set()
        self._moved = anyio.Event()
        self._over = anyio.Event()

    def open(self, publisher: Publisher) -> None:
        """Begin to answer and to append."""
        self._publisher = publisher
        self._act()

    def close(self) -> None:
        """Append nothing more: the agent is through. What comes now is left to the last word, or the next owner."""
        self._publisher = None

    def over(self, event: wire.Terminal | None, offset: int) -> None:
        """Tell those who wait for it how the turn ended, if it did; only the first word counts."""
        if not self._over.is_set():
            self._ended_as, self._ended_at = event, offset
            self._over.set()

    # ------------------------------------------------------------------------------------------------------ stored

    def on_input(self, record: Record) -> None:
        """Take in an input of the log; each comes once, in order."""
        try:
            event = input_of(record)
        except InvalidInput as error:
            # A turn is refused by whoever leases it; nobody leases a stop.
            if record.kind is Kind.CANCEL:
                self._reject(record.offset, "not_an_input", str(error))
            return
        self._history.apply(record.offset, event, time=record.time)
        if isinstance(event, wire.TurnAnswer) and (fault := unfit(self._history, record.offset)) is not None:
            self._reopen(event, record.offset)
            self._reject(record.offset, *fault, event.turn)
        self._act()
        moved, self._moved = self._moved, anyio.Event()
        moved.set()

    def _reject(self, offset: int, code: str, reason: str, turn: str = "") -> None:
        if self._publisher is not None:
            step = reject(offset, code, reason, turn)
            self._put(step.event, *step.settles)

    def _reopen(self, event: wire.TurnAnswer, offset: int) -> None:
        # At once, and not when the rejection is stored: nobody may take it until then.
        view = self._history.turns.get(event.turn)
        question = view.questions.get(event.request) if view is not None else None
        if question is not None and question.answer_offset == offset:
            question.answer = question.answer_offset = None

    def _act(self) -> None:
        view = self._view
        if view.stop is not None:
            self._switch.pull(Stop(Cause.CANCEL, view.stop.by, view.stop.reason, view.stop.trace))
        elif view.interrupted_by is not None:
            cause = Cause.ROLLBACK if view.rollback else Cause.INTERRUPT
            later = self._history.turns[view.interrupted_by].request
            trace = later.trace if later is not None else {}
            self._switch.pull(Stop(cause, by=view.interrupted_by, trace=trace))
        self._cancel_waiting()

    def _cancel_waiting(self) -> None:
        """End the turns that were stopped while they waited behind this one."""
        if self._publisher is None:
            return
        for view in stopped(self._history):
            if view is not self._view and view.stop is not None and view.id not in self._taken:
                self._taken.add(view.id)
                self._put(cancelled(view), view.offset)

    def _put(self, event: wire.OutputEvent, *settled: int) -> None:
        if self._publisher is not None and self._publisher.error is None:
            self._publisher.put(event, _settle(*settled))

    # -------------------------------------------------------------------------------------------------------- live

    async def on_signal(self, body: bytes) -> bytes | None:
        """Answer a live request to stop; the reply is sent once the end is stored."""
        try:
            event = wire.decode(body)
        except InvalidInput:
            return None
        if not isinstance(event, wire.TurnCancel):
            return None
        if event.all:
            for view in self._history.open:
                if view is not self._view and view.stop is None:
                    view.stop = event
            self._cancel_waiting()
            return await self._stop_running(event)
        target = self._history.turns.get(event.turn or "")
        if target is self._view:
            return await self._stop_running(event)
        return None if target is None else await self._stop_waiting(target, event)

    async def _stop_running(self, event: wire.TurnCancel) -> bytes | None:
        late = self._over.is_set()
        self._switch.pull(Stop(Cause.CANCEL, event.by, event.reason, event.trace))
        await self._over.wait()
        if self._ended_as is None:
            return None
        receipt = "cancelled" if isinstance(self._ended_as, wire.TurnCancelled) and not late else "already_ended"
        return msgspec.json.encode(wire.CancelReply(receipt, self._ended_at))

    async def _stop_waiting(self, target: TurnView, event: wire.TurnCancel) -> bytes | None:
        publisher = self._publisher
        late = target.ended
        if not late and publisher is not None:
            target.stop = target.stop or event
            self._cancel_waiting()
            try:
                await publisher.flush()
            except Fenced:
                return None
        if target.state == "cancelled" and target.ended_at is not None:
            return msgspec.json.encode(wire.CancelReply("already_ended" if late else "cancelled", target.ended_at))
        return None

    # ------------------------------------------------------------------------------------------------------- time

    async def watch_deadlines(self) -> None:
        """Stop the turn when its time is over, and end those that wait behind it when theirs is."""
        while True:
            moved = self._moved
            now = self._clock()
            soonest = math.inf
            for view in self._history.open:
                deadline = view.request.deadline if view.request is not None else None
                if deadline is None or view.id in self._taken:
                    continue
                if now < deadline:
                    soonest = min(soonest, deadline)
                elif view is self._view:
                    self._switch.pull(Stop(Cause.DEADLINE, reason=OVERDUE))
                else:
                    self._taken.add(view.id)
                    self._put(wire.TurnExpired(**terminal_fields(view), reason=OVERDUE), view.offset)
            with anyio.move_on_after(soonest - now):
                await moved.wait()

    # ------------------------------------------------------------------------------------------ what the agent asks

    async def take_steering(self) -> list[wire.TurnRequested]:
        """Consume the steering turns that wait."""
        publisher = await self._open_publisher()
        taken: list[wire.TurnRequested] = []
        for view in self._history.open:
            request = view.request
            if request is None or request.on_busy != "steer" or view.state != "queued" or view.attempt > 0:
                continue
            if view.offset <= self._view.offset or view.stop is not None or view.id in self._taken:
                continue
            self._taken.add(view.id)
            taken.append(request)
            publisher.put(wire.SteerConsumed(steer=view.id, offset=view.offset), _settle(view.offset))
        if taken:
            await publisher.flush()
        return taken

    async def ask(self, question: wire.InputRequired, hold: float) -> Any:
        """Put the question, unless it was; wait for the answer for a while, then suspend the turn."""
        publisher = await self._open_publisher()
        if question.request not in self._view.questions:
            if question.deadline is not None:
                question.deadline += self._clock()
            publisher.put(question)
            await publisher.flush()
        asked = self._view.questions[question.request]
        deadline = math.inf if asked.event.deadline is None else asked.event.deadline
        give_up = self._clock() + hold
        while asked.answer is None:
            now = self._clock()
            if self._switch.stop is not None:
                await self.meet_stop()
            elif now >= deadline:
                self._switch.pull(Stop(Cause.DEADLINE, reason=f"nobody answered {question.request} in time"))
            elif now >= give_up:
                self._switch.pull(Stop(Cause.SUSPEND))
            moved = self._moved
            with anyio.move_on_after(min(give_up, deadline) - now):
                await moved.wait()
        if self._switch.stop is not None:
            # The answer came just as the turn was given up on: it is left to wake it, or it would sleep for ever.
            await self.meet_stop()
        if not asked.resumed and asked.answer_offset is not None:
            # The input that carries the turn stays pending until the turn ends: it is the lease.
            change = None if asked.answer_offset == self._carrier else _settle(asked.answer_offset)
            publisher.put(wire.TurnResumed(request=question.request, answer=asked.answer_offset), change)
            await publisher.flush()
        return asked.answer.value

    async def _open_publisher(self) -> Publisher:
        if self._publisher is None or self._switch.stop is not None:
            await self.meet_stop()
        return self._publisher

    async def meet_stop(self) -> NoReturn:
        """Let the agent meet its cancellation.

        Raises:
            Fenced: It is in a shielded cleanup, or its turn is over.
        """
        await anyio.lowlevel.checkpoint()
        raise Fenced("this turn is being stopped; what its agent appends now is refused")


def _settle(*offsets: int) -> Change:
    def change(pending: Pending) -> Pending:
        return pending.settle(*offsets)

    return change
