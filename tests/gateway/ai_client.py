"""What the AI SDK's client makes of a UI message stream: its rules, its refusals, and when it asks by itself."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

Chunk = dict[str, Any]
Part = dict[str, Any]

_PM = "providerMetadata"
_TOOL = {"providerExecuted": bool, _PM: dict, "dynamic": bool, "title": str, "toolMetadata": dict}
_FINISH = {"stop", "length", "content-filter", "tool-calls", "error", "interrupted", "other"}
_ANY = object
# Per type: what must be there, and what may.
SCHEMA: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "start": ({}, {"messageId": str, "messageMetadata": _ANY}),
    "start-step": ({}, {}),
    "finish-step": ({}, {}),
    "reset-step": ({}, {}),
    "text-start": ({"id": str}, {_PM: dict}),
    "text-delta": ({"id": str, "delta": str}, {_PM: dict}),
    "text-end": ({"id": str}, {_PM: dict}),
    "reasoning-start": ({"id": str}, {_PM: dict}),
    "reasoning-delta": ({"id": str, "delta": str}, {_PM: dict}),
    "reasoning-end": ({"id": str}, {_PM: dict}),
    "tool-input-start": ({"toolCallId": str, "toolName": str}, _TOOL),
    "tool-input-delta": ({"toolCallId": str, "inputTextDelta": str}, {}),
    "tool-input-available": ({"toolCallId": str, "toolName": str, "input": _ANY}, _TOOL),
    "tool-output-available": ({"toolCallId": str, "output": _ANY}, {**_TOOL, "preliminary": bool}),
    "tool-output-error": ({"toolCallId": str, "errorText": str}, _TOOL),
    "tool-output-denied": ({"toolCallId": str}, {}),
    "tool-approval-request": ({"approvalId": str, "toolCallId": str}, {"reason": str, "isAutomatic": bool}),
    "tool-approval-response": (
        {"approvalId": str, "approved": bool},
        {"reason": str, "providerExecuted": bool, _PM: dict},
    ),
    "source-url": ({"sourceId": str, "url": str}, {"title": str, _PM: dict}),
    "file": ({"url": str, "mediaType": str}, {_PM: dict}),
    "message-metadata": ({"messageMetadata": _ANY}, {}),
    "error": ({"errorText": str}, {}),
    "abort": ({}, {"reason": str}),
    "finish": ({}, {"finishReason": str, "messageMetadata": _ANY}),
}


class Refused(Exception):
    """The client ends in an error: the stream is not one it takes."""


def check(chunk: Chunk, version: int = 7) -> None:
    """Refuse what the client's schema refuses."""
    kind = chunk.get("type")
    if not isinstance(kind, str):
        raise Refused(f"no type: {chunk}")
    if kind.startswith("data-"):
        required, optional = {"data": _ANY}, {"id": str, "transient": bool}
    elif kind in SCHEMA:
        required, optional = SCHEMA[kind]
    else:
        raise Refused(f"unknown type {kind}")
    for name, wanted in required.items():
        if name not in chunk or not isinstance(chunk[name], wanted):
            raise Refused(f"{kind} needs {name}: {chunk}")
    for name, wanted in optional.items():
        if name in chunk and not isinstance(chunk[name], wanted):
            raise Refused(f"{kind}.{name} is {chunk[name]!r}")
    if kind == "finish" and chunk.get("finishReason") not in _FINISH | {None}:
        raise Refused(f"finishReason {chunk['finishReason']}")
    if version < 7 and (kind == "reset-step" or chunk.get("finishReason") == "interrupted"):
        raise Refused(f"{chunk} is unknown to version {version}")
    if re.search(r'"__proto__"\s*:', json.dumps(chunk)):
        raise Refused("a forbidden key")


def is_tool(part: Part) -> bool:
    return part["type"] == "dynamic-tool" or part["type"].startswith("tool-")


