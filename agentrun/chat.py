"""What was said, in the shape providers take it: OpenAI chat messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec

from agentrun import wire

ChatMessage = dict[str, Any]

INTERRUPTED = "The call was interrupted: it has no result, and whether it took effect is not known."
"""What the model is told of a tool call that never got its result. Providers refuse a call without one."""


def input_to_chat(value: Any) -> list[ChatMessage]:
    """Return a turn's input as messages of the user.

    A string or a list of content parts is one message. A chat message stays as it is. Of a list of chat messages only
    the last ones of the user count, since what came before them stands in the log. Anything else is sent as JSON.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if _is_message(value):
        return [dict(value)]
    if isinstance(value, Sequence) and value:
        items = list(cast("Sequence[Any]", value))
        if all(_is_message(item) for item in items):
            return _last_of_user(items)
        if all(isinstance(item, Mapping) and "type" in item for item in items):
            return [{"role": "user", "content": items}]
    return [{"role": "user", "content": _json(value)}]


def message_to_chat(message: wire.Message) -> list[ChatMessage]:
    """Return an agent's message as assistant messages, each followed by the results of its tool calls.

    Tool calls that stand side by side are calls of one step. A call without a result gets one that says that it was
    interrupted; one whose input never was complete is left out, as are reasoning, data, sources and files.
    """
    chat: list[ChatMessage] = []
    text: list[str] = []
    calls: list[wire.ToolPart] = []
    for part in message.parts:
        if isinstance(part, wire.TextPart):
            if calls:
                chat += _step("".join(text), calls)
                text, calls = [], []
            text.append(part.text)
        elif isinstance(part, wire.ToolPart) and (part.settled or part.input is not wire.UNSET):
            calls.append(part)
    return chat + _step("".join(text), calls)


def _step(text: str, calls: Sequence[wire.ToolPart]) -> list[ChatMessage]:
    if not calls:
        return [{"role": "assistant", "content": text}] if text else []
    head: ChatMessage = {"role": "assistant", "content": text or None, "tool_calls": [_call(c) for c in calls]}
    return [head, *({"role": "tool", "tool_call_id": c.call, "content": _result(c)} for c in calls)]


def _call(part: wire.ToolPart) -> dict[str, Any]:
    arguments: Any = {} if part.input is wire.UNSET else part.input
    return {
        "id": part.call,
        "type": "function",
        "function": {"name": part.name, "arguments": arguments if isinstance(arguments, str) else _json(arguments)},
    }


def _result(part: wire.ToolPart) -> str:
    if part.error is not None:
        return f"Error: {part.error}"
    if part.output is wire.UNSET:
        return INTERRUPTED
    return part.output if isinstance(part.output, str) else _json(part.output)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(cast("Mapping[str, Any]", value).get("role"), str)


def _last_of_user(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    users = [i for i, m in enumerate(messages) if m["role"] == "user"]
    if not users:
        return [dict(m) for m in messages]
    first = last = users[-1]
    while first > 0 and messages[first - 1]["role"] == "user":
        first -= 1
    return [dict(m) for m in messages[first : last + 1]]


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
