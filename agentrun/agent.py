"""What an author of agents touches: `agent` and `Context`.

Two shapes of agent, told apart once, when declared::

    @agent
    async def hello(ctx: Context):          # an async generator: what it yields is appended
        yield "Hello "

    @agent(resume=True)
    async def busy(ctx: Context) -> None:   # a coroutine: it emits; may have task groups of its own
        await ctx.emit("Hello ")

A stop cancels the agent at its next await, again and again (anyio's rule) until it has ended. Cleanup that awaits
goes under a shield: ``with anyio.move_on_after(1, shield=True): await connection.aclose()``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol, cast, overload

from agentrun.errors import Fail, InvalidInput, Retry
from agentrun.wire import (
    AskKind,
    InputRequired,
    Message,
    OutputEvent,
    ReasoningDelta,
    TextDelta,
    TurnRequested,
    Usage,
    check_id,
    mend,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

__all__ = ["Agent", "Context", "Fail", "Item", "Retry", "agent"]

Item = str | OutputEvent | Usage
"""What an agent yields or emits: text, an event (its ``turn`` and ``attempt`` are filled in), or usage to add up."""

_FROM_AUTHORS = frozenset(
    {
        "text.delta",
        "reasoning.delta",
        "tool.input.delta",
        "tool.call",
        "tool.progress",
        "tool.result",
        "data",
        "source",
        "file",
    }
)


class Port(Protocol):
    """What a running turn offers its agent; the worker's side of `Context`."""

    @property
    def stopping(self) -> bool: ...
    async def emit(self, event: OutputEvent) -> None: ...
    async def ask(self, question: InputRequired, hold: float | None) -> Any: ...
    async def take_steering(self) -> list[TurnRequested]: ...


class Context:
    """One attempt at one turn, as its agent sees it.

    Attributes:
        session: The session's id.
        turn: The turn's id.
        attempt: 1, 2, 3 … for this turn.
        request: The turn as it was sent: ``input``, ``user``, ``device``, ``metadata``, ``deadline``, ``trace``.
        messages: The conversation in the provider's chat shape, this turn's input last. Tool calls that never got a
            result have one that says so.
        partial: What earlier attempts at this turn left, or None. An agent declared with ``resume=True`` goes on
            after it; any other starts over, and its first output replaces it for readers.
        resumes: Whether this attempt goes on after ``partial``: there is one, and the agent was declared so.
        usage: Tokens used, added up over what the agent reported; stands in the turn's terminal event.
        finish_reason: Stands in ``turn.completed``; set it before returning.
    """

    def __init__(
        self,
        port: Port,
        *,
        session: str,
        attempt: int,
        request: TurnRequested,
        messages: list[dict[str, Any]],
        partial: Message | None,
    ) -> None:
        self._port = port
        self.session = session
        self.turn = request.turn
        self.attempt = attempt
        self.request = request
        self.messages = messages
        self.partial = partial
        self.resumes = False
        self.usage: Usage | None = None
        self.finish_reason = "stop"
        self._asked = 0

    @property
    def input(self) -> Any:
        """What the sender sent: text, or any JSON."""
        return self.request.input

    @property
    def text(self) -> str:
        """The input as text: itself if it is text, the text content of a chat message, else empty."""
        value = self.request.input
        if isinstance(value, dict):
            value = cast("dict[str, Any]", value).get("content")
        return value if isinstance(value, str) else ""

    @property
    def stopping(self) -> bool:
        """Whether the turn is being stopped. An agent that awaits need not look: it is cancelled."""
        return self._port.stopping

    async def emit(self, item: Item) -> None:
        """Append text, an event, or usage. Waits only while the turn's buffer is full (a broker outage, say).

        Raises:
            InvalidInput: The item is nothing an author appends, or holds what JSON cannot.
        """
        if isinstance(item, str):
            if item:
                await self._port.emit(TextDelta(text=item))
        elif isinstance(item, Usage):
            self.usage = item if self.usage is None else add_usage(self.usage, item)
        elif getattr(item, "type", None) in _FROM_AUTHORS:
            if not isinstance(item, (TextDelta, ReasoningDelta)):
                mend(item)  # here its author can be told; once it is queued nobody can
            await self._port.emit(item)
        else:
            raise InvalidInput(
                f"an agent yields or emits str, Usage, or one of {', '.join(sorted(_FROM_AUTHORS))}; "
                f"not {type(item).__name__}"
            )

    async def ask(
        self,
        prompt: str = "",
        *,
        kind: AskKind = "approval",
        choices: Sequence[str] | None = None,
        id: str | None = None,
        call: str | None = None,
        tool: str | None = None,
        input: Any = None,
        deadline: float | None = None,
        hold: float | None = None,
    ) -> Any:
        """Ask a person or a client, and return the answer.

        The question is held open in memory for a while; after that the turn is suspended (slot and lease are given
        back) and, when the answer is there, the agent is run again on any worker: this same call then returns at once.
        So what stands before it runs twice; ``ctx.partial`` says what was said.

        Args:
            prompt: What to show.
            kind: ``approval`` (answer: true, false or ``{"approved": …, "reason": …}``), ``choice`` (one of
                ``choices``), ``text``, or ``tool`` (any JSON: the result of a tool the client runs).
            choices: For ``choice``.
            id: The question's id, the same each time the agent is run. Default: ``call``, or ``ask-<n>`` for the
                n-th question of the run.
            call: The tool call it is about.
            tool: For ``tool``: the tool's name.
            input: For ``tool``: its input.
            deadline: Seconds from now after which the turn expires.
            hold: Seconds to wait before suspending; default is the worker's ``ask_hold``.

        Raises:
            InvalidInput: ``choice`` without choices, or an id that cannot be one.
        """
        self._asked += 1
        if kind == "choice" and not choices:
            raise InvalidInput("a question of kind choice needs choices")
        request = check_id("a question's id", id or call or f"ask-{self._asked}")
        question = InputRequired(
            request=request,
            kind=kind,
            prompt=prompt,
            choices=None if choices is None else list(choices),
            call=call,
            tool=tool,
            deadline=deadline,
        )
        if kind == "tool":
            question.input = input
        return await self._port.ask(question, hold)

    async def approve(self, prompt: str = "", *, call: str | None = None, id: str | None = None) -> bool:
        """Ask for approval and return whether it was given."""
        answer: Any = await self.ask(prompt, kind="approval", call=call, id=id)
        return bool(cast("dict[str, Any]", answer).get("approved")) if isinstance(answer, dict) else bool(answer)

    async def steering(self) -> list[Any]:
        """Take what was sent with ``on_busy="steer"`` since the last call: a list of inputs, often empty.

        What is taken is part of this turn and does not run as a turn of its own; the log says so before this returns.
        """
        return [request.input for request in await self._port.take_steering()]


