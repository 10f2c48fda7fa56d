"""The message of one attempt, put together from its events at a cost per token that does not grow with the text."""

from __future__ import annotations

from agentrun import wire
from agentrun.wire import DataPart, FilePart, Message, Part, ReasoningPart, SourcePart, TextPart, ToolPart


class MessageBuilder:
    """Folds output events into a `Message`.

    Applying an event costs the same however long the text is; `message` joins what has come since it was last asked
    for. Parts are replaced and never changed, so a message that was given out stays as it was.
    """

    __slots__ = ("_parts", "_pieces", "tokens")

    def __init__(self, message: Message | None = None) -> None:
        self._parts: list[Part] = list(message.parts) if message is not None else []
        self._pieces: dict[int, list[str]] = {}
        self.tokens = 0
        """Tokens of the events applied; those of the message begun with do not count."""

    def __bool__(self) -> bool:
        """Whether the message has a part."""
        return bool(self._parts)

    @property
    def message(self) -> Message:
        """The message so far."""
        for index, pieces in self._pieces.items():
            self._parts[index] = _grown(self._parts[index], "".join(pieces))
        self._pieces.clear()
        return Message(parts=list(self._parts))

    def copy(self) -> MessageBuilder:
        """Return a builder that goes on from here by itself."""
        other = MessageBuilder(self.message)
        other.tokens = self.tokens
        return other

    def replace(self, message: Message) -> None:
        """Take ``message`` for what was said so far. The token count stays."""
        self._parts = list(message.parts)
        self._pieces.clear()

    def apply(self, event: wire.AnyEvent) -> None:
        """Add what ``event`` says; events that say nothing are let pass."""
        match event:
            case wire.TextDelta():
                self._count(event)
                self._grow_last(TextPart, event.text)
            case wire.ReasoningDelta():
                self._count(event)
                self._grow_last(ReasoningPart, event.text)
            case wire.ToolInputDelta():
                self._tool_input(event)
            case wire.ToolCall():
                index, part = self._tool(event.call)
                self._put(index, ToolPart(event.call, event.name, event.input, part.output, part.error))
            case wire.ToolResult():
                index, part = self._tool(event.call)
                output = event.output if event.error is None else wire.UNSET
                self._put(index, ToolPart(part.call, part.name, part.input, output, event.error, part.input_text))
            case wire.Data():
                self._data(event)
            case wire.Source():
                self._parts.append(SourcePart(event.url, event.title, event.id))
            case wire.File():
                self._parts.append(FilePart(event.url, event.media_type, event.name))
            case _:
                pass

    def _count(self, event: wire.TextDelta | wire.ReasoningDelta) -> None:
        # After a hole the index knows of tokens that were not seen; an author's event has none yet.
        self.tokens = max(self.tokens, event.index) + event.count

    def _grow_last(self, kind: type[TextPart] | type[ReasoningPart], text: str) -> None:
        if not text:
            return
        if not self._parts or type(self._parts[-1]) is not kind:
            self._parts.append(kind(""))
        self._pieces.setdefault(len(self._parts) - 1, []).append(text)

    def _tool_input(self, event: wire.ToolInputDelta) -> None:
        index, part = self._tool(event.call)
        if part.input is not wire.UNSET:
            return
        if index == len(self._parts):
            self._parts.append(part)
        if event.name and event.name != part.name:
            self._parts[index] = ToolPart(part.call, event.name, part.input, part.output, part.error, part.input_text)
        if event.text:
            self._pieces.setdefault(index, []).append(event.text)

    def _tool(self, call: str) -> tuple[int, ToolPart]:
        """Return the call's part and its place; a new part belongs at the end."""
        for index in range(len(self._parts) - 1, -1, -1):
            part = self._parts[index]
            if isinstance(part, ToolPart) and part.call == call:
                return index, part
        return len(self._parts), ToolPart(call)

    def _put(self, index: int, part: ToolPart) -> None:
        if index == len(self._parts):
            self._parts.append(part)
            return
        if part.input is not wire.UNSET:
            self._pieces.pop(index, None)
        self._parts[index] = part

    def _data(self, event: wire.Data) -> None:
        if event.transient:
            return
        new = DataPart(event.name, event.data, event.id)
        if event.id is not None:
            for index, part in enumerate(self._parts):
                if isinstance(part, DataPart) and (part.name, part.id) == (event.name, event.id):
                    self._parts[index] = new
                    return
        self._parts.append(new)


def _grown(part: Part, text: str) -> Part:
    match part:
        case TextPart():
            return TextPart(part.text + text)
        case ReasoningPart():
            return ReasoningPart(part.text + text)
        case ToolPart():
            return ToolPart(part.call, part.name, part.input, part.output, part.error, part.input_text + text)
        case _:
            return part
