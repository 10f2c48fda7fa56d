"""The fold of a session's records."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from session_logs import Log, sessions

from agentrun import wire
from agentrun.chat import INTERRUPTED
from agentrun.errors import TurnNotFound
from agentrun.history import History, MessageBuilder, TurnView, input_to_chat, message_to_chat
from agentrun.wire import DataPart, Message, ReasoningPart, TextPart, ToolPart

thorough = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def fold(*events: wire.AnyEvent) -> History:
    history = History()
    for event in events:
        history.apply(history.offset + 1, event, time=100.0)
    return history


def requested(
    turn: str = "t", input: Any = "hi", on_busy: wire.OnBusy = "enqueue", replaces: str | None = None
) -> wire.TurnRequested:
    return wire.TurnRequested(turn=turn, agent="a", input=input, on_busy=on_busy, replaces=replaces)


def exchange(turn: str, input: str, reply: str, replaces: str | None = None) -> list[wire.AnyEvent]:
    return [requested(turn, input, replaces=replaces), started(turn=turn), completed(reply, turn=turn)]


def replaced(history: History) -> dict[str, str | None]:
    return {view.id: view.replaced_by for view in history.turns.values()}


def started(attempt: int = 1, turn: str = "t", **more: Any) -> wire.TurnStarted:
    return wire.TurnStarted(turn=turn, attempt=attempt, worker=f"w{attempt}", lease="l", **more)


def text(piece: str, attempt: int = 1, turn: str = "t", **more: Any) -> wire.TextDelta:
    return wire.TextDelta(turn=turn, attempt=attempt, text=piece, **more)


def completed(reply: str = "", attempt: int = 1, turn: str = "t") -> wire.TurnCompleted:
    return wire.TurnCompleted(turn=turn, attempt=attempt, turn_offset=1, message=said(reply))


def cancelled(reply: str = "", attempt: int = 1, turn: str = "t", **more: Any) -> wire.TurnCancelled:
    return wire.TurnCancelled(turn=turn, attempt=attempt, turn_offset=1, message=said(reply), **more)


def asked(request: str = "r", attempt: int = 1) -> wire.InputRequired:
    return wire.InputRequired(turn="t", attempt=attempt, request=request, kind="approval")


def answer(value: Any = True, request: str = "r", turn: str = "t") -> wire.TurnAnswer:
    return wire.TurnAnswer(turn=turn, request=request, value=value)


def said(reply: str) -> Message:
    return Message(parts=[TextPart(reply)] if reply else [])


def built(*events: wire.OutputEvent) -> list[wire.Part]:
    builder = MessageBuilder()
    for event in events:
        builder.apply(event)
    return builder.message.parts


def shape(view: TurnView) -> dict[str, Any]:
    names = ("id", "state", "attempt", "charged", "worker", "message", "tokens", "usage", "error", "steers")
    return {name: getattr(view, name) for name in (*names, "finish_reason", "consumed_by", "rolled_back", "stop")}


# ------------------------------------------------------------------------------------------------- the builder


def test_adjacent_text_is_one_part() -> None:
    assert built(
        wire.TextDelta(text="a"),
        wire.TextDelta(text=""),
        wire.TextDelta(text="b"),
        wire.ReasoningDelta(text="c"),
        wire.ReasoningDelta(text="d"),
        wire.TextDelta(text="e"),
    ) == [TextPart("ab"), ReasoningPart("cd"), TextPart("e")]


def test_tools() -> None:
    streamed = [
        wire.ToolInputDelta(call="1", name="f", text='{"a'),
        wire.ToolInputDelta(call="2", name="g", text="{}"),
        wire.ToolInputDelta(call="1", text='":1}'),
    ]
    assert built(*streamed) == [ToolPart("1", "f", input_text='{"a":1}'), ToolPart("2", "g", input_text="{}")]
    called = [*streamed, wire.ToolCall(call="1", name="f", input={"a": 1}), wire.ToolProgress(call="1", data=0.5)]
    assert built(*called) == [ToolPart("1", "f", {"a": 1}), ToolPart("2", "g", input_text="{}")]
    assert built(*called, wire.ToolInputDelta(call="1", text="late")) == built(*called)
    settled = [*called, wire.ToolResult(call="1", output=None), wire.ToolResult(call="2", error="no")]
    assert built(*settled) == [ToolPart("1", "f", {"a": 1}, None), ToolPart("2", "g", error="no", input_text="{}")]


def test_data_of_one_id_is_replaced_in_place_and_transient_data_is_no_part() -> None:
    assert built(
        wire.Data(name="d", id="1", data=1),
        wire.Data(name="d", data=2),
        wire.Data(name="d", data=2),
        wire.Data(name="d", id="1", data=3),
        wire.Data(name="d", id="1", data=4, transient=True),
    ) == [DataPart("d", 3, "1"), DataPart("d", 2), DataPart("d", 2)]


def test_sources_and_files_are_parts() -> None:
    assert built(wire.Source(url="u", title="t"), wire.File(url="f", media_type="m", name="n")) == [
        wire.SourcePart("u", "t"),
        wire.FilePart("f", "m", "n"),
    ]


def test_a_message_given_out_and_a_copy_stay_as_they_are() -> None:
    builder = MessageBuilder(said("Hel"))
    builder.apply(wire.ToolCall(call="1", name="f", input=1))
    early, copy = builder.message, builder.copy()
    builder.apply(wire.ToolResult(call="1", output=2))
    builder.apply(wire.TextDelta(text="lo", count=2))
    assert early == copy.message == Message(parts=[TextPart("Hel"), ToolPart("1", "f", 1)])
    assert builder.message == Message(parts=[TextPart("Hel"), ToolPart("1", "f", 1, 2), TextPart("lo")])
    assert (builder.tokens, copy.tokens) == (2, 0)


def test_the_index_counts_tokens_that_were_not_seen() -> None:
    builder = MessageBuilder()
    builder.apply(wire.TextDelta(text="lo", index=40, count=2))
    builder.apply(wire.ReasoningDelta(text="hm", index=42))
    assert builder.tokens == 43


# ------------------------------------------------------------------------------------------------------ states


def test_a_turn_from_queued_to_completed() -> None:
    history = fold(requested())
    view = history.turns["t"]
    assert (view.state, view.attempt, view.offset, view.agent, view.ended) == ("queued", 0, 1, "a", False)
    assert history.apply(2, started()) is view
    assert (view.state, view.attempt, view.worker) == ("running", 1, "w1")
    history.apply(3, text("Hel", count=2))
    history.apply(4, text("lo"))
    assert (view.message, view.tokens, view.last_out) == (said("Hello"), 3, 4)
    usage = wire.Usage(input_tokens=1)
    history.apply(5, wire.TurnCompleted(turn="t", attempt=1, turn_offset=1, message=said("Hello"), usage=usage))
    assert (view.state, view.ended, view.ended_at, view.finish_reason) == ("completed", True, 5, "stop")
    assert view.usage == usage


def test_the_other_ends() -> None:
    error = wire.ErrorInfo("c", "m")
    ends = [
        wire.TurnCancelled(turn="t", attempt=1, turn_offset=1, by="me", reason="why", rolled_back=True),
        wire.TurnFailed(turn="t", attempt=1, turn_offset=1, error=error),
        wire.TurnExpired(turn="t", attempt=1, turn_offset=1, reason="late"),
    ]
    views = [fold(requested(), started(), text("Hi"), end).turns["t"] for end in ends]
    assert [(v.state, v.message) for v in views] == [(s, said("Hi")) for s in ("cancelled", "failed", "expired")]
    assert (views[0].by, views[0].reason, views[0].rolled_back) == ("me", "why", True)
    assert views[1].error == error
    assert views[2].reason == "late"


def test_the_first_end_is_the_only_one() -> None:
    view = fold(requested(), started(), completed("Hi"), cancelled("Ho"), text("!"), started(2), asked()).turns["t"]
    assert (view.state, view.message, view.attempt, view.ended_at, view.questions) == (
        "completed",
        said("Hi"),
        1,
        3,
        {},
    )


def test_drain_and_suspension_are_not_charged() -> None:
    history = fold(requested(), started(), wire.TurnReleased(turn="t", attempt=1))
    view = history.turns["t"]
    assert (view.state, view.attempt, view.charged) == ("queued", 1, 0)
    history.apply(4, started(2))
    assert (view.state, view.charged) == ("running", 1)
    suspended = wire.TurnSuspended(turn="t", attempt=2, requests=["r"], message=said("Well"), until=500.0)
    history.apply(5, suspended)
    assert (view.state, view.charged, view.message, view.suspended_until) == ("suspended", 0, said("Well"), 500.0)
    history.apply(6, started(3))
    error = wire.ErrorInfo("c", "m", retryable=True)
    history.apply(7, wire.TurnRetrying(turn="t", attempt=3, error=error, after=5.0), time=1000.0)
    assert (view.state, view.charged, view.error, view.retry_at) == ("retrying", 1, error, 1005.0)
    history.apply(8, started(4))
    assert (view.state, view.charged, view.error, view.retry_at, view.suspended_until) == (
        "running",
        2,
        None,
        None,
        None,
    )


def test_output_of_an_attempt_that_was_superseded_is_ignored() -> None:
    view = fold(requested(), started(), started(2), text("new", 2), text("old", 1)).turns["t"]
    assert (view.message, view.last_out) == (said("new"), 4)


def test_the_same_turn_again_changes_nothing() -> None:
    history = fold(requested(input="first"), requested(input="again"))
    assert history.turns["t"].request == requested(input="first")
    assert history.at(1) is history.turns["t"]
    assert history.at(2) is None


def test_a_rejected_turn() -> None:
    rejected = wire.InputRejected(turn="t", offset=1, code="bad", reason="no agent")
    view = fold(requested(), rejected).turns["t"]
    assert (view.state, view.reason, view.ended_at) == ("rejected", "no agent", 2)
    assert fold(requested(), wire.InputRejected(offset=9, code="c", reason="r")).turns["t"].state == "queued"


def test_turns_whose_request_was_trimmed() -> None:
    history = History()
    history.apply(40, wire.Gap(from_=1, to=40, reason="trimmed"))
    history.apply(41, text("lo", attempt=3))
    view = history.turns["t"]
    assert (view.request, view.offset, view.attempt, view.message) == (None, 0, 3, said("lo"))
    history.apply(42, completed("Hello", attempt=3))
    assert history.messages() == [{"role": "assistant", "content": "Hello"}]


def test_what_was_applied_before_and_what_is_unknown_changes_nothing() -> None:
    history = fold(requested(), started(), text("Hi"))
    assert history.apply(3, text("Hi")) is None
    assert history.apply(4, wire.UnknownEvent("new", b"{}")) is None
    assert (history.turns["t"].message, history.offset) == (said("Hi"), 4)


# ----------------------------------------------------------------------------------------------------- attempts


def test_an_earlier_answer_stands_until_the_next_attempt_says_something() -> None:
    history = fold(requested(), started(), text("old"), started(2, message=said("old")))
    view = history.turns["t"]
    history.apply(5, wire.ToolProgress(turn="t", attempt=2, call="c", data=1))
    assert (view.message, view.tokens) == (said("old"), 0)
    history.apply(6, text("new", 2))
    assert (view.message, view.tokens) == (said("new"), 1)


@pytest.mark.parametrize("end", [cancelled(attempt=2), completed(attempt=2)])
def test_an_empty_retry_never_blanks_a_good_answer(end: wire.Terminal) -> None:
    history = fold(requested(), started(), text("good"), started(2), end)
    assert history.turns["t"].message == said("good")


def test_an_attempt_that_resumes_goes_on_from_the_message_carried() -> None:
    view = fold(requested(), started(), started(2, resumes_from=2, message=said("Hel")), text("lo", 2)).turns["t"]
    assert (view.message, view.tokens) == (said("Hello"), 1)


def test_an_attempt_that_resumes_without_a_message_goes_on_from_what_there_is() -> None:
    view = fold(requested(), started(), text("Hel"), started(2, resumes_from=3), text("lo", 2)).turns["t"]
    assert view.message == said("Hello")


def test_checkpoint_snapshot_and_end_say_what_the_message_is() -> None:
    history = fold(requested(), started(), text("?"))
    view = history.turns["t"]
    history.apply(4, wire.TurnCheckpoint(turn="t", attempt=1, message=said("Hel")))
    history.apply(5, text("lo"))
    assert view.message == said("Hello")
    history.apply(9, wire.Snapshot(turn="t", attempt=1, from_=6, to=9, message=said("Hello wor")))
    history.apply(10, text("ld"))
    assert view.message == said("Hello world")
    history.apply(11, completed("Hello, world"))
    assert view.message == said("Hello, world")


def test_a_gap_makes_the_message_incomplete_until_it_is_told() -> None:
    history = fold(requested(), started(), text("Hel"))
    view = history.turns["t"]
    assert history.apply(9, wire.Gap(from_=4, to=9)) is view
    assert (view.incomplete, view.message) == (True, said("Hel"))
    history.apply(10, started(2))
    assert view.incomplete
    history.apply(11, text("new", 2))
    assert not view.incomplete
    history.apply(19, wire.Gap(from_=12, to=19))
    history.apply(20, started(3, resumes_from=11))
    history.apply(21, text("!", 3))
    assert view.incomplete
    history.apply(22, completed("Hello!", 3))
    assert not view.incomplete


# ------------------------------------------------------------------------------------- questions, stops, interrupts


def test_the_first_answer_to_an_open_question_counts() -> None:
    history = fold(requested(), answer("early"), started(), asked(), answer("yes"), answer("no"), answer(request="?"))
    view = history.turns["t"]
    question = view.questions["r"]
    assert (question.offset, question.answer, question.answer_offset) == (4, answer("yes"), 5)
    assert [history.answered_by(offset) for offset in (2, 4, 5, 6, 7)] == [view, None, view, view, view]
    assert not question.resumed
    history.apply(8, wire.TurnResumed(turn="t", attempt=1, request="r", answer=5))
    assert question.resumed


def test_a_question_asked_again_keeps_its_answer() -> None:
    view = fold(requested(), started(), asked(), answer("yes"), started(2), asked(attempt=2)).turns["t"]
    assert view.questions["r"].answer == answer("yes")


def test_an_answer_that_is_rejected_leaves_the_question_open() -> None:
    rejected = wire.InputRejected(turn="t", offset=4, code="bad", reason="no such choice")
    history = fold(requested(), started(), asked(), answer("red"), rejected, answer("blue"))
    view = history.turns["t"]
    assert (view.state, view.questions["r"].answer_offset) == ("running", 6)


def test_answers_for_turns_that_ended_or_never_were() -> None:
    history = fold(requested(), started(), asked(), completed("x"), answer(), answer(turn="nobody"))
    assert history.turns["t"].questions["r"].answer is None
    assert history.answered_by(5) is history.turns["t"]
    assert history.answered_by(6) is None


def test_a_stop_is_for_one_turn_or_for_all_that_were_sent_before() -> None:
    one, everything = wire.TurnCancel(turn="b", by="me"), wire.TurnCancel(all=True)
    history = fold(requested("a"), requested("b"), requested("c"), completed(turn="a", attempt=0), one)
    assert [v.stop for v in history.turns.values()] == [None, one, None]
    assert history.answered_by(5) is history.turns["b"]
    history.apply(6, everything)
    history.apply(7, requested("d"))
    assert [v.stop for v in history.turns.values()] == [None, one, everything, None]
    assert history.answered_by(6) is history.turns["b"]
    assert history.apply(8, wire.TurnCancel(turn="nobody")) is None


def test_an_interrupt_concerns_all_turns_before_it_that_have_not_ended() -> None:
    history = fold(
        requested("a"),
        completed(turn="a", attempt=0),
        requested("b"),
        requested("c", on_busy="rollback"),
        requested("d", on_busy="interrupt"),
        requested("e"),
    )
    told = [(v.interrupted_by, v.rollback) for v in history.turns.values()]
    assert told == [(None, False), ("c", True), ("d", False), (None, False), (None, False)]


def test_a_consumed_steer_has_ended() -> None:
    history = fold(
        requested(),
        started(),
        requested("s", on_busy="steer"),
        wire.SteerConsumed(turn="t", attempt=1, steer="s", offset=3),
    )
    steer = history.turns["s"]
    assert (steer.state, steer.consumed_by, steer.ended_at) == ("consumed", "t", 4)
    assert history.turns["t"].steers == ["s"]


# ----------------------------------------------------------------------------------------- the provider's messages


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    ("value", "chat"),
    [
        ("hi", [user("hi")]),
        ({"role": "user", "content": "hi", "name": "n"}, [{"role": "user", "content": "hi", "name": "n"}]),
        ([{"type": "text", "text": "hi"}], [user([{"type": "text", "text": "hi"}])]),
        ([user("a"), assistant("b"), user("c"), user("d")], [user("c"), user("d")]),
        ([{"role": "system", "content": "s"}], [{"role": "system", "content": "s"}]),
        ({"city": "Köln"}, [user('{"city":"Köln"}')]),
        ([1, 2], [user("[1,2]")]),
        ([], [user("[]")]),
        (None, [user("null")]),
    ],
)
def test_inputs(value: Any, chat: list[dict[str, Any]]) -> None:
    assert input_to_chat(value) == chat


def test_text_tools_and_results_in_steps() -> None:
    message = Message(
        parts=[
            ReasoningPart("hm"),
            TextPart("Let me "),
            DataPart("d", 1),
            TextPart("see."),
            ToolPart("1", "f", {"a": 1}, {"b": 2}),
            ToolPart("2", "g", {}, "plain"),
            TextPart("And"),
            ToolPart("3", "h", None, error="no"),
            TextPart("Done."),
        ]
    )

    def called(call: str, name: str, arguments: str) -> dict[str, Any]:
        return {"id": call, "type": "function", "function": {"name": name, "arguments": arguments}}

    assert message_to_chat(message) == [
        assistant("Let me see.") | {"tool_calls": [called("1", "f", '{"a":1}'), called("2", "g", "{}")]},
        {"role": "tool", "tool_call_id": "1", "content": '{"b":2}'},
        {"role": "tool", "tool_call_id": "2", "content": "plain"},
        assistant("And") | {"tool_calls": [called("3", "h", "null")]},
        {"role": "tool", "tool_call_id": "3", "content": "Error: no"},
        assistant("Done."),
    ]


def test_a_call_that_was_cut_off_is_repaired() -> None:
    chat = message_to_chat(Message(parts=[ToolPart("1", "f", {}), ToolPart("2", "g", input_text='{"a')]))
    assert [m["role"] for m in chat] == ["assistant", "tool"]
    assert [c["id"] for c in chat[0]["tool_calls"]] == ["1"]
    assert chat[0]["content"] is None
    assert chat[1] == {"role": "tool", "tool_call_id": "1", "content": INTERRUPTED}


def test_an_empty_message_is_none_at_all() -> None:
    assert message_to_chat(Message(parts=[ReasoningPart("hm")])) == []


def test_the_conversation_before_a_turn() -> None:
    history = fold(
        requested("a", "1"),
        started(turn="a"),
        completed("one", turn="a"),
        requested("b", "2"),
        started(turn="b"),
        text("two", turn="b"),
        requested("c", "3"),
    )
    assert history.messages(until="b") == [user("1"), assistant("one"), user("2")]
    assert history.messages() == [user("1"), assistant("one"), user("2"), assistant("two")]
    assert history.messages(until="c") == [user("1"), assistant("one"), user("2"), assistant("two"), user("3")]
    with pytest.raises(TurnNotFound):
        history.messages(until="d")


def test_what_stays_of_turns_that_did_not_complete() -> None:
    history = fold(
        requested("a", "1"),
        started(turn="a"),
        cancelled("part", turn="a"),
        requested("b", "2"),
        cancelled(turn="b", attempt=0),
        requested("c", "3"),
        started(turn="c"),
        cancelled("gone", turn="c", rolled_back=True),
        requested("d", "4"),
        wire.InputRejected(turn="d", offset=9, code="c", reason="r"),
        requested("e", "5"),
    )
    assert history.turns["d"].state == "rejected"
    assert history.messages(until="e") == [user("1"), assistant("part"), user("2"), user("5")]


def test_steering_stands_between_the_input_and_the_answer() -> None:
    events = [
        requested("a", "1"),
        started(turn="a"),
        requested("s", "left!", on_busy="steer"),
        requested("b", "2"),
        wire.SteerConsumed(turn="a", attempt=1, steer="s", offset=3),
    ]
    kept = fold(*events, completed("one", turn="a"))
    assert kept.messages(until="b") == [user("1"), user("left!"), assistant("one"), user("2")]
    assert kept.messages(until="a") == [user("1"), user("left!")]
    rolled_back = fold(*events, cancelled("one", turn="a", rolled_back=True))
    assert rolled_back.messages(until="b") == [user("2")]


# --------------------------------------------------------------------------------------------------- properties


def folded(log: Log) -> History:
    history = History()
    for offset, event in log:
        history.apply(offset, event)
    return history


def shapes(history: History) -> list[dict[str, Any]]:
    return [shape(view) for view in history.turns.values()]


def test_a_replaced_turn_and_all_after_it_leave_the_conversation() -> None:
    history = fold(
        *exchange("a", "1", "one"), *exchange("b", "2", "two"), *exchange("c", "3", "three"),
        *exchange("d", "2, once more", "new", replaces="b"), requested("e", "5"),
    )  # fmt: skip
    assert replaced(history) == {"a": None, "b": "d", "c": "d", "d": None, "e": None}
    before = [user("1"), assistant("one"), user("2, once more")]
    assert history.messages(until="d") == before
    assert history.messages() == [*before, assistant("new")]
    assert history.messages(until="e") == [*before, assistant("new"), user("5")]
    assert history.turns["b"].message == said("two"), "it can still be read"


def test_what_was_replaced_keeps_its_first_mark() -> None:
    history = fold(
        *exchange("a", "1", "one"), *exchange("b", "1", "uno", replaces="a"), *exchange("c", "1", "eins", replaces="a")
    )
    assert replaced(history) == {"a": "b", "b": "c", "c": None}
    assert history.messages() == [user("1"), assistant("eins")]


@pytest.mark.parametrize("unknown", ["z", "b", "c"])
def test_a_turn_not_known_by_then_replaces_nothing(unknown: str) -> None:
    history = fold(*exchange("a", "1", "one"), *exchange("b", "2", "two", replaces=unknown), requested("c", "3"))
    assert replaced(history) == {"a": None, "b": None, "c": None}


def test_the_same_request_again_replaces_nothing() -> None:
    history = fold(*exchange("a", "1", "one"), *exchange("b", "2", "two"), requested("b", "2", replaces="a"))
    assert replaced(history) == {"a": None, "b": None}


@pytest.mark.parametrize(
    "end",
    [
        cancelled(turn="b", attempt=0),
        cancelled(turn="b", attempt=0, rolled_back=True),
        wire.TurnExpired(turn="b", turn_offset=4),
        wire.InputRejected(turn="b", offset=4, code="c", reason="r"),
    ],
)
def test_what_was_replaced_stays_so_whatever_becomes_of_the_request(end: wire.AnyEvent) -> None:
    history = fold(*exchange("a", "1", "one"), requested("b", "2", replaces="a"), end)
    assert replaced(history) == {"a": "b", "b": None}
    assert assistant("one") not in history.messages()


def test_a_turn_that_was_replaced_before_it_ran_has_its_own_input() -> None:
    history = fold(*exchange("a", "1", "one"), requested("b", "2"), requested("c", "3", replaces="b"))
    assert history.turns["b"].interrupted_by is None
    assert history.messages(until="b") == [user("1"), assistant("one"), user("2")]
    assert history.messages(until="c") == [user("1"), assistant("one"), user("3")]


def test_a_turn_interrupted_and_replaced_is_both() -> None:
    history = fold(requested("a", "1"), started(turn="a"), requested("b", "2", on_busy="interrupt", replaces="a"))
    assert (history.turns["a"].interrupted_by, history.turns["a"].replaced_by) == ("b", "b")
    assert history.messages(until="b") == [user("2")]


def test_steering_that_was_replaced_leaves_the_answer_that_took_it() -> None:
    history = fold(
        requested("a", "1"),
        started(turn="a"),
        requested("s", "left!", on_busy="steer"),
        wire.SteerConsumed(turn="a", attempt=1, steer="s", offset=3),
        requested("b", "right!", replaces="s"),
        completed("one", turn="a"),
    )
    assert history.messages(until="a") == [user("1"), user("left!")], "an attempt that goes on must know it"
    assert history.messages(until="b") == [user("1"), assistant("one"), user("right!")]


def test_turns_whose_requests_were_trimmed_are_replaced_in_their_order() -> None:
    history = fold(
        text("one", turn="a"), completed("one", turn="a"), text("two", turn="b"), requested("c", "3", replaces="b")
    )
    assert replaced(history) == {"a": None, "b": "c", "c": None}


@thorough
@given(sessions(), st.data())
def test_folding_on_after_reading_part_twice_is_folding_once(log: Log, data: st.DataObject) -> None:
    first, again = sorted(data.draw(st.integers(0, len(log))) for _ in range(2))
    history = folded(log[:again])
    for offset, event in log[first:]:
        history.apply(offset, event)
    assert shapes(history) == shapes(folded(log))
    assert history.messages() == folded(log).messages()


@thorough
@given(sessions())
def test_merged_deltas_fold_to_the_same(log: Log) -> None:
    merged: Log = []
    for offset, event in log:
        before = merged[-1][1] if merged else None
        if isinstance(event, wire.TextDelta | wire.ReasoningDelta) and type(before) is type(event):
            merged[-1] = (
                offset,
                type(event)(
                    turn=event.turn,
                    attempt=event.attempt,
                    text=before.text + event.text,
                    index=before.index,
                    count=before.count + event.count,
                ),
            )
        else:
            merged.append((offset, event))
    assert shapes(folded(merged)) == shapes(folded(log))


@thorough
@given(sessions(), st.integers(800, 1500))
def test_stored_whole_or_in_chunks_it_folds_to_the_same(log: Log, limit: int) -> None:
    history = History()
    pad = {"pad": 'x\n"é' * 300}
    wanted = History()
    for _, event in log:
        if isinstance(event, wire.ToolCall):
            event = wire.ToolCall(turn=event.turn, attempt=event.attempt, call=event.call, name="tool", input=pad)
        wanted.apply(wanted.offset + 1, event)
        known = not isinstance(event, wire.UnknownEvent)
        out = known and not isinstance(event, wire.TurnRequested | wire.TurnAnswer | wire.TurnCancel)
        bodies = wire.split(event, limit) if out else [wire.encode(event) if known else event.raw]
        for body in bodies:
            history.apply(history.offset + 1, wire.decode(body))
    assert [v.message for v in history.turns.values()] == [v.message for v in wanted.turns.values()]
    assert [v.state for v in history.turns.values()] == [v.state for v in wanted.turns.values()]


@thorough
@given(sessions())
def test_open_turns_are_those_that_have_not_ended(log: Log) -> None:
    history = History()
    for offset, event in log:
        history.apply(offset, event)
        assert history.open == [view for view in history.turns.values() if not view.ended]


def told(history: History) -> list[object]:
    views = [(v.id, v.offset, v.state, v.attempt, v.message, v.replaced_by, v.ended_at) for v in history.turns.values()]
    return [history.offset, views, history.messages()]


@thorough
@given(sessions(), st.data())
def test_a_fork_goes_on_as_if_it_had_folded_everything(log: Log, data: st.DataObject) -> None:
    history = History()
    forks: list[History] = []
    for offset, event in log:
        if history.calm and data.draw(st.booleans()):
            forks.append(history.fork())
        for fork in (history, *forks):
            fork.apply(offset, event)
    for fork in forks:
        assert told(fork) == told(history)


def test_a_fork_leaves_what_it_comes_from_alone() -> None:
    history = fold(*exchange("t1", "a", "b"), requested("t2"), requested("t3", replaces="t2"))
    before = told(history)
    fork = history.fork()
    for event in (started(turn="t2"), text("x", turn="t2"), wire.TurnCancel(turn="t3"), completed("y", turn="t2")):
        fork.apply(fork.offset + 1, event)
    assert told(history) == before
    assert history.calm
    assert not fork.calm
    assert fork.turns["t2"].replaced_by == "t3"


def test_an_answer_that_came_before_the_fork_belongs_to_its_turn() -> None:
    history = fold(requested("t"), wire.TurnAnswer(turn="t", request="r", value=1))
    fork = history.fork()
    assert fork.answered_by(2) is fork.turns["t"] is fork.at(1)
    assert fork.turns["t"] is not history.turns["t"]


def test_messages_are_the_callers_own() -> None:
    history = fold(requested("t1", input=[{"type": "text", "text": "hi"}]))
    history.messages(until="t1")[0]["content"][0]["text"] = "changed"
    assert history.messages(until="t1") == [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
