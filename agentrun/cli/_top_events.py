"""The last events of a session, a line each, as ``agentrun top`` shows them: tokens in a row are one line."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from agentrun import wire
from agentrun.cli.lines import said
from agentrun.client import Event

__all__ = ["Line", "Recently"]

_LINES = 40
_TEXT = 120
"""Characters of a text that are kept: its end."""

_Text = wire.TextDelta | wire.ReasoningDelta | wire.ToolInputDelta


@dataclass
class Line:
    """One event, or the tokens of one kind that came in a row.

    Attributes:
        first: The offset, of the first one.
        last: The offset of the last one.
        type: The event's type.
        turn: The turn and the attempt, if it is about one.
        text: What there is to say.
        tokens: How many, if they are tokens.
    """

    first: int
    last: int
    type: str
    turn: str
    text: str
    tokens: int | None = None


class Recently:
    """The last lines.

    Args:
        content: Whether to show what events say, not only what they are.
    """

    def __init__(self, *, content: bool) -> None:
        self.lines: deque[Line] = deque(maxlen=_LINES)
        self._content = content

    def add(self, event: Event) -> None:
        """Take in the session's next event."""
        data = event.data
        turn = _turn(event)
        if not isinstance(data, _Text):
            self.lines.append(Line(event.offset, event.offset, event.type, turn, self._said(event)))
            return
        last = self.lines[-1] if self.lines else None
        if last is None or (last.type, last.turn) != (event.type, turn):
            last = Line(event.offset, event.offset, event.type, turn, "", 0)
            self.lines.append(last)
        last.last = event.offset
        last.tokens = (last.tokens or 0) + (1 if isinstance(data, wire.ToolInputDelta) else data.count)
        if self._content:
            last.text = (last.text + data.text)[-_TEXT:]

    def say(self, text: str) -> None:
        """Add what is no event."""
        self.lines.append(Line(0, 0, "", "", text))

    def _said(self, event: Event) -> str:
        return said(event) if self._content else _bare(event.data)


def _turn(event: Event) -> str:
    attempt = getattr(event.data, "attempt", 0)
    return (event.turn or "") + (f" #{attempt}" if attempt else "")


def _bare(data: wire.AnyEvent) -> str:
    """What tells nothing of what is asked and answered."""
    match data:
        case wire.TurnStarted():
            return f"by {data.worker}"
        case wire.TurnFailed() | wire.TurnRetrying():
            return data.error.code
        case wire.TurnCancelled():
            return f"by {data.by}" if data.by else ""
        case wire.ToolCall():
            return data.name
        case wire.InputRequired():
            return data.kind
        case wire.Snapshot() | wire.Gap():
            return f"{data.from_} to {data.to}"
        case _:
            return ""
