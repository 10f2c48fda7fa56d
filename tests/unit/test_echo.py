from __future__ import annotations

import time
from typing import Any

import anyio
import pytest

from agentrun.agent import Context
from agentrun.errors import Fail, Retry
from agentrun.message import MessageBuilder
from agentrun.wire import InputRequired, Message, OutputEvent, TextDelta, TextPart, ToolCall, ToolPart, TurnRequested
from workers.echo import echo


class Port:
    """Folds what is appended; answers ``answer`` to a question, or raises where there is none."""

    stopping = False

    def __init__(self, partial: Message | None = None, answer: Any = None) -> None:
        self.texts: list[str] = []
        self.times: list[float] = []
        self.events: list[OutputEvent] = []
        self.answer = answer
        self.asked: list[str] = []
        self.steering: list[str] = []
        self._message = MessageBuilder(partial)

    @property
    def message(self) -> Message:
        return self._message.message

    async def emit(self, event: OutputEvent) -> None:
        self.events.append(event)
        self._message.apply(event)
        if isinstance(event, TextDelta):
            self.texts.append(event.text)
            self.times.append(time.monotonic())

    async def ask(self, question: InputRequired, hold: float | None) -> Any:
        self.asked.append(question.request)
        if self.answer is None:
            raise LookupError("nobody answers")
        return self.answer

    async def take_steering(self) -> list[TurnRequested]:
        taken = [TurnRequested(turn="s", agent="echo", input=text) for text in self.steering]
        self.steering = []
        return taken


async def run(text: str, partial: Message | None = None, attempt: int = 1, **port_options: Any) -> Port:
    port = Port(partial, **port_options)
    await echo.run(context(port, text, partial, attempt))
    return port


def context(port: Port, text: str, partial: Message | None = None, attempt: int = 1) -> Context:
    request = TurnRequested(turn="t1", agent="echo", input=text)
    return Context(port, session="s1", attempt=attempt, request=request, messages=[], partial=partial)


def said(text: str) -> Message:
    return Message(parts=[TextPart(text)])


@pytest.mark.parametrize("text", ["hello", " two  words ", "a\nb\t c", "count on me", "   ", ""])
async def test_anything_is_echoed_exactly_word_by_word(text: str) -> None:
    port = await run(text)
    assert "".join(port.texts) == text
    assert len(port.texts) == max(len(text.split()), 1 if text else 0)


async def test_an_echo_goes_on_where_it_stopped() -> None:
    assert (await run("one two three", said("one tw"))).texts == ["o ", "three"]


async def test_count_keeps_its_rate_over_the_whole_run() -> None:
    port = await run("count 30 5")
    assert port.texts == [f"w{i} " for i in range(30)]
    assert port.times[-1] - port.times[0] >= 29 * 0.005 - 0.001


@pytest.mark.parametrize("n", range(19))
async def test_count_resumed_anywhere_gives_the_same_text(n: int) -> None:
    whole = "w0 w1 w2 w3 w4 w5 "
    port = await run("count 6 0", said(whole[:n]))
    assert port.message.text == whole


async def test_count_that_starts_over_says_everything() -> None:
    # A partial of an attempt that is not resumed: there is none for this one.
    assert "".join((await run("count 2 0", None, attempt=2)).texts) == "w0 w1 "


async def test_approve_asks_about_its_call_and_counts_when_approved() -> None:
    port = await run("approve 2 0", answer=True)
    assert [e.type for e in port.events] == ["text.delta", "tool.call", "tool.result", "text.delta", "text.delta"]
    assert port.asked == ["deploy"]
    assert port.message.parts == [
        TextPart("I need approval. "),
        ToolPart("deploy", "deploy", {"words": 2}, "deployed"),
        TextPart("w0 w1 "),
    ]


async def test_approve_that_is_denied_says_so() -> None:
    port = await run("approve 2 0", answer={"approved": False})
    assert port.message.parts[1:] == [
        ToolPart("deploy", "deploy", {"words": 2}, error="denied"),
        TextPart("Then it is left undone. "),
    ]


@pytest.mark.parametrize("answer", [True, False])
async def test_approve_resumed_after_any_event_ends_the_same(answer: bool) -> None:
    whole = await run("approve 3 0", answer=answer)
    for cut in range(1, len(whole.events)):
        builder = MessageBuilder()
        for event in whole.events[:cut]:
            builder.apply(event)
        resumed = await run("approve 3 0", builder.message, attempt=2, answer=answer)
        assert resumed.message == whole.message, f"cut after {cut} events"
        calls = [e for e in (*whole.events[:cut], *resumed.events) if isinstance(e, ToolCall)]
        assert len(calls) == 1


async def test_steer_writes_what_was_sent_meanwhile() -> None:
    port = Port()
    port.steering = ["go left"]
    await echo.run(context(port, "steer 3 0"))
    assert "".join(port.texts) == "[steered: go left] w0 w1 w2 "
    resumed = await run("steer 3 0", said("[steered: say w9 ] w0 w1 "), attempt=2)
    assert resumed.texts == ["w2 "]


@pytest.mark.parametrize("text", ["bench 7 1000", "bench 7 1000 3"])
async def test_bench_words_carry_their_time(text: str) -> None:
    before = time.monotonic_ns()
    port = await run(text)
    pairs = [word.rstrip().split("@") for word in port.texts]
    assert [name for name, _ in pairs] == [f"w{i}" for i in range(7)]
    stamps = [int(stamp) for _, stamp in pairs]
    assert stamps == sorted(stamps)
    assert before <= stamps[0] <= stamps[-1] <= time.monotonic_ns()
    resumed = await run(text, said("w0@1 w1@2 w2@3 "), attempt=2)
    assert [word.split("@")[0] for word in resumed.texts] == ["w3", "w4", "w5", "w6"]


async def test_fail_and_retry() -> None:
    with pytest.raises(Fail) as failed:
        await run("fail")
    assert failed.value.code == "asked_for"
    with pytest.raises(Retry) as again:
        await run("retry 1.5")
    assert again.value.after == 1.5
    assert (await run("retry 1.5", attempt=2)).texts == ["attempt 2 "]


async def test_stubborn_takes_its_time_when_stopped() -> None:
    port = Port()
    with anyio.move_on_after(0.05) as scope:
        await echo.run(context(port, "stubborn 100"))
    assert scope.cancelled_caught
    assert time.monotonic() - port.times[0] >= 0.1
