"""Models through litellm: text, reasoning, tool calls and usage as an agent's items.

::

    from agentrun.adapters.litellm import stream

    @agent(resume=True)
    async def support(ctx: Context):
        async for item in stream(ctx, model="gpt-4.1-mini", tools=[look_up]):
            yield item

litellm is imported when it is first used (it takes seconds; `load` does it beforehand), without fetching its price
map. Its own retries are off: a turn is retried by the worker, on any worker. What is changed in litellm globally is
``suppress_debug_info``, without which it prints to stdout on each error, and that its spans hold nothing of what is
said unless ``OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT`` says otherwise; litellm itself reads a ``.env`` file
when it is imported, unless ``LITELLM_MODE=PRODUCTION``.

With litellm's own ``otel`` callback each model call has a span of litellm's below the agent's; see
docs/observability.md.

A stop in the first millisecond of a call may make Python warn that a coroutine of litellm's was never awaited. It is
harmless: no request was sent.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal

import anyio
import anyio.to_thread
from opentelemetry import trace

from agentrun.adapters._litellm_errors import signal_for
from agentrun.adapters._litellm_step import Step, tool_message
from agentrun.adapters.tools import Tool, run_calls, toolset
from agentrun.agent import Context, Item
from agentrun.errors import AuthorSignal, InvalidInput, Retry
from agentrun.history import message_to_chat
from agentrun.telemetry.attempt import model_known
from agentrun.wire import UNSET, Message, Part, ToolCall, ToolPart, ToolResult

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

__all__ = ["litellm_stream", "load", "stream"]

CONTINUE = (
    "Your answer above was interrupted. Go on exactly where it stopped, even in the middle of a sentence or word. "
    "Repeat nothing that is there already, and say nothing about the interruption."
)
_CLOSE = 2.0


def load() -> Any:
    """Import litellm and return it. It takes seconds: a worker does it before its first turn."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    os.environ.setdefault("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "NO_CONTENT")
    import litellm

    litellm.suppress_debug_info = True
    return litellm


async def stream(
    source: Context | Sequence[dict[str, Any]],
    *,
    model: str | None = None,
    tools: Iterable[Callable[..., Any] | Tool] = (),
    system: str | None = None,
    max_steps: int = 8,
    resume: Literal["continue", "restart"] = "continue",
    stall_timeout: float = 60.0,
    **options: Any,
) -> AsyncGenerator[Item]:
    """Ask a model, run the tools it calls, and ask again until it is done; yield what an agent yields.

    Yields text as ``str``, ``ReasoningDelta``, ``ToolInputDelta``, ``ToolCall``, ``ToolResult``, and ``Usage`` once a
    model call. With a context, ``ctx.finish_reason`` is set (the provider's last one, or ``max_steps``), and the
    result of a tool that ends while others still run is appended by ``ctx.emit`` at once instead of yielded at the end
    of the step, so that a suspension or crash does not run it again.

    The connection to the provider is closed as soon as the turn is stopped or the iteration is given up. Usage of a
    call that is broken off is not known: providers send it last.

    Args:
        source: The context, or plain chat messages.
        model: As litellm names it, such as ``openai/gpt-4.1-mini``; default is ``AGENTRUN_MODEL``.
        tools: Functions, see `agentrun.adapters.tools.Tool`. What a tool raises is told to the model, but for
            ``Retry`` and ``Fail``, which end the attempt. Calls of one step run side by side.
        system: Put before the messages.
        max_steps: Model calls in this attempt.
        resume: What to do where an agent declared ``resume=True`` is run again. ``continue``: tool calls without a
            result are run, so a tool that was at work when its worker died runs again (a question answered meanwhile
            returns at once); and a text that broke off is given to the
            model with the request to go on where it stopped. Models mostly do; the seam is as good as the model, and
            one whose answer was complete may add to it. ``restart``: ask again from the start; the answer then stands
            after what earlier attempts left. Reasoning is never given back to the model on a resume.
        stall_timeout: Seconds of silence from the provider before the call is given up.
        options: For ``litellm.acompletion``: ``temperature``, ``api_base``, ``api_key`` …

    Raises:
        Retry: Rate limits (after ``retry-after``), overload, timeouts, connection errors, a stream that breaks off or
            ends without a finish reason, a stall.
        Fail: What trying again cannot mend; its ``code`` is ``authentication``, ``permission``, ``not_found``,
            ``context_window``, ``content_policy`` or ``bad_request``.
        InvalidInput: No model is named, or a tool cannot be described.
    """
    named = toolset(tools)
    request = _request(model, named, options)
    model_known(request["model"])
    ctx = source if isinstance(source, Context) else None
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    messages += source.messages if isinstance(source, Context) else source
    seen: set[str] = set()
    if ctx is not None and ctx.resumes and resume == "continue":
        rest, said = await _take_up(ctx, named, seen)
        for result in rest:
            yield result
        messages += said

    litellm = await anyio.to_thread.run_sync(load, abandon_on_cancel=True)
    attempt = 1 if ctx is None else ctx.attempt
    finish = "max_steps"
    for _ in range(max_steps):
        step = Step(seen)
        async with aclosing(_chunks(litellm, _call(request, messages), stall_timeout, attempt)) as chunks:
            async for chunk in chunks:
                for item in step.take(chunk):
                    yield item
        for item in step.end():
            yield item
        if not step.calls:
            finish = step.finish_reason
            break
        results, rest = await run_calls(step.calls, named, ctx)
        for result in rest:
            yield result
        messages += [step.message(litellm), *map(tool_message, results)]
    if ctx is not None:
        ctx.finish_reason = finish


