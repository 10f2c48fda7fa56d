"""A message as the AI SDK's client holds it: its parts, and the chunks that make them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, cast

import msgspec

from agentrun import wire

__all__ = ["Chunk", "Options", "Part", "Stated", "Text", "Tool", "parts_of"]

Chunk = dict[str, Any]
"""One chunk of a UI message stream. Fields that are not given are absent, never null."""

INTERRUPTED = "interrupted: the call has no result"
_ODD = re.compile(r"[^A-Za-z0-9_.-]+")
_SUSPECT = re.compile(rb'"(?:__proto__|constructor)"')
_FINISH_REASONS = frozenset({"stop", "length", "content-filter", "tool-calls", "error", "other"})


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How chunks are made.

    Attributes:
        version: The major version of the client's package ``ai``.
        static_tools: Tools whose parts the application declares by name; all others are dynamic.
        metadata: Whether the usage goes into the message's metadata.
        interrupted: Whether the client knows that finish reason: `WorkflowChatTransport` brings an older ``ai``.
    """

    version: int = 7
    static_tools: frozenset[str] = frozenset()
    metadata: bool = True
    interrupted: bool = True


class Text:
    """Text, or reasoning."""

    __slots__ = ("_pieces", "id", "kind", "open")

    def __init__(self, kind: str, id: str, text: str = "", *, open: bool = True) -> None:
        self.kind = kind
        self.id = id
        self.open = open
        self._pieces = [text] if text else []

    def add(self, text: str) -> Chunk:
        """Add to it."""
        self._pieces.append(text)
        return {"type": f"{self.kind}-delta", "id": self.id, "delta": text}

    @property
    def text(self) -> str:
        """All of it."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def start(self) -> Chunk:
        """The chunk it begins with."""
        return {"type": f"{self.kind}-start", "id": self.id}

    def end(self) -> Chunk:
        """Close it."""
        self.open = False
        return {"type": f"{self.kind}-end", "id": self.id}

    def chunks(self) -> list[Chunk]:
        """The chunks that make it as it is."""
        made = [self.start()]
        if self.text:
            made.append({"type": f"{self.kind}-delta", "id": self.id, "delta": self.text})
        return made if self.open else [*made, {"type": f"{self.kind}-end", "id": self.id}]

    def ui(self) -> dict[str, Any]:
        """The part as the client keeps it."""
        return {"type": self.kind, "text": self.text, "state": "streaming" if self.open else "done"}


class Stated:
    """A part that is told at once: data, a source, a file."""

    __slots__ = ("chunk", "key")

    def __init__(self, chunk: Chunk, key: tuple[str, str] | None = None) -> None:
        self.chunk = chunk
        self.key = key
        """What replaces it: data of the same type and id."""

    def chunks(self) -> list[Chunk]:
        """The chunk that makes it."""
        return [self.chunk]

    def ui(self) -> dict[str, Any]:
        """The part as the client keeps it."""
        return self.chunk


class Tool:
    """A tool call, or a question that stands as one.

    ``asked``: it is a question's own part, and no part of the message in the log.
    """

    __slots__ = (
        "_pieces",
        "approval",
        "asked",
        "call",
        "dynamic",
        "error",
        "input",
        "name",
        "output",
        "provider",
        "state",
        "streaming",
    )

    def __init__(self, call: str, name: str, *, dynamic: bool, asked: bool = False) -> None:
        self.call = call
        self.name = name
        self.dynamic = dynamic
        self.asked = asked
        self.state = "input-streaming"
        self.streaming = False
        """Whether the client can take more input as text."""
        self._pieces: list[str] = []
        self.input: Any = wire.UNSET
        self.output: Any = wire.UNSET
        self.error: str | None = None
        self.approval: dict[str, Any] | None = None
        self.provider = False

    @property
    def text(self) -> str:
        """Its input as far as it was streamed."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    @property
    def settled(self) -> bool:
        """Whether it has its result."""
        return self.state.startswith("output-")

    # Each changes the part, and returns the chunks that change it for the client.

    def begin(self) -> list[Chunk]:
        """Its input begins to come, or begins anew: then what was there is said again."""
        self.state, self.streaming = "input-streaming", True
        head = self._head("tool-input-start")
        return [head, self._delta(self.text)] if self.text else [head]

    def add(self, text: str) -> list[Chunk]:
        """More of its input."""
        self._pieces.append(text)
        return [self._delta(text)] if self.streaming else self.begin()

    def called(self, input: Any) -> list[Chunk]:
        """Its input is complete."""
        self.input, self.state, self.streaming = input, "input-available", False
        return [self._head("tool-input-available") | {"input": self._input}]

    def unknown(self) -> list[Chunk]:
        """Nothing is known of its input."""
        return [*self.begin(), self._delta("null")]

    def done(self, output: Any) -> list[Chunk]:
        """It has its result."""
        self.output, self.error, self.state, self.streaming = output, None, "output-available", False
        return [self._settled({"type": "tool-output-available", "toolCallId": self.call, "output": output})]

    def failed(self, error: str) -> list[Chunk]:
        """It has ended with an error."""
        self.output, self.error, self.state, self.streaming = wire.UNSET, error, "output-error", False
        return [self._settled({"type": "tool-output-error", "toolCallId": self.call, "errorText": error})]

    def denied(self) -> list[Chunk]:
        """It was not approved, and does not run."""
        self.state = "output-denied"
        return [{"type": "tool-output-denied", "toolCallId": self.call}]

    def request(self, id: str, reason: str = "", *, automatic: bool = False) -> list[Chunk]:
        """Ask for approval."""
        self.approval = {"id": id}
        if reason:
            self.approval["requestReason"] = reason
        if automatic:
            self.approval["isAutomatic"] = True
        self.state, self.streaming = "approval-requested", False
        return [self._request()]

    def respond(self, approved: bool, reason: str | None = None, *, provider: bool = False) -> list[Chunk]:
        """Approval is given or denied."""
        assert self.approval is not None
        self.approval["approved"] = approved
        if reason:
            self.approval["reason"] = reason
        self.state = "approval-responded"
        self.provider = self.provider or provider
        return [self._response()]

    def chunks(self) -> list[Chunk]:
        """The chunks that make it as it is. Only of a call that is still open does the client hear as of a new one."""
        text = self.text if self.input is wire.UNSET else msgspec.json.encode(self.input).decode()
        made = [self._head("tool-input-start")]
        if text or self.state != "input-streaming":
            made.append(self._delta(text or "null"))
        if self.approval is not None:
            made.append(self._request())
            if "approved" in self.approval:
                made.append(self._response())
        match self.state:
            case "output-available":
                made.append({"type": "tool-output-available", "toolCallId": self.call, "output": self.output})
            case "output-error":
                made.append({"type": "tool-output-error", "toolCallId": self.call, "errorText": self.error})
            case "output-denied":
                made.append({"type": "tool-output-denied", "toolCallId": self.call})
            case "input-available":
                made = made if self.approval is not None else []
                made.append(self._head("tool-input-available") | {"input": self._input})
            case "input-streaming" if self.approval is not None:
                made += [self._head("tool-input-start"), self._delta(text)]
            case _:
                pass
        return made

    def ui(self) -> dict[str, Any]:
        """The part as the client keeps it."""
        part: dict[str, Any] = {
            "type": "dynamic-tool" if self.dynamic else f"tool-{self.name}",
            **({"toolName": self.name} if self.dynamic else {}),
            "toolCallId": self.call,
            "state": self.state,
        }
        if self.input is not wire.UNSET:
            part["input"] = self.input
        elif self.state != "input-streaming":
            part["input"] = None
        if self.state == "output-available":
            part["output"] = self.output
        if self.state == "output-error":
            part["errorText"] = self.error
        if self.approval is not None:
            part["approval"] = self.approval
        if self.provider:
            part["providerExecuted"] = True
        return part

    @property
    def _input(self) -> Any:
        return None if self.input is wire.UNSET else self.input

    def _head(self, type: str) -> Chunk:
        chunk: Chunk = {"type": type, "toolCallId": self.call, "toolName": self.name}
        if self.dynamic:
            chunk["dynamic"] = True
        return chunk

    def _delta(self, text: str) -> Chunk:
        return {"type": "tool-input-delta", "toolCallId": self.call, "inputTextDelta": text}

    def _request(self) -> Chunk:
        assert self.approval is not None
        chunk: Chunk = {
            "type": "tool-approval-request",
            "approvalId": self.approval["id"],
            "toolCallId": self.call,
        }
        if "requestReason" in self.approval:
            chunk["reason"] = self.approval["requestReason"]
        if "isAutomatic" in self.approval:
            chunk["isAutomatic"] = True
        return chunk

    def _response(self) -> Chunk:
        assert self.approval is not None
        chunk: Chunk = {
            "type": "tool-approval-response",
            "approvalId": self.approval["id"],
            "approved": self.approval["approved"],
        }
        if "reason" in self.approval:
            chunk["reason"] = self.approval["reason"]
        if self.provider:
            chunk["providerExecuted"] = True
        return chunk

    def _settled(self, chunk: Chunk) -> Chunk:
        if self.provider:
            self.provider = False
            chunk["providerExecuted"] = False
        return chunk


