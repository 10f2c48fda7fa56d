from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import pytest
from scripted_owner import Owner, lag, make_broker, make_client, message

import agentrun
from agentrun import wire
from agentrun.broker import Entry, Kind
from agentrun.brokers.memory import MemoryBroker
from agentrun.client import Client, Session
from agentrun.errors import (
    InvalidInput,
    NotWaiting,
    QueueFull,
    SessionBusy,
    SessionGone,
    TooLarge,
    TurnFailed,
    TurnNotFound,
    Unavailable,
)


@pytest.fixture
def broker() -> MemoryBroker:
    return make_broker()


@pytest.fixture
def client(broker: MemoryBroker) -> Client:
    return make_client(broker)


@pytest.fixture
def session(client: Client) -> Session:
    return client.session("s")


@pytest.fixture
def owner(broker: MemoryBroker) -> Owner:
    return Owner(broker)


async def stored(broker: MemoryBroker, session: str = "s") -> list[Any]:
    return [wire.decode(r.body) for r in await broker.log.read(session)]


# -------------------------------------------------------------------------------------------------------------- send


async def test_a_turn_is_one_queued_record_that_carries_what_its_sender_said(
    broker: MemoryBroker, session: Session
) -> None:
    before = time.time()
    turn = await session.send(
        {"role": "user", "content": "hello"},
        agent="support",
        id="t1",
        deadline=60,
        user="ann",
        device="phone",
        parent="t0",
        replaces="t-1",
        metadata={"plan": ["a", 1]},
        trace={"traceparent": "00-1-2-03"},
    )
    (record,) = await broker.log.read("s")
    assert (record.offset, record.kind, record.agent, str(record.pending)) == (1, Kind.TURN, "support", "1")
    event = wire.decode(record.body)
    assert isinstance(event, wire.TurnRequested)
    assert event.deadline is not None
    assert before + 60 <= event.deadline <= time.time() + 60
    assert event == wire.TurnRequested(
        turn="t1",
        agent="support",
        input={"role": "user", "content": "hello"},
        deadline=event.deadline,
        user="ann",
        device="phone",
        parent="t0",
        replaces="t-1",
        metadata={"plan": ["a", 1]},
        trace={"traceparent": "00-1-2-03"},
    )
    assert (turn.id, turn.offset) == ("t1", 1)


async def test_a_deadline_may_be_a_time_with_a_timezone(broker: MemoryBroker, session: Session) -> None:
    at = datetime.now(UTC) + timedelta(hours=1)
    await session.send("hello", deadline=at)
    assert (await stored(broker))[0].deadline == at.timestamp()


async def test_ids_are_made_up_where_none_are_given(session: Session) -> None:
    first, second = await session.send("a"), await session.send("a")
    assert first.id != second.id
    assert (first.offset, second.offset) == (1, 2)


async def test_sending_again_returns_the_first_and_stores_nothing(broker: MemoryBroker, session: Session) -> None:
    first = await session.send("hello", id="t1", deadline=60)
    again = await session.send("hello", id="t1", deadline=60)
    assert again.offset == first.offset
    assert len(await stored(broker)) == 1


async def test_senders_of_the_same_turn_at_once_store_it_once(broker: MemoryBroker, client: Client) -> None:
    offsets: list[int | None] = []

    async def send() -> None:
        offsets.append((await client.session("s").send("hello", id="t1")).offset)

    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(send)
    assert offsets == [1] * 20
    assert len(await stored(broker)) == 1


@pytest.mark.parametrize("change", [{"input": "bye"}, {"agent": "other"}])
async def test_an_id_cannot_be_used_for_another_request(session: Session, change: dict[str, Any]) -> None:
    await session.send("hello", id="t1")
    with pytest.raises(InvalidInput, match="sent before, at offset 1"):
        await session.send(**{"input": "hello", "id": "t1", **change})


async def test_every_sender_gets_in_under_contention(broker: MemoryBroker, client: Client) -> None:
    async def send(number: int) -> None:
        await client.session("s").send(number, id=f"t{number}")

    async with anyio.create_task_group() as group:
        for number in range(60):
            group.start_soon(send, number)
    assert sorted(event.input for event in await stored(broker)) == list(range(60))
    tail = await broker.log.last("s")
    assert [entry.offset for entry in tail.pending] == list(range(1, 61))


