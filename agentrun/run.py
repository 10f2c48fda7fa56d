"""One attempt at one turn, from the claim to the last word."""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, cast

import anyio
import msgspec
from anyio.abc import TaskGroup
from msgspec import Struct

from agentrun import wire
from agentrun.agent import Agent, Context
from agentrun.broker import Broker, Kind, Pending, Record, Tail
from agentrun.cancel import Cause, Stop, StopSwitch
from agentrun.errors import AuthorSignal, Fail, Fenced, InvalidInput, Retry, SessionGone, Unavailable
from agentrun.history import History, TurnView
from agentrun.plan import cancelled, settles, stopped, terminal_fields
from agentrun.publish import Pacer, Publisher, SessionWriter
from agentrun.settings import WorkerSettings

log = logging.getLogger("agentrun.worker")


class Shared(Struct, frozen=True):
    """What all attempts of a worker have in common."""

    broker: Broker
    worker: str
    settings: WorkerSettings
    pacer: Pacer
    agents: TaskGroup
    """Where agents run: one that ignores its stop outlives its turn, and is reported."""


class HandedBack(Struct, frozen=True):
    """The attempt is over, the turn is not: its input is to be leased again after ``delay`` seconds."""

    delay: float = 0.0


class Settled(Struct, frozen=True):
    """The input is done with."""


class Lost(Struct, frozen=True):
    """The session is somebody else's; the queue message is not ours to settle."""


Outcome = HandedBack | Settled | Lost


