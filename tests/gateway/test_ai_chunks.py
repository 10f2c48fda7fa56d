"""From events to chunks: each event, and any order of them, as the client's rules make a message of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrun import wire
from agentrun.gateway.ai_chunks import Chunker, message_id
from agentrun.gateway.ai_message import INTERRUPTED, Options, encode
from agentrun.history import History, TurnView
from tests.gateway.ai_client import (
    Chunk,
    Part,
    Reader,
    Refused,
    complete_with_approvals,
    complete_with_tool_calls,
    is_tool,
)
from tests.unit.session_logs import Log, sessions

V7 = Options()


class Told:
    """A turn that is told event by event, to a chunker and a client."""

    def __init__(self, options: Options = V7) -> None:
        self.chunker = Chunker("t", options)
        self.client = Reader(version=options.version)
        self.history = History()
        self.log: Log = []
        self.chunks: list[Chunk] = []
        self.tell(wire.TurnRequested(turn="t", agent="a", input="x"))

    def tell(self, *events: Any) -> list[Chunk]:
        made: list[Chunk] = []
        for event in events:
            if isinstance(event, wire.OutputEvent.__args__):
                event.turn = event.turn or "t"
                event.attempt = event.attempt or max(1, self.view.attempt if self.log else 1)
            offset = len(self.log) + 1
            self.log.append((offset, event))
            self.history.apply(offset, event)
            made += self.chunker.feed(offset, event)
        self.client.feed(*(json.loads(encode(chunk)) for chunk in made))
        self.chunks += made
        return made

    @property
    def view(self) -> TurnView:
        return self.history.turns["t"]

    def start(self, attempt: int = 1, **fields: Any) -> list[Chunk]:
        return self.tell(wire.TurnStarted(worker="w", lease=f"l{attempt}", attempt=attempt, **fields))

    def end(self, kind: type[Any] = wire.TurnCompleted, **fields: Any) -> list[Chunk]:
        return self.tell(kind(turn_offset=1, message=self.view.message, **fields))

    def parts(self) -> list[Part]:
        return [part for part in self.client.parts if part["type"] != "step-start"]


def told(*events: Any, options: Options = V7) -> Told:
    turn = Told(options)
    turn.start()
    turn.tell(*events)
    return turn


def types(chunks: list[Chunk]) -> list[str]:
    return [chunk["type"] for chunk in chunks]


# ----------------------------------------------------------------------------------------------------- each event


def test_a_turn_of_text() -> None:
    turn = told(wire.TextDelta(text="Hel"), wire.TextDelta(text="lo"))
    turn.end(usage=wire.Usage(input_tokens=3, output_tokens=2))
    usage = {"inputTokens": 3, "outputTokens": 2, "totalTokens": 5, "cachedInputTokens": 0, "reasoningTokens": 0}
    assert turn.chunks == [
        {"type": "start", "messageId": "msg_t"},
        {"type": "start-step"},
        {"type": "text-start", "id": "t1"},
        {"type": "text-delta", "id": "t1", "delta": "Hel"},
        {"type": "text-delta", "id": "t1", "delta": "lo"},
        {"type": "text-end", "id": "t1"},
        {"type": "finish-step"},
        {"type": "finish", "messageMetadata": {"usage": usage}, "finishReason": "stop"},
    ]
    assert turn.client.message == {
        "id": "msg_t",
        "role": "assistant",
        "parts": [{"type": "step-start"}, {"type": "text", "text": "Hello", "state": "done"}],
        "metadata": {"usage": usage},
    }


def test_metadata_can_be_left_out() -> None:
    turn = told(wire.TextDelta(text="x"), options=Options(metadata=False))
    assert turn.end(usage=wire.Usage(input_tokens=1))[-1] == {"type": "finish", "finishReason": "stop"}


def test_reasoning_then_text_are_two_parts() -> None:
    turn = told(wire.ReasoningDelta(text="hm"), wire.TextDelta(text="ah"))
    assert types(turn.chunks)[2:] == ["reasoning-start", "reasoning-delta", "reasoning-end", "text-start", "text-delta"]
    assert turn.parts() == [
        {"type": "reasoning", "text": "hm", "state": "done"},
        {"type": "text", "text": "ah", "state": "streaming"},
    ]


def test_a_tool_call_from_its_first_letter_to_its_result() -> None:
    turn = told(
        wire.ToolInputDelta(call="c", name="add", text='{"a":'),
        wire.ToolInputDelta(call="c", text="1}"),
        wire.ToolCall(call="c", name="add", input={"a": 1}),
        wire.ToolResult(call="c", output=2),
    )
    assert types(turn.chunks)[2:] == [
        "tool-input-start",
        "tool-input-delta",
        "tool-input-delta",
        "tool-input-available",
        "tool-output-available",
    ]
    assert all(chunk.get("dynamic", True) for chunk in turn.chunks)
    [part] = turn.parts()
    assert (part["type"], part["toolName"], part["state"], part["input"], part["output"]) == (
        "dynamic-tool",
        "add",
        "output-available",
        {"a": 1},
        2,
    )


def test_a_tool_that_the_application_declares_is_no_dynamic_one() -> None:
    turn = told(wire.ToolCall(call="c", name="add", input={}), options=Options(static_tools=frozenset({"add"})))
    assert turn.parts()[0]["type"] == "tool-add"


def test_a_tool_that_fails_and_one_that_never_ends() -> None:
    turn = told(
        wire.ToolCall(call="c", name="add", input={}),
        wire.ToolCall(call="d", name="add", input={}),
        wire.ToolInputDelta(call="e", name="add", text="{"),
        wire.ToolResult(call="c", error="no"),
    )
    turn.end()
    assert [(p["state"], p["errorText"]) for p in turn.parts()] == [
        ("output-error", "no"),
        ("output-error", INTERRUPTED),
        ("output-error", INTERRUPTED),
    ]


def test_a_result_without_its_call() -> None:
    turn = told(wire.ToolResult(call="c", output={"x": 1}))
    assert [(p["toolName"], p["output"]) for p in turn.parts()] == [("tool", {"x": 1})]


def test_after_tool_calls_a_client_does_not_go_on_by_itself() -> None:
    turn = told(wire.ToolCall(call="c", name="add", input={}), wire.ToolResult(call="c", output=1))
    assert complete_with_tool_calls(turn.client.message)
    turn.tell(wire.TextDelta(text="done"))
    turn.end()
    assert turn.client.finish == "stop"
    assert not complete_with_tool_calls(turn.client.message)
    assert not complete_with_approvals(turn.client.message)


def test_progress_is_data_that_is_not_kept() -> None:
    turn = told(wire.ToolCall(call="c", name="add", input={}), wire.ToolProgress(call="c", data=50))
    assert turn.chunks[-1] == {"type": "data-tool-progress", "data": {"toolCallId": "c", "data": 50}, "transient": True}
    assert turn.parts()[0]["state"] == "input-available"


def test_data_sources_and_files() -> None:
    turn = told(
        wire.Data(name="chart", data={"n": 1}, id="x"),
        wire.Data(name="chart", data={"n": 2}, id="x"),
        wire.Data(name="odd näme!", data=None),
        wire.Data(name="tick", data=1, transient=True),
        wire.Source(url="http://a", title="A"),
        wire.Source(url="http://b", id="b"),
        wire.File(url="http://f", media_type="image/png", name="f.png"),
    )
    assert turn.parts() == [
        {"type": "data-chart", "data": {"n": 2}, "id": "x"},
        {"type": "data-odd-n-me-", "data": None},
        {"type": "source-url", "sourceId": "source-1", "url": "http://a", "title": "A"},
        {"type": "source-url", "sourceId": "b", "url": "http://b"},
        {"type": "file", "url": "http://f", "mediaType": "image/png"},
    ]
    assert turn.client.transient == [{"type": "data-tick", "data": 1, "transient": True}]


def test_keys_that_the_client_refuses_are_left_out() -> None:
    evil = json.loads(
        '{"__proto__": {"x": 1}, "constructor": {"prototype": 1}, "ok": [{"__proto__": 2, "constructor": 3}]}'
    )
    [chunk] = told().tell(wire.Data(name="d", data=evil))
    assert json.loads(encode(chunk))["data"] == {"ok": [{"constructor": 3}]}
    text = {"type": "text-delta", "id": "t1", "delta": '"__proto__":'}
    assert json.loads(encode(text)) == text


@pytest.mark.parametrize(
    ("reason", "shown"), [("stop", "stop"), ("tool_calls", "tool-calls"), ("length", "length"), ("odd", "other")]
)
def test_finish_reasons(reason: str, shown: str) -> None:
    assert told().end(finish_reason=reason)[-1]["finishReason"] == shown


@pytest.mark.parametrize(("version", "reason"), [(7, "interrupted"), (6, "stop"), (5, "stop")])
def test_a_stopped_turn(version: int, reason: str) -> None:
    turn = told(wire.TextDelta(text="x"), options=Options(version=version))
    chunks = turn.end(wire.TurnCancelled, by="ann", reason="enough")
    assert types(chunks) == ["text-end", "finish-step", "abort", "finish"]
    assert chunks[2]["reason"] == "enough (by ann)"
    assert turn.client.finish == reason


def test_a_turn_stopped_before_it_began_has_no_message() -> None:
    turn = Told()
    turn.end(wire.TurnCancelled)
    assert types(turn.chunks) == ["abort", "finish"]
    assert turn.client.message is None
    assert turn.chunker.replay() == turn.chunks


@pytest.mark.parametrize(
    ("end", "text"),
    [
        ({"kind": wire.TurnFailed, "error": wire.ErrorInfo("c", "went wrong")}, "went wrong"),
        ({"kind": wire.TurnExpired, "reason": "too late"}, "too late"),
    ],
)
def test_a_turn_that_fails_says_so_and_ends(end: dict[str, Any], text: str) -> None:
    turn = told(wire.TextDelta(text="half"))
    chunks = turn.end(**end)
    assert chunks[-2:] == [{"type": "error", "errorText": text}, {"type": "finish", "finishReason": "error"}]
    assert (turn.client.error, turn.parts()[0]["text"]) == (text, "half")


def test_a_turn_that_another_took_in_ends_without_a_message() -> None:
    turn = Told()
    turn.tell(wire.SteerConsumed(turn="other", attempt=1, steer="t", offset=1))
    assert (turn.chunks, turn.client.message) == ([{"type": "finish", "finishReason": "stop"}], None)


def test_a_turn_that_cannot_be_used() -> None:
    turn = Told()
    turn.tell(wire.InputRejected(turn="t", offset=1, code="duplicate", reason="seen"))
    assert turn.client.error == "duplicate: seen"
    assert turn.chunks[-1]["type"] == "finish"


# ------------------------------------------------------------------------------------------------------- questions


def answered(turn: Told, request: str, value: Any) -> list[Chunk]:
    return turn.tell(wire.TurnAnswer(turn="t", request=request, value=value))


@pytest.mark.parametrize("approved", [True, False])
def test_approval_of_a_call(approved: bool) -> None:
    turn = told(
        wire.TextDelta(text="may I"),
        wire.ToolCall(call="c", name="rm", input={}),
        wire.InputRequired(request="c", kind="approval", call="c", prompt="sure?"),
    )
    assert turn.chunker.waiting
    assert turn.chunks[-1] == {
        "type": "tool-approval-request",
        "approvalId": "c",
        "toolCallId": "c",
        "reason": "sure?",
    }
    chunks = answered(turn, "c", {"approved": approved, "reason": "because"})
    assert not turn.chunker.waiting
    assert chunks[0] == {"type": "tool-approval-response", "approvalId": "c", "approved": approved, "reason": "because"}
    assert turn.parts()[1]["state"] == ("approval-responded" if approved else "output-denied")
    turn.tell(wire.ToolResult(call="c", output="gone"))
    assert turn.parts()[1]["state"] == "output-available"
    assert turn.parts()[1]["approval"]["approved"] is approved


def test_approval_of_nothing_in_particular_is_a_call_of_its_own() -> None:
    turn = told(wire.InputRequired(request="ask-1", kind="approval", prompt="go on?"))
    [part] = turn.parts()
    assert (part["toolName"], part["toolCallId"], part["state"], part["input"]) == (
        "approval",
        "ask-1",
        "approval-requested",
        {"prompt": "go on?"},
    )
    answered(turn, "ask-1", True)
    assert turn.parts()[0]["output"] == {"approved": True}


@pytest.mark.parametrize(("kind", "choices"), [("text", None), ("choice", ["a", "b"])])
def test_a_question_is_a_call_that_the_client_answers(kind: Any, choices: list[str] | None) -> None:
    turn = told(wire.InputRequired(request="q", kind=kind, prompt="which?", choices=choices))
    [part] = turn.parts()
    shown = {"prompt": "which?", "kind": kind} | ({"choices": choices} if choices else {})
    assert (part["toolName"], part["state"], part["input"]) == ("question", "input-available", shown)
    assert not complete_with_tool_calls(turn.client.message)
    answered(turn, "q", "a")
    assert complete_with_tool_calls(turn.client.message)
    assert turn.parts()[0]["output"] == "a"


def test_a_tool_of_the_client_is_a_static_one() -> None:
    turn = told(wire.InputRequired(request="q", kind="tool", tool="locate", input={"high": True}))
    assert turn.client.called == ["q"]
    assert turn.parts()[0] | {} == {
        "type": "tool-locate",
        "toolCallId": "q",
        "state": "input-available",
        "input": {"high": True},
        "providerExecuted": None,
    }
    answered(turn, "q", {"lat": 1})
    assert turn.parts()[0]["output"] == {"lat": 1}


def test_a_tool_of_the_client_that_failed_there() -> None:
    turn = told(wire.InputRequired(request="q", kind="tool", tool="locate"))
    answered(turn, "q", {"error": "denied"})
    assert turn.parts()[0]["errorText"] == "denied"


def test_a_client_answers_by_itself_though_other_calls_are_open() -> None:
    turn = told(
        wire.ToolCall(call="c", name="rm", input={}),
        wire.ToolCall(call="d", name="rm", input={}),
        wire.ToolInputDelta(call="e", name="rm", text='{"n"'),
        wire.InputRequired(request="c", kind="approval", call="c"),
    )
    assert not complete_with_approvals(turn.client.message)
    answered(turn, "c", True)
    assert complete_with_approvals(turn.client.message)
    more = Reader(turn.client.message)
    for chunks in (
        turn.tell(wire.ToolInputDelta(call="e", text=":1}")),
        turn.tell(wire.InputRequired(request="d", kind="approval", call="d")),
    ):
        more.feed(*chunks)
    assert [p["state"] for p in more.parts if is_tool(p)] == [
        "approval-responded",
        "approval-requested",
        "approval-responded",
    ]
    assert not complete_with_approvals(more.message)


def test_a_continued_message_begins_new_texts() -> None:
    turn = told(
        wire.TextDelta(text="one"),
        wire.ToolInputDelta(call="e", name="f", text='{"n"'),
        wire.TextDelta(text="two"),
        wire.InputRequired(request="q", kind="text"),
    )
    more = Reader(turn.client.message)
    more.feed(*answered(turn, "q", "yes"))
    more.feed(*turn.tell(wire.TextDelta(text="three"), wire.ToolInputDelta(call="e", text=":1}")))
    assert [p.get("text") or p["input"] for p in more.parts[1:]] == [
        "one",
        {"n": 1},
        "two",
        {"prompt": "", "kind": "text"},
        "three",
    ]


def test_an_answer_that_was_refused_opens_the_question_again() -> None:
    turn = told(
        wire.ToolCall(call="c", name="rm", input={}), wire.InputRequired(request="c", kind="approval", call="c")
    )
    answered(turn, "c", True)
    assert not turn.chunker.waiting
    turn.tell(wire.InputRejected(turn="t", offset=len(turn.log), code="invalid_answer", reason="no"))
    assert turn.chunker.waiting
    assert turn.parts()[0]["state"] == "approval-requested"


def test_version_5_knows_no_approvals() -> None:
    turn = told(
        wire.ToolCall(call="c", name="rm", input={}),
        wire.InputRequired(request="c", kind="approval", call="c", prompt="sure?"),
        options=Options(version=5),
    )
    assert [(p["toolCallId"], p["state"]) for p in turn.parts()] == [
        ("c", "input-available"),
        ("ask:c", "input-available"),
    ]
    answered(turn, "c", True)
    assert turn.parts()[1]["output"] is True


def test_a_turn_stopped_while_it_waits_leaves_no_question_open() -> None:
    turn = told(
        wire.ToolCall(call="c", name="rm", input={}), wire.InputRequired(request="c", kind="approval", call="c")
    )
    turn.end(wire.TurnCancelled)
    assert turn.parts()[0]["state"] == "output-error"
    assert not turn.chunker.waiting


# -------------------------------------------------------------------------------------------------------- attempts


def test_a_takeover_that_resumes_goes_on() -> None:
    turn = told(wire.TextDelta(text="one "))
    turn.start(2, resumes_from=3, message=turn.view.message)
    turn.tell(wire.TextDelta(text="two"))
    assert [p["text"] for p in turn.parts()] == ["one two"]
    assert "reset-step" not in types(turn.chunks)


def test_a_takeover_that_begins_anew_replaces_what_was_said_with_its_first_word() -> None:
    turn = told(wire.TextDelta(text="one"), wire.ToolCall(call="c", name="f", input={}))
    turn.start(2, message=turn.view.message)
    assert len(turn.parts()) == 2
    turn.tell(wire.ToolProgress(call="c", data=1))
    assert len(turn.parts()) == 2
    turn.tell(wire.TextDelta(text="two"))
    assert [p["text"] for p in turn.parts()] == ["two"]
    assert types(turn.chunks).count("reset-step") == 1


def test_an_older_client_cannot_be_told_and_reads_again() -> None:
    turn = told(wire.TextDelta(text="one"), options=Options(version=6))
    turn.start(2)
    turn.tell(wire.TextDelta(text="two"))
    assert turn.chunker.broken
    again = Reader(version=6)
    again.feed(*turn.chunker.replay())
    assert [p["text"] for p in again.parts[1:]] == ["two"]


def test_an_agent_that_starts_over_after_an_answer() -> None:
    turn = told(
        wire.TextDelta(text="may I? "),
        wire.ToolCall(call="c", name="rm", input={}),
        wire.InputRequired(request="c", kind="approval", call="c"),
    )
    turn.tell(wire.TurnSuspended(requests=["c"], message=turn.view.message))
    shown = turn.client.message
    more = Reader(shown)
    more.feed({"type": "start", "messageId": message_id("t")})
    more.feed(*answered(turn, "c", True))
    more.feed(*turn.start(2, message=turn.view.message))
    more.feed(*turn.tell(wire.TextDelta(text="may I? "), wire.ToolCall(call="c", name="rm", input={})))
    more.feed(*turn.tell(wire.TurnResumed(request="c", answer=6), wire.ToolResult(call="c", output="ok")))
    more.feed(*turn.end())
    assert [p.get("text") or p["output"] for p in more.parts if p["type"] != "step-start"] == ["may I? ", "ok"]
    assert more.finish == "stop"


def test_an_attempt_to_come_is_told_in_passing() -> None:
    turn = told(wire.TextDelta(text="one"))
    turn.tell(wire.TurnRetrying(error=wire.ErrorInfo("c", "busy"), after=2.0))
    turn.start(2)
    notes = [chunk["data"] for chunk in turn.client.transient]
    assert notes == [{"state": "retrying", "after": 2.0, "message": "busy"}, {"state": "running", "attempt": 2}]


def test_a_superseded_attempt_says_nothing_more() -> None:
    turn = told(wire.TextDelta(text="one"))
    turn.start(2)
    assert turn.tell(wire.TextDelta(text="zombie", attempt=1)) == []


def test_what_a_hole_lost_is_told_by_the_next_message() -> None:
    turn = told(wire.TextDelta(text="one "))
    assert turn.chunker.exact
    message = wire.Message(parts=[wire.TextPart("one two "), wire.ToolPart("c", "f", {})])
    turn.tell(wire.Snapshot(turn="t", attempt=1, from_=4, to=4, message=message))
    turn.tell(wire.ToolResult(call="c", output=1))
    assert [p.get("text") or p["output"] for p in turn.parts()] == ["one two ", 1]
    assert not turn.chunker.exact


# ------------------------------------------------------------------------------------------------------ any order


def content(parts: list[Part]) -> list[Any]:
    """What a message says, however its parts came to be: adjacent texts joined, questions of their own left out."""
    said: list[Any] = []
    for part in parts:
        kind = part["type"]
        if kind in ("text", "reasoning"):
            if said and said[-1][0] == kind:
                said[-1] = (kind, said[-1][1] + part["text"])
            else:
                said.append((kind, part["text"]))
        elif is_tool(part):
            if part.get("toolName") == "approval":
                continue
            settled = part["state"] in ("output-available", "output-error")
            said.append(("tool", part["toolCallId"], part.get("output"), part.get("errorText") if settled else None))
        elif kind != "step-start":
            said.append((kind, part.get("data"), part.get("url")))
    return said


def logged(view: TurnView) -> list[Any]:
    """What the log says of the same."""
    said: list[Any] = []
    for part in view.message.parts:
        match part:
            case wire.TextPart() | wire.ReasoningPart():
                kind = "text" if isinstance(part, wire.TextPart) else "reasoning"
                said.append((kind, part.text))
            case wire.ToolPart():
                error = INTERRUPTED if view.ended and not part.settled else part.error
                said.append(("tool", part.call, None if wire.is_unset(part.output) else part.output, error))
            case wire.DataPart():
                said.append((f"data-{part.name}", part.data, None))
            case wire.SourcePart():
                said.append(("source-url", None, part.url))
            case wire.FilePart():
                said.append(("file", None, part.url))
    # The log keeps texts apart only where something stood between them.
    return said


def without_nothing(part: Part) -> Part:
    automatic = (part.get("approval") or {}).get("isAutomatic") and part["state"].startswith("output-")
    kept = {name: value for name, value in part.items() if value not in (None, False) and name != "rawInput"}
    if kept.get("state") != "approval-responded":
        kept.pop("providerExecuted", None)  # it only excuses a call that is open
    return {name: value for name, value in kept.items() if not (automatic and name == "approval")}


def comparable(message: dict[str, Any] | None) -> list[Part]:
    """A message's parts, without what says nothing; questions, whose place the log does not keep, come last."""
    parts = [without_nothing(p) for p in message["parts"] if p["type"] != "step-start"] if message else []
    joined: list[Part] = []
    for part in [p for p in parts if not own(p)]:
        if joined and part["type"] in ("text", "reasoning") and joined[-1]["type"] == part["type"]:
            joined[-1] = {**part, "text": joined[-1]["text"] + part["text"]}
        else:
            joined.append(part)
    return [*joined, *(p for p in parts if own(p))]


