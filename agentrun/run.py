"""One attempt at one turn, from the claim to the last word."""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, cast

import anyio
from anyio.abc import TaskGroup
from msgspec import Struct

from agentrun import wire
from agentrun.agent import Agent, Context
from agentrun.broker import Broker, Kind, Lease, Pending, Tail
from agentrun.cancel import Cause, Stop, StopSwitch
from agentrun.dead import DeadLetters, entry_of
from agentrun.errors import AuthorSignal, Fail, Fenced, Retry, SessionGone, Unavailable
from agentrun.history import History, TurnView
from agentrun.inbox import Inbox
from agentrun.peers import new_lease
from agentrun.plan import settles, terminal_fields
from agentrun.publish import Pacer, Publisher
from agentrun.settings import WorkerSettings
from agentrun.watching import Watcher, outcome_of, stopped
from agentrun.writer import Change, SessionWriter

log = logging.getLogger("agentrun.worker")

_TRACE_LIMIT = 16_384
"""Characters of a failed agent's traceback that are logged."""
_LONGEST_RETRY = 30.0
"""Seconds before an attempt after an unexpected error, at most."""
_LONGEST_REASON = 4000
"""Characters of an error's text that go into the log."""


class Shared(Struct, frozen=True):
    """What all attempts of a worker have in common."""

    broker: Broker
    worker: str
    settings: WorkerSettings
    pacer: Pacer
    dead: DeadLetters
    watcher: Watcher
    agents: TaskGroup
    """Where agents run: one that ignores its stop outlives its turn, and is reported."""