class Attempt:
    """Runs an agent for a turn, as the owner of its session.

    Args:
        shared: The worker's.
        agent: Whom the turn is for.
        session: The session's id.
        carrier: The leased input: the turn's request, or what woke it up again.
        history: The session, folded to the end that ``tail`` names.
        turn: The turn, of ``history``.
        tail: The session's end.
    """

    def __init__(
        self, shared: Shared, agent: Agent, session: str, carrier: Record, history: History, turn: TurnView, tail: Tail
    ) -> None:
        assert turn.request is not None
        self._shared = shared
        self._settings = shared.settings
        self._agent = agent
        self._session = session
        self._carrier = carrier
        self._history = history
        self._view = turn
        self._request = turn.request
        self._claim_after = tail
        self._number = turn.attempt + 1
        self._switch = StopSwitch()
        self._inputs_moved = anyio.Event()
        self._done = anyio.Event()
        self._over = anyio.Event()
        self._open = False
        self._failure: Exception | None = None
        self._by_itself = False
        self._ended_as: wire.Terminal | None = None
        self._ended_at = 0
        self.started = 0.0
        self._publisher: Publisher
        self._ctx: Context

    # -------------------------------------------------------------------------------------------- seen from outside

    @property
    def session(self) -> str:
        """The session's id."""
        return self._session

    @property
    def turn(self) -> str:
        """The turn's id."""
        return self._request.turn

    @property
    def number(self) -> int:
        """Which attempt it is."""
        return self._number

    def stop(self, stop: Stop) -> None:
        """Stop the agent."""
        self._switch.pull(stop)

    async def on_signal(self, body: bytes) -> bytes | None:
        """Answer a live request to stop; the reply is sent once the end is stored."""
        try:
            event = wire.decode(body)
        except InvalidInput:
            return None
        if not isinstance(event, wire.TurnCancel):
            return None
        target = self._history.turns.get(event.turn) if event.turn is not None else self._view
        if target is None:
            return None
        if event.all:
            self._stop_waiting(event)
        if target is self._view:
            self.stop(Stop(Cause.CANCEL, event.by, event.reason))
            await self._over.wait()
            if self._ended_as is None:
                return None
            receipt = "cancelled" if isinstance(self._ended_as, wire.TurnCancelled) else "already_ended"
            return msgspec.json.encode(wire.CancelReply(receipt, self._ended_at))
        if self._open and target.stop is None and not target.ended:
            target.stop = event
            self._cancel_waiting()
            try:
                await self._publisher.flush()
            except Fenced:
                return None
        if target.state == "cancelled" and target.ended_at is not None:
            return msgspec.json.encode(wire.CancelReply("cancelled", target.ended_at))
        return None

    def _stop_waiting(self, event: wire.TurnCancel) -> None:
        for view in self._history.turns.values():
            if view is not self._view and not view.ended and view.stop is None:
                view.stop = event
        if self._open:
            self._cancel_waiting()

    # --------------------------------------------------------------------------------------------------- the attempt

    async def run(self) -> Outcome:
        """Claim the session, run the agent, append the last word.

        Raises:
            Conflict: The session moved on before the claim; nothing has happened.
        """
        try:
            return await self._run()
        finally:
            self._open = False
            self._over.set()

    async def _run(self) -> Outcome:
        partial = self._view.message if self._view.message.parts and not self._view.incomplete else None
        resumes = self._agent.resume and partial is not None
        started = wire.TurnStarted(
            turn=self.turn,
            attempt=self._number,
            worker=self._shared.worker,
            lease=f"{time.time_ns():x}",
            resumes_from=self._view.last_out if resumes else None,
            message=partial,
        )
        tail = await self._claim(started)
        self.started = time.monotonic()
        self._history.apply(tail.offset, started, time=time.time())
        writer = SessionWriter(self._shared.broker.log, self._session, tail, self._on_input)
        capabilities = self._shared.broker.capabilities
        self._publisher = Publisher(
            writer,
            turn=self.turn,
            attempt=self._number,
            message=partial if resumes else None,
            pacer=self._shared.pacer,
            min_gap=self._settings.min_gap,
            buffer_events=self._settings.buffer_events,
            checkpoint_after=self._settings.checkpoint * capabilities.delta_ttl,
            max_body=capabilities.max_body,
        )
        self._publisher.on_stored = self._on_stored
        self._ctx = Context(
            self,
            session=self._session,
            attempt=self._number,
            request=self._request,
            messages=self._history.messages(until=self.turn),
            partial=partial,
        )
        self._open = True
        outcome: Outcome = Lost()
        async with anyio.create_task_group() as group:
            group.start_soon(self._publish)
            group.start_soon(self._watch, writer, tail)
            if self._request.deadline is not None:
                group.start_soon(self._expire_at, self._request.deadline)
            await self._run_agent()
            outcome = await self._finish()
            group.cancel_scope.cancel()
        return outcome

    async def _claim(self, started: wire.TurnStarted) -> Tail:
        # A message left by earlier attempts may be large; the claim itself is one record, so what is too large is
        # left out of it: it is still in the log for as long as its deltas are.
        body = wire.encode(started)
        if len(body) > self._shared.broker.capabilities.max_body:
            started.message = None
            body = wire.encode(started)
        after = self._claim_after
        pending = after.pending.claim(self._carrier.offset)
        return await self._shared.broker.log.append(self._session, body, kind=Kind.EVENT, after=after, pending=pending)

    async def _publish(self) -> None:
        await self._publisher.run()
        self.stop(Stop(Cause.FENCED))

    async def _watch(self, writer: SessionWriter, tail: Tail) -> None:
        """See inputs as they are stored, and a takeover even while the agent is silent."""
        after, cursor = tail.offset, tail.cursor
        while True:
            try:
                async with self._shared.broker.log.follow(
                    self._session, after=after, deltas=False, cursor=cursor
                ) as batches:
                    async for batch in batches:
                        for record in batch:
                            after, cursor = record.offset, record.cursor
                            if record.kind.input:
                                await self._publisher.reached(record.offset - 1)
                            if not writer.observe(record):
                                self.stop(Stop(Cause.FENCED))
                                return
            except SessionGone:
                self.stop(Stop(Cause.FENCED))
                return
            except Unavailable:
                await anyio.sleep(0.5)

    async def _expire_at(self, deadline: float, reason: str = "its deadline passed") -> None:
        await anyio.sleep(max(0.0, deadline - time.time()))
        self.stop(Stop(Cause.DEADLINE, reason=reason))

    async def _run_agent(self) -> None:
        self._shared.agents.start_soon(self._agent_task)
        await self._switch.changed.wait()
        if not self._done.is_set():
            with anyio.move_on_after(self._settings.cancel_grace):
                await self._done.wait()
        if not self._done.is_set():
            log.warning(
                "agent %s goes on %.1f s after its turn %s was stopped: it swallows cancellation, or cleans up for too "
                "long. Its turn ends without it; what it emits is refused.",
                self._agent.name,
                self._settings.cancel_grace,
                self.turn,
            )
        self._open = False

    async def _agent_task(self) -> None:
        try:
            with self._switch.scope:
                await self._agent.run(self._ctx)
            self._by_itself = self._switch.stop is None
        except Exception as error:
            # Whatever an author's code raises ends the attempt, not the worker.
            self._failure = _cause_of(error)
            self._by_itself = self._switch.stop is None
        finally:
            self._done.set()
            self._switch.changed.set()

    # ------------------------------------------------------------------------------------------- the agent's requests

    @property
    def stopping(self) -> bool:
        """Whether the turn is being stopped."""
        return self._switch.stop is not None

    async def emit(self, event: wire.OutputEvent) -> None:
        """Queue an event for the log; the agent meets its stop here if it did not elsewhere."""
        if not self._open or self._switch.stop is not None:
            await self._meet_stop()
        await self._publisher.emit(event)

    async def _meet_stop(self) -> None:
        await anyio.lowlevel.checkpoint()
        # Still here: the agent is in a shielded cleanup.
        raise Fenced("this turn is being stopped; what its agent appends now is refused")

    async def take_steering(self) -> list[wire.TurnRequested]:
        """Consume the steering turns that wait."""
        taken: list[wire.TurnRequested] = []
        for view in self._history.turns.values():
            request = view.request
            if request is None or request.on_busy != "steer" or view.state != "queued" or view.attempt > 0:
                continue
            if view.offset <= self._view.offset or view.stop is not None:
                continue
            taken.append(request)
            self._publisher.put(wire.SteerConsumed(steer=view.id, offset=view.offset), _settle(view.offset))
        if taken:
            await self._publisher.flush()
        return taken

    async def ask(self, question: wire.InputRequired, hold: float | None) -> Any:
        """Put the question, unless it was; wait for the answer for a while, then suspend the turn."""
        asked = self._view.questions.get(question.request)
        if asked is None:
            if question.deadline is not None:
                question.deadline += time.time()
            self._publisher.put(question)
            await self._publisher.flush()
            asked = self._view.questions[question.request]
        deadline = asked.event.deadline
        give_up = time.monotonic() + (self._settings.ask_hold if hold is None else hold)
        while asked.answer is None:
            if self._switch.stop is not None:
                await self._meet_stop()
            now = time.time()
            if deadline is not None and now >= deadline:
                self.stop(Stop(Cause.DEADLINE, reason=f"nobody answered {question.request} in time"))
            elif time.monotonic() >= give_up:
                self.stop(Stop(Cause.SUSPEND, until=deadline))
            left = give_up - time.monotonic()
            if deadline is not None:
                left = min(left, deadline - now)
            with anyio.move_on_after(max(0.0, left)):
                await self._inputs_moved.wait()
        answer = asked.answer
        if not asked.resumed and asked.answer_offset is not None:
            offset = asked.answer_offset
            # The input that carries the turn stays pending until the turn ends: it is the lease.
            change = None if offset == self._carrier.offset else _settle(offset)
            self._publisher.put(wire.TurnResumed(request=question.request, answer=offset), change)
            await self._publisher.flush()
        return answer.value

    # ------------------------------------------------------------------------------------------------- what comes in

    def _on_input(self, record: Record) -> None:
        try:
            event = wire.decode(record.body)
        except InvalidInput:
            return
        self._history.apply(record.offset, event, time=record.time)
        self._act_on_inputs()
        moved, self._inputs_moved = self._inputs_moved, anyio.Event()
        moved.set()

    def _act_on_inputs(self) -> None:
        view = self._view
        if view.stop is not None:
            self.stop(Stop(Cause.CANCEL, view.stop.by, view.stop.reason))
        elif view.interrupted_by is not None:
            self.stop(Stop(Cause.ROLLBACK if view.rollback else Cause.INTERRUPT, by=view.interrupted_by))
        if self._open:
            self._cancel_waiting()

    def _cancel_waiting(self) -> None:
        """End the turns that were stopped while they waited behind this one."""
        for view in stopped(self._history):
            if view is not self._view and view.stop is not None and self._publisher.error is None:
                event = cancelled(view)
                offset = view.offset
                # Taken as ended right away, so that it is not put twice before it is stored.
                view.state = "cancelled"
                self._publisher.put(event, _settle(offset))

    def _on_stored(self, event: wire.OutputEvent, offset: int) -> None:
        if event.turn != self.turn and (other := self._history.turns.get(event.turn)) is not None:
            other.ended_at = offset
        self._history.apply(offset, event, time=time.time())

    # ---------------------------------------------------------------------------------------------------- the last word

    async def _finish(self) -> Outcome:
        try:
            await self._publisher.flush()
            event, outcome, change = self._last_word()
            if isinstance(event, wire.TERMINAL):
                self._publisher.on_stored = self._remember_end
            self._publisher.put(event, change)
            await self._publisher.flush()
        except Fenced as error:
            log.info("turn %s, attempt %d: %s", self.turn, self._number, error)
            return Lost()
        return outcome

    def _remember_end(self, event: wire.OutputEvent, offset: int) -> None:
        if isinstance(event, wire.TERMINAL) and event.turn == self.turn:
            self._ended_as, self._ended_at = event, offset

    def _last_word(self) -> tuple[wire.OutputEvent, Outcome, Callable[[Pending], Pending]]:
        stop = self._switch.stop
        if stop is not None and stop.cause is Cause.FENCED:
            raise Fenced("the session was taken over")
        if stop is None or self._by_itself:
            return self._own_word()
        usage = self._ctx.usage
        if stop.cause is Cause.SUSPEND:
            open_questions = [name for name, q in self._view.questions.items() if not q.resumed]
            event = wire.TurnSuspended(requests=open_questions, message=self._message(), usage=usage, until=stop.until)
            outcome = Settled() if stop.until is None else HandedBack(max(0.0, stop.until - time.time()))
            return event, outcome, Pending.park
        if stop.cause is Cause.DRAIN:
            return wire.TurnReleased(reason="drain", usage=usage), HandedBack(), Pending.release
        if stop.cause is Cause.DEADLINE:
            return self._end(wire.TurnExpired(**self._fields(), reason=stop.reason))
        reason = stop.reason
        if stop.cause is not Cause.CANCEL:
            reason = stop.cause.name.lower()
        return self._end(
            wire.TurnCancelled(**self._fields(), by=stop.by, reason=reason, rolled_back=stop.cause is Cause.ROLLBACK)
        )

    def _own_word(self) -> tuple[wire.OutputEvent, Outcome, Callable[[Pending], Pending]]:
        failure = self._failure
        if failure is None:
            # What it said is what it meant to say, were it nothing.
            fields = self._fields()
            fields["message"] = self._publisher.builder.message
            return self._end(wire.TurnCompleted(**fields, finish_reason=self._ctx.finish_reason))
        if isinstance(failure, Fail):
            return self._end(wire.TurnFailed(**self._fields(), error=wire.ErrorInfo(failure.code, str(failure))))
        if isinstance(failure, Retry):
            error = wire.ErrorInfo("retry", str(failure) or "the agent asked for another attempt", retryable=True)
            after = failure.after
        else:
            log.error(
                "agent %s failed in turn %s, attempt %d:\n%s",
                self._agent.name,
                self.turn,
                self._number,
                "".join(traceback.format_exception(failure)),
            )
            error = wire.ErrorInfo("agent_error", f"{type(failure).__name__}: {failure}", retryable=True)
            after = min(30.0, self._settings.retry_delay * math.pow(2, self._view.charged - 1))
        if self._view.charged >= self._settings.max_attempts:
            error = wire.ErrorInfo(error.code, f"gave up after {self._view.charged} attempts: {error.message}")
            return self._end(wire.TurnFailed(**self._fields(), error=error))
        event = wire.TurnRetrying(error=error, after=after, usage=self._ctx.usage)
        return event, HandedBack(after), Pending.park if after > 0 else Pending.release

    def _end(self, event: wire.Terminal) -> tuple[wire.Terminal, Outcome, Callable[[Pending], Pending]]:
        carrier = self._carrier.offset

        def change(pending: Pending) -> Pending:
            return pending.settle(carrier, *settles(self._view, pending, self._history))

        return event, Settled(), change

    def _message(self) -> wire.Message:
        """What was said; if this attempt said nothing, what earlier ones did."""
        builder = self._publisher.builder
        return builder.message if builder else self._view.message

    def _fields(self) -> dict[str, Any]:
        return terminal_fields(self._view) | {
            "attempt": self._number,
            "message": self._message(),
            "usage": self._ctx.usage or self._view.usage,
        }


def _settle(offset: int) -> Callable[[Pending], Pending]:
    return lambda pending: pending.settle(offset)


def _cause_of(error: Exception) -> Exception:
    """Return what an agent's own task group wraps: a signal of its author, or the only error there is."""
    leaves = list(_leaves(error))
    signals = [leaf for leaf in leaves if isinstance(leaf, AuthorSignal)]
    return signals[0] if signals else leaves[0] if len(leaves) == 1 else error


def _leaves(error: Exception) -> Iterator[Exception]:
    if isinstance(error, ExceptionGroup):
        for inner in cast("ExceptionGroup[Exception]", error).exceptions:
            yield from _leaves(inner)
    else:
        yield error