def _function_of(fn: Any) -> Any:
    # A callable object's shape is that of its __call__; inspect itself looks through partials.
    if inspect.isroutine(fn) or isinstance(fn, functools.partial):
        return cast("Any", fn)
    return type(fn).__call__


AgentFunction = Callable[[Context], AsyncIterator[Item]] | Callable[[Context], Awaitable[None]]


class Agent:
    """An agent: a name to send turns to, and the function that answers them.

    Args:
        fn: An async generator function, or a coroutine function, of one `Context`.
        name: What turns are addressed to; default is the function's name.
        resume: Whether it can go on from ``ctx.partial`` when a turn comes back after a crash or a suspension.

    Raises:
        InvalidInput: The function is of neither shape, or the name cannot be one.
    """

    def __init__(self, fn: AgentFunction, *, name: str | None = None, resume: bool = False) -> None:
        shape = _function_of(fn)
        self.generator = inspect.isasyncgenfunction(shape)
        if not self.generator and not inspect.iscoroutinefunction(shape):
            raise InvalidInput(
                f"an agent is an async generator function (async def with yield) or a coroutine function; {fn!r} is "
                "neither"
            )
        self.fn = fn
        self.name = check_id("an agent's name", name or getattr(fn, "__name__", "agent"))
        self.resume = resume
        self.__doc__ = getattr(fn, "__doc__", None)

    def __repr__(self) -> str:
        return f"Agent({self.name!r})"

    async def run(self, ctx: Context) -> None:
        """Run the agent to its end, appending what it yields."""
        ctx.resumes = self.resume and ctx.partial is not None
        if not self.generator:
            await cast("Callable[[Context], Awaitable[None]]", self.fn)(ctx)
            return
        items = cast("Callable[[Context], AsyncGenerator[Item]]", self.fn)(ctx)
        async with aclosing(items):
            async for item in items:
                await ctx.emit(item)


@overload
def agent(fn: AgentFunction, /) -> Agent: ...
@overload
def agent(*, name: str | None = None, resume: bool = False) -> Callable[[AgentFunction], Agent]: ...
def agent(
    fn: AgentFunction | None = None, /, *, name: str | None = None, resume: bool = False
) -> Agent | Callable[[AgentFunction], Agent]:
    """Declare an agent: ``@agent``, or ``@agent(name=…, resume=…)``. See `Agent`."""
    if fn is not None:
        return Agent(fn)
    return functools.partial(Agent, name=name, resume=resume)


def add_usage(a: Usage, b: Usage) -> Usage:
    """Return the two added up."""
    return Usage(**{name: getattr(a, name) + getattr(b, name) for name in Usage.__struct_fields__})
