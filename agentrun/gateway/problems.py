"""Errors as HTTP says them: ``application/problem+json`` (RFC 9457)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from agentrun import errors

__all__ = ["Problem", "problem_of"]

_STATUS: tuple[tuple[type[errors.AgentrunError], int, str], ...] = (
    (errors.TurnNotFound, 404, "turn_not_found"),
    (errors.SessionGone, 410, "session_gone"),
    (errors.SessionBusy, 409, "session_busy"),
    (errors.QueueFull, 429, "queue_full"),
    (errors.NotWaiting, 409, "not_waiting"),
    (errors.TooLarge, 413, "too_large"),
    (errors.IdTaken, 409, "id_taken"),
    (errors.InvalidInput, 422, "invalid_input"),
    (errors.Unavailable, 503, "unavailable"),
    (errors.Misconfigured, 503, "misconfigured"),
    (errors.BrokerError, 503, "broker_error"),
)
_RETRY_AFTER = {429: "1", 503: "1"}


class Problem(Exception):
    """A request that is answered with an error.

    Args:
        status: The HTTP status.
        code: A short machine-readable name of the condition.
        detail: What was expected, what came, what to do next. It reaches the client: no secrets.
        headers: More headers.
        extra: More members of the JSON object.
    """

    def __init__(
        self, status: int, code: str, detail: str, *, headers: Mapping[str, str] | None = None, **extra: Any
    ) -> None:
        super().__init__(f"{status} {code}: {detail}")
        self.status = status
        self.code = code
        self.detail = detail
        self.headers = dict(headers or {})
        self.extra = extra

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object."""
        return {"code": self.code, "status": self.status, "detail": self.detail, **self.extra}

    def response(self) -> Response:
        """The response."""
        headers = dict(self.headers)
        if self.status in _RETRY_AFTER:
            headers.setdefault("Retry-After", _RETRY_AFTER[self.status])
        return Response(
            msgspec.json.encode(self.body), self.status, headers=headers, media_type="application/problem+json"
        )


def problem_of(error: Exception) -> Problem:
    """Return how HTTP says this error. What is none of ours says nothing of itself."""
    if isinstance(error, Problem):
        return error
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            return Problem(status, code, str(error))
    return Problem(500, "internal", "the gateway met an error it does not know; its log has more")
