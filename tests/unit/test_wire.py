"""The wire: every event's bytes, what is let pass, and pieces of what is too large."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentrun import wire
from agentrun.errors import InvalidInput

M = wire.Message(
    parts=[
        wire.TextPart("Héllo"),
        wire.ReasoningPart("hm"),
        wire.ToolPart("c1", "f", {"a": 1}, None),
        wire.ToolPart("c2", "g", input_text='{"a'),
        wire.ToolPart("c3", "h", [], error="no"),
        wire.DataPart("d", {"x": 1}, "i"),
        wire.SourcePart("https://e.org", "T", "s"),
        wire.FilePart("https://e.org/f", "text/plain", "f.txt"),
    ]
)
M_JSON = (
    '{"parts":[{"type":"text","text":"Héllo"},{"type":"reasoning","text":"hm"},'
    '{"type":"tool","call":"c1","name":"f","input":{"a":1},"output":null},'
    '{"type":"tool","call":"c2","name":"g","input_text":"{\\"a"},'
    '{"type":"tool","call":"c3","name":"h","input":[],"error":"no"},'
    '{"type":"data","name":"d","data":{"x":1},"id":"i"},'
    '{"type":"source","url":"https://e.org","title":"T","id":"s"},'
    '{"type":"file","url":"https://e.org/f","media_type":"text/plain","name":"f.txt"}]}'
)
TA: dict[str, Any] = {"turn": "t", "attempt": 1}
ERROR = wire.ErrorInfo("c", "m", retryable=True)
USAGE = wire.Usage(1, 2, 3, 4)
USAGE_JSON = '{"input_tokens":1,"output_tokens":2,"cached_tokens":3,"reasoning_tokens":4}'
TRACE = {"traceparent": "00-1"}

# @M stands for M_JSON, @U for USAGE_JSON.
GOLDEN: list[tuple[wire.KnownEvent, str]] = [
    (
        wire.TurnRequested(turn="t", agent="a", input="hi"),
        '{"type":"turn.requested","turn":"t","agent":"a","input":"hi"}',
    ),
    (
        wire.TurnRequested(
            turn="t",
            agent="a",
            input=None,
            user="u",
            device="d",
            on_busy="steer",
            deadline=1.5,
            parent="p",
            replaces="r",
            metadata={"k": 1},
            trace=TRACE,
        ),
        '{"type":"turn.requested","turn":"t","agent":"a","input":null,"user":"u","device":"d","on_busy":"steer",'
        '"deadline":1.5,"parent":"p","replaces":"r","metadata":{"k":1},"trace":{"traceparent":"00-1"}}',
    ),
    (
        wire.TurnAnswer(turn="t", request="r", value=True, user="u", trace=TRACE),
        '{"type":"turn.answer","turn":"t","request":"r","value":true,"user":"u","trace":{"traceparent":"00-1"}}',
    ),
    (
        wire.TurnCancel(turn="t", by="u", reason="why", trace=TRACE),
        '{"type":"turn.cancel","turn":"t","by":"u","reason":"why","trace":{"traceparent":"00-1"}}',
    ),
    (wire.TurnCancel(all=True), '{"type":"turn.cancel","all":true}'),
    (
        wire.TurnStarted(**TA, worker="w", lease="l"),
        '{"type":"turn.started","turn":"t","attempt":1,"worker":"w","lease":"l"}',
    ),
    (
        wire.TurnStarted(turn="t", attempt=2, worker="w", lease="l", resumes_from=7, message=M, trace={"t": "x"}),
        '{"type":"turn.started","turn":"t","attempt":2,"worker":"w","lease":"l","resumes_from":7,"message":@M,"trace":{"t":"x"}}',
    ),
    (wire.TextDelta(**TA, text="é\n"), '{"type":"text.delta","turn":"t","attempt":1,"text":"é\\n"}'),
    (
        wire.TextDelta(**TA, text="a", index=5, count=2),
        '{"type":"text.delta","turn":"t","attempt":1,"text":"a","index":5,"count":2}',
    ),
    (
        wire.ReasoningDelta(**TA, text="a", index=5, count=2),
        '{"type":"reasoning.delta","turn":"t","attempt":1,"text":"a","index":5,"count":2}',
    ),
    (
        wire.ToolInputDelta(**TA, call="c", text="{", name="f"),
        '{"type":"tool.input.delta","turn":"t","attempt":1,"call":"c","text":"{","name":"f"}',
    ),
    (
        wire.ToolCall(**TA, call="c", name="f", input={"a": [1, None]}),
        '{"type":"tool.call","turn":"t","attempt":1,"call":"c","name":"f","input":{"a":[1,null]}}',
    ),
    (
        wire.ToolProgress(**TA, call="c", data=0.5),
        '{"type":"tool.progress","turn":"t","attempt":1,"call":"c","data":0.5}',
    ),
    (
        wire.ToolResult(**TA, call="c", output={"a": 1}),
        '{"type":"tool.result","turn":"t","attempt":1,"call":"c","output":{"a":1}}',
    ),
    (
        wire.ToolResult(**TA, call="c", error="no"),
        '{"type":"tool.result","turn":"t","attempt":1,"call":"c","error":"no"}',
    ),
    (
        wire.Data(**TA, name="d", data=1, id="i", transient=True),
        '{"type":"data","turn":"t","attempt":1,"name":"d","data":1,"id":"i","transient":true}',
    ),
    (
        wire.Source(**TA, url="u", title="T", id="s"),
        '{"type":"source","turn":"t","attempt":1,"url":"u","title":"T","id":"s"}',
    ),
    (
        wire.File(**TA, url="u", media_type="m", name="n"),
        '{"type":"file","turn":"t","attempt":1,"url":"u","media_type":"m","name":"n"}',
    ),
    (
        wire.InputRequired(**TA, request="r", kind="approval"),
        '{"type":"input.required","turn":"t","attempt":1,"request":"r","kind":"approval"}',
    ),
    (
        wire.InputRequired(
            **TA,
            request="r",
            kind="tool",
            prompt="p",
            choices=["a", "b"],
            call="c",
            tool="f",
            input={"a": 1},
            deadline=2.5,
        ),
        '{"type":"input.required","turn":"t","attempt":1,"request":"r","kind":"tool","prompt":"p","choices":["a","b"],'
        '"call":"c","tool":"f","input":{"a":1},"deadline":2.5}',
    ),
    (
        wire.TurnSuspended(**TA, requests=["r"], message=M, usage=USAGE, until=3.5),
        '{"type":"turn.suspended","turn":"t","attempt":1,"requests":["r"],"message":@M,"usage":@U,"until":3.5}',
    ),
    (
        wire.TurnResumed(**TA, request="r", answer=9),
        '{"type":"turn.resumed","turn":"t","attempt":1,"request":"r","answer":9}',
    ),
    (
        wire.TurnRetrying(**TA, error=ERROR, after=2.0, usage=USAGE),
        '{"type":"turn.retrying","turn":"t","attempt":1,"error":{"code":"c","message":"m","retryable":true},'
        '"after":2.0,"usage":@U}',
    ),
    (wire.TurnReleased(**TA), '{"type":"turn.released","turn":"t","attempt":1}'),
    (
        wire.TurnReleased(**TA, reason="move", usage=USAGE),
        '{"type":"turn.released","turn":"t","attempt":1,"reason":"move","usage":@U}',
    ),
    (
        wire.TurnLost(**TA, worker="w1", by="w2"),
        '{"type":"turn.lost","turn":"t","attempt":1,"worker":"w1","by":"w2"}',
    ),
    (
        wire.TurnCheckpoint(**TA, message=M),
        '{"type":"turn.checkpoint","turn":"t","attempt":1,"message":@M}',
    ),
    (
        wire.SteerConsumed(**TA, steer="s", offset=4),
        '{"type":"steer.consumed","turn":"t","attempt":1,"steer":"s","offset":4}',
    ),
    (
        wire.InputRejected(offset=4, code="c", reason="why"),
        '{"type":"input.rejected","offset":4,"code":"c","reason":"why"}',
    ),
    (
        wire.Chunk(**TA, index=0, total=2, data='{"a'),
        '{"type":"chunk","turn":"t","attempt":1,"index":0,"total":2,"data":"{\\"a"}',
    ),
    (
        wire.TurnCompleted(**TA, turn_offset=1, message=M, usage=USAGE, finish_reason="length"),
        '{"type":"turn.completed","turn":"t","attempt":1,"turn_offset":1,"message":@M,"usage":@U,'
        '"finish_reason":"length"}',
    ),
    (
        wire.TurnCancelled(turn="t", turn_offset=1),
        '{"type":"turn.cancelled","turn":"t","turn_offset":1,"message":{"parts":[]}}',
    ),
    (
        wire.TurnCancelled(**TA, turn_offset=1, message=M, usage=USAGE, by="u", reason="why", rolled_back=True),
        '{"type":"turn.cancelled","turn":"t","attempt":1,"turn_offset":1,"message":@M,"usage":@U,"by":"u","reason":"why",'
        '"rolled_back":true}',
    ),
    (
        wire.TurnFailed(**TA, turn_offset=1, usage=USAGE, error=wire.ErrorInfo("c", "m")),
        '{"type":"turn.failed","turn":"t","attempt":1,"turn_offset":1,"message":{"parts":[]},"usage":@U,"error":{"code":"c","message":"m"}}',
    ),
    (
        wire.TurnExpired(**TA, turn_offset=1, usage=USAGE, reason="late"),
        '{"type":"turn.expired","turn":"t","attempt":1,"turn_offset":1,"message":{"parts":[]},"usage":@U,"reason":"late"}',
    ),
    (
        wire.Snapshot(**TA, from_=3, to=9, message=M),
        '{"type":"snapshot","turn":"t","attempt":1,"from":3,"to":9,"message":@M}',
    ),
    (wire.Gap(from_=3, to=9), '{"type":"gap","from":3,"to":9}'),
    (wire.Gap(from_=1, to=9, reason="trimmed"), '{"type":"gap","from":1,"to":9,"reason":"trimmed"}'),
]


@pytest.mark.parametrize(("event", "body"), GOLDEN, ids=[e.type for e, _ in GOLDEN])
def test_the_bytes_of_each_event(event: wire.KnownEvent, body: str) -> None:
    stored = body.replace("@M", M_JSON).replace("@U", USAGE_JSON).encode()
    assert wire.encode(event) == stored
    assert wire.decode(stored) == event


def test_every_event_has_its_bytes_pinned() -> None:
    assert {type(event) for event, _ in GOLDEN} == set(get_args(wire.KnownEvent))


def test_every_field_of_every_event_is_pinned() -> None:
    for cls in get_args(wire.KnownEvent):
        seen = {name for event, _ in GOLDEN if type(event) is cls for name in json.loads(wire.encode(event))} - {"type"}
        wanted = set(cls.__struct_encode_fields__)
        if cls is wire.InputRejected:
            wanted -= {"turn", "attempt"}
        assert seen == wanted, cls.__name__


def test_fields_that_are_not_known_are_skipped() -> None:
    body = b'{"type":"text.delta","turn":"t","attempt":1,"text":"a","mood":"good"}'
    assert wire.decode(body) == wire.TextDelta(turn="t", attempt=1, text="a")


def test_an_event_of_a_type_that_is_not_known_is_passed_on() -> None:
    body = b'{"turn":"t","type":"turn.dreamt","about":["sheep"]}'
    assert wire.decode(body) == wire.UnknownEvent("turn.dreamt", body)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"", "not an event"),
        (b"\xff", "not an event"),
        (b"[]", "not an event"),
        (b'{"turn":"t"}', "not an event"),
        (b'{"type":1}', "not an event"),
        (b'{"type":"text.delta","turn":"t"}', r"not a valid text\.delta event.*text"),
        (b'{"type":"text.delta","text":1}', r"not a valid text\.delta event"),
        (b'{"type":"turn.requested","turn":"t","agent":"a","input":1,"on_busy":"panic"}', "not a valid"),
    ],
)
def test_what_is_no_event_is_refused_with_the_reason(body: bytes, what: str) -> None:
    with pytest.raises(InvalidInput, match=what):
        wire.decode(body)


@pytest.mark.parametrize("good", ["a", "A-z_09", "x" * 128])
def test_ids(good: str) -> None:
    assert wire.check_id("turn", good) == good


@pytest.mark.parametrize("bad", ["", "x" * 129, "a.b", "a b", "a\n", "é", "a*", ">"])
def test_what_is_no_id(bad: str) -> None:
    with pytest.raises(InvalidInput, match="turn must be 1 to 128 characters"):
        wire.check_id("turn", bad)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(json_values, st.text(), st.booleans())
def test_what_is_encoded_is_decoded(value: Any, text: str, with_id: bool) -> None:
    part = wire.ToolPart("c", text, value, value) if with_id else wire.DataPart("d", value)
    for event in (
        wire.TurnRequested(turn="t", agent="a", input=value, metadata={text: value}),
        wire.ToolCall(turn="t", attempt=1, call="c", name=text, input=value),
        wire.ToolResult(turn="t", attempt=1, call="c", output=value),
        wire.InputRequired(turn="t", attempt=1, request="r", kind="tool", input=value),
        wire.TurnCompleted(turn="t", attempt=1, turn_offset=1, message=wire.Message(parts=[part, wire.TextPart(text)])),
    ):
        assert wire.decode(wire.encode(event)) == event


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.text(st.sampled_from('a"\\\n\x01é😀'), min_size=1).map(lambda text: text * 200),
    st.integers(700, 4000),
    st.text("t", min_size=1, max_size=128),
)
def test_pieces_keep_the_limit_and_are_joined_again(text: str, limit: int, turn: str) -> None:
    event = wire.ToolResult(turn=turn, attempt=1, call="c", output=text)
    bodies = wire.split(event, limit)
    assert all(len(body) <= limit for body in bodies)
    assert (len(bodies) == 1) == (len(wire.encode(event)) <= limit)
    joiner = wire.Joiner()
    joined = [joiner.feed(wire.decode(body)) for body in bodies]
    assert joined == [None] * (len(bodies) - 1) + [event]


def test_pieces_with_an_input_between_and_after_a_run_that_broke_off() -> None:
    event = wire.ToolResult(turn="t", attempt=1, call="c", output="x" * 3000)
    pieces = [wire.decode(body) for body in wire.split(event, 1000)]
    stop = wire.TurnCancel(all=True)
    joiner = wire.Joiner()
    assert joiner.feed(pieces[0]) is None
    assert [joiner.feed(e) for e in (*pieces[:2], stop, *pieces[2:])] == [
        None,
        None,
        stop,
        *[None] * (len(pieces) - 3),
        event,
    ]


def test_pieces_whose_beginning_was_not_seen_are_not_joined() -> None:
    event = wire.ToolResult(turn="t", attempt=1, call="c", output="x" * 3000)
    pieces = [wire.decode(body) for body in wire.split(event, 1000)]
    joiner = wire.Joiner()
    assert [joiner.feed(e) for e in pieces[1:]] == [*[None] * (len(pieces) - 2), pieces[-1]]
    assert [joiner.feed(e) for e in pieces][-1] == event
