"""An agent that says what would be markup, wherever it can."""

from __future__ import annotations

from collections.abc import AsyncIterator

from agentrun import Context, agent
from agentrun.agent import Item
from agentrun.wire import Data, Source, ToolCall, ToolResult


@agent(name="hostile")
async def hostile(ctx: Context) -> AsyncIterator[Item]:
    """Give the input back in text, tools, data and sources."""
    yield ToolCall(call="c", name=ctx.text, input={"html": ctx.text})
    yield ToolResult(call="c", output=ctx.text)
    yield Data(name=ctx.text, data=ctx.text)
    yield Source(url="javascript:window.broken=1")
    yield f"```{ctx.text}\n```\n**{ctx.text}** `{ctx.text}`\n{ctx.text}"
