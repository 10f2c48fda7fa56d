"""How events look in a terminal."""

from __future__ import annotations

from collections.abc import Container
from typing import TextIO

from rich.console import Console
from rich.text import Text

from agentrun import wire
from agentrun.cli.lines import clean, describe, input_text, question_text, short
from agentrun.client import Event
from agentrun.history import History, Question, TurnView

__all__ = ["Renderer", "Screen"]


class Screen:
    """Text that streams, and notices on lines of their own.

    What a terminal would take for commands is left out of the text; a file gets it as it is.
    """

    def __init__(self, text: TextIO, notices: TextIO) -> None:
        self._text = text
        self._clean = text.isatty()
        self._notices = Console(file=notices, highlight=False, soft_wrap=True)
        self._open = False

    def write(self, text: str, style: str = "") -> None:
        """Go on in the line."""
        if not text:
            return
        if style and self._clean:
            self._notices.print(Text(clean(text), style), end="")
        else:
            self._text.write(clean(text) if self._clean else text)
        self._text.flush()
        self._open = not text.endswith("\n")

    def end_line(self) -> None:
        """Begin a new line, unless one begins here."""
        if self._open:
            self.write("\n")

    def line(self, text: str, style: str = "dim") -> None:
        """A notice."""
        self.end_line()
        self._notices.print(Text(clean(text), style))


class Renderer:
    """Folds events and shows what they change, each turn's text as it streams.

    Args:
        screen: Where to.
        history: What went before.
        own: The turns sent from here; with it the inputs of all turns are shown, and said whose they are.
        answer_hint: Whether a question says how to answer it from another terminal.
    """

    def __init__(
        self,
        screen: Screen,
        *,
        history: History | None = None,
        own: Container[str] | None = None,
        answer_hint: str | None = None,
    ) -> None:
        self.history = history or History()
        self._screen = screen
        self._own = own
        self._answer_hint = answer_hint
        self._said: dict[str, list[str]] = {}
        self._fresh: set[str] = set()
        """Turns whose next text may replace what was shown."""
        self.open: dict[str, TurnView] = {id: view for id, view in self.history.turns.items() if not view.ended}

    @property
    def active(self) -> TurnView | None:
        """The first turn that has not ended."""
        return next((view for view in self.open.values() if not view.ended), None)

    @property
    def question(self) -> tuple[TurnView, Question] | None:
        """The first question that is open."""
        for view in self.open.values():
            for question in () if view.ended else view.questions.values():
                if question.answer is None:
                    return view, question
        return None

    def recap(self, limit: int = 20) -> None:
        """Show what was said before."""
        views = list(self.history.turns.values())
        if len(views) > limit:
            self._screen.line(f"… {len(views) - limit} turns before (agentrun history)")
        for view in views[-limit:]:
            if view.request is not None:
                self._input(view.request, "(replaced) " if view.replaced_by is not None else "")
            for part in view.message.parts:
                if isinstance(part, wire.TextPart):
                    self._screen.write(part.text)
                else:
                    self._screen.line(describe(part))
            if view.ended:
                self._screen.end_line()
                if view.state != "completed":
                    self._screen.line(_end_text(view))
            else:
                self._said[view.id] = [view.message.text]
                if view.state == "queued":
                    self._screen.line("waits for a worker")
        if (asked := self.question) is not None:
            self._ask(asked[0].id, asked[1].event)

    def show(self, event: Event) -> None:
        """Take in the next event."""
        data = event.data
        before = self.history.turns.get(event.turn or "")
        worker = before.worker if before else None
        state = before.state if before else None
        view = self.history.apply(event.offset, data, time=event.time)
        if view is not None and not view.ended:
            self.open[view.id] = view
        match data:
            case wire.TextDelta() if view is not None:
                self._text(view, data)
            case wire.ReasoningDelta():
                self._screen.write(data.text, "dim italic")
            case wire.TurnStarted() if view is not None:
                self._fresh.add(view.id)
                self._started(data, state, worker)
            case wire.TurnRequested() if self._own is not None:
                if data.replaces in self.history.turns:
                    self._screen.line(f"what was said from turn {data.replaces} on is replaced")
                self._input(data)
            case wire.InputRequired():
                self._ask(data.turn, data)
            case wire.TurnAnswer() if self._own is not None:
                self._screen.line(f"answered{_by(data.user)}: {short(data.value)}")
            case wire.Gap():
                self._screen.line(f"offsets {data.from_} to {data.to} are gone ({data.reason})")
            case _:
                if view is not None:
                    self._whole(view)
                    self._other(view, data)
        if view is not None and view.ended:
            self._said.pop(view.id, None)
            self.open.pop(view.id, None)

    def _text(self, view: TurnView, delta: wire.TextDelta) -> None:
        if view.id in self._fresh:
            self._fresh.discard(view.id)
            self._whole(view)
        elif delta.attempt == view.attempt:
            self._screen.write(delta.text)
            self._said.setdefault(view.id, []).append(delta.text)

    def _whole(self, view: TurnView) -> None:
        """Show what the turn's message has more, or instead."""
        said = "".join(self._said.get(view.id, ()))
        text = view.message.text
        if text == said:
            return
        if text.startswith(said):
            self._screen.write(text[len(said) :])
        else:
            self._screen.line("what was said before is replaced by:")
            self._screen.write(text)
        self._said[view.id] = [text]

    def _started(self, data: wire.TurnStarted, state: str | None, worker: str | None) -> None:
        if state is None or data.attempt == 1:
            return
        on = "goes on" if data.resumes_from is not None else "starts over"
        if state == "running":
            self._screen.line(f"worker {worker} died; {data.worker} {on} (attempt {data.attempt})")
        elif state != "suspended" and worker != data.worker:
            self._screen.line(f"{data.worker} {on} (attempt {data.attempt})")

    def _input(self, data: wire.TurnRequested, mark: str = "") -> None:
        assert self._own is not None or data.turn in self.history.turns
        mine = self._own is not None and data.turn in self._own
        who = "" if mine else data.user or data.device or ""
        self._screen.end_line()
        self._screen.line(f"{mark}{who}› {input_text(data.input)}", "bold" if mine else "bold dim")

    def _ask(self, turn: str, data: wire.InputRequired) -> None:
        self._screen.line(f"? {question_text(data)}", "yellow")
        if self._answer_hint is not None:
            self._screen.line(f"  {self._answer_hint} {turn} {data.request} …")

    def _other(self, view: TurnView, data: wire.AnyEvent) -> None:
        if view.ended:
            if view.state == "completed":
                self._screen.end_line()
            else:
                self._screen.line(_end_text(view))
            return
        match data:
            case wire.ToolCall() | wire.ToolResult() | wire.Data() | wire.Source() | wire.File():
                self._screen.line(describe(data))
            case wire.TurnRetrying():
                self._screen.line(f"failed: {data.error.message}; tried again in {data.after:g} s")
            case wire.TurnReleased():
                self._screen.line(f"worker {view.worker} hands the turn over ({data.reason})")
            case wire.TurnLost():
                self._screen.line(f"worker {data.worker} has been silent; its turn is handed over")
            case wire.TurnSuspended():
                self._screen.line("suspended until answered")
            case _:
                pass


def _by(user: str | None) -> str:
    return f" by {user}" if user else ""


def _end_text(view: TurnView) -> str:
    why = view.error.message if view.error is not None else view.reason
    words = {"cancelled": "stopped", "consumed": "taken in by the running turn"}.get(view.state, view.state)
    return f"■ {words}{_by(view.by)}{f': {why}' if why else ''}"
