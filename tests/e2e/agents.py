"""Agents that the end-to-end tests need besides ``workers.echo``."""

import time

from agentrun import Context, agent


@agent
async def blocks(ctx: Context):
    """Keeps the event loop for as many seconds as it is told."""
    time.sleep(float(ctx.text))  # noqa: ASYNC251 - what an author should not do
    yield "blocked"
