"""Agents that the end-to-end tests need besides ``workers.echo``."""

import logging
import time

from opentelemetry import baggage, trace

from agentrun import Context, agent


@agent
async def blocks(ctx: Context):
    """Keeps the event loop for as many seconds as it is told."""
    time.sleep(float(ctx.text))  # noqa: ASYNC251 - what an author should not do
    yield "blocked"


@agent
async def looks_up(ctx: Context):
    """Has a span of its own, and something to say to the log."""
    with trace.get_tracer("mine").start_as_current_span("look up"):
        logging.getLogger("mine").warning("looking up")
    yield "found "
    yield "it"


@agent
async def asks(ctx: Context):
    """Asks, and is suspended until there is an answer; then it tells for which tenant that is."""
    answer = await ctx.ask("may I?", kind="text", hold=0.0)
    yield f"{answer}, {baggage.get_baggage('tenant')}"
