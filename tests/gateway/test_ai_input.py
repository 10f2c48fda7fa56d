"""What is made of a POST."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrun import wire
from agentrun.gateway import ai_input
from agentrun.gateway.ai_input import Run, run_id, run_of, session_of
from agentrun.gateway.problems import Problem
from agentrun.history import History
from tests.gateway.ai_http import user


def post(*messages: dict[str, Any], **fields: Any) -> ai_input.Post:
    return ai_input.parse_post(json.dumps({"id": "s", "messages": list(messages), **fields}).encode())


def log(*events: wire.AnyEvent) -> History:
    history = History()
    for offset, event in enumerate(events, 1):
        history.apply(offset, event)
    return history


def sent(turn: str, text: str = "x", replaces: str | None = None, **metadata: Any) -> wire.TurnRequested:
    return wire.TurnRequested(turn=turn, agent="a", input=text, replaces=replaces, metadata=metadata)


@given(st.text(min_size=1, max_size=20))
def test_a_chat_id_names_one_session_and_can_be_had_back(chat: str) -> None:
    session = session_of(chat)
    wire.check_id("a session", session)
    if session != chat:
        coded = session.removeprefix("c_")
        assert base64.urlsafe_b64decode(coded + "=" * (-len(coded) % 4)).decode("utf-8", "surrogatepass") == chat


def test_chat_ids_that_are_none() -> None:
    for chat in ("", "é" * 100):
        with pytest.raises(Problem) as refused:
            session_of(chat)
        assert refused.value.status == 422


@given(st.binary(max_size=300))
def test_no_body_is_more_than_refused(body: bytes) -> None:
    try:
        ai_input.parse_post(body)
    except Problem as problem:
        assert 400 <= problem.status < 500  # noqa: PT017


PARTS = ["type", "text", "url", "mediaType", "toolCallId", "state", "approval", "id", "approved", "output", "reason"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(PARTS), inner, max_size=5),
    max_leaves=20,
)


@given(
    st.lists(st.dictionaries(st.sampled_from(PARTS), JSON, max_size=6), max_size=4),
    st.sampled_from(["user", "assistant"]),
)
def test_no_parts_are_more_than_refused(parts: list[dict[str, Any]], role: str) -> None:
    history = log(
        sent("t"),
        wire.TurnStarted(turn="t", attempt=1, worker="w", lease="l"),
        wire.InputRequired(turn="t", attempt=1, request="q", kind="approval", call="c"),
        wire.InputRequired(turn="t", attempt=1, request="r", kind="tool"),
    )
    try:
        posted = post({"id": "msg_t", "role": role, "parts": parts})
        if role == "user":
            ai_input.send_of(posted, "s", history)
        else:
            ai_input.answers_of(posted, history)
    except Problem as problem:
        assert problem.status == 422  # noqa: PT017


def test_runs() -> None:
    for run in (Run("s", "t"), Run("s_-", "t-1", 17)):
        assert run_of(run_id(run)) == run
    for text in ("s", "s~", "~t", "s~t~", "s~t~x", "s~t~1~2", "a/b~t"):
        assert run_of(text) is None


def test_a_new_message_is_a_turn_of_its_id() -> None:
    send = ai_input.send_of(post(user("hi", "u-1")), "s", None)
    assert (send.turn, send.input, send.replaces) == ("u-1", "hi", None)
    odd = ai_input.send_of(post(user("hi", "u 1")), "s", None)
    assert odd.turn.startswith("m_")
    assert odd.turn == ai_input.send_of(post(user("hi", "u 1")), "s", None).turn
    assert odd.turn != ai_input.send_of(post(user("hi", "u 1")), "other", None).turn


def test_an_edit_replaces_the_turn_of_that_message() -> None:
    history = log(sent("u-1", message_id="u-1"), sent("u-2", message_id="u-2"))
    edit = ai_input.send_of(post(user("new", "u-1"), messageId="u-1"), "s", history)
    assert (edit.replaces, edit.agent) == ("u-1", "a")
    history.apply(3, sent(edit.turn, "new", "u-1", message_id="u-1"))
    again = ai_input.send_of(post(user("new", "u-1"), messageId="u-1"), "s", history)
    assert (again.turn, again.replaces) == (edit.turn, "u-1"), "posted again, it is the same turn"
    other = ai_input.send_of(post(user("newer", "u-1"), messageId="u-1"), "s", history)
    assert (other.replaces, other.turn != edit.turn) == (edit.turn, True)


def test_a_regeneration_replaces_the_turn_whose_answer_it_names() -> None:
    history = log(sent("u-1"), sent("u-2"))
    fields = {"trigger": "regenerate-message"}
    last = ai_input.send_of(post(user("x", "u-1"), user("x", "u-2"), **fields), "s", history)
    assert last.replaces == "u-2"
    named = ai_input.send_of(post(user("x", "u-1"), messageId="msg_u-1", **fields), "s", history)
    assert named.replaces == "u-1"
    history.apply(3, sent(named.turn, "x", "u-1", message_id="u-1"))
    assert ai_input.send_of(post(user("x", "u-1"), messageId="msg_u-1", **fields), "s", history) == named
    anew = ai_input.send_of(post(user("x", "u-1"), **fields), "s", history)
    assert anew.replaces == named.turn
    unknown = ai_input.send_of(post(user("x", "u-9"), **fields), "s", history)
    assert (unknown.turn, unknown.replaces) == ("u-9", None)


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("hi", [{"type": "text", "text": "hi"}]),
        ({"role": "user", "content": "hi"}, [{"type": "text", "text": "hi"}]),
        ({"odd": 1}, [{"type": "text", "text": '{"odd":1}'}]),
        ([{"type": "input_audio", "n": 1}], [{"type": "text", "text": '{"type":"input_audio","n":1}'}]),
        (
            [{"type": "file", "file": {"file_data": "data:,x"}}],
            [{"type": "file", "url": "data:,x", "mediaType": "application/octet-stream"}],
        ),
    ],
)
def test_a_turn_that_was_sent_otherwise_is_a_message_too(value: Any, parts: list[dict[str, Any]]) -> None:
    view = log(wire.TurnRequested(turn="t", agent="a", input=value)).turns["t"]
    assert ai_input.user_message(view) == {"id": "t", "role": "user", "parts": parts}
