"""The agents of a chaos run. What they say can be told beforehand: words ``w0 w1 …``, however often they are resumed.

    count <n> <ms>              n words, one each ms milliseconds
    silent <n> <ms> <seconds>   says nothing for that time, as a slow model; then counts
    tool <n> <ms> <seconds>     calls a tool that takes that time, without a word; then counts
    block <n> <ms> <seconds>    counts, and in mid-answer blocks the event loop for that time
    flaky <n> <ms> <percent>    counts; each attempt breaks down at some word with that chance, and is retried
    stubborn <ms>               counts for ever, and takes that time to clean up when stopped

and, as `workers.echo` does them: ``approve <n> <ms>``, ``steer <n> <ms>``, ``retry <after>``, ``fail``. Anything else
is echoed.

``chaos`` goes on after what a lost attempt said; ``fresh`` starts over.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import cast

import anyio

from agentrun import Agent, Context, agent
from agentrun.agent import Item
from agentrun.wire import ToolCall, ToolPart, ToolResult
from workers.echo import echo

_COUNTED = re.compile(r"(count|silent|tool|block|flaky) +(\d+) +(\d+)(?: +(\d+(?:\.\d+)?))?")
_STUBBORN = re.compile(r"stubborn +(\d+)")
_FOR_EVER = 10_000
"""Words; stopped or overdue before."""


def words_of(text: str) -> int | None:
    """How many words, ``w0 w1 …``, the whole answer to a command is; None where it is not made of these alone."""
    match = _COUNTED.fullmatch(text)
    return int(match[2]) if match else None


async def _answer(ctx: Context) -> AsyncGenerator[Item]:
    if match := _STUBBORN.fullmatch(ctx.text):
        commanded = _stubborn(ctx, int(match[1]) / 1000)
    elif match := _COUNTED.fullmatch(ctx.text):
        commanded = _counted(ctx, match)
    else:
        commanded = cast("AsyncGenerator[Item]", echo.fn(ctx))
    async with aclosing(commanded) as items:
        async for item in items:
            yield item


async def _counted(ctx: Context, match: re.Match[str]) -> AsyncGenerator[Item]:
    command, n, seconds, more = match[1], int(match[2]), int(match[3]) / 1000, float(match[4] or 0)
    words = _words_left(ctx, n)
    if command == "silent" and len(words) == n:
        await anyio.sleep(more)
    if command == "tool":
        async for event in _tool(ctx, more):
            yield event
    middle = len(words) // 2
    dice = random.Random(f"{ctx.turn} {ctx.attempt}")
    breaks = dice.randrange(n) if command == "flaky" and n and dice.random() * 100 < more else None
    for i, word in enumerate(words):
        if i == breaks:
            raise RuntimeError("as you asked")
        if command == "block" and i == middle and ctx.attempt == 1:
            time.sleep(more)  # noqa: ASYNC251 - this is what is asked for
        yield word
        await anyio.sleep(seconds)


async def _stubborn(ctx: Context, cleanup: float) -> AsyncGenerator[Item]:
    try:
        for word in _words_left(ctx, _FOR_EVER):
            yield word
            await anyio.sleep(0.02)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(cleanup)


async def _tool(ctx: Context, seconds: float) -> AsyncIterator[Item]:
    parts = ctx.partial.parts if ctx.resumes and ctx.partial is not None else []
    work = next((part for part in parts if isinstance(part, ToolPart) and part.call == "work"), None)
    if work is None:
        yield ToolCall(call="work", name="work", input={"seconds": seconds})
    if work is None or not work.settled:
        await anyio.sleep(seconds)
        yield ToolResult(call="work", output="done")


def _words_left(ctx: Context, n: int) -> list[str]:
    said = ctx.partial.text if ctx.resumes and ctx.partial is not None else ""
    return re.findall(r"\S+ |\S+| ", "".join(f"w{i} " for i in range(n))[len(said) :])


@agent(name="chaos", resume=True)
async def chaos(ctx: Context) -> AsyncIterator[Item]:
    """Do what the text says, going on after what was said."""
    async with aclosing(_answer(ctx)) as items:
        async for item in items:
            yield item


@agent(name="fresh")
async def fresh(ctx: Context) -> AsyncIterator[Item]:
    """Do what the text says, from the start in each attempt."""
    async with aclosing(_answer(ctx)) as items:
        async for item in items:
            yield item


AGENTS: tuple[Agent, ...] = (chaos, fresh)