def own(part: Part) -> bool:
    return part.get("toolName") == "approval"


@settings(max_examples=100, deadline=None)
@given(sessions())
def test_the_chunks_make_the_message_that_the_log_tells(log: Log) -> None:
    history = History()
    for offset, event in log:
        history.apply(offset, event)
    for turn, view in history.turns.items():
        chunker, client = Chunker(turn, V7), Reader()
        for offset, event in log:
            client.feed(*chunker.feed(offset, event))
        assert content(client.parts) == logged(view), turn
        assert (client.finished or client.error is not None) is view.ended
        if client.message is not None:
            assert client.message["id"] == message_id(turn)
        if view.ended and view.state not in ("consumed", "rejected") and client.error is None:
            assert not complete_with_tool_calls(client.message or {"parts": []})
            assert not complete_with_approvals(client.message or {"parts": []})
            kept, shown = comparable(Chunker.of(view, V7).message()), comparable(client.message)
            assert [p for p in kept if not own(p)] == [p for p in shown if not own(p)]
            assert all(p in kept for p in shown if own(p))


@settings(max_examples=100, deadline=None)
@given(sessions(), st.data())
def test_a_replay_at_any_point_makes_the_same_message_and_goes_on(log: Log, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(log)))
    for turn in [event.turn for _, event in log if isinstance(event, wire.TurnRequested)]:
        late, client = Chunker(turn, V7), Reader()
        for offset, event in log[:at]:
            client.feed(*late.feed(offset, event))
        fresh, resumed = Reader(), Reader(client.message, resumes=True)
        fresh.feed(*late.replay())
        resumed.feed(*late.replay())
        assert comparable(fresh.message) == comparable(client.message)
        for offset, event in log[at:]:
            made = late.feed(offset, event)
            for reader in (client, fresh, resumed):
                reader.feed(*made)
        assert comparable(fresh.message) == comparable(client.message) == comparable(resumed.message)