Part = Text | Tool | Stated


def parts_of(message: wire.Message, options: Options, ids: Iterable[str]) -> list[Part]:
    """Return the parts of a message as the log has it; the last is left open if it is text. ``ids`` name the texts."""
    parts: list[Part] = []
    ids = iter(ids)
    for part in message.parts:
        match part:
            case wire.TextPart():
                parts.append(Text("text", next(ids), part.text, open=False))
            case wire.ReasoningPart():
                parts.append(Text("reasoning", next(ids), part.text, open=False))
            case wire.ToolPart():
                parts.append(_tool(part, options))
            case wire.DataPart():
                parts.append(data_part(part.name, part.data, part.id))
            case wire.SourcePart():
                parts.append(source_part(part.url, part.title, part.id, parts))
            case wire.FilePart():
                parts.append(file_part(part.url, part.media_type))
    if parts and isinstance(parts[-1], Text):
        parts[-1].open = True
    return parts


def _tool(part: wire.ToolPart, options: Options) -> Tool:
    name = part.name or "tool"
    tool = Tool(part.call, name, dynamic=name not in options.static_tools)
    if part.input is wire.UNSET:
        tool.begin()
        if part.input_text:
            tool.add(part.input_text)
    else:
        tool.called(part.input)
    if part.error is not None:
        tool.failed(part.error)
    elif part.output is not wire.UNSET:
        tool.done(part.output)
    return tool