async def test_a_sender_gets_in_beside_a_talking_owner(session: Session, owner: Owner) -> None:
    first = await session.send("talk", id="t1")
    await owner.start("t1", 1)

    async def talk() -> None:
        while True:
            tail = await owner.broker.log.last("s")
            body = wire.encode(wire.TextDelta(turn="t1", attempt=1, text="x"))
            try:
                await owner.broker.log.append("s", body, kind=Kind.DELTA, after=tail, pending=tail.pending)
            except agentrun.Conflict:
                continue

    async with anyio.create_task_group() as group:
        group.start_soon(talk)
        for number in range(20):
            await session.send(number)
        group.cancel_scope.cancel()
    events = [event async for event in session.events(follow=False)]
    assert [e.offset for e in events] == list(range(1, len(events) + 1))
    assert [e.data.input for e in events if isinstance(e.data, wire.TurnRequested)] == ["talk", *range(20)]
    assert first.offset == 1


@pytest.mark.parametrize(("policy", "flag"), [("enqueue", ""), ("steer", ""), ("interrupt", "w"), ("rollback", "w")])
async def test_policies_ride_on_the_turn_and_wake_what_they_stop(
    broker: MemoryBroker, session: Session, policy: wire.OnBusy, flag: str
) -> None:
    await session.send("first")
    await session.send("second", on_busy=policy)
    assert (await stored(broker))[1].on_busy == policy
    assert (await broker.log.last("s")).pending == (Entry(1, ""), Entry(2, flag))


async def test_reject_is_for_busy_sessions_only(session: Session, owner: Owner) -> None:
    await session.send("first", id="t1", on_busy="reject")
    with pytest.raises(SessionBusy):
        await session.send("second", id="t2", on_busy="reject")
    assert len(await stored(owner.broker)) == 1
    await owner.run("t1", 1, "hi")
    assert (await session.send("second", id="t2", on_busy="reject")).offset == 5


async def test_a_retried_reject_does_not_meet_itself(session: Session, owner: Owner) -> None:
    await session.send("first", id="t1", on_busy="reject")
    assert (await session.send("first", id="t1", on_busy="reject")).offset == 1
    await owner.run("t1", 1)
    await session.send("second", id="t2")
    # t1 is no longer pending, and the session is busy with another.
    assert (await session.send("first", id="t1", on_busy="reject")).offset == 1
    assert (await owner.broker.log.last("s")).offset == 4


async def test_a_full_queue_refuses_new_turns_but_knows_old_ones(broker: MemoryBroker) -> None:
    session = make_client(broker, max_queued=2).session("s")
    await session.send("a", id="t1")
    await session.send("b", id="t2")
    with pytest.raises(QueueFull, match="2 inputs"):
        await session.send("c", id="t3")
    assert (await session.send("b", id="t2")).offset == 2
    assert len(await stored(broker)) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"id": "a b"}, "a turn's id"),
        ({"agent": "a.b"}, "an agent's name"),
        ({"on_busy": "wait"}, "on_busy is one of"),
        ({"replaces": "a b"}, "the turn to replace"),
        ({"replaces": "t1", "on_busy": "steer"}, "replaces none"),
        ({"deadline": -1}, "has passed"),
        ({"deadline": 0}, "has passed"),
        ({"deadline": float("nan")}, "has passed"),
        ({"deadline": datetime(2100, 1, 1)}, "timezone"),
        ({"input": object()}, "cannot be JSON"),
        ({"input": {(1, 2): 3}}, "JSON"),
        ({"input": "\ud800"}, "cannot be JSON"),
        ({"metadata": {"x": lambda: 0}}, "cannot be JSON"),
        ({"user": 5}, "user"),
        ({"trace": {"a": 1}}, "trace"),
    ],
)
async def test_what_cannot_be_sent_is_said_before_anything_is_stored(
    broker: MemoryBroker, session: Session, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidInput, match=says):
        await session.send(**{"input": "hello", **arguments})
    assert await stored(broker) == []