@settings(max_examples=100, deadline=None)
@given(sessions(), st.data())
def test_chunk_numbers_are_the_same_for_every_reader(log: Log, data: st.DataObject) -> None:
    for turn in [event.turn for _, event in log if isinstance(event, wire.TurnRequested)]:
        one, two = Chunker(turn, V7), Chunker(turn, V7)
        chunks = [chunk for offset, event in log for chunk in one.feed(offset, event)]
        stored = [(o, e if isinstance(e, wire.UnknownEvent) else wire.decode(wire.encode(e))) for o, e in log]
        again = [chunk for offset, event in stored for chunk in two.feed(offset, event)]
        split = data.draw(st.integers(0, len(chunks)))
        client, whole = Reader(), Reader()
        client.feed(*chunks[:split], *again[split:])
        whole.feed(*chunks)
        assert client.message == whole.message
        assert chunks == again


OPS = ("text", "text", "reasoning", "input", "call", "result", "ask", "ask", "answer", "reject", "crash", "suspend")


@st.composite
def asking_turns(draw: st.DrawFn) -> Log:
    """A turn whose agent asks a lot, about calls and about nothing, and is started over or goes on."""
    turn = Told()
    turn.start()
    for op in draw(st.lists(st.sampled_from(OPS), min_size=5, max_size=30)):
        n = len(turn.log)
        view = turn.view
        tools = [part for part in view.message.parts if isinstance(part, wire.ToolPart)]
        called = [part.call for part in tools if not part.settled and part.input is not wire.UNSET]
        unanswered = [question for question in view.questions.values() if question.answer is None]
        match op:
            case "text" | "reasoning":
                turn.tell(wire.TextDelta(text=f"{n} ") if op == "text" else wire.ReasoningDelta(text=f"{n} "))
            case "input":
                call = next((part.call for part in tools if part.input is wire.UNSET and not part.settled), f"c{n}")
                turn.tell(wire.ToolInputDelta(call=call, name="tool", text=str(n)))
            case "call":
                call = next((part.call for part in tools if part.input is wire.UNSET and not part.settled), f"c{n}")
                turn.tell(wire.ToolCall(call=call, name="tool", input={"n": n}))
            case "result" if called:
                turn.tell(wire.ToolResult(call=draw(st.sampled_from(called)), output=n))
            case "ask":
                kind = draw(st.sampled_from(["approval", "approval", "tool", "text"]))
                call = draw(st.sampled_from([*called, f"c{n}", None]))
                request = call if call and call not in view.questions and draw(st.booleans()) else f"q{n}"
                turn.tell(wire.InputRequired(request=request, kind=kind, call=call, tool="tool"))
            case "answer" if unanswered:
                question = draw(st.sampled_from(unanswered)).event
                value = draw(st.booleans()) if question.kind == "approval" else f"a{n}"
                turn.tell(wire.TurnAnswer(turn="t", request=question.request, value=value))
            case "reject":
                given = [q.answer_offset for q in view.questions.values() if q.answer_offset is not None]
                if given and given[-1] == n:
                    turn.tell(wire.InputRejected(offset=n, code="invalid_answer", reason="no"))
            case "crash" | "suspend":
                message = view.message
                if op == "suspend":
                    turn.tell(wire.TurnSuspended(requests=[q.event.request for q in unanswered], message=message))
                turn.start(view.attempt + 1, message=message, resumes_from=n if draw(st.booleans()) else None)
            case _:
                pass
    if draw(st.booleans()):
        turn.end(draw(st.sampled_from([wire.TurnCompleted, wire.TurnCancelled])))
    return turn.log


