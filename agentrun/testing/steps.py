"""What a model's answer in a test is made of; `agentrun.testing.Script` puts it together."""

from __future__ import annotations

import re
from typing import Any

from msgspec import Struct, field

__all__ = ["Call", "Drop", "Fail", "Pause", "Refuse", "Stall", "Step", "Text", "Thought", "words"]


class Text(Struct, frozen=True):
    """Text of the answer, sent word by word, each word ``delay`` seconds after the last."""

    text: str
    delay: float = 0.0


class Thought(Struct, frozen=True):
    """Reasoning (``reasoning_content``), sent like `Text`."""

    text: str
    delay: float = 0.0


class Call(Struct, frozen=True):
    """A tool call, its arguments cut into ``pieces`` deltas. Several in one script are parallel calls.

    ``arguments`` as text is sent as it is, valid JSON or not.
    """

    name: str
    arguments: dict[str, Any] | str = field(default_factory=dict[str, Any])
    id: str = ""
    pieces: int = 3


class Pause(Struct, frozen=True):
    """Silence. As the first step it is silence before the response headers."""

    seconds: float


class Stall(Struct, frozen=True):
    """Silence until the client goes away."""


class Fail(Struct, frozen=True):
    """An error object inside the stream, which ends it."""

    message: str = "the model failed"
    code: str | None = None
    type: str = "server_error"


class Drop(Struct, frozen=True):
    """The connection breaks off. ``clean`` ends the response properly, but without a finish reason or ``[DONE]``."""

    clean: bool = False


class Refuse(Struct, frozen=True):
    """An HTTP error instead of a stream; stands alone in its script."""

    status: int
    message: str = "refused"
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict[str, str])


Step = Text | Thought | Call | Pause | Stall | Fail | Drop | Refuse


def words(text: str) -> list[str]:
    """Return the words that a text is sent in."""
    # Each word keeps the white space that follows it, so that the words joined are the text.
    return re.findall(r"\s*\S+\s*|\s+", text)