async def test_an_agent_is_needed_from_somewhere(broker: MemoryBroker) -> None:
    client = Client(broker)
    with pytest.raises(InvalidInput, match="which agent"):
        await client.session("s").send("hello")
    await client.session("s", agent="a").send("hello")
    await client.session("s", agent="a").send("hello", agent="b")
    assert [e.agent for e in await stored(broker)] == ["a", "b"]


async def test_too_large_an_input_is_refused_with_the_limit() -> None:
    session = make_client(make_broker(max_body=500)).session("s")
    with pytest.raises(TooLarge, match="takes 500"):
        await session.send("x" * 1000)


@pytest.mark.parametrize("bad", ["", "a b", "a.b", "x" * 129, "*"])
def test_ids_are_checked(client: Client, bad: str) -> None:
    with pytest.raises(InvalidInput):
        client.session(bad)
    with pytest.raises(InvalidInput):
        client.turn("s", bad)


async def test_an_unknown_outcome_is_settled_by_sending_again(
    broker: MemoryBroker, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, calls = broker.log.append, 0

    async def unsure(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        tail = await append(*args, **options)
        if calls == 1:
            raise Unavailable("the answer was lost")
        return tail

    monkeypatch.setattr(broker.log, "append", unsure)
    assert (await session.send("hello", id="t1")).offset == 1
    assert calls == 2
    assert len(await stored(broker)) == 1


async def test_a_send_of_unknown_outcome_does_not_meet_itself_as_busy(
    broker: MemoryBroker, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = broker.log.append

    async def lossy(*args: Any, **options: Any) -> Any:
        await append(*args, **options)
        raise Unavailable("the answer was lost")

    monkeypatch.setattr(broker.log, "append", lossy)
    assert (await session.send("hello", on_busy="reject")).offset == 1
    assert len(await stored(broker)) == 1


async def test_a_broker_that_stays_away_is_given_up(broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(session: str) -> Any:
        raise Unavailable("the broker is away")

    monkeypatch.setattr(broker.log, "last", away)
    with pytest.raises(Unavailable, match="away"):
        await make_client(broker, send_timeout=0.3).session("s").send("hello")


# ----------------------------------------------------------------------------------------------------------- a turn


async def test_a_turn_s_events_are_its_own_and_end_by_themselves(session: Session, owner: Owner) -> None:
    first = await session.send("a", id="t1")
    second = await session.send("b", id="t2")
    await owner.run("t1", 1, "one", " two")
    await owner.run("t2", 2, "three")
    assert [(e.offset, e.type) for e in [e async for e in first.events()]] == [
        (1, "turn.requested"),
        (3, "turn.started"),
        (4, "text.delta"),
        (5, "text.delta"),
        (6, "turn.completed"),
    ]
    assert [e.offset async for e in second.events()] == [2, 7, 8, 9]


async def test_a_turn_s_events_span_its_attempts_and_come_live(session: Session, owner: Owner) -> None:
    turn = await session.send("a", id="t1")
    seen: list[str] = []

    async def read() -> None:
        seen.extend([event.type async for event in turn.events()])

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await owner.start("t1", 1)
            await owner.say("half")
            await owner.start("t1", 1, attempt=2, message=message("half"))
            await owner.say("whole")
            await owner.end()
    assert seen == [
        "turn.requested",
        "turn.started",
        "text.delta",
        "turn.started",
        "text.delta",
        "turn.completed",
    ]


async def test_a_result_waits_and_holds_the_answer(session: Session, owner: Owner) -> None:
    turn = await session.send("a", id="t1")
    with pytest.raises(TimeoutError):
        await turn.result(timeout=0.02)
    await owner.start("t1", 1)
    await owner.say("he", "llo")
    end = await owner.end(finish_reason="length", usage=wire.Usage(input_tokens=3, output_tokens=2))
    result = await turn.result(timeout=5)
    assert (result.text, result.offset, result.attempt, result.finish_reason) == ("hello", end, 1, "length")
    assert result.usage == wire.Usage(input_tokens=3, output_tokens=2)


@pytest.mark.parametrize(
    ("cls", "fields", "state", "code", "says", "retryable"),
    [
        (wire.TurnCancelled, {"by": "ann", "reason": "enough"}, "cancelled", "cancelled", "by ann: enough", False),
        (wire.TurnCancelled, {}, "cancelled", "cancelled", "stopped", False),
        (
            wire.TurnFailed,
            {"error": wire.ErrorInfo("overloaded", "come back later", True)},
            "failed",
            "overloaded",
            "come back",
            True,
        ),
        (wire.TurnExpired, {"reason": "nobody answered"}, "expired", "expired", "nobody answered", False),
    ],
)
async def test_a_turn_that_did_not_complete_says_why(
    session: Session,
    owner: Owner,
    cls: Any,
    fields: dict[str, Any],
    state: str,
    code: str,
    says: str,
    retryable: bool,
) -> None:
    turn = await session.send("a", id="t1")
    await owner.start("t1", 1)
    await owner.end(cls, **fields)
    with pytest.raises(TurnFailed, match=says) as failed:
        await turn.result(timeout=5)
    assert (failed.value.state, failed.value.code, failed.value.retryable) == (state, code, retryable)


async def test_a_rejected_turn_ends_with_the_reason(session: Session, owner: Owner) -> None:
    turn = await session.send("a", id="t1")
    event = wire.InputRejected(offset=1, code="undecodable", reason="not an event")
    await owner.append(event, lambda pending: pending.settle(1))
    assert [e.type async for e in turn.events()] == ["turn.requested", "input.rejected"]
    with pytest.raises(TurnFailed, match="not an event") as failed:
        await turn.result(timeout=5)
    assert failed.value.state == "rejected"


async def test_a_bare_handle_finds_its_turn(client: Client, owner: Owner) -> None:
    session = client.session("s")
    await session.send("a", id="t1")
    await session.send("b", id="t2")
    await owner.run("t1", 1)
    await owner.run("t2", 2, "hi")
    turn = client.turn("s", "t2")
    assert (await turn.result(timeout=5)).text == "hi"
    assert turn.offset == 2
    with pytest.raises(TurnNotFound, match="no turn t3"):
        await client.turn("s", "t3").result(timeout=5)


async def test_a_trimmed_turn_is_not_found(session: Session, owner: Owner) -> None:
    turn = await session.send("a", id="t1")
    await owner.run("t1", 1)
    await session.send("b", id="t2")
    owner.broker.state.trim("s", 2)
    with pytest.raises(TurnNotFound, match="trimmed"):
        await turn.result(timeout=5)
    with pytest.raises(TurnNotFound, match="trimmed"):
        [e async for e in turn.events()]


# ------------------------------------------------------------------------------------------------------------ steering


async def test_a_steer_that_is_taken_in_says_by_whom(session: Session, owner: Owner) -> None:
    turn = await session.send("write", id="t1")
    await owner.start("t1", 1)
    steer = await turn.steer("in French", id="t2", user="ann")
    assert (await stored(owner.broker))[2] == wire.TurnRequested(
        turn="t2", agent="echo", input="in French", user="ann", on_busy="steer"
    )
    with pytest.raises(TimeoutError):
        await steer.consumed_by(timeout=0.02)
    assert steer.offset is not None
    await owner.append(
        wire.SteerConsumed(turn="t1", attempt=1, steer="t2", offset=steer.offset),
        lambda pending: pending.settle(3),
    )
    assert await steer.consumed_by(timeout=5) == "t1"
    assert [e.type async for e in steer.events()] == ["turn.requested", "steer.consumed"]
    with pytest.raises(TurnFailed, match="part of turn t1") as failed:
        await steer.result(timeout=5)
    assert failed.value.state == "consumed"


async def test_a_steer_that_is_not_taken_in_is_a_turn_of_its_own(session: Session, owner: Owner) -> None:
    turn = await session.send("write", id="t1")
    await owner.start("t1", 1)
    steer = await turn.steer("in French", id="t2")
    await owner.end()
    await owner.run("t2", 3, "oui")
    assert await steer.consumed_by(timeout=5) is None
    assert (await steer.result(timeout=5)).text == "oui"


async def test_a_steer_that_is_stopped_before_it_ran_was_not_taken_in(session: Session, owner: Owner) -> None:
    turn = await session.send("write", id="t1")
    await owner.start("t1", 1)
    steer = await turn.steer("in French", id="t2")
    owner.turn, owner.at = "t2", 3
    await owner.end(wire.TurnCancelled)
    assert await steer.consumed_by(timeout=5) is None


# ------------------------------------------------------------------------------------------------------------ answers


async def test_an_answer_wakes_the_turn_s_agent(session: Session, owner: Owner) -> None:
    turn = await session.send("delete all", id="t1", agent="admin")
    await owner.start("t1", 1)
    await owner.ask("q1")
    await owner.suspend("q1")
    offset = await turn.answer("q1", {"approved": True, "reason": "sure"}, user="ann")
    record = (await owner.broker.log.read("s"))[-1]
    assert (record.offset, record.kind, record.agent, str(record.pending)) == (
        offset,
        Kind.TURN,
        "admin",
        f"1p,{offset}w",
    )
    assert wire.decode(record.body) == wire.TurnAnswer(
        turn="t1", request="q1", value={"approved": True, "reason": "sure"}, user="ann"
    )


async def test_a_question_that_a_lagging_server_does_not_know_is_answered_all_the_same(
    session: Session, broker: MemoryBroker, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    await session.send("a", id="t1")
    await owner.start("t1", 1)
    await owner.ask("q1")
    await owner.ask("q2")
    for request, through in (("q1", 0), ("q2", 2)):  # neither the turn is known, nor the question
        with monkeypatch.context() as patch:
            lag(broker, patch, through=through)
            await session.turn("t1").answer(request, True)
    assert (await session.turn("t1").view()).questions["q2"].answer is not None


async def test_a_turn_that_a_lagging_server_does_not_know_is_seen(
    session: Session, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = await session.send("a", id="t1")
    lag(broker, monkeypatch, through=0)
    assert (await turn.view()).state == "queued"


async def test_the_first_answer_wins(broker: MemoryBroker, owner: Owner) -> None:
    await make_client(broker).session("s").send("delete all", id="t1")
    await owner.start("t1", 1)
    await owner.ask("q1")
    outcomes: list[str] = []

    async def answer(user: str, value: bool) -> None:
        turn = make_client(broker).turn("s", "t1")
        try:
            await turn.answer("q1", value, user=user)
            outcomes.append(user)
        except NotWaiting as error:
            outcomes.append(str(error))

    async with anyio.create_task_group() as group:
        group.start_soon(answer, "ann", True)
        group.start_soon(answer, "bob", False)
    first, second = sorted(outcomes, key=len)
    assert first in ("ann", "bob")
    assert second == f"question q1 was answered by {first} first"
    assert [e.type for e in await stored(broker)].count("turn.answer") == 1


async def test_the_same_answer_again_changes_nothing(session: Session, owner: Owner) -> None:
    turn = await session.send("delete all", id="t1")
    await owner.start("t1", 1)
    await owner.ask("q1")
    offset = await turn.answer("q1", True, user="ann")
    assert await turn.answer("q1", True, user="ann") == offset
    with pytest.raises(NotWaiting):
        await turn.answer("q1", False, user="ann")
    with pytest.raises(NotWaiting, match="by ann first"):
        await turn.answer("q1", True, user="bob")
    assert (await owner.broker.log.last("s")).offset == offset


async def test_an_answer_whose_outcome_was_lost_is_found(
    session: Session, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = await session.send("delete all", id="t1")
    await owner.start("t1", 1)
    await owner.ask("q1")
    append = owner.broker.log.append

    async def lossy(*args: Any, **options: Any) -> Any:
        await append(*args, **options)
        raise Unavailable("the answer was lost")

    monkeypatch.setattr(owner.broker.log, "append", lossy)
    assert await turn.answer("q1", True) == 4
    assert (await owner.broker.log.last("s")).offset == 4


@pytest.mark.parametrize(
    ("kind", "fields", "good", "bad"),
    [
        ("approval", {}, [True, False, {"approved": False, "reason": "no"}], ["yes", 1, {"approved": 1}, {"ok": True}]),
        ("approval", {}, [{"approved": True}], [None, {"approved": True, "reason": 3}]),
        ("choice", {"choices": ["red", "blue"]}, ["blue"], ["green", 0, ["red"]]),
        ("text", {}, ["", "anything"], [1, None, {"text": "x"}]),
        ("tool", {"tool": "locate", "input": {}}, [None, {"lat": 1.5}, [1]], [object()]),
    ],
)
async def test_an_answer_must_fit_its_question(
    session: Session, owner: Owner, kind: wire.AskKind, fields: dict[str, Any], good: list[Any], bad: list[Any]
) -> None:
    turn = await session.send("a", id="t1")
    await owner.start("t1", 1)
    for number, value in enumerate(good):
        await owner.ask(f"q{number}", kind, **fields)
        end = await owner.broker.log.last("s")
        for wrong in bad:
            with pytest.raises(InvalidInput):
                await turn.answer(f"q{number}", wrong)
        assert await owner.broker.log.last("s") == end
        await turn.answer(f"q{number}", value)
        assert (await stored(owner.broker))[-1].value == value


async def test_what_is_not_waiting_says_so(session: Session, owner: Owner, client: Client) -> None:
    turn = await session.send("a", id="t1")
    await owner.start("t1", 1)
    await owner.ask("q1")
    with pytest.raises(NotWaiting, match=r"no question q2 \(its questions: q1\)"):
        await turn.answer("q2", True)
    with pytest.raises(TurnNotFound):
        await client.turn("s", "t9").answer("q1", True)
    await owner.end()
    with pytest.raises(NotWaiting, match="ended"):
        await turn.answer("q1", True)


# ---------------------------------------------------------------------------------------------------- history, delete


async def test_history_and_events_join_without_a_seam(session: Session, owner: Owner) -> None:
    await session.send("a", id="t1")
    await owner.run("t1", 1, "one")
    await session.send("b", id="t2")
    await owner.start("t2", 5)
    await owner.say("two", " three")
    history = await session.history()
    assert history.offset == 8
    assert history.turns["t1"].message == message("one")
    assert history.turns["t2"].message == message("two three")
    assert (history.turns["t1"].state, history.turns["t2"].state) == ("completed", "running")
    await owner.say(" four")
    await owner.end()
    async for event in session.events(history.offset, follow=False):
        history.apply(event.offset, event.data, time=event.time)
    assert history.turns["t2"].message == message("two three four")
    assert history.messages() == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "two three four"},
    ]


async def test_history_goes_on_from_the_last_message_stored_whole(session: Session, owner: Owner) -> None:
    await session.send("a", id="t1")
    await owner.start("t1", 1)
    await owner.say("one", " two")
    await owner.emit(wire.TurnCheckpoint(message=message("one two")))
    end = await owner.say(" three")
    history = await session.history()
    assert (history.offset, history.turns["t1"].message) == (end, message("one two three"))


async def test_the_history_of_nothing_is_empty(session: Session) -> None:
    history = await session.history()
    assert (history.offset, history.turns, history.messages()) == (0, {}, [])


async def test_a_deleted_session_begins_anew(session: Session, owner: Owner) -> None:
    await session.send("a", id="t1")
    await owner.run("t1", 1, "secret")
    await session.delete()
    assert [e async for e in session.events(follow=False)] == []
    with pytest.raises(SessionGone, match="before 4"):
        [e async for e in session.events(4, follow=False)]
    assert (await session.send("a", id="t1")).offset == 1


async def test_a_turn_of_a_session_that_was_deleted_since_is_not_waited_for(client: Client) -> None:
    session = client.session("s", agent="a")
    turn = await session.send("x")
    await session.delete()
    with pytest.raises(SessionGone), anyio.fail_after(20):
        await turn.result()
    with pytest.raises(SessionGone), anyio.fail_after(20):
        await anext(turn.events())


async def test_who_follows_a_session_that_is_deleted_is_told(session: Session) -> None:
    await session.send("a", id="t1")
    async with session.follow() as events:
        await anext(events)
        await session.delete()
        with pytest.raises(SessionGone), anyio.fail_after(20):
            await anext(events)


def test_the_stored_form_is_plain_json(session: Session) -> None:
    async def main() -> None:
        await session.send("hello", id="t1")
        (event,) = [e async for e in session.events(follow=False)]
        assert json.loads(event.raw) == {"type": "turn.requested", "turn": "t1", "agent": "echo", "input": "hello"}
        assert "turn.requested" in repr(event)

    anyio.run(main)
