from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from typing import Any

import pytest

from agentrun.agent import Agent, Context, Item, agent
from agentrun.errors import InvalidInput
from agentrun.wire import (
    Data,
    InputRequired,
    Message,
    OutputEvent,
    ReasoningDelta,
    TextDelta,
    TextPart,
    ToolCall,
    TurnRequested,
    TurnStarted,
    Usage,
)


class Port:
    """Records what a context is asked for."""

    stopping = False

    def __init__(self, answer: Any = None) -> None:
        self.events: list[OutputEvent] = []
        self.questions: list[tuple[InputRequired, float | None]] = []
        self.answer = answer
        self.steering: list[TurnRequested] = []

    async def emit(self, event: OutputEvent) -> None:
        self.events.append(event)

    async def ask(self, question: InputRequired, hold: float | None) -> Any:
        self.questions.append((question, hold))
        return self.answer

    async def take_steering(self) -> list[TurnRequested]:
        taken, self.steering = self.steering, []
        return taken


def context(port: Port, value: Any = "hi", partial: Message | None = None) -> Context:
    request = TurnRequested(turn="t1", agent="a", input=value)
    return Context(port, session="s1", attempt=1, request=request, messages=[], partial=partial)


def test_both_shapes_are_told_apart_also_behind_partials_and_objects() -> None:
    async def generator(ctx: Context, x: int = 0) -> AsyncIterator[Item]:
        yield "a"

    async def coroutine(ctx: Context) -> None: ...

    class Answering:
        async def __call__(self, ctx: Context) -> AsyncIterator[Item]:
            yield "a"

    assert Agent(generator).generator
    assert Agent(functools.partial(generator, x=1), name="p").generator
    assert Agent(Answering(), name="c").generator
    assert not Agent(coroutine).generator


@pytest.mark.parametrize("name", ["", "a.b", "a b", "x" * 129])
def test_a_name_that_cannot_be_part_of_a_subject_is_refused(name: str) -> None:
    async def fn(ctx: Context) -> None: ...

    fn.__name__ = name
    with pytest.raises(InvalidInput):
        Agent(fn)


def test_a_plain_function_is_refused_and_named() -> None:
    def plain(ctx: Context) -> None: ...

    with pytest.raises(InvalidInput, match="plain"):
        agent(plain)


def test_the_decorator_takes_a_name_and_resume_or_nothing() -> None:
    @agent
    async def bare(ctx: Context) -> None: ...

    @agent(name="other", resume=True)
    async def named(ctx: Context) -> None: ...

    assert (bare.name, bare.resume) == ("bare", False)
    assert (named.name, named.resume) == ("other", True)


async def test_a_generator_appends_what_it_yields_and_a_coroutine_what_it_emits() -> None:
    @agent
    async def generator(ctx: Context) -> AsyncIterator[Item]:
        yield "one"
        yield ReasoningDelta(text="hm")
        yield ""

    @agent
    async def coroutine(ctx: Context) -> None:
        await ctx.emit("one")
        await ctx.emit(Data(name="n", data=1))

    port = Port()
    await generator.run(context(port))
    assert port.events == [TextDelta(text="one"), ReasoningDelta(text="hm")]
    port = Port()
    await coroutine.run(context(port))
    assert port.events == [TextDelta(text="one"), Data(name="n", data=1)]


async def test_an_agent_whose_append_fails_is_closed_before_run_returns() -> None:
    closed: list[bool] = []

    @agent
    async def tidy(ctx: Context) -> AsyncIterator[Item]:
        try:
            yield "one"
        finally:
            closed.append(True)

    class Broken(Port):
        async def emit(self, event: OutputEvent) -> None:
            raise OSError("no")

    with pytest.raises(OSError, match="no"):
        await tidy.run(context(Broken()))
    assert closed == [True]


async def test_usage_is_added_up_and_not_appended() -> None:
    port = Port()
    ctx = context(port)
    await ctx.emit(Usage(input_tokens=1, output_tokens=2))
    await ctx.emit(Usage(input_tokens=10, cached_tokens=3))
    assert ctx.usage == Usage(input_tokens=11, output_tokens=2, cached_tokens=3)
    assert port.events == []


@pytest.mark.parametrize("item", [TurnStarted(worker="w", lease="l"), InputRequired(request="r", kind="text"), 3, None])
async def test_what_is_not_an_authors_is_refused(item: Any) -> None:
    port = Port()
    with pytest.raises(InvalidInput, match=type(item).__name__):
        await context(port).emit(item)
    assert port.events == []


@pytest.mark.parametrize(
    ("value", "text"),
    [("hi", "hi"), ({"role": "user", "content": "hi"}, "hi"), ({"content": ["hi"]}, ""), ([1], ""), (None, "")],
)
def test_the_text_of_an_input(value: Any, text: str) -> None:
    ctx = context(Port(), value)
    assert (ctx.input, ctx.text) == (value, text)


async def test_questions_are_numbered_and_may_be_named() -> None:
    port = Port(answer="yes")
    ctx = context(port)
    assert await ctx.ask("a") == "yes"
    await ctx.ask("b", id="mine")
    await ctx.ask("c", call="c1", hold=2.5)
    await ctx.ask("d", kind="choice", choices=("x", "y"))
    await ctx.ask(kind="tool", tool="browse", input=None)
    assert [q.request for q, _ in port.questions] == ["ask-1", "mine", "c1", "ask-4", "ask-5"]
    assert [hold for _, hold in port.questions] == [None, None, 2.5, None, None]
    assert port.questions[3][0].choices == ["x", "y"]
    assert port.questions[4][0].input is None


async def test_a_question_that_cannot_be_put_is_refused() -> None:
    ctx = context(Port())
    with pytest.raises(InvalidInput, match="choices"):
        await ctx.ask("?", kind="choice")
    with pytest.raises(InvalidInput, match="question's id"):
        await ctx.ask("?", id="a.b")


@pytest.mark.parametrize(
    ("answer", "given"),
    [
        (True, True),
        (False, False),
        ({"approved": True}, True),
        ({"approved": False, "reason": "no"}, False),
        ({}, False),
    ],
)
async def test_approval(answer: Any, given: bool) -> None:
    assert await context(Port(answer)).approve("?") is given


async def test_steering_is_taken_once() -> None:
    port = Port()
    port.steering = [TurnRequested(turn="t2", agent="a", input="left"), TurnRequested(turn="t3", agent="a", input=[1])]
    ctx = context(port)
    assert await ctx.steering() == ["left", [1]]
    assert await ctx.steering() == []


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("partial", [Message(parts=[TextPart("so far")]), None])
async def test_a_context_says_whether_the_attempt_goes_on_after_the_partial(
    resume: bool, partial: Message | None
) -> None:
    said: list[bool] = []

    @agent(resume=resume)
    async def look(ctx: Context) -> None:
        said.append(ctx.resumes)
        await ctx.emit(ToolCall(call="c", name="n", input={}))

    await look.run(context(Port(), partial=partial))
    assert said == [resume and partial is not None]
