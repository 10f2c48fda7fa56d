"""Folded sessions and turns, as JSON shows them."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET

from agentrun.history import History, Question, TurnView

__all__ = ["session_view", "turn_view"]


def session_view(session: str, history: History) -> dict[str, Any]:
    """Return a session: its turns, and the offset to follow it from."""
    turns = [turn_view(view) for view in history.turns.values()]
    busy = any(not view.ended for view in history.turns.values())
    return {"session": session, "offset": history.offset, "busy": busy, "turns": turns}


def turn_view(view: TurnView) -> dict[str, Any]:
    """Return a turn; members without a value are left out."""
    request = view.request
    shown: dict[str, Any] = {
        "id": view.id,
        "offset": view.offset,
        "state": view.state,
        "agent": view.agent or None,
        "attempt": view.attempt,
        "worker": view.worker,
        "message": view.message,
        "usage": view.usage,
        "error": view.error,
        "finish_reason": view.finish_reason,
        "by": view.by,
        "reason": view.reason,
        "rolled_back": view.rolled_back or None,
        "incomplete": view.incomplete or None,
        "consumed_by": view.consumed_by,
        "replaced_by": view.replaced_by,
        "interrupted_by": view.interrupted_by,
        "ended_at": view.ended_at,
        "retry_at": view.retry_at,
        "suspended_until": view.suspended_until,
        "questions": [_question(question) for question in view.questions.values()] or None,
    }
    if request is not None:
        shown |= {
            "input": request.input,
            "user": request.user,
            "device": request.device,
            "on_busy": request.on_busy,
            "deadline": request.deadline,
            "parent": request.parent,
            "replaces": request.replaces,
            "metadata": request.metadata or None,
        }
    return {name: value for name, value in shown.items() if value is not None}


def _question(question: Question) -> dict[str, Any]:
    event, answer = question.event, question.answer
    shown: dict[str, Any] = {
        "request": event.request,
        "offset": question.offset,
        "kind": event.kind,
        "prompt": event.prompt,
        "choices": event.choices,
        "call": event.call,
        "tool": event.tool,
        "input": event.input,
        "deadline": event.deadline,
    }
    shown = {name: value for name, value in shown.items() if value is not None and value is not UNSET}
    if answer is not None:
        shown |= {"answer": answer.value, "answered_by": answer.user, "answered_at": question.answer_offset}
    return shown
