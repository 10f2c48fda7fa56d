"""Agents that the browser tests need besides ``workers.echo``."""

import anyio

from agentrun import Context, agent


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
