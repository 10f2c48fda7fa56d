"""Agents that the browser tests need besides ``workers.echo``."""

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import cast

import anyio

import workers.echo
from agentrun import Context, agent
from agentrun.agent import Item

LAST_WORDS = 15


@agent(resume=True)
async def echo(ctx: Context):
    """`workers.echo`, which also talks until the file is there that it is told of: as long as a test needs it to."""
    if match := re.fullmatch(r"talk (\S+)", ctx.text):
        said = len(ctx.partial.text.split()) if ctx.partial is not None else 0
        left = LAST_WORDS
        while left:
            yield f"w{said} "
            said += 1
            if await anyio.Path(match[1]).exists():
                left -= 1
            await anyio.sleep(0.04)
        return
    async with aclosing(cast("AsyncGenerator[Item]", workers.echo.echo.fn(ctx))) as items:
        async for item in items:
            yield item


@agent(resume=True)
async def asker(ctx: Context):
    """Asks for a choice and for text."""
    where = await ctx.ask("Where?", kind="choice", choices=["here", "there"], id="where")
    why = await ctx.ask("Why?", kind="text", id="why")
    yield f"{where}, {why}."


@agent
async def gated(ctx: Context):
    """Says half of what it has to say, and the rest once the file is there that it is told of."""
    for i in range(30):
        yield f"w{i} "
    while not await anyio.Path(ctx.text).exists():  # noqa: ASYNC110 - the test is another process
        await anyio.sleep(0.02)
    for i in range(30, 60):
        yield f"w{i} "
        await anyio.sleep(0.005)
