"""Holes in a log that is being read: what stood there, as far as later records tell.

A hole is a run of offsets whose records have expired; only deltas do. The records that stay carry the turn's message
now and then (`CARRIERS`). What the records between the hole and the carrier add is taken away from that message; what
remains is what stood there after the hole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from agentrun import wire
from agentrun.wire import DataPart, FilePart, Message, Part, ReasoningPart, SourcePart, TextPart, ToolPart

CARRIERS = (wire.TurnStarted, wire.TurnSuspended, wire.TurnCheckpoint, *wire.TERMINAL)
"""Events that carry the message of their turn."""

Hole = tuple[int, int]
"""The first and the last offset that is missing."""


def snapshot_for(hole: Hole, following: Sequence[tuple[int, wire.AnyEvent]]) -> wire.Snapshot | wire.Gap | None:
    """Return what to give a reader in place of ``hole``, or None while the records that follow do not tell.

    ``following`` are the decoded records after the hole, in order and without exception, chunks as they are stored.

    The snapshot's message is what the turn's attempt had said after the hole. Three things the log does not tell, and
    all are mended by the records that follow: a tool call whose input was still being streamed is left out (and what
    was said during that, where further holes follow); data that is replaced later may be left out or show its later
    value; and where further holes follow with no new part between, text of those may be in the message already.

    A gap is returned where the beginning of the log is missing, and where the next message is empty, is not known, or
    does not end in what the records between say.
    """
    start, end = hole
    if start == 1:
        # A session begins with an input, and inputs do not expire. A whole beginning is more than one turn's message.
        return wire.Gap(from_=start, to=end, reason="trimmed")
    gap = wire.Gap(from_=start, to=end)
    joiner = wire.Joiner()
    between: list[wire.OutputEvent | None] = []
    turn, attempt = "", 0
    for offset, event in following:
        if offset > end + 1:
            between.append(None)
        end = offset
        whole = _output(joiner.feed(event))
        if whole is None or (turn and whole.turn != turn):
            continue
        if not turn:
            # The hole belongs to whoever speaks first after it, or to the attempt before the one that starts there.
            turn, attempt = whole.turn, whole.attempt - isinstance(whole, wire.TurnStarted)
        if not isinstance(whole, CARRIERS):
            between.append(whole)
            continue
        if attempt < 1 or whole.message is None or not whole.message.parts:
            return gap
        try:
            message = _before(whole.message, between)
        except _Unlike:
            return gap
        return wire.Snapshot(turn=turn, attempt=attempt, from_=start, to=hole[1], message=message)
    return None


class _Unlike(Exception):
    """The message carried does not go on from what the records say."""


def _output(event: wire.AnyEvent | None) -> wire.OutputEvent | None:
    """Return the event if it is output of the turn that runs there, not about another input or a turn never run."""
    match event:
        case (
            None
            | wire.TurnRequested()
            | wire.TurnAnswer()
            | wire.TurnCancel()
            | wire.InputRejected()
            | wire.Snapshot()
            | wire.Gap()
            | wire.UnknownEvent()
        ):
            return None
        case _:
            ran = event.attempt > 0 or not isinstance(event, wire.TERMINAL)
            return event if event.turn and ran else None


def _before(message: Message, between: Sequence[wire.OutputEvent | None]) -> Message:
    """Return the message as it was before these events; None among them is a further hole."""
    undo = _Undo(list(message.parts))
    for event in reversed(between):
        undo.apply(event)
    return Message(parts=undo.parts)


class _Undo:
    """The inverse of `MessageBuilder`, applied from the last event to the first."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        # False: a hole was crossed whose text still stands at the end of the parts.
        self._exact = True

    def apply(self, event: wire.OutputEvent | None) -> None:
        match event:
            case None:
                self._exact = False
            case wire.TextDelta():
                self._text(TextPart, event.text)
            case wire.ReasoningDelta():
                self._text(ReasoningPart, event.text)
            case wire.ToolInputDelta():
                self._tool_input(event)
            case wire.ToolCall():
                self._tool_call(event)
            case wire.ToolResult():
                self._tool_result(event)
            case wire.Data() if not event.transient:
                self._data(event)
            case wire.Source():
                self._appended(SourcePart(event.url, event.title, event.id))
            case wire.File():
                self._appended(FilePart(event.url, event.media_type, event.name))
            case _:
                pass

    def _text(self, kind: type[TextPart] | type[ReasoningPart], text: str) -> None:
        if not text:
            return
        last = self.parts[-1] if self.parts else None
        if not isinstance(last, kind) or not last.text.endswith(text):
            raise _Unlike
        rest = last.text[: -len(text)]
        self.parts[-1:] = [kind(rest)] if rest else []

    def _tool_input(self, event: wire.ToolInputDelta) -> None:
        index = self._find_tool(event.call)
        if index is None:
            # It went with its call.
            return
        part = self._tool_at(index)
        if part.input is not wire.UNSET:
            return
        if event.text and part.input_text.endswith(event.text):
            part = ToolPart(part.call, part.name, input_text=part.input_text[: -len(event.text)])
            self.parts[index] = part
        if not part.input_text and index == len(self.parts) - 1:
            del self.parts[index]

    def _tool_call(self, event: wire.ToolCall) -> None:
        index = self._need(self._find_tool(event.call))
        part = self._tool_at(index)
        after = self.parts[index + 1 :]
        if all(_streamed(p) for p in after) and not (self._exact and after):
            self._cut(index)
        else:
            # Its input was being streamed before the parts that follow it.
            self.parts[index] = ToolPart(part.call, part.name, output=part.output, error=part.error)

    def _tool_result(self, event: wire.ToolResult) -> None:
        index = self._need(self._find_tool(event.call))
        part = self._tool_at(index)
        if part.name or part.input is not wire.UNSET or part.input_text:
            self.parts[index] = ToolPart(part.call, part.name, part.input, input_text=part.input_text)
        else:
            self._cut(index)

    def _data(self, event: wire.Data) -> None:
        if event.id is None:
            self._appended(DataPart(event.name, event.data))
            return
        index = self._find(lambda part: isinstance(part, DataPart) and (part.name, part.id) == (event.name, event.id))
        if index is not None and index == len(self.parts) - 1:
            del self.parts[index]

    def _appended(self, part: Part) -> None:
        index = self._need(self._find(lambda other: other == part))
        if self._exact and index < len(self.parts) - 1:
            raise _Unlike
        self._cut(index)

    def _cut(self, index: int) -> None:
        # What stands after the part was said after it, so that from here on the parts are exact again.
        del self.parts[index:]
        self._exact = True

    def _find(self, wanted: Callable[[Part], bool]) -> int | None:
        return next((i for i in range(len(self.parts) - 1, -1, -1) if wanted(self.parts[i])), None)

    def _find_tool(self, call: str) -> int | None:
        return self._find(lambda part: isinstance(part, ToolPart) and part.call == call)

    def _tool_at(self, index: int) -> ToolPart:
        part = self.parts[index]
        assert isinstance(part, ToolPart)
        return part

    def _need(self, index: int | None) -> int:
        if index is None:
            raise _Unlike
        return index


def _streamed(part: Part) -> bool:
    """Whether records that expire can make such a part."""
    if isinstance(part, ToolPart):
        return part.input is wire.UNSET and not part.settled
    return isinstance(part, TextPart | ReasoningPart)
