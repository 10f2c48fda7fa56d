"""What can answer a question."""

from __future__ import annotations

from typing import Any, cast

from agentrun import wire
from agentrun.errors import InvalidInput


def check_answer(question: wire.InputRequired, value: Any) -> None:
    """Raise InvalidInput if ``value`` cannot answer the question."""
    match question.kind:
        case "approval":
            expected = 'true, false or {"approved": true or false, "reason": text}'
            good = isinstance(value, bool) or _is_approval(value)
        case "choice":
            expected = f"one of {question.choices}"
            good = value in (question.choices or ())
        case "text":
            expected = "text"
            good = isinstance(value, str)
        case "tool":
            expected, good = "JSON", True
    if not good:
        raise InvalidInput(f"question {question.request} takes {expected}, not {value!r}")


def _is_approval(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    fields = cast("dict[Any, Any]", value)
    return (
        set(fields) <= {"approved", "reason"}
        and isinstance(fields.get("approved"), bool)
        and isinstance(fields.get("reason"), str | None)
    )