class Reader:
    """One response, or several that continue each other, of one message.

    Attributes:
        called: Calls the application was told of, to run those it knows.
    """

    def __init__(self, message: dict[str, Any] | None = None, *, resumes: bool = False, version: int = 7) -> None:
        self._message: dict[str, Any] = copy.deepcopy(message) or {"id": "made-up", "role": "assistant", "parts": []}
        self._shown = len(message["parts"]) if message else -1
        self.called: list[str] = []
        self.finish: str | None = None
        self.finished = False
        self.error: str | None = None
        self.aborted = False
        self.transient: list[Chunk] = []
        self._resumes = resumes
        self._version = version
        self._open: dict[tuple[str, str], Part] = {}
        self._inputs: dict[str, dict[str, Any]] = {}
        for part in self._step() if message else ():
            if is_tool(part) and part["state"] == "input-streaming":
                name = part.get("toolName") or part["type"].removeprefix("tool-")
                known = {"text": part.get("rawInput", ""), "name": name, "dynamic": part["type"] == "dynamic-tool"}
                self._inputs[part["toolCallId"]] = known

    def feed(self, *chunks: Chunk) -> None:
        for chunk in chunks:
            check(chunk, self._version)
            if self.error is None:
                self._feed(chunk)

    @property
    def parts(self) -> list[Part]:
        return self.message["parts"] if self._shown >= 0 else []

    @property
    def message(self) -> dict[str, Any] | None:
        """What the application sees: what came since the client last took note is no part of it."""
        if self._shown < 0:
            return None
        return copy.deepcopy(self._message | {"parts": self._message["parts"][: self._shown]})

    def _write(self) -> None:
        self._shown = len(self._message["parts"])

    def _step(self) -> list[Part]:
        parts = self._message["parts"]
        starts = [i for i, part in enumerate(parts) if part["type"] == "step-start"]
        return parts[starts[-1] + 1 :] if starts else parts

    def _tool(self, call: str) -> Part:
        for part in [*self._step(), *reversed(self._message["parts"])]:
            if is_tool(part) and part["toolCallId"] == call:
                return part
        raise Refused(f"No tool invocation found for tool call ID {call!r}.")

    def _put_tool(self, chunk: Chunk, **fields: Any) -> None:
        dynamic = bool(chunk.get("dynamic"))
        kind = "dynamic-tool" if dynamic else f"tool-{chunk['toolName']}"
        for part in self._step():
            if is_tool(part) and part["toolCallId"] == chunk["toolCallId"]:
                if (part["type"] == "dynamic-tool") != dynamic:
                    continue
                break
        else:
            part = {"toolCallId": chunk["toolCallId"]}
            self._message["parts"].append(part)
        part["type"] = kind
        if dynamic:
            part["toolName"] = chunk["toolName"]
        self._state(part, chunk, **fields)

    def _state(self, part: Part, chunk: Chunk, **fields: Any) -> None:
        for name in ("output", "errorText", "rawInput"):
            part.pop(name, None)
        part.update(fields)
        part["providerExecuted"] = chunk.get("providerExecuted", part.get("providerExecuted"))

    def _feed(self, chunk: Chunk) -> None:
        kind = chunk["type"]
        handler = getattr(self, "_on_" + kind.replace("-", "_"), None)
        if handler is not None:
            handler(chunk)
        elif kind.startswith("data-"):
            self._data(chunk)
        elif kind.rsplit("-", 1)[0] in ("text", "reasoning"):
            self._text(chunk, *kind.rsplit("-", 1))

    def _text(self, chunk: Chunk, kind: str, what: str) -> None:
        key = (kind, chunk["id"])
        if what == "start":
            part: Part = {"type": kind, "text": "", "state": "streaming"}
            self._open[key] = part
            self._message["parts"].append(part)
        elif key not in self._open:
            raise Refused(f"Received {kind}-{what} for missing {kind} part with ID {chunk['id']!r}")
        elif what == "delta":
            self._open[key]["text"] += chunk["delta"]
        else:
            self._open.pop(key)["state"] = "done"
        self._write()

    def _data(self, chunk: Chunk) -> None:
        if chunk.get("transient"):
            self.transient.append(chunk)
            return
        for part in self._message["parts"]:
            if chunk.get("id") is not None and (part["type"], part.get("id")) == (chunk["type"], chunk["id"]):
                part["data"] = chunk["data"]
                break
        else:
            self._message["parts"].append(dict(chunk))
        self._write()

    def _on_start(self, chunk: Chunk) -> None:
        if self._resumes:
            self._message |= {"parts": []}
            self._message.pop("metadata", None)
            self._open, self._inputs = {}, {}
            self._resumes = False
        if "messageId" in chunk:
            self._message["id"] = chunk["messageId"]
        self._write()

    def _on_start_step(self, chunk: Chunk) -> None:
        self._message["parts"].append({"type": "step-start"})

    def _on_reset_step(self, chunk: Chunk) -> None:
        step = self._step()
        self._open, self._inputs = {}, {}
        if step:
            del self._message["parts"][-len(step) :]
            self._write()

    def _on_tool_input_start(self, chunk: Chunk) -> None:
        known = {"text": "", "name": chunk["toolName"], "dynamic": chunk.get("dynamic")}
        self._inputs[chunk["toolCallId"]] = known
        self._put_tool(chunk, state="input-streaming", input=None)
        self._write()

    def _on_tool_input_delta(self, chunk: Chunk) -> None:
        known = self._inputs.get(chunk["toolCallId"])
        if known is None:
            raise Refused(f"Received tool-input-delta for missing tool call with ID {chunk['toolCallId']!r}")
        known["text"] += chunk["inputTextDelta"]
        try:
            value = json.loads(known["text"])
        except ValueError:
            value = None  # the client makes what it can of half a value
        about = {"toolCallId": chunk["toolCallId"], "toolName": known["name"], "dynamic": known["dynamic"]}
        self._put_tool(about, state="input-streaming", input=value, rawInput=known["text"])
        self._write()

    def _on_tool_input_available(self, chunk: Chunk) -> None:
        self._put_tool(chunk, state="input-available", input=chunk["input"])
        self._write()
        if not chunk.get("providerExecuted"):
            self.called.append(chunk["toolCallId"])

    def _on_tool_output_available(self, chunk: Chunk) -> None:
        self._state(self._tool(chunk["toolCallId"]), chunk, state="output-available", output=chunk["output"])
        self._write()

    def _on_tool_output_error(self, chunk: Chunk) -> None:
        self._state(self._tool(chunk["toolCallId"]), chunk, state="output-error", errorText=chunk["errorText"])
        self._write()

    def _on_tool_output_denied(self, chunk: Chunk) -> None:
        self._tool(chunk["toolCallId"])["state"] = "output-denied"
        self._write()

    def _on_tool_approval_request(self, chunk: Chunk) -> None:
        approval = {"id": chunk["approvalId"]}
        if "reason" in chunk:
            approval["requestReason"] = chunk["reason"]
        if chunk.get("isAutomatic"):
            approval["isAutomatic"] = True
        self._tool(chunk["toolCallId"]).update(state="approval-requested", approval=approval)
        self._write()

    def _on_tool_approval_response(self, chunk: Chunk) -> None:
        for part in self._message["parts"]:
            if is_tool(part) and (part.get("approval") or {}).get("id") == chunk["approvalId"]:
                break
        else:
            raise Refused(f"No tool invocation found for approval ID {chunk['approvalId']!r}.")
        part["state"] = "approval-responded"
        part["approval"] |= {k: chunk[k] for k in ("approved", "reason") if k in chunk}
        if "providerExecuted" in chunk:
            part["providerExecuted"] = chunk["providerExecuted"]
        self._write()

    def _on_source_url(self, chunk: Chunk) -> None:
        self._message["parts"].append(dict(chunk))
        self._write()

    _on_file = _on_source_url

    def _on_error(self, chunk: Chunk) -> None:
        self.error = chunk["errorText"]

    def _on_abort(self, chunk: Chunk) -> None:
        self.aborted = True

    def _on_finish(self, chunk: Chunk) -> None:
        self.finished = True
        self.finish = chunk.get("finishReason")
        if "messageMetadata" in chunk:
            self._message["metadata"] = {**self._message.get("metadata", {}), **chunk["messageMetadata"]}
            self._write()


def last_step_tools(message: dict[str, Any]) -> list[Part]:
    parts = message["parts"]
    starts = [i for i, part in enumerate(parts) if part["type"] == "step-start"]
    return [part for part in parts[starts[-1] + 1 if starts else 0 :] if is_tool(part)]


def complete_with_approvals(message: dict[str, Any]) -> bool:
    """``lastAssistantMessageIsCompleteWithApprovalResponses``."""
    states = [part["state"] for part in last_step_tools(message)]
    good = {"output-available", "output-error", "output-denied", "approval-responded"}
    return "approval-responded" in states and set(states) <= good


def complete_with_tool_calls(message: dict[str, Any]) -> bool:
    """``lastAssistantMessageIsCompleteWithToolCalls``."""
    tools = [part for part in last_step_tools(message) if not part.get("providerExecuted")]
    return bool(tools) and all(part["state"] in ("output-available", "output-error") for part in tools)
