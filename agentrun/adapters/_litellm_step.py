"""One model call: its chunks as items of the agent, and as the message the next call is given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec

from agentrun.agent import Item
from agentrun.wire import ReasoningDelta, ToolCall, ToolInputDelta, ToolResult, Usage


class _Writing:
    """A tool call while the model writes it."""

    def __init__(self, call: str, given: str | None) -> None:
        self.call = call
        self.given = given
        self.name = ""
        self.text: list[str] = []
        self.extra: dict[str, Any] = {}

    def complete(self) -> ToolCall:
        text = "".join(self.text)
        value: Any
        try:
            value = msgspec.json.decode(text) if text.strip() else {}
        except msgspec.DecodeError:
            value = text
        return ToolCall(call=self.call, name=self.name, input=value)


class Step:
    """Folds the chunks of one model call.

    Args:
        seen: The ids of this turn's tool calls; an id that comes again is made another, since some providers count
            from zero in each call.
    """

    def __init__(self, seen: set[str]) -> None:
        self._seen = seen
        self._text: list[str] = []
        self._writing: list[_Writing] = []
        self._at: dict[int, _Writing] = {}
        self._usage: Usage | None = None
        self._thinking: list[Any] = []
        self.finish_reason = "stop"
        self.calls: list[ToolCall] = []

    def take(self, chunk: Any) -> Iterator[Item]:
        """Yield what the chunk says."""
        if usage := getattr(chunk, "usage", None):
            self._usage = _usage(usage)
        if not chunk.choices:
            return
        choice = chunk.choices[0]
        if choice.finish_reason:
            self.finish_reason = str(choice.finish_reason)
        delta = choice.delta
        if reasoning := getattr(delta, "reasoning_content", None):
            yield ReasoningDelta(text=reasoning)
        if getattr(delta, "thinking_blocks", None):
            self._thinking.append(chunk)
        if delta.content:
            self._text.append(delta.content)
            yield delta.content
        for piece in delta.tool_calls or ():
            yield from self._tool(piece)

    def end(self) -> Iterator[Item]:
        """Yield the complete tool calls, and the call's usage."""
        for writing in self._writing:
            call = writing.complete()
            self.calls.append(call)
            yield call
        if self._usage is not None:
            yield self._usage

    def message(self, litellm: Any) -> dict[str, Any]:
        """Return what the model said, for the next call."""
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._text) or None}
        if self._thinking:
            # Signed by the provider, which refuses a tool's result without them.
            whole = litellm.stream_chunk_builder(self._thinking)
            message["thinking_blocks"] = whole.choices[0].message.thinking_blocks
        message["tool_calls"] = [
            {
                "id": call.call,
                "type": "function",
                # Text here never was JSON; the call's result says so, and some providers do not take it back.
                "function": {
                    "name": call.name,
                    "arguments": "{}" if isinstance(call.input, str) else _json(call.input),
                },
                **writing.extra,
            }
            for call, writing in zip(self.calls, self._writing, strict=True)
        ]
        return message

    def _tool(self, piece: Any) -> Iterator[Item]:
        index = piece.index or 0
        writing = self._at.get(index)
        if writing is None or (piece.id and piece.id != writing.given):
            writing = _Writing(self._new_id(piece.id), piece.id)
            self._at[index] = writing
            self._writing.append(writing)
        if piece.function.name and not writing.name:
            writing.name = piece.function.name
        if extra := getattr(piece, "provider_specific_fields", None):
            writing.extra = {"provider_specific_fields": extra}
        text = piece.function.arguments or ""
        if text or not writing.text:
            writing.text.append(text)
            yield ToolInputDelta(call=writing.call, text=text, name=writing.name)

    def _new_id(self, given: str | None) -> str:
        base = given or "call"
        new, n = base, 1
        while new in self._seen:
            n += 1
            new = f"{base}-{n}"
        self._seen.add(new)
        return new


def tool_message(result: ToolResult) -> dict[str, Any]:
    """Return a tool's result for the next model call."""
    if result.error is not None:
        content = f"Error: {result.error}"
    else:
        content = result.output if isinstance(result.output, str) else _json(result.output)
    return {"role": "tool", "tool_call_id": result.call, "content": content}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _usage(usage: Any) -> Usage:
    prompt = getattr(usage, "prompt_tokens_details", None)
    completion = getattr(usage, "completion_tokens_details", None)
    return Usage(
        input_tokens=usage.prompt_tokens or 0,
        output_tokens=usage.completion_tokens or 0,
        cached_tokens=getattr(prompt, "cached_tokens", None) or 0,
        reasoning_tokens=getattr(completion, "reasoning_tokens", None) or 0,
    )
