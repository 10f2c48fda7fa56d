"""One turn of an agent, run as in production: a real worker, a real client, and a broker in memory.

::

    result = await run_turn(support, "where is my parcel?")
    assert result.outcome == "completed"
    assert "on its way" in result.text
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import anyio
from msgspec import Struct

from agentrun import wire
from agentrun.agent import Agent
from agentrun.background import Background
from agentrun.broker import Broker, Kind, Pending
from agentrun.brokers.memory_state import MemoryState, QueuedInput
from agentrun.client import Event, Receipt, Turn
from agentrun.history import State, TurnView
from agentrun.settings import WorkerSettings
from agentrun.testing.mishaps import Halt, Mishap, Victim, halt_of
from agentrun.testing.rig import Rig, memory_rig
from agentrun.wire import ErrorInfo, InputRequired, Message, TextPart, Usage

__all__ = ["Answers", "TurnResult", "run_turn"]

Answers = Mapping[str, Any] | Callable[[InputRequired], Any]
"""The answers to an agent's questions: by the question's id, or given by a function."""

_SETTINGS = WorkerSettings(lost_after=0.0)
_SESSION = "test"
E = TypeVar("E")


class TurnResult(Struct, frozen=True, kw_only=True):
    """What became of a turn.

    Attributes:
        turn: Its id.
        outcome: ``completed``, ``cancelled``, ``failed``, ``expired`` or ``rejected``.
        message: What a reader is shown at the end.
        events: All its events, from the request to the one that ended it.
        attempts: How often it was begun.
        usage: Tokens, as the agent reported them.
        finish_reason: Of a turn that completed.
        error: Of a turn that failed.
        reason: Of a turn that was stopped, expired or rejected.
        receipt: With ``stop_after``: what the stop was answered.
    """

    turn: str
    outcome: State
    message: Message
    events: list[Event]
    attempts: int
    usage: Usage | None = None
    finish_reason: str | None = None
    error: ErrorInfo | None = None
    reason: str | None = None
    receipt: Receipt | None = None

    @property
    def text(self) -> str:
        """The text of the message."""
        return self.message.text

    @property
    def types(self) -> list[str]:
        """The types of the events, in order."""
        return [event.type for event in self.events]

    def of(self, kind: type[E]) -> list[E]:
        """The events of one kind, such as `agentrun.wire.ToolCall`, in order."""
        return [event.data for event in self.events if isinstance(event.data, kind)]


async def run_turn(
    agent: Agent,
    input: Any,
    *,
    earlier: Sequence[tuple[Any, str | Message]] = (),
    answers: Answers | None = None,
    stop_after: int | str | None = None,
    deadline: float | None = None,
    mishaps: Sequence[Mishap] = (),
    settings: WorkerSettings | None = None,
    user: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    timeout: float = 30.0,
) -> TurnResult:
    """Run one turn of an agent to its end and return what became of it, whatever that is.

    The waits between attempts are skipped: the broker's clock is put forward. When the worker dies, another takes over
    at once.

    Args:
        agent: The agent.
        input: What it is sent.
        earlier: The session before it: pairs of what was sent and what was answered.
        answers: The answers to its questions. A question that has none is an error, unless the turn ends in
            another way: by ``stop_after``, or a deadline.
        stop_after: When the turn is stopped. A number: after so many tokens or events of an attempt, counted as in
            `agentrun.testing.mishaps`; the agent gets no further. A type, such as ``tool.call`` or ``input.required``:
            when such an event is in the log; the agent goes on until the stop reaches it.
        deadline: Seconds after which it expires.
        mishaps: What befalls the workers. One that the answer is too short for is an error, unless the turn ends in
            another way than by being completed.
        settings: The workers' times and limits, such as ``WorkerSettings(ask_hold=0)`` to suspend at each question.
        user: Who sends it.
        metadata: As for `agentrun.Session.send`.
        timeout: Seconds after which the test has failed.

    Raises:
        TimeoutError: It has not ended within ``timeout``; the message says how far it came.
        AssertionError: A mishap has not happened.
        LookupError: The agent asked something that ``answers`` does not have.
        InvalidInput: An answer does not fit its question, or another argument cannot be used.
    """
    rig = memory_rig(_SkippingState(delta_ttl=1e9))
    await _tell(rig.broker, agent.name, earlier)
    session = rig.client.session(_SESSION, agent=agent.name)
    turn = await session.send(input, deadline=deadline, user=user, metadata=metadata)
    play = _Play(turn, answers, stop_after, deadline)
    befalls = [(mishap, halt_of(mishap)) for mishap in mishaps]
    async with Background() as background:
        halts = [*(halt for _, halt in befalls), *play.halts]
        background.group.start_soon(_work, rig, agent, settings or _SETTINGS, halts)
        background.group.start_soon(play.stop)
        with anyio.move_on_after(timeout) as scope:
            await play.watch()
        if scope.cancelled_caught:
            raise TimeoutError(f"the turn has not ended within {timeout:g} s; its events: {play.so_far}")
    view = (await session.history()).turns[turn.id]
    missed = [mishap for mishap, halt in befalls if not halt.done]
    if missed and view.state == "completed":
        raise AssertionError(f"the turn was completed before this could happen: {missed[0]}")
    return _result(view, play)


async def _work(rig: Rig, agent: Agent, settings: WorkerSettings, halts: Sequence[Halt]) -> None:
    """Run a worker, and another one when it dies, for ever."""
    while True:
        async with rig.worker(agent, settings=settings, mishaps=halts) as worker:
            await worker.gone.wait()


class _Play:
    """The client's side of the turn: watches, answers, stops."""

    def __init__(
        self, turn: Turn, answers: Answers | None, stop_after: int | str | None, deadline: float | None
    ) -> None:
        self.events: list[Event] = []
        self.receipt: Receipt | None = None
        self.halts: list[Halt] = []
        self._turn = turn
        self._answers: Answers = answers or dict[str, Any]()
        self._stop_at = stop_after if isinstance(stop_after, str) else None
        self._ends_anyway = stop_after is not None or deadline is not None
        self._stop = anyio.Event()
        self._stopped = anyio.Event()
        if isinstance(stop_after, int):
            self.halts.append(Halt(stop_after, None, self._hold_and_stop))

    @property
    def so_far(self) -> str:
        """What was seen, in few words."""
        return ", ".join(f"{number} {type}" for type, number in Counter(event.type for event in self.events).items())

    async def watch(self) -> None:
        """See the turn to its end."""
        async with aclosing(self._turn.events()) as events:
            async for event in events:
                self.events.append(event)
                if event.type == self._stop_at:
                    self._stop.set()
                elif isinstance(event.data, InputRequired):
                    await self._answer(event.data)
        if self._stop.is_set():
            await self._stopped.wait()

    async def stop(self) -> None:
        """Stop the turn when it is time."""
        await self._stop.wait()
        self.receipt = await self._turn.cancel(by="test")
        self._stopped.set()

    async def _hold_and_stop(self, worker: Victim) -> None:
        self._stop.set()
        await anyio.sleep_forever()

    async def _answer(self, question: InputRequired) -> None:
        if callable(self._answers):
            value = self._answers(question)
        elif question.request in self._answers:
            value = self._answers[question.request]
        elif self._ends_anyway or question.deadline is not None:
            return
        else:
            raise LookupError(
                f"the agent asks {question.request!r} ({question.kind}): {question.prompt!r}, and there is no answer"
            )
        await self._turn.answer(question.request, value)


