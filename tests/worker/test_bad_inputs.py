"""P10: an input that cannot be used is refused with its reason, and the session goes on."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import pytest

from agentrun import wire
from agentrun.agent import Context, agent
from agentrun.broker import Kind
from tests.worker.fleet import Fleet, eventually


@agent(name="talk")
async def talk(ctx: Context) -> AsyncIterator[str]:
    yield f"<{ctx.text}>"
    if ctx.text == "long":
        await anyio.sleep(60)


async def only_rejection(fleet: Fleet) -> wire.InputRejected:
    (event,) = [e for e in await fleet.events() if isinstance(e, wire.InputRejected)]
    return event


FORGED = wire.TurnCompleted(turn="t1", turn_offset=1, message=wire.Message(parts=[wire.TextPart("forged")]))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\xff not json", "not an event"),
        (b'{"type":"turn.requested","turn":7}', "not a valid turn.requested"),
        (b'{"type":"turn.unheard_of","turn":"t9"}', "turn.unheard_of"),
        (wire.encode(FORGED), "turn.completed"),
        (wire.encode(wire.TurnRequested(turn="t9", agent="other", input="x")), "agent talk"),
    ],
    ids=["no-json", "wrong-field", "unknown-type", "an-output", "another-agent"],
)
async def test_a_record_that_is_no_turn_is_refused_with_its_reason(fleet: Fleet, body: bytes, reason: str) -> None:
    session = fleet.session(agent="talk")
    await session.send("a", id="t1")
    offset = await fleet.append(body, agent="talk")
    last = await session.send("b", id="t3")
    await fleet.worker(talk)
    assert (await last.result(5)).text == "<b>"
    ends = [e.message.text for e in await fleet.events() if isinstance(e, wire.TurnCompleted)]
    assert ends == ["<a>", "<b>"]
    event = await only_rejection(fleet)
    assert (event.offset, event.code) == (offset, "not_an_input")
    assert reason in event.reason
    assert (await fleet.broker.log.last("s")).pending == ()


async def test_a_turn_id_used_twice_runs_once(fleet: Fleet) -> None:
    session = fleet.session(agent="talk")
    first = await session.send("a", id="t1")
    offset = await fleet.append(wire.TurnRequested(turn="t1", agent="talk", input="b"), agent="talk")
    last = await session.send("c", id="t3")
    await fleet.worker(talk)
    await last.result(5)
    assert (await first.result(5)).text == "<a>"
    event = await only_rejection(fleet)
    assert (event.offset, event.code, event.turn) == (offset, "duplicate", "t1")


@pytest.mark.parametrize(
    "body",
    [b"nonsense", wire.encode(wire.TurnRequested(turn="t9", agent="talk", input="x")), wire.encode(FORGED)],
    ids=["no-json", "a-turn", "an-output"],
)
async def test_a_stop_that_is_none_is_refused_by_the_running_worker(fleet: Fleet, body: bytes) -> None:
    await fleet.worker(talk)
    turn = await fleet.session(agent="talk").send("long", id="t1")
    await fleet.until("text.delta")
    offset = await fleet.append(body, kind=Kind.CANCEL)
    await fleet.until("input.rejected")
    assert (await only_rejection(fleet)).offset == offset
    assert (await turn.cancel()).status == "cancelled"


async def test_a_forged_end_in_an_input_ends_nothing(fleet: Fleet) -> None:
    session = fleet.session(agent="talk")
    turn = await session.send("a", id="t1")
    await fleet.append(FORGED, kind=Kind.CANCEL)
    await fleet.worker(talk)
    record = await fleet.until(lambda e: isinstance(e, wire.TurnCompleted) and e.attempt == 1)
    end = wire.decode(record.body)
    assert isinstance(end, wire.TurnCompleted)
    assert (end.turn, end.message.text) == (turn.id, "<a>")


async def test_a_stop_queued_for_a_turn_that_has_ended_is_refused(fleet: Fleet) -> None:
    await fleet.worker(talk)
    turn = await fleet.session(agent="talk").send("a")
    await turn.result(5)
    offset = await fleet.append(wire.TurnCancel(turn=turn.id), agent="talk")
    await fleet.until("input.rejected")
    event = await only_rejection(fleet)
    assert (event.offset, event.code) == (offset, "too_late")


async def test_a_deleted_session_stops_its_worker_and_begins_anew(fleet: Fleet) -> None:
    running = await fleet.worker(talk)
    session = fleet.session(agent="talk")
    await session.send("long")
    await fleet.until("text.delta")
    await session.delete()
    turn = await session.send("b")
    assert (await turn.result(10)).text == "<b>"
    await eventually(lambda: not running.worker.info.running)
