"""Events, parts and tables, in a line each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import msgspec

from agentrun import wire
from agentrun.client import Event

__all__ = ["clean", "columns", "describe", "event_line", "input_text", "question_text", "said", "short"]

_WIDTH = 160
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def describe(item: Any) -> str:
    """A message's part, or the event it came from, in a line."""
    match item:
        case wire.ToolPart():
            call = f"⚙ {item.name}({short('' if wire.is_unset(item.input) else item.input)})"
            if not item.settled:
                return call
            return f"{call} → {f'error: {item.error}' if item.error is not None else short(item.output)}"
        case wire.ToolCall():
            return f"⚙ {item.name}({short(item.input)})"
        case wire.ToolResult():
            return f"  → error: {item.error}" if item.error is not None else f"  → {short(item.output)}"
        case wire.Data() | wire.DataPart():
            return f"[{item.name}] {short(item.data)}"
        case wire.Source() | wire.SourcePart():
            return f"source: {item.title or ''} {item.url}"
        case wire.File() | wire.FilePart():
            return f"file: {item.name or ''} {item.url}"
        case wire.ReasoningPart():
            return short(item.text)
        case _:
            return short(item)


def clean(text: str) -> str:
    """The text without what a terminal would take for commands."""
    return _CONTROL.sub("", text)


def short(value: Any) -> str:
    """Text, or JSON, cut to a line."""
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    text = text.replace("\n", "⏎")
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"


def said(event: Event) -> str:
    """What an event says, in a line."""
    match event.data:
        case wire.TextDelta() | wire.ReasoningDelta() | wire.ToolInputDelta() as data:
            return short(data.text)
        case wire.TurnRequested() as data:
            instead = f" instead of {data.replaces}" if data.replaces else ""
            return f"{data.turn} to {data.agent}{instead}: {short(data.input)}"
        case wire.TurnStarted() as data:
            resumes = "" if data.resumes_from is None else f", goes on after {data.resumes_from}"
            return f"{data.turn} by {data.worker}{resumes}"
        case wire.TurnFailed() | wire.TurnRetrying() as data:
            return f"{data.turn} {data.error.code}: {short(data.error.message)}"
        case wire.Snapshot() | wire.Gap() as data:
            return f"{data.from_} to {data.to}"
        case wire.ToolCall() | wire.ToolResult() | wire.Data() | wire.Source() | wire.File() as data:
            return describe(data).strip()
        case wire.UnknownEvent() as data:
            return short(data.raw.decode(errors="replace"))
        case data:
            fields = cast("dict[str, Any]", msgspec.to_builtins(data))
            left_out = ("type", "turn", "message", "attempt", "turn_offset", "metadata", "trace")
            rest = (f"{name}={short(value)}" for name, value in fields.items() if name not in left_out)
            return short(" ".join((fields.get("turn") or "", *rest)))


def question_text(question: wire.InputRequired) -> str:
    """What is asked, and how to answer."""
    prompt = question.prompt or (f"run {question.tool}" if question.tool else "")
    match question.kind:
        case "approval":
            return f"{prompt or 'Approve?'} [y/n]"
        case "choice":
            choices = ", ".join(f"{i}) {choice}" for i, choice in enumerate(question.choices or (), 1))
            return f"{prompt} {choices}".strip()
        case "tool":
            return f"{prompt} {'' if wire.is_unset(question.input) else short(question.input)} [JSON]".strip()
        case "text":
            return prompt


def input_text(value: Any) -> str:
    match value:
        case {"content": str(content)}:
            return content
        case str():
            return value
        case _:
            return short(value)


def columns(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A table as lines, nothing cut off."""
    cells = [list(header), *([str(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def event_line(event: Event) -> bytes:
    """The event as a line of JSON, its own JSON as it was stored."""
    body = event.raw.replace(b"\n", b" ").replace(b"\r", b" ")
    key = b"event"
    if isinstance(event.data, wire.UnknownEvent):
        try:
            msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            key, body = b"undecodable", msgspec.json.encode(event.raw.decode(errors="replace"))
    return b'{"offset":%d,"time":%s,"%s":%s}\n' % (event.offset, repr(event.time).encode(), key, body)
