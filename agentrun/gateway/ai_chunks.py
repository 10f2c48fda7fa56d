"""From the events of one turn to the chunks of a UI message stream.

The chunks are a function of the events alone, so that the n-th chunk of a turn is the same at every gateway and after
every restart. One message has one step: what the client can be told to forget is the current step, and a turn that is
begun anew after a crash forgets all it had said. A second, empty step follows at the end of a message with tool calls,
so that no client takes these for calls it is to continue by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentrun import wire
from agentrun.gateway import ai_message
from agentrun.gateway.ai_message import INTERRUPTED, Chunk, Options, Part, Stated, Text, Tool
from agentrun.gateway.ai_questions import approval_in, approval_of, error_of, input_of
from agentrun.history import History, Question, TurnView
from agentrun.snapshot import CARRIERS

__all__ = ["Chunker", "message_id"]

QUESTION = "question"
APPROVAL = "approval"
"""Names of the tools that questions stand as which are about no call."""
_ASKED = "ask:"
_AUTOMATIC = "auto:"
_RUN = (
    wire.TextDelta,
    wire.ReasoningDelta,
    wire.ToolInputDelta,
    wire.ToolCall,
    wire.ToolResult,
    wire.Source,
    wire.File,
)


def message_id(turn: str) -> str:
    """Return the id of the message that answers a turn; the same live, replayed, in the history, and continued."""
    return f"msg_{turn}"


class Chunker:
    """Makes the chunks of one turn; feed it the session's events, from the turn's request on.

    Args:
        turn: The turn's id.
        options: How chunks are made.

    Attributes:
        parts: The message as a client has it that got all chunks.
        ended: Nothing more comes.
        exact: All events were there: the chunks are those that any other reader gets.
        asked: Offset of the newest question.
        broken: What was shown is superseded, and this client's version cannot be told: it must read all again.
    """

    def __init__(self, turn: str, options: Options) -> None:
        self.turn = turn
        self.parts: list[Part] = []
        self.ended = False
        self.exact = True
        self.asked = 0
        self.broken = False
        self._options = options
        self._history = History()
        self._view: TurnView | None = None
        self._tools: dict[str, Tool] = {}
        self._questions: dict[str, tuple[Question, Tool]] = {}
        self._started = False
        self._superseded = False
        self._texts = 0
        self._made: list[Chunk] = []
        self._last: list[Chunk] | None = None
        """What ends the response where the turn never ran."""

    @classmethod
    def of(cls, view: TurnView, options: Options) -> Chunker:
        """Return that of a turn that has ended, from what the log keeps of it for good.

        Where the questions stood that were about no call is not kept: they come last.
        """
        chunker = cls(view.id, options)
        chunker._view = view
        chunker._started = view.attempt > 0
        chunker._adopt(view.message, list(view.questions.values()))
        chunker._close()
        chunker.ended = True
        return chunker

    @property
    def view(self) -> TurnView | None:
        """The turn, as far as it was read."""
        return self._view

    @property
    def waiting(self) -> bool:
        """Whether the client is to answer: its response ends, and it goes on with another request."""
        return not self.ended and any(question.answer is None for question, _ in self._questions.values())

    # ----------------------------------------------------------------------------------------------------- whole

    def replay(self) -> list[Chunk]:
        """The fewest chunks that make the message as it is; what is fed from here on goes on after them."""
        made = self._begin() if self._started else []
        for part in self.parts:
            made += part.chunks()
        return made + self._end() if self.ended else made

    def message(self) -> dict[str, Any] | None:
        """The message as the client keeps it; None if nothing was said."""
        if not self.parts:
            return None
        return ai_message.ui_message(
            message_id(self.turn), self.parts, ended=self.ended, metadata=self._metadata() or None
        )

    def pause(self) -> list[Chunk]:
        """The chunks that end a response while the turn waits for an answer."""
        return [{"type": "finish-step"}, {"type": "finish", "finishReason": "tool-calls"}]

    # -------------------------------------------------------------------------------------------------------- feed

    def feed(self, offset: int, data: wire.AnyEvent, *, time: float = 0.0) -> list[Chunk]:
        """Return the chunks that an event makes; none for an event of another turn."""
        if self.ended or offset <= self._history.offset:
            return []
        self._made = []
        if type(data) is wire.TextDelta and self._goes_on(data):
            # Nearly all events are this one.
            self._history.apply(offset, data, time=time)
            self._text("text", data.text)
            return self._made
        match data:
            case wire.Gap():
                self.exact = self.exact and self._view is None
                self._history.apply(offset, data)
            case wire.UnknownEvent():
                pass
            case wire.SteerConsumed() if data.steer == self.turn and self._view is not None:
                self._over({"type": "finish", "finishReason": "stop"})
            case wire.InputRejected() if self._view is not None:
                self._rejected(offset, data)
            case wire.TurnRequested() | wire.TurnAnswer() | wire.InputRejected():
                if data.turn == self.turn:
                    self._input(offset, data)
            case wire.TurnCancel():
                pass
            case _:
                if data.turn == self.turn:
                    self._output(offset, data, time)
        return self._made

    def _goes_on(self, data: wire.TextDelta) -> bool:
        view = self._view
        known = view is not None and data.attempt == view.attempt and data.turn == self.turn
        return known and self._started and not self._superseded

    def _input(self, offset: int, data: wire.TurnRequested | wire.TurnAnswer | wire.InputRejected) -> None:
        if isinstance(data, wire.TurnRequested) and self._view is None:
            self._view = self._history.apply(offset, data)
        elif isinstance(data, wire.TurnAnswer) and data.request in self._questions:
            question, _ = self._questions[data.request]
            self._history.apply(offset, data)
            if question.answer_offset == offset:
                self._answered(question)

    def _rejected(self, offset: int, data: wire.InputRejected) -> None:
        assert self._view is not None
        if data.offset == self._view.offset:
            self._history.apply(offset, data)
            self._error(f"{data.code}: {data.reason}")
            return
        for question, tool in self._questions.values():
            if question.answer_offset == data.offset and data.offset:
                self._history.apply(offset, data)
                self.asked = offset
                self._still()
                if tool.asked and tool.settled:
                    self._made += tool.called(tool.input)
                self._made += self._put(question, tool)
                self._excuse()

    def _output(self, offset: int, data: wire.OutputEvent | wire.Snapshot, time: float) -> None:
        view = self._view
        if view is None:
            view = self._view = TurnView(self.turn, 0)
            self._history.turns[self.turn] = view
            self.exact = False
        if data.attempt < view.attempt and not isinstance(data, wire.TERMINAL):
            return
        if isinstance(data, wire.Chunk):
            return  # half an event, whose beginning was trimmed
        if isinstance(data, wire.TurnStarted):
            self._attempt(offset, data, time)
            return
        carries = isinstance(data, (wire.Snapshot, *CARRIERS))
        before = view.message if carries else None
        self._history.apply(offset, data, time=time)
        if view.attempt > 0:
            self._start()
        if before is not None:
            self.exact = self.exact and not isinstance(data, wire.Snapshot)
            if view.message.parts != before.parts:
                self._supersede(view.message)
        match data:
            case wire.InputRequired():
                question = view.questions[data.request]
                if question.offset == offset:
                    self.asked = offset
                    self._ask(question)
            case wire.TurnRetrying():
                self._note({"state": "retrying", "after": data.after, "message": data.error.message})
            case wire.TurnReleased():
                self._note({"state": "queued"})
            case wire.SteerConsumed():
                self._note({"state": "steered", "turn": data.steer})
            case wire.TurnCompleted() | wire.TurnCancelled() | wire.TurnFailed() | wire.TurnExpired():
                self._close()
                self.ended = True
                self._made += self._end()
            case _:
                self._said(data)

    def _attempt(self, offset: int, data: wire.TurnStarted, time: float) -> None:
        assert self._view is not None
        before = self._view.message
        self._history.apply(offset, data, time=time)
        self._start()
        if self._view.message.parts != before.parts:
            self._supersede(self._view.message)
        self._superseded = data.resumes_from is None
        if data.attempt > 1:
            self._note({"state": "running", "attempt": data.attempt})

    def _start(self) -> None:
        if not self._started:
            self._started = True
            self._made += self._begin()

    def _begin(self) -> list[Chunk]:
        return [{"type": "start", "messageId": message_id(self.turn)}, {"type": "start-step"}]

    # -------------------------------------------------------------------------------------------- what the agent says

    def _said(self, data: wire.AnyEvent) -> None:
        if self._superseded and self._adds(data):
            self._superseded = False
            self._forget()
        match data:
            case wire.TextDelta() | wire.ReasoningDelta():
                self._text("text" if isinstance(data, wire.TextDelta) else "reasoning", data.text)
            case wire.ToolInputDelta():
                self._tool_input(data)
            case wire.ToolCall():
                self._tool_call(data)
            case wire.ToolResult():
                self._tool_result(data)
            case wire.ToolProgress():
                about = {"toolCallId": data.call, "data": data.data}
                self._made.append({"type": "data-tool-progress", "data": about, "transient": True})
            case wire.Data():
                self._data(data)
            case wire.Source():
                self._add(ai_message.source_part(data.url, data.title, data.id, self.parts))
            case wire.File():
                self._add(ai_message.file_part(data.url, data.media_type))
            case _:
                pass

    @staticmethod
    def _adds(data: wire.AnyEvent) -> bool:
        """Whether it is the first of what supersedes an earlier attempt: as `History`, only what makes a part."""
        if isinstance(data, (wire.TextDelta, wire.ReasoningDelta)):
            return bool(data.text)
        return isinstance(data, _RUN) or (isinstance(data, wire.Data) and not data.transient)

    def _text(self, kind: str, text: str) -> None:
        if not text:
            return
        last = self.parts[-1] if self.parts else None
        if not isinstance(last, Text) or last.kind != kind or not last.open:
            self._close_text()
            last = Text(kind, self._text_id())
            self.parts.append(last)
            self._made.append(last.start())
        self._made.append(last.add(text))

    def _text_id(self) -> str:
        self._texts += 1
        return f"t{self._texts}"

    def _tool_input(self, data: wire.ToolInputDelta) -> None:
        tool = self._tools.get(data.call)
        if tool is None:
            tool = self._add_tool(data.call, data.name)
            self._made += tool.begin()
        elif tool.input is not wire.UNSET:
            return
        elif data.name and data.name != tool.name:
            tool.name = data.name
            self._made += tool.begin()
        if data.text:
            self._made += tool.add(data.text)

    def _tool_call(self, data: wire.ToolCall) -> None:
        tool = self._tools.get(data.call) or self._add_tool(data.call, data.name)
        tool.name = data.name or tool.name
        tool.asked = False
        state, output, error = tool.state, tool.output, tool.error
        open_question = self._question_of(tool)
        self._made += tool.called(data.input)
        if open_question is not None:
            self._made += self._put(open_question, tool)
        elif state == "output-available":
            self._made += tool.done(output)
        elif state == "output-error" and error is not None:
            self._made += tool.failed(error)

    def _tool_result(self, data: wire.ToolResult) -> None:
        tool = self._tools.get(data.call)
        if tool is None:
            tool = self._add_tool(data.call, "")
            self._made += tool.unknown()
        tool.asked = False
        self._made += tool.done(data.output) if data.error is None else tool.failed(data.error)

    def _data(self, data: wire.Data) -> None:
        part = ai_message.data_part(data.name, data.data, data.id)
        if data.transient:
            self._made.append({**part.chunk, "transient": True})
            return
        for index, other in enumerate(self.parts):
            if part.key is not None and isinstance(other, Stated) and other.key == part.key:
                self.parts[index] = part
                self._made.append(part.chunk)
                return
        self._add(part)

    def _add(self, part: Stated) -> None:
        self._close_text()
        self.parts.append(part)
        self._made.append(part.chunk)

    def _add_tool(self, call: str, name: str, *, dynamic: bool | None = None, asked: bool = False) -> Tool:
        self._close_text()
        name = name or "tool"
        if dynamic is None:
            dynamic = name not in self._options.static_tools
        tool = Tool(call, name, dynamic=dynamic, asked=asked)
        self.parts.append(tool)
        self._tools[call] = tool
        return tool

    def _close_text(self) -> None:
        if self.parts and isinstance(last := self.parts[-1], Text) and last.open:
            self._made.append(last.end())

    # -------------------------------------------------------------------------------------------------- superseded

    def _forget(self) -> None:
        if not self.parts:
            return
        self._reset()
        for question, _ in list(self._questions.values()):
            if question.answer is None:
                self._ask(question)
            else:
                del self._questions[question.event.request]

    def _supersede(self, message: wire.Message) -> None:
        """The log says what was said so far, and it is not what was shown: a hole had lost some of it."""
        questions = [question for question, _ in self._questions.values()]
        self._superseded = False
        if self.parts:
            self._reset()
        self._adopt(message, questions)
        for part in self.parts:
            self._made += part.chunks()

    def _reset(self) -> None:
        self.parts, self._tools = [], {}
        if self._options.version >= 7:
            self._made.append({"type": "reset-step"})
        else:
            self.broken = True

    def _adopt(self, message: wire.Message, questions: Sequence[Question]) -> None:
        """Take the message from the log, and the questions as they stand, without a word to the client."""
        ids = iter(self._text_id, "")
        self.parts = ai_message.parts_of(message, self._options, ids)
        self._tools = {part.call: part for part in self.parts if isinstance(part, Tool)}
        self._questions = {}
        made, self._made = self._made, []
        for question in questions:
            tool = self._tools.get(question.event.call or "")
            if tool is not None and tool.settled and not self._apart(question.event):
                if question.event.kind == "approval":
                    tool.approval = approval_of(question)
                continue
            self._ask(question)
            if question.answer is not None:
                self._answered(question)
        self._made = made

    # ------------------------------------------------------------------------------------------------------ questions

    def _ask(self, question: Question) -> None:
        """Show a question."""
        self._still()
        event = question.event
        tool = self._tools.get(event.call or "")
        if tool is None or tool.settled or self._apart(event) or self._question_of(tool) is not None:
            tool = self._own_part(event)
            self._made += tool.called(input_of(event))
        self._questions[event.request] = (question, tool)
        self._made += self._put(question, tool)
        self._excuse()

    def _still(self) -> None:
        """Let nothing be open: a response may end here, and the next one begins with nothing open."""
        self._close_text()
        for tool in self._tools.values():
            tool.streaming = False

    def _excuse(self) -> None:
        """Show calls that ask nothing as approved: clients send an answer by themselves only once no call is open."""
        for tool in self._tools.values():
            if self._options.version >= 7 and tool.state.startswith("input-") and self._question_of(tool) is None:
                self._made += tool.request(f"{_AUTOMATIC}{tool.call}", automatic=True)
                self._made += tool.respond(True, provider=True)

    def _apart(self, event: wire.InputRequired) -> bool:
        """Whether the question is a part of its own even if it is about a call."""
        return event.kind in ("choice", "text") or (event.kind == "approval" and self._options.version < 6)

    def _own_part(self, event: wire.InputRequired) -> Tool:
        call = event.request if self._apart(event) else event.call or event.request
        if call in self._tools:
            call = f"{_ASKED}{event.request}"
        if event.kind == "tool":
            # The application runs it, so it knows it by name.
            return self._add_tool(call, event.tool or "", dynamic=False, asked=True)
        return self._add_tool(call, APPROVAL if event.kind == "approval" else QUESTION, dynamic=True, asked=True)

    def _put(self, question: Question, tool: Tool) -> list[Chunk]:
        """The chunks by which the client is asked, by a part that is there."""
        event = question.event
        if event.kind == "approval" and self._options.version >= 6:
            return tool.request(event.request, event.prompt)
        if tool.state == "input-available":
            return []
        return tool.called(input_of(event) if tool.input is wire.UNSET else tool.input)

    def _answered(self, question: Question) -> None:
        assert question.answer is not None
        event, value = question.event, question.answer.value
        _, tool = self._questions[event.request]
        if event.kind == "approval" and self._options.version >= 6:
            approved, reason = approval_in(value)
            state = tool.state
            self._made += tool.respond(approved, reason)
            if state in ("output-available", "output-error"):
                self._made += tool.done(tool.output) if tool.error is None else tool.failed(tool.error)
            elif not approved:
                self._made += tool.denied()
            elif tool.asked:
                self._made += tool.done({"approved": True})
            return
        error = error_of(value) if event.kind == "tool" else None
        self._made += tool.done(value) if error is None else tool.failed(error)

    def _question_of(self, tool: Tool) -> Question | None:
        for question, about in self._questions.values():
            if about is tool and question.answer is None:
                return question
        return None

    # ------------------------------------------------------------------------------------------------------------ end

    def _close(self) -> None:
        """Close what is open: nothing more comes of it."""
        self._close_text()
        for part in self.parts:
            if isinstance(part, Text):
                part.open = False
        for tool in self._tools.values():
            if not tool.settled:
                self._made += tool.failed(INTERRUPTED)

    def _end(self) -> list[Chunk]:
        """The chunks after the last part."""
        view = self._view
        if self._last is not None or view is None:
            return self._last or []
        made: list[Chunk] = []
        if self._started:
            made.append({"type": "finish-step"})
            if self._tools:
                # The client takes note of a step only when something follows that it shows.
                made += [{"type": "start-step"}, {"type": "start", "messageId": message_id(self.turn)}]
        finish: Chunk = {"type": "finish"}
        if self._started and (metadata := self._metadata()):
            finish["messageMetadata"] = metadata
        match view.state:
            case "cancelled":
                abort: Chunk = {"type": "abort"}
                if why := _why(view):
                    abort["reason"] = why
                known = self._options.version >= 7 and self._options.interrupted
                finish["finishReason"] = "interrupted" if known else "stop"
                return [*made, abort, finish]
            case "failed" | "expired":
                text = view.error.message if view.error is not None else view.reason
                finish["finishReason"] = "error"
                return [*made, {"type": "error", "errorText": text or f"the turn {view.state}"}, finish]
            case _:
                finish["finishReason"] = ai_message.finish_reason(view.finish_reason or "stop")
                return [*made, finish]

    def _metadata(self) -> dict[str, Any]:
        usage = self._view.usage if self._view is not None else None
        return ai_message.usage_metadata(usage) if usage is not None and self._options.metadata else {}

    def _over(self, *chunks: Chunk) -> None:
        """It never ran: there is no message."""
        self.ended = True
        self._last = list(chunks)
        self._made += chunks

    def _error(self, text: str) -> None:
        self._over({"type": "error", "errorText": text}, {"type": "finish", "finishReason": "error"})

    def _note(self, what: dict[str, Any]) -> None:
        self._made.append({"type": "data-agentrun", "data": what, "transient": True})


def _why(view: TurnView) -> str | None:
    if view.by and view.reason:
        return f"{view.reason} (by {view.by})"
    return view.reason or (f"stopped by {view.by}" if view.by else None)