litellm_stream = stream


def _request(model: str | None, tools: dict[str, Tool], options: dict[str, Any]) -> dict[str, Any]:
    model = model or os.environ.get("AGENTRUN_MODEL")
    if not model:
        raise InvalidInput(
            "no model: pass model=…, or set AGENTRUN_MODEL to a litellm name such as openai/gpt-4.1-mini"
        )
    request: dict[str, Any] = {"stream_options": {"include_usage": True}, **options}
    request |= {"model": model, "stream": True, "num_retries": 0, "max_retries": 0}
    if tools:
        request["tools"] = [tool.spec for tool in tools.values()]
        # Else any call with tools imports litellm's proxy, which takes seconds and the package mcp.
        request["_skip_mcp_handler"] = True
    return request


def _call(request: dict[str, Any], messages: list[dict[str, Any]]) -> dict[str, Any]:
    metadata: dict[str, Any] = {**(request.get("metadata") or {})}
    span = trace.get_current_span()
    if span.get_span_context().is_valid:
        # Else its callback writes what it knows of the call, usage among it, on this span instead of one of its own.
        metadata.setdefault("litellm_parent_otel_span", span)
    # New for each call: it keeps there what it has told of, and would pass over a second call with the same.
    return {**request, "messages": messages, **({"metadata": metadata} if metadata else {})}


async def _chunks(litellm: Any, request: dict[str, Any], stall: float, attempt: int) -> AsyncGenerator[Any]:
    """Yield the chunks of one model call; whatever ends it, the provider's connection is closed."""
    response: Any = None
    try:
        with anyio.fail_after(stall):
            response = await litellm.acompletion(**request)
        iterator: AsyncIterator[Any] = response.__aiter__()
        while True:
            with anyio.fail_after(stall):
                chunk = await anext(iterator, None)
            if chunk is None:
                break
            yield chunk
        # litellm makes up a "stop" where the provider's stream ended without one, which is how a proxy cuts it off.
        if response.received_finish_reason is None and response.intermittent_finish_reason is None:
            raise ConnectionError("the provider's stream ended without a finish reason")
    except AuthorSignal:
        raise
    except TimeoutError as error:
        raise Retry(f"the provider was silent for {stall:g} s", after=_backoff(attempt)) from error
    except Exception as error:
        signal = signal_for(error, _backoff(attempt))
        if signal is None:
            raise
        raise signal from error
    finally:
        if response is not None:
            with anyio.move_on_after(_CLOSE, shield=True):
                await response.aclose()


def _backoff(attempt: int) -> float:
    return min(30.0, 2.0 ** (attempt - 1))


async def _take_up(
    ctx: Context, tools: dict[str, Tool], seen: set[str]
) -> tuple[list[ToolResult], list[dict[str, Any]]]:
    """Run the calls that earlier attempts left open; return results to append, and what was said as messages."""
    said: list[Part] = []
    calls: list[ToolCall] = []
    results: list[ToolResult] = []
    for part in ctx.partial.parts if ctx.partial is not None else ():
        if isinstance(part, ToolPart):
            seen.add(part.call)
            if not part.settled and part.input is UNSET:
                results.append(ToolResult(call=part.call, error="interrupted before the call was complete"))
                continue
            if not part.settled:
                calls.append(ToolCall(call=part.call, name=part.name, input=part.input))
        said.append(part)
    ran, rest = await run_calls(calls, tools, ctx)
    messages = message_to_chat(Message(parts=_settled(said, ran)))
    if messages and messages[-1]["role"] == "assistant":
        messages.append({"role": "user", "content": CONTINUE})
    return results + rest, messages


def _settled(parts: list[Part], results: list[ToolResult]) -> list[Part]:
    by_call = {result.call: result for result in results}
    settled: list[Part] = []
    for part in parts:
        if isinstance(part, ToolPart):
            # Input that never was JSON is text here, which some providers do not take back.
            value: Any = {} if isinstance(part.input, str) else part.input
            result = by_call.get(part.call, part)
            output = UNSET if result.error is not None else result.output
            settled.append(ToolPart(part.call, part.name, value, output, result.error))
        else:
            settled.append(part)
    return settled
