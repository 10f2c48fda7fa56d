"""Questions and answers, as the log has them and as the AI SDK's client shows and gives them."""

from __future__ import annotations

from typing import Any, cast

from agentrun import wire
from agentrun.history import Question

__all__ = ["approval_in", "approval_of", "error_of", "input_of"]


def input_of(event: wire.InputRequired) -> Any:
    """Return the input of the call that a question stands as."""
    if event.kind == "tool":
        return event.input
    shown: dict[str, Any] = {"prompt": event.prompt}
    if event.kind != "approval":
        shown["kind"] = event.kind
    if event.choices is not None:
        shown["choices"] = event.choices
    return shown


def approval_in(value: Any) -> tuple[bool, str | None]:
    """Return whether an answer approves, and why."""
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        reason = fields.get("reason")
        return bool(fields.get("approved")), reason if isinstance(reason, str) else None
    return bool(value), None


def approval_of(question: Question) -> dict[str, Any]:
    """Return the approval as the client keeps it in the part of the call."""
    approval: dict[str, Any] = {"id": question.event.request}
    if question.event.prompt:
        approval["requestReason"] = question.event.prompt
    if question.answer is not None:
        approval["approved"], reason = approval_in(question.answer.value)
        if reason:
            approval["reason"] = reason
    return approval


def error_of(value: Any) -> str | None:
    """Return the error that the client's tool ended with, if it did."""
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        if set(fields) == {"error"} and isinstance(fields["error"], str):
            return fields["error"]
    return None