@settings(max_examples=300, deadline=None)
@given(asking_turns())
def test_a_message_that_is_continued_after_each_question_is_the_whole_message(log: Log) -> None:
    chunker, reader = Chunker("t", V7), Reader()
    responses = 1
    for offset, event in log:
        chunks = chunker.feed(offset, event)
        if chunker.waiting and chunker.asked == offset:
            # The response ends here; the client goes on with another, whatever it has answered.
            reader.feed(*chunks, *chunker.pause())
            assert reader.finish == "tool-calls"
            assert not complete_with_approvals(reader.message or {})
            reader = Reader(reader.message)
            reader.feed({"type": "start", "messageId": message_id("t")})
            responses += 1
            continue
        reader.feed(*chunks)
    whole = Reader()
    whole.feed(*chunker.replay())
    if responses == 1 or whole.parts:
        assert comparable(reader.message) == comparable(whole.message)
    if chunker.ended:
        assert not complete_with_approvals(reader.message or {"parts": []})
        assert not complete_with_tool_calls(reader.message or {"parts": []})


def test_the_rules_of_the_client_are_rules() -> None:
    for bad in (
        {"type": "agentrun"},
        {"type": "text-delta", "id": "1"},
        {"type": "abort", "reason": None},
        {"type": "finish", "finishReason": "done"},
        {"type": "data-x"},
    ):
        with pytest.raises(Refused):
            Reader().feed(bad)
    for bad in (
        {"type": "text-delta", "id": "1", "delta": "x"},
        {"type": "tool-output-available", "toolCallId": "c", "output": 1},
        {"type": "tool-input-delta", "toolCallId": "c", "inputTextDelta": "x"},
        {"type": "tool-approval-response", "approvalId": "c", "approved": True},
    ):
        with pytest.raises(Refused):
            Reader().feed(bad)
