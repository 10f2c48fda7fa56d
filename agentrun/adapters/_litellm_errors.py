"""What a provider's error means for the turn: try again, or give up."""

from __future__ import annotations

import email.utils
import time
from typing import Any

from agentrun.errors import AuthorSignal, Fail, Retry

_AGAIN = frozenset({408, 409, 425, 429})
_CODES = {401: "authentication", 403: "permission", 404: "not_found"}
_NAMED = {"ContextWindowExceededError": "context_window", "ContentPolicyViolationError": "content_policy"}


def signal_for(error: Exception, backoff: float) -> AuthorSignal | None:
    """Return the error as ``Retry`` or ``Fail``, or None where it says nothing of a provider.

    ``backoff`` is the delay where the provider names none.
    """
    # Errors in mid-stream come wrapped, with the real one inside.
    inner: Any = getattr(error, "original_exception", None) or error
    status = getattr(inner, "status_code", None)
    message = f"{type(inner).__name__}: {getattr(inner, 'message', None) or inner}"
    if type(inner).__name__ in _NAMED:
        return Fail(message, code=_NAMED[type(inner).__name__])
    if isinstance(inner, OSError):
        return Retry(message, after=backoff)
    if not isinstance(status, int):
        return None
    if status in _AGAIN or status >= 500:
        return Retry(message, after=_retry_after(inner, backoff))
    return Fail(message, code=_CODES.get(status, "bad_request"))


def _retry_after(error: Any, backoff: float) -> float:
    """Return the delay the provider asks for: seconds, or an HTTP date."""
    headers = getattr(error, "litellm_response_headers", None) or getattr(
        getattr(error, "response", None), "headers", None
    )
    value = headers.get("retry-after") if headers else None
    if not value:
        return backoff
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return backoff
