"""What befalls a worker in the middle of an attempt, in words.

::

    await run_turn(support, "hello", mishaps=[WorkerDies(after=3)])
    await run_turn(support, "hello", mishaps=[AckLost(after=1), ConnectionLost(0.5, after=4)])

"After" counts what the agent has appended in the attempt and what is in the log: each token of text or reasoning and
each other event is one, pieces of a tool call's input are none. 0 is before the agent's first line. At that point the
agent is held, so the log ends exactly there. Each mishap happens once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, cast

import anyio
from msgspec import Struct

from agentrun import reading
from agentrun.agent import Agent, Context, Item
from agentrun.broker import SessionLog
from agentrun.wire import OutputEvent, ReasoningDelta, TextDelta, ToolInputDelta, Usage

__all__ = ["AckLost", "ConnectionLost", "Halt", "Mishap", "Victim", "Watched", "WorkerDies", "halt_of"]


class WorkerDies(Struct, frozen=True, kw_only=True):
    """The worker disappears without a word: the session stays claimed, until another worker takes it over.

    It dies within this process: `finally` blocks of the agent still run, but nothing that they append is stored.
    """

    after: int
    attempt: int = 1


class AckLost(Struct, frozen=True, kw_only=True):
    """The worker's next append is stored, and it is not told so."""

    after: int
    attempt: int = 1


class ConnectionLost(Struct, frozen=True):
    """The worker cannot reach the broker for ``seconds``. Where the lease runs out meanwhile, another takes over."""

    seconds: float
    after: int = 0
    attempt: int = 1


Mishap = WorkerDies | AckLost | ConnectionLost


class Victim(Protocol):
    """What can befall a worker."""

    def die(self) -> None: ...  # noqa: D102 - see RunningWorker
    def drop_next_ack(self) -> None: ...  # noqa: D102
    def lose_connection(self, seconds: float = ...) -> None: ...  # noqa: D102


class Halt:
    """Something that is done once, when an attempt has come to a point; the agent goes on when it is done.

    Args:
        after: See above.
        attempt: Which attempt at a turn; None: any.
        do: What to do, with the worker that runs the attempt. It may end the attempt.
    """

    def __init__(self, after: int, attempt: int | None, do: Callable[[Victim], Awaitable[None]]) -> None:
        self.after = after
        self.attempt = attempt
        self.do = do
        self.done = False


def halt_of(mishap: Mishap | Halt) -> Halt:
    """Return a mishap as what is done."""
    if isinstance(mishap, Halt):
        return mishap

    async def do(worker: Victim) -> None:
        match mishap:
            case WorkerDies():
                worker.die()
                await anyio.sleep_forever()
            case AckLost():
                worker.drop_next_ack()
            case ConnectionLost(seconds):
                worker.lose_connection(seconds)

    return Halt(mishap.after, mishap.attempt, do)


class Watched(Agent):
    """An agent that is held where something is to be done.

    Args:
        agent: The agent.
        worker: Who runs it.
        log: Where what it says is stored; it must not fail by plan.
        halts: What is done.
    """

    def __init__(self, agent: Agent, worker: Victim, log: SessionLog, halts: Sequence[Halt]) -> None:
        super().__init__(agent.fn, name=agent.name, resume=agent.resume)
        self._agent = agent
        self._worker = worker
        self._log = log
        self._halts = halts

    async def run(self, ctx: Context) -> None:
        """See `Agent.run`."""
        count = 0
        emit = ctx.emit

        async def counted(item: Item) -> None:
            nonlocal count
            await emit(item)
            if weight := _weight(item):
                count += weight
                await self._halt(ctx, count)

        ctx.emit = counted
        await self._halt(ctx, 0)
        await self._agent.run(ctx)

    async def _halt(self, ctx: Context, count: int) -> None:
        for halt in self._halts:
            if halt.done or count < halt.after or halt.attempt not in (None, ctx.attempt):
                continue
            halt.done = True
            await _stored(self._log, ctx, count)
            await halt.do(self._worker)


async def _stored(log: SessionLog, ctx: Context, count: int) -> None:
    """Wait until so much of the attempt is in the log."""
    seen = 0
    if not count:
        return
    async with reading.follow(log, ctx.session) as events:
        async for event in events:
            if event.turn == ctx.turn and getattr(event.data, "attempt", 0) == ctx.attempt:
                seen += _weight(cast("OutputEvent", event.data)) if event.type in _COUNTED else 0
            if seen >= count:
                return


_COUNTED = ("text.delta", "reasoning.delta", "tool.call", "tool.progress", "tool.result", "data", "source", "file")


def _weight(item: Item) -> int:
    match item:
        case str():
            return bool(item)
        case TextDelta() | ReasoningDelta():
            return item.count
        case Usage() | ToolInputDelta():
            return 0
        case _:
            return 1
