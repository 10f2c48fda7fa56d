"""Random sessions as a correct worker and its senders would store them."""

from __future__ import annotations

from hypothesis import strategies as st

from agentrun import wire
from agentrun.history import History, MessageBuilder, TurnView

Log = list[tuple[int, wire.AnyEvent]]

CONTENT = ("text", "text", "text", "reasoning", "tool", "progress", "result", "data", "transient", "source", "file")
STREAMED = ("tool_input", "named_data")
OTHER = ("checkpoint", "ask", "steer", "send", "stop", "stop_queued", "unknown")
ENDINGS = ("crash", "lost", "released", "retrying", "suspended", "completed", "cancelled", "failed", "expired")

DELTAS = (wire.TextDelta, wire.ReasoningDelta, wire.ToolInputDelta, wire.ToolProgress)

texts = st.text("ab é😀", min_size=1, max_size=4)


def is_delta(event: wire.AnyEvent) -> bool:
    return isinstance(event, DELTAS) or (isinstance(event, wire.Data) and event.transient)


class _Session:
    def __init__(self, draw: st.DrawFn, ops: tuple[str, ...]) -> None:
        self.draw = draw
        self.ops = ops
        self.log: Log = []
        self.history = History()
        self.sent = 0
        self.builder = MessageBuilder()

    def add(self, event: wire.AnyEvent) -> None:
        offset = self.history.offset + 1
        self.log.append((offset, event))
        self.history.apply(offset, event)

    def send(self, on_busy: str = "enqueue") -> None:
        self.sent += 1
        self.add(wire.TurnRequested(turn=f"t{self.sent}", agent="a", input=f"input {self.sent}", on_busy=on_busy))

    def waiting(self, view: TurnView) -> list[TurnView]:
        return [v for v in self.history.turns.values() if v is not view and not v.ended]

    def attempt(self, view: TurnView) -> None:
        number = view.attempt + 1
        left = view.message if number > 1 else None
        resumes = number > 1 and self.draw(st.booleans())
        self.builder = MessageBuilder(left if resumes else None)
        self.add(
            wire.TurnStarted(
                turn=view.id,
                attempt=number,
                worker="w",
                lease=f"{view.id}-{number}",
                resumes_from=view.last_out if resumes else None,
                message=left,
            )
        )
        for op in self.draw(st.lists(st.sampled_from(self.ops), max_size=12)):
            self.step(view, op)

    def out(self, event: wire.OutputEvent, view: TurnView) -> None:
        event.turn, event.attempt = view.id, view.attempt
        if isinstance(event, (wire.TextDelta, wire.ReasoningDelta)):
            event.index = self.builder.tokens
        self.builder.apply(event)
        self.add(event)

    def tools(self, *, called: bool) -> list[str]:
        """Calls of this attempt without a result, with or without their input complete."""
        return [
            p.call
            for p in self.builder.message.parts
            if isinstance(p, wire.ToolPart) and not p.settled and (p.input is not wire.UNSET) is called
        ]

    def step(self, view: TurnView, op: str) -> None:
        n = self.history.offset
        text = self.draw(texts) if op in ("text", "reasoning", "tool_input") else ""
        match op:
            case "text":
                self.out(wire.TextDelta(text=text, count=self.draw(st.integers(1, 3))), view)
            case "reasoning":
                self.out(wire.ReasoningDelta(text=text), view)
            case "tool":
                call = next(iter(self.tools(called=False)), f"c{n}")
                self.out(wire.ToolCall(call=call, name="tool", input={"n": n}), view)
            case "tool_input":
                call = next(iter(self.tools(called=False)), f"c{n}")
                self.out(wire.ToolInputDelta(call=call, text=text, name="tool"), view)
            case "progress" | "result":
                for call in self.tools(called=True)[:1]:
                    failed = self.draw(st.booleans())
                    done = wire.ToolResult(call=call, output=None if failed else n, error="no" if failed else None)
                    self.out(done if op == "result" else wire.ToolProgress(call=call, data=n), view)
            case "data":
                self.out(wire.Data(name="d", data=n), view)
            case "named_data":
                self.out(wire.Data(name="d", id=self.draw(st.sampled_from("xy")), data=n), view)
            case "transient":
                self.out(wire.Data(name="t", data=n, transient=True), view)
            case "source":
                self.out(wire.Source(url=f"u{n}"), view)
            case "file":
                self.out(wire.File(url=f"f{n}", media_type="text/plain"), view)
            case _:
                self.other(view, op, n)

    def other(self, view: TurnView, op: str, n: int) -> None:
        waiting = self.waiting(view)
        match op:
            case "checkpoint":
                self.out(wire.TurnCheckpoint(message=self.builder.message), view)
            case "ask":
                self.out(wire.InputRequired(request=f"r{n}", kind="approval"), view)
                self.add(wire.TurnAnswer(turn=view.id, request=f"r{n}", value=True))
                self.out(wire.TurnResumed(request=f"r{n}", answer=n + 2), view)
            case "steer" if waiting:
                self.out(wire.SteerConsumed(steer=waiting[0].id, offset=waiting[0].offset), view)
            case "send" if self.sent < 4:
                self.send(self.draw(st.sampled_from(["enqueue", "interrupt", "rollback", "steer"])))
            case "stop":
                self.add(wire.TurnCancel(all=True) if self.draw(st.booleans()) else wire.TurnCancel(turn=view.id))
            case "stop_queued" if waiting:
                self.add(wire.TurnCancelled(turn=waiting[-1].id, turn_offset=waiting[-1].offset))
            case "unknown":
                self.add(wire.UnknownEvent("new.type", b'{"type":"new.type"}'))
            case _:
                pass

    def end(self, view: TurnView, ending: str) -> None:
        # Some workers put only their own attempt's message in the last word, some what a reader sees.
        message = self.builder.message if self.draw(st.booleans()) else view.message
        error = wire.ErrorInfo("c", "m", retryable=True)
        match ending:
            case "crash":
                return
            case "lost":
                self.out(wire.TurnLost(worker="w1", by="w2"), view)
            case "released":
                self.out(wire.TurnReleased(), view)
            case "retrying":
                self.out(wire.TurnRetrying(error=error, after=1.0), view)
            case "suspended":
                self.out(wire.TurnSuspended(requests=[], message=message), view)
            case "completed":
                self.out(wire.TurnCompleted(turn_offset=view.offset, message=message), view)
            case "cancelled":
                rolled_back = self.draw(st.booleans())
                self.out(wire.TurnCancelled(turn_offset=view.offset, message=message, rolled_back=rolled_back), view)
            case "failed":
                self.out(wire.TurnFailed(turn_offset=view.offset, message=message, error=error), view)
            case _:
                self.out(wire.TurnExpired(turn_offset=view.offset, message=message), view)


@st.composite
def sessions(draw: st.DrawFn, ops: tuple[str, ...] = CONTENT + STREAMED + OTHER) -> Log:
    """A session of up to a few turns with up to four attempts each; the last turn may still be running."""
    session = _Session(draw, ops)
    for _ in range(draw(st.integers(1, 3))):
        session.send()
        while waiting := [v for v in session.history.turns.values() if not v.ended]:
            view = waiting[0]
            session.attempt(view)
            if view.attempt == 1 and draw(st.integers(0, 9)) == 0:
                return session.log
            endings = ENDINGS if view.attempt < 4 else ENDINGS[5:]
            session.end(view, draw(st.sampled_from(endings)))
    return session.log
