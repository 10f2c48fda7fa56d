"""A chat agent on any model litellm knows, with tools; set up by its environment.

    AGENTRUN_MODEL       as litellm names it: openai/gpt-4.1-mini, anthropic/claude-sonnet-4-5, ollama/llama3 …
    AGENTRUN_API_BASE    where the provider is, if not where litellm looks for it
    AGENTRUN_SYSTEM      the system prompt
    AGENTRUN_TOOLS       functions, as module:name, or the names of those below; default now,calculate,publish
    AGENTRUN_MAX_STEPS   model calls per attempt; default 8

Keys are read by litellm: OPENAI_API_KEY, ANTHROPIC_API_KEY …
"""

from __future__ import annotations

import ast
import importlib
import operator
import os
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

from agentrun import Context, agent
from agentrun.adapters.litellm import load, stream
from agentrun.adapters.tools import Tool
from agentrun.agent import Item
from agentrun.wire import Data


def now() -> str:
    """Return the date and time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def calculate(expression: str) -> float:
    """Work out an arithmetic expression.

    Args:
        expression: Numbers, + - * / // % ** and parentheses.
    """
    return _value(ast.parse(expression, mode="eval").body)


async def publish(ctx: Context, title: str, text: str) -> str:
    """Publish a notice to everyone in this conversation. A person is asked to approve it first.

    Args:
        ctx: The turn.
        title: A line.
        text: What the notice says.
    """
    if not await ctx.approve(f"Publish “{title}”?"):
        return "not approved; nothing was published"
    await ctx.emit(Data(name="notice", data={"title": title, "text": text}))
    return "published"


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            base, exponent = _value(left), _value(right)
            # 9**9**9 would keep a core busy for ever.
            if abs(exponent) > 1000 or abs(base) > 1e12:
                raise ValueError("too large")
            return base**exponent
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(left), _value(right))
        case _:
            raise ValueError(f"not arithmetic: {ast.unparse(node)}")


def _tool(name: str) -> Tool:
    if ":" not in name:
        return Tool({"now": now, "calculate": calculate, "publish": publish}[name])
    module, _, attribute = name.partition(":")
    return Tool(getattr(importlib.import_module(module), attribute))


_names = os.environ.get("AGENTRUN_TOOLS", "now,calculate,publish")
TOOLS = [_tool(name.strip()) for name in _names.split(",") if name.strip()]

# It takes seconds; better when the worker starts than when its first turn waits.
load()


@agent(name="chat", resume=True)
async def chat(ctx: Context) -> AsyncIterator[Item]:
    """Answer with the model, using the tools."""
    options: dict[str, Any] = {}
    if base := os.environ.get("AGENTRUN_API_BASE"):
        options["api_base"] = base
    async for item in stream(
        ctx,
        tools=TOOLS,
        system=os.environ.get("AGENTRUN_SYSTEM"),
        max_steps=int(os.environ.get("AGENTRUN_MAX_STEPS", "8")),
        **options,
    ):
        yield item