def _result(view: TurnView, play: _Play) -> TurnResult:
    return TurnResult(
        turn=view.id,
        outcome=view.state,
        message=view.message,
        events=play.events,
        attempts=view.attempt,
        usage=view.usage,
        finish_reason=view.finish_reason,
        error=view.error,
        reason=view.reason,
        receipt=play.receipt,
    )


async def _tell(broker: Broker, agent: str, earlier: Sequence[tuple[Any, str | Message]]) -> None:
    """Store exchanges as a worker would have."""
    tail = await broker.log.last(_SESSION)
    for number, (said, answer) in enumerate(earlier, 1):
        turn, offset = f"earlier-{number}", tail.next
        message = Message([TextPart(answer)] if answer else []) if isinstance(answer, str) else answer
        waiting = Pending().add(offset)
        steps: list[tuple[wire.KnownEvent, Pending]] = [
            (wire.TurnRequested(turn=turn, agent=agent, input=said), waiting),
            (wire.TurnStarted(turn=turn, attempt=1, worker="test", lease=f"lease-{number}"), waiting.claim(offset)),
            (wire.TurnCompleted(turn=turn, attempt=1, turn_offset=offset, message=message), Pending()),
        ]
        for event, pending in steps:
            asked = isinstance(event, wire.TurnRequested)
            tail = await broker.log.append(
                _SESSION,
                wire.encode(event),
                kind=Kind.TURN if asked else Kind.EVENT,
                after=tail,
                pending=pending,
                agent=agent if asked else None,
            )


class _SkippingState(MemoryState):
    """Puts its clock forward to the time of the next attempt, so that nobody waits for it."""

    def __init__(self, *, delta_ttl: float) -> None:
        super().__init__(delta_ttl=delta_ttl)
        steady, self._ahead = self.clock, 0.0
        self.clock = lambda: steady() + self._ahead

    def settle(self, item: QueuedInput, *, again_at: float | None) -> None:
        super().settle(item, again_at=again_at)
        last = wire.decode(self.sessions[item.session].kept[-1].body)
        if again_at is not None and isinstance(last, wire.TurnRetrying):
            self._ahead += max(0.0, again_at - self.clock())
            self.wake(item.session)