class Ended(Struct, frozen=True):
    """A turn's end: the session folded up to it, the session's end there, and the turn's last record."""

    history: History
    tail: Tail
    body: bytes


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
        lease: The lease of the input that carries it: the turn's request, or what woke it up again.
        history: The session, folded to the end that ``tail`` names.
        turn: The turn, of ``history``.
        tail: The session's end.
    """

    def __init__(
        self, shared: Shared, agent: Agent, lease: Lease, history: History, turn: TurnView, tail: Tail
    ) -> None:
        assert turn.request is not None
        self._shared = shared
        self._settings = shared.settings
        self._capabilities = shared.broker.capabilities
        self._agent = agent
        self._session = lease.session
        self._carrier = lease.record
        self._lease = new_lease(lease.token)
        self._history = history
        self._view = turn
        self._request = turn.request
        self._number = turn.attempt + 1
        self._partial = turn.message if turn.message.parts and not turn.incomplete else None
        self._resumes = agent.resume and self._partial is not None
        self._switch = StopSwitch()
        self._inbox = Inbox(history, turn, lease.record.offset, self._switch, shared.broker.now)
        self._done = anyio.Event()
        self._open = False
        self._failure: Exception | None = None
        self._by_itself = False
        self._claim_after = tail
        self.started = 0.0
        self.on_ended: Callable[[Ended], None] | None = None
        """Told at once of the turn's end, since the session's next turn may begin at once."""
        self._watch = shared.watcher.attempt(lease.session, turn, lease.record)
        self._writer: SessionWriter
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

    @property
    def tokens(self) -> int:
        """Tokens it has stored."""
        return self._publisher.builder.tokens if self.started else 0

    def stop(self, stop: Stop) -> None:
        """Stop the agent."""
        self._switch.pull(stop)

    async def on_signal(self, body: bytes) -> bytes | None:
        """Answer a live request to stop; the reply is sent once the end is stored."""
        return await self._inbox.on_signal(body)

    # --------------------------------------------------------------------------------------------------- the attempt

    async def run(self) -> Outcome:
        """Claim the session, run the agent, append the last word.

        Raises:
            Conflict: The session moved on before the claim; nothing has happened.
        """
        try:
            with self._watch.current():
                await self._claim()
                outcome: Outcome = Lost()
                async with anyio.create_task_group() as group:
                    group.start_soon(self._publish)
                    group.start_soon(self._look, self._writer.tail)
                    group.start_soon(self._inbox.watch_deadlines)
                    await self._run_agent()
                    outcome = await self._conclude()
                    group.cancel_scope.cancel()
                return outcome
        finally:
            # However it came to an end: nobody waits for it any more, and its agent does not go on.
            self._open = False
            self._inbox.over(None, 0)
            self._switch.scope.cancel()
            self._watch.close()

    async def _claim(self) -> None:
        started = wire.TurnStarted(
            turn=self.turn,
            attempt=self._number,
            worker=self._shared.worker,
            lease=self._lease,
            resumes_from=self._view.last_out if self._resumes else None,
            message=self._partial,
            trace=self._watch.fields,
        )
        # A message left by earlier attempts may be large; the claim itself is one record, so what is too large is
        # left out of it: it is still in the log for as long as its deltas are.
        body = wire.encode(started)
        if len(body) > self._capabilities.max_body:
            started.message = None
            body = wire.encode(started)
        log, after = self._shared.broker.log, self._claim_after
        pending = after.pending.claim(self._carrier.offset)
        tail = await log.append(self._session, body, kind=Kind.EVENT, after=after, pending=pending)
        self.started = time.monotonic()
        self._watch.claimed()
        self._switch.on_pull = self._on_stop
        self._history.apply(tail.offset, started, time=self._shared.broker.now())
        self._writer = SessionWriter(log, self._session, tail, self._inbox.on_input)
        self._begin()

    def _begin(self) -> None:
        self._publisher = Publisher(
            self._writer,
            turn=self.turn,
            attempt=self._number,
            message=self._partial if self._resumes else None,
            pacer=self._shared.pacer,
            min_gap=self._settings.min_gap,
            buffer_events=self._settings.buffer_events,
            checkpoint_after=self._settings.checkpoint * self._capabilities.delta_ttl,
            max_body=self._capabilities.max_body,
        )
        self._publisher.on_stored = self._on_stored
        if self._watch.active:
            self._publisher.on_append = self._watch.appended
        self._ctx = Context(
            self,
            session=self._session,
            attempt=self._number,
            request=self._apart(self._request),
            messages=self._history.messages(until=self.turn),
            partial=self._partial,
        )
        self._ctx.usage = self._view.usage
        self._open = True
        self._inbox.open(self._publisher)

    def _on_stored(self, event: wire.OutputEvent, offset: int) -> None:
        self._history.apply(offset, event, time=self._shared.broker.now())
        self._shared.watcher.stored(self._session, self._history, event)

    def _on_stop(self, stop: Stop) -> None:
        self._watch.stopped(stopped(stop))

    async def _publish(self) -> None:
        await self._publisher.run()
        if self._publisher.error is not None:
            self.stop(Stop(Cause.FENCED))

    async def _look(self, tail: Tail) -> None:
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
                            if not self._writer.observe(record):
                                self._publisher.fence(Fenced(f"taken over at offset {record.offset}"))
                                self.stop(Stop(Cause.FENCED))
                                return
            except SessionGone as error:
                self._publisher.fence(Fenced(str(error)))
                self.stop(Stop(Cause.FENCED))
                return
            except Unavailable:
                await anyio.sleep(0.5)

    # ------------------------------------------------------------------------------------------------------ the agent

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
        self._inbox.close()

    async def _agent_task(self) -> None:
        try:
            with self._switch.scope, self._watch.invoking(self._ctx.messages):
                await self._guarded()
        except Exception as error:
            # Whatever an author's code raises ends the attempt, not the worker.
            self._failure = _cause_of(error)
        finally:
            self._by_itself = self._switch.stop is None
            self._done.set()
            self._switch.changed.set()

    async def _guarded(self) -> None:
        try:
            await self._agent.run(self._ctx)
        except anyio.get_cancelled_exc_class() as error:
            if anyio.current_effective_deadline() == -math.inf:
                raise
            # Not by us: something it awaited was cancelled by somebody else. That is an error like any other.
            raise RuntimeError("the agent was cancelled, but its turn was not stopped") from error

    @property
    def stopping(self) -> bool:
        """Whether the turn is being stopped."""
        return self._switch.stop is not None

    async def emit(self, event: wire.OutputEvent) -> None:
        """Queue an event for the log; the agent meets its stop here if it did not elsewhere."""
        if not self._open or self._switch.stop is not None:
            await self._inbox.meet_stop()
        await self._publisher.emit(event)

    async def take_steering(self) -> list[wire.TurnRequested]:
        """Consume the steering turns that wait."""
        return [self._apart(request) for request in await self._inbox.take_steering()]

    def _apart(self, request: wire.TurnRequested) -> wire.TurnRequested:
        """Copy it for the author's code, which may change what it is given."""
        try:
            return deepcopy(request)
        except RecursionError:
            self.on_ended = None  # too deep to be copied: what it is part of is not kept
            return request

    async def ask(self, question: wire.InputRequired, hold: float | None) -> Any:
        """Put the question, unless it was; wait for the answer for a while, then suspend the turn."""
        return await self._inbox.ask(question, self._settings.ask_hold if hold is None else hold)

    # ---------------------------------------------------------------------------------------------------- the last word

    async def _conclude(self) -> Outcome:
        try:
            await self._publisher.close()
            reported = False
            while True:
                event, outcome, change = self._last_word()
                if not reported and isinstance(event, wire.TurnFailed) and not isinstance(self._failure, Fail):
                    reported = True
                    await self._report_dead(event)
                    continue
                *pieces, last = wire.split(event, self._capabilities.max_body)
                for body in pieces:
                    await self._writer.append(body, Kind.EVENT)
                # An input that comes in between may be a stop: then the last word is another one.
                tail = await self._writer.try_append(last, Kind.EVENT, change)
                if tail is not None:
                    break
        except Fenced as error:
            log.info("turn %s, attempt %d: %s", self.turn, self._number, error)
            self._watch.ended("fenced")
            return Lost()
        ends = isinstance(event, wire.TERMINAL)
        if ends:
            self._inbox.over(event, tail.offset)
            self._leave(tail, pieces, last)
        # Only now: who waits for a receipt does not wait for this.
        failed = event.error.code if isinstance(event, (wire.TurnFailed, wire.TurnRetrying)) else None
        self._watch.ended(outcome_of(event), error=failed, said=self._message())
        if ends:
            self._shared.watcher.turn_ended(self._session, self._view, event)
        return outcome

    async def _report_dead(self, event: wire.TurnFailed) -> None:
        after = self._writer.tail.offset
        dead = entry_of(self._session, event, view=self._view, record=self._carrier, after=after)
        assert dead is not None
        self._shared.watcher.dead(dead.agent)
        await self._shared.dead.report(dead)

    def _leave(self, tail: Tail, pieces: list[bytes], last: bytes) -> None:
        # Only what the log would tell as well, and nothing that an author's code may hold.
        if self.on_ended is not None and not pieces and self._partial is None:
            self._history.apply(tail.offset, wire.decode(last), time=tail.time)
            self.on_ended(Ended(self._history, tail, last))

    def _last_word(self) -> tuple[wire.OutputEvent, Outcome, Change]:
        stop = self._switch.stop
        if stop is not None and stop.cause is Cause.FENCED:
            raise Fenced("the session was taken over")
        if stop is None or self._by_itself:
            event, outcome, change = self._own_word()
            # It had its last word before the stop came, unless it only asks for another attempt.
            if stop is None or isinstance(event, wire.TERMINAL) or not stop.cause.ends:
                return event, outcome, change
        if stop.cause is Cause.SUSPEND:
            return self._suspended()
        if stop.cause is Cause.DRAIN:
            return wire.TurnReleased(**self._names(), usage=self._ctx.usage), HandedBack(), Pending.release
        if stop.cause is Cause.DEADLINE:
            return self._end(wire.TurnExpired(**self._fields(), reason=stop.reason))
        reason = stop.reason if stop.cause is Cause.CANCEL else stop.cause.name.lower()
        rolled_back = stop.cause is Cause.ROLLBACK
        return self._end(wire.TurnCancelled(**self._fields(), by=stop.by, reason=reason, rolled_back=rolled_back))

    def _suspended(self) -> tuple[wire.OutputEvent, Outcome, Change]:
        questions = [q.event for q in self._view.questions.values() if q.answer is None]
        deadlines = [d for d in (*(q.deadline for q in questions), self._request.deadline) if d is not None]
        until = min(deadlines, default=None)
        event = wire.TurnSuspended(
            **self._names(),
            requests=[q.request for q in questions],
            message=self._message(),
            usage=self._ctx.usage,
            until=until,
        )
        return (
            event,
            Settled() if until is None else HandedBack(max(0.0, until - self._shared.broker.now())),
            Pending.park,
        )

    def _own_word(self) -> tuple[wire.OutputEvent, Outcome, Change]:
        failure = self._failure
        if failure is None:
            # What it said is what it meant to say, were it nothing.
            fields = self._fields()
            fields["message"] = self._publisher.builder.message
            return self._end(wire.TurnCompleted(**fields, finish_reason=str(self._ctx.finish_reason)))
        if isinstance(failure, Fail):
            return self._end(wire.TurnFailed(**self._fields(), error=wire.ErrorInfo(failure.code, _words(failure))))
        if isinstance(failure, Retry):
            why = _words(failure) or "the agent asked for another attempt"
            error = wire.ErrorInfo("retry", why, retryable=True)
            after = failure.after
        else:
            log.error(
                "agent %s failed in turn %s, attempt %d:\n%s",
                self._agent.name,
                self.turn,
                self._number,
                _trace(failure),
            )
            error = wire.ErrorInfo("agent_error", f"{type(failure).__name__}: {_words(failure)}", retryable=True)
            after = min(_LONGEST_RETRY, self._settings.retry_delay * math.pow(2, self._view.charged - 1))
        if self._view.charged >= self._settings.max_attempts:
            error = wire.ErrorInfo(error.code, f"gave up after {self._view.charged} attempts: {error.message}")
            return self._end(wire.TurnFailed(**self._fields(), error=error))
        event = wire.TurnRetrying(**self._names(), error=error, after=after, usage=self._ctx.usage)
        if self._request.deadline is not None:
            after = min(after, self._request.deadline - self._shared.broker.now())
        return event, HandedBack(max(0.0, after)), Pending.park if after > 0 else Pending.release

    def _end(self, event: wire.Terminal) -> tuple[wire.Terminal, Outcome, Change]:
        carrier = self._carrier.offset

        def change(pending: Pending) -> Pending:
            return pending.settle(carrier, *settles(self._view, pending, self._history))

        return event, Settled(), change

    def _message(self) -> wire.Message:
        """What was said; if this attempt said nothing, what earlier ones did."""
        builder = self._publisher.builder
        return builder.message if builder else self._view.message

    def _names(self) -> dict[str, Any]:
        return {"turn": self.turn, "attempt": self._number}

    def _fields(self) -> dict[str, Any]:
        return terminal_fields(self._view) | {
            "attempt": self._number,
            "message": self._message(),
            "usage": self._ctx.usage,
        }


def _words(error: Exception) -> str:
    """What an author's error says, short enough for a record and fit for JSON."""
    return str(error)[:_LONGEST_REASON].encode("utf-8", "replace").decode()


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


def _trace(error: Exception) -> str:
    # An author's message may be of any length, and no text at all to a log's encoding.
    text = "".join(traceback.format_exception(error))
    return text[-_TRACE_LIMIT:].encode("utf-8", "backslashreplace").decode()
