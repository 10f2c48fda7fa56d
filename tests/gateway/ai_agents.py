"""Agents for the tests of the AI SDK's endpoints."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio

from agentrun import wire
from agentrun.agent import Agent, Context, Item, agent


@agent(name="over")
async def over(ctx: Context) -> AsyncIterator[Item]:
    """Starts over after each suspension and each crash."""
    yield f"attempt {ctx.attempt}: may I? "
    yield wire.ToolCall(call="c1", name="rm", input={"path": "/"})
    approved = await ctx.approve("sure?", call="c1")
    if approved:
        yield wire.ToolResult(call="c1", output="gone")
    yield "done" if approved else "left alone"


@agent(name="slow")
async def slow(ctx: Context) -> AsyncIterator[Item]:
    """Says its attempt, then a word each 20 ms, for as long as the input says."""
    yield f"attempt {ctx.attempt}: "
    for n in range(int(ctx.text)):
        await anyio.sleep(0.02)
        yield f"w{n} "


class Gates:
    """Lets an agent say so many words, and no more, until it is let go on."""

    def __init__(self) -> None:
        self._open = 0
        self._moved = anyio.Event()

    def open(self, words: int) -> None:
        """Let it say so many words in all."""
        self._open = words
        self._moved.set()
        self._moved = anyio.Event()

    async def reached(self, words: int) -> None:
        while self._open < words:
            await self._moved.wait()


def gated(gates: Gates, words: int, name: str = "gated") -> Agent:
    """An agent that says so many words, as far as it is let."""

    @agent(name=name)
    async def says(ctx: Context) -> AsyncIterator[Item]:
        for n in range(words):
            await gates.reached(n + 1)
            await anyio.sleep(0.002)
            yield f"w{n} "

    return says


@agent(name="curious", resume=True)
async def curious(ctx: Context) -> AsyncIterator[Item]:
    """Asks the client for a tool's result, then for a choice, then for a word."""
    place = await ctx.ask(kind="tool", tool="locate", input={"high": True}, id="where")
    if not ctx.resumes or "at" not in ctx.partial.text:
        yield f"at {place} "
    colour = await ctx.ask("which?", kind="choice", choices=["red", "blue"], id="colour")
    word = await ctx.ask("a word?", kind="text", id="word")
    yield f"{colour} {word}"


@agent(name="both")
async def both(ctx: Context) -> None:
    """Calls two tools at once, each of which needs approval."""
    said: dict[str, bool] = {}

    async def one(call: str) -> None:
        await ctx.emit(wire.ToolCall(call=call, name="rm", input={}))
        said[call] = await ctx.approve(call=call)
        await ctx.emit(wire.ToolResult(call=call, output=said[call]))

    async with anyio.create_task_group() as group:
        group.start_soon(one, "a")
        group.start_soon(one, "b")
    await ctx.emit(f"a {said['a']}, b {said['b']}")