def data_part(name: str, data: Any, id: str | None) -> Stated:
    """Return data of the application."""
    chunk: Chunk = {"type": data_type(name), "data": data}
    if id is None:
        return Stated(chunk)
    chunk["id"] = id
    return Stated(chunk, (chunk["type"], id))


def data_type(name: str) -> str:
    """Return the type of the chunk for data of this name."""
    return f"data-{_ODD.sub('-', name) or 'data'}"


def source_part(url: str, title: str | None, id: str | None, before: Sequence[Part]) -> Stated:
    """Return a source."""
    number = sum(isinstance(part, Stated) and part.chunk["type"] == "source-url" for part in before) + 1
    chunk: Chunk = {"type": "source-url", "sourceId": id or f"source-{number}", "url": url}
    if title is not None:
        chunk["title"] = title
    return Stated(chunk)


def file_part(url: str, media_type: str) -> Stated:
    """Return a file."""
    return Stated({"type": "file", "url": url, "mediaType": media_type})


def usage_metadata(usage: wire.Usage) -> dict[str, Any]:
    """Return the usage as the AI SDK names it."""
    return {
        "usage": {
            "inputTokens": usage.input_tokens,
            "outputTokens": usage.output_tokens,
            "totalTokens": usage.input_tokens + usage.output_tokens,
            "cachedInputTokens": usage.cached_tokens,
            "reasoningTokens": usage.reasoning_tokens,
        }
    }


def finish_reason(reason: str) -> str:
    """Return a turn's finish reason as one that the client knows."""
    name = reason.replace("_", "-")
    return name if name in _FINISH_REASONS else "other"


def ui_message(id: str, parts: Sequence[Part], *, ended: bool, metadata: dict[str, Any] | None) -> dict[str, Any]:
    """Return a whole assistant message as the client keeps it."""
    shown: list[dict[str, Any]] = [{"type": "step-start"}, *(part.ui() for part in parts)]
    if ended and any(isinstance(part, Tool) for part in parts):
        shown.append({"type": "step-start"})
    message: dict[str, Any] = {"id": id, "role": "assistant", "parts": shown}
    if metadata is not None:
        message["metadata"] = metadata
    return message


def encode(value: Any) -> bytes:
    """Return the JSON, without keys for which the client's parser refuses the whole stream."""
    body = msgspec.json.encode(value)
    return body if _SUSPECT.search(body) is None else msgspec.json.encode(_clean(value))


def _clean(value: Any) -> Any:
    if isinstance(value, list):
        return [_clean(item) for item in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    kept = {k: _clean(v) for k, v in cast("dict[str, Any]", value).items() if k != "__proto__"}
    inner = kept.get("constructor")
    if isinstance(inner, dict) and "prototype" in inner:
        del kept["constructor"]
    return kept
