"""An agent without a model: it echoes, counts at an exact rate, asks, fails. For demonstrations, tests and benches.

    count <n> <ms>                  n words, one each ms milliseconds; goes on where a lost attempt stopped
    approve <n> <ms>                calls a tool that asks for approval, then counts
    steer <n> <ms>                  counts, and takes in what is sent meanwhile with on_busy="steer"
    bench <n> <rate> [<burst>]      n words that carry their time, rate a second, burst at once
    stubborn <ms>                   counts for ever, and takes ms milliseconds to clean up when stopped
    retry <after>                   asks for another attempt, once
    fail                            fails

Anything else is echoed, word by word.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing

import anyio

from agentrun import Context, Fail, Retry, agent
from agentrun.agent import Item
from agentrun.wire import ToolCall, ToolPart, ToolResult

_APPROVAL = "I need approval. "
_DENIED = "Then it is left undone. "


@agent(name="echo", resume=True)
async def echo(ctx: Context) -> AsyncIterator[Item]:
    """Do what the text says; echo it if it says nothing known."""
    for pattern, command in _COMMANDS.items():
        if match := re.fullmatch(pattern, ctx.text.strip()):
            numbers = [float(number) for number in match.groups() if number is not None]
            async with aclosing(command(ctx, *numbers)) as items:
                async for item in items:
                    yield item
            return
    for word in _left(re.findall(r"\s*\S+\s*|\s+", ctx.text), _said(ctx)):
        yield word


async def _count(ctx: Context, n: float, ms: float) -> AsyncGenerator[Item]:
    words = list(_left(_words(n), _said(ctx)))
    async for i in _ticks(len(words), ms / 1000):
        yield words[i]


async def _approve(ctx: Context, n: float, ms: float) -> AsyncGenerator[Item]:
    said = _said(ctx)
    parts = ctx.partial.parts if ctx.partial is not None and ctx.resumes else []
    deploy = next((part for part in parts if isinstance(part, ToolPart) and part.call == "deploy"), None)
    for text in _left([_APPROVAL], said):
        yield text
    if deploy is None:
        yield ToolCall(call="deploy", name="deploy", input={"words": int(n)})
    if deploy is not None and deploy.settled:
        approved = deploy.error is None
    else:
        approved = await ctx.approve("Deploy?", call="deploy")
        yield ToolResult(call="deploy", output="deployed") if approved else ToolResult(call="deploy", error="denied")
    words = list(_left(_words(n) if approved else [_DENIED], said[len(_APPROVAL) :]))
    async for i in _ticks(len(words), ms / 1000):
        yield words[i]


async def _steer(ctx: Context, n: float, ms: float) -> AsyncGenerator[Item]:
    done = len(re.findall(r"w\d+ ", re.sub(r"\[steered: .*?\] ", "", _said(ctx))))
    async for i in _ticks(int(n) - done, ms / 1000):
        for text in await ctx.steering():
            yield f"[steered: {text}] "
        yield f"w{done + i} "


async def _bench(ctx: Context, n: float, rate: float, burst: float = 1) -> AsyncGenerator[Item]:
    done, size = len(_said(ctx).split()), int(burst)
    steps = -(-(int(n) - done) // size)
    async for step in _ticks(steps, size / rate):
        first = done + step * size
        for i in range(first, min(first + size, int(n))):
            yield f"w{i}@{time.monotonic_ns()} "


async def _stubborn(ctx: Context, ms: float) -> AsyncGenerator[Item]:
    try:
        async for i in _ticks(1_000_000_000, 0.02):
            yield f"w{i} "
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(ms / 1000)


async def _retry(ctx: Context, after: float) -> AsyncGenerator[Item]:
    if ctx.attempt == 1:
        raise Retry("as you asked", after=after)
    yield f"attempt {ctx.attempt} "


async def _fail(ctx: Context) -> AsyncGenerator[Item]:
    yield "I fail. "
    raise Fail("as you asked", code="asked_for")


_NUMBER = r" +(\d+(?:\.\d+)?)"
_COMMANDS: dict[str, Callable[..., AsyncGenerator[Item]]] = {
    f"count{_NUMBER}{_NUMBER}": _count,
    f"approve{_NUMBER}{_NUMBER}": _approve,
    f"steer{_NUMBER}{_NUMBER}": _steer,
    rf"bench{_NUMBER} +([1-9]\d*(?:\.\d+)?)(?: +([1-9]\d*))?": _bench,
    f"stubborn{_NUMBER}": _stubborn,
    f"retry{_NUMBER}": _retry,
    "fail": _fail,
}


def _words(n: float) -> Iterator[str]:
    return (f"w{i} " for i in range(int(n)))


def _said(ctx: Context) -> str:
    """The text this attempt goes on after."""
    return ctx.partial.text if ctx.resumes and ctx.partial is not None else ""


def _left(tokens: Iterable[str], said: str) -> Iterator[str]:
    """Yield what of the tokens was not said; a token that was cut in two is finished first."""
    skip = len(said)
    for token in tokens:
        if skip < len(token):
            yield token[skip:]
        skip = max(0, skip - len(token))


async def _ticks(n: int, seconds: float) -> AsyncIterator[int]:
    # Against the clock at the start, so that what each step costs does not add up.
    start = time.monotonic()
    for i in range(n):
        await anyio.sleep(max(0.0, start + i * seconds - time.monotonic()))
        yield i
