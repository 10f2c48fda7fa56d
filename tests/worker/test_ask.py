"""Questions: held in memory, suspended, answered, misanswered."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import pytest

from agentrun import wire
from agentrun.agent import Context, agent
from agentrun.errors import NotWaiting, TurnFailed
from tests.worker.fleet import Fleet, Part, Wrapped, eventually


@agent(name="asks", resume=True)
async def asks(ctx: Context) -> AsyncIterator[str]:
    if not ctx.resumes:
        yield "may I? "
    ok = await ctx.approve("sure?")
    yield f"{ok}"


async def rejected(fleet: Fleet) -> list[tuple[int, str]]:
    return [(e.offset, e.code) for e in await fleet.events() if isinstance(e, wire.InputRejected)]


async def test_an_answer_that_comes_soon_is_taken_in_memory(fleet: Fleet) -> None:
    await fleet.worker(asks)
    turn = await fleet.session(agent="asks").send("x")
    await fleet.until("input.required")
    offset = await turn.answer("ask-1", True)
    result = await turn.result(5)
    assert (result.text, result.attempt) == ("may I? True", 1)
    resumed = next(e for e in await fleet.events() if isinstance(e, wire.TurnResumed))
    assert (resumed.request, resumed.answer) == ("ask-1", offset)
    await anyio.sleep(0.8)
    assert (await fleet.broker.log.last("s")).pending == ()
    assert (await fleet.types())[-1] == "turn.completed"


async def test_an_answer_wakes_a_suspended_turn_on_another_worker(fleet: Fleet) -> None:
    first = await fleet.worker(asks, name="w1", ask_hold=0.05)
    session = fleet.session(agent="asks")
    turn = await session.send("x")
    suspended = await fleet.until("turn.suspended")
    assert str(suspended.pending) == f"{turn.offset}p"
    event = wire.decode(suspended.body)
    assert isinstance(event, wire.TurnSuspended)
    assert (event.requests, event.message.text, event.until) == (["ask-1"], "may I? ", None)
    await first.drain()
    await fleet.worker(asks, name="w2")
    offset = await turn.answer("ask-1", True)
    result = await turn.result(5)
    assert (result.text, result.attempt) == ("may I? True", 2)
    starts = [e for e in await fleet.events() if isinstance(e, wire.TurnStarted)]
    assert [s.worker for s in starts] == ["w1", "w2"]
    assert str((await fleet.until("turn.resumed")).pending) == f"{offset}a"
    assert (await fleet.broker.log.last("s")).pending == ()


async def test_a_suspended_turn_holds_no_slot_but_its_place(fleet: Fleet) -> None:
    await fleet.worker(asks, ask_hold=0.05, concurrency=1)
    session = fleet.session(agent="asks")
    turn = await session.send("x", id="t1")
    behind = await session.send("y", id="t2")
    await fleet.until("turn.suspended")
    other = await fleet.session("other", "asks").send("z")
    await fleet.until("turn.suspended", "other")
    await other.cancel()
    assert (await session.history()).turns["t2"].state == "queued"
    await turn.answer("ask-1", True)
    await turn.result(5)
    await fleet.until("turn.suspended", times=2)
    await behind.answer("ask-1", False)
    assert (await behind.result(5)).text == "may I? False"


async def test_suspensions_are_not_charged(memory_fleet: Fleet) -> None:
    @agent(name="asks")
    async def often(ctx: Context) -> AsyncIterator[str]:
        for _ in range(4):
            yield str(await ctx.ask("name?", kind="text"))

    await memory_fleet.worker(often, ask_hold=0.02, max_attempts=2)
    turn = await memory_fleet.session(agent="asks").send("x")
    for n in range(1, 5):
        await memory_fleet.until("turn.suspended", times=n)
        await turn.answer(f"ask-{n}", f"a{n} ")
    result = await turn.result(5)
    assert (result.text, result.attempt) == ("a1 a2 a3 a4 ", 5)
    required = [e.request for e in await memory_fleet.events() if isinstance(e, wire.InputRequired)]
    assert required == ["ask-1", "ask-2", "ask-3", "ask-4"]


async def test_two_questions_at_once(fleet: Fleet) -> None:
    got: dict[str, str] = {}

    @agent(name="asks")
    async def both(ctx: Context) -> None:
        async def one(name: str) -> None:
            got[name] = await ctx.ask(name, kind="text", id=name)

        async with anyio.create_task_group() as group:
            group.start_soon(one, "q1")
            group.start_soon(one, "q2")

    await fleet.worker(both, ask_hold=0.3)
    turn = await fleet.session(agent="asks").send("x")
    await fleet.until("input.required", times=2)
    await turn.answer("q2", "two")
    await fleet.until("turn.suspended")
    await turn.answer("q1", "one")
    assert (await turn.result(5)).attempt == 2
    assert got == {"q1": "one", "q2": "two"}
    assert (await fleet.broker.log.last("s")).pending == ()


async def test_an_answer_that_arrives_just_while_the_turn_is_suspended(memory_fleet: Fleet) -> None:
    done: list[str] = []

    class Log(Part):
        async def append(self, session: str, body: bytes, **args: object) -> object:
            if b'"turn.suspended"' in body and not done:
                done.append("answered")
                await memory_fleet.client.turn("s", "t1").answer("ask-1", True)
            return await self.inner.append(session, body, **args)

    await memory_fleet.worker(asks, ask_hold=0.05, wrap=lambda b: Wrapped(b, log=Log(b.log)))
    turn = await memory_fleet.session(agent="asks").send("x", id="t1")
    assert (await turn.result(5)).text == "may I? True"
    assert done == ["answered"]
    assert (await memory_fleet.types()).count("turn.suspended") == 1


async def test_a_worker_that_dies_with_the_answer_in_hand(fleet: Fleet) -> None:
    answers: list[object] = []

    @agent(name="asks")
    async def slow(ctx: Context) -> AsyncIterator[str]:
        answers.append(await ctx.approve("sure?"))
        if len(answers) == 1:
            await anyio.sleep(60)
        yield "done"

    first = await fleet.worker(slow, ask_hold=0.05)
    turn = await fleet.session(agent="asks").send("x")
    await fleet.until("turn.suspended")
    await turn.answer("ask-1", True)
    await eventually(lambda: len(answers) == 1)
    await first.crash()
    await fleet.worker(slow, ask_hold=0.05)
    result = await turn.result(10)
    assert (result.text, result.attempt, answers) == ("done", 3, [True, True])
    assert (await fleet.types()).count("turn.resumed") == 1
    assert (await fleet.broker.log.last("s")).pending == ()


async def test_a_worker_that_dies_before_it_takes_the_answer(fleet: Fleet) -> None:
    first = await fleet.worker(asks)
    turn = await fleet.session(agent="asks").send("x")
    await fleet.until("input.required")
    await first.crash()
    await turn.answer("ask-1", True)
    await fleet.worker(asks)
    result = await turn.result(10)
    assert (result.text, result.attempt) == ("may I? True", 2)
    assert (await fleet.broker.log.last("s")).pending == ()


async def test_a_suspended_turn_can_be_stopped(fleet: Fleet) -> None:
    await fleet.worker(asks, ask_hold=0.05)
    turn = await fleet.session(agent="asks").send("x")
    await fleet.until("turn.suspended")
    receipt = await turn.cancel(by="me")
    assert (receipt.status, receipt.took < 2) == ("cancelled", True)
    end = (await fleet.events())[-1]
    assert isinstance(end, wire.TurnCancelled)
    assert (end.by, end.message.text) == ("me", "may I? ")
    assert (await fleet.broker.log.last("s")).pending == ()
    with pytest.raises(NotWaiting):
        await turn.answer("ask-1", True)


async def test_what_waits_behind_a_suspended_turn_can_be_stopped(fleet: Fleet) -> None:
    await fleet.worker(asks, ask_hold=0.05)
    session = fleet.session(agent="asks")
    turn = await session.send("x")
    behind = await session.send("y")
    await fleet.until("turn.suspended")
    assert (await behind.cancel()).status == "cancelled"
    assert (await session.history()).turns[turn.id].state == "suspended"
    await turn.answer("ask-1", True)
    await turn.result(5)
    assert (await fleet.broker.log.last("s")).pending == ()


@pytest.mark.parametrize("hold", [10.0, 0.05], ids=["held", "suspended"])
async def test_answers_that_cannot_be_used_are_refused_with_a_reason(fleet: Fleet, hold: float) -> None:
    await fleet.worker(asks, ask_hold=hold)
    turn = await fleet.session(agent="asks").send("x", id="t1")
    await fleet.until("input.required" if hold > 1 else "turn.suspended")
    expected: list[tuple[int, str]] = []
    for answer, code in (
        (wire.TurnAnswer(turn="t1", request="ask-1", value="perhaps"), "invalid_answer"),
        (wire.TurnAnswer(turn="t1", request="other", value=True), "not_waiting"),
        (wire.TurnAnswer(turn="nobody", request="ask-1", value=True), "not_waiting"),
    ):
        expected.append((await fleet.append(answer, agent="asks"), code))
        await fleet.until("input.rejected", times=len(expected))
    assert await rejected(fleet) == expected
    await turn.answer("ask-1", True)
    assert (await turn.result(5)).text == "may I? True"
    late = await fleet.append(wire.TurnAnswer(turn="t1", request="ask-1", value=False), agent="asks")
    await fleet.until("input.rejected", times=4)
    assert (await rejected(fleet))[-1] == (late, "already_ended")
    assert (await fleet.broker.log.last("s")).pending == ()


async def test_a_second_answer_is_refused_and_the_first_counts(fleet: Fleet) -> None:
    @agent(name="asks")
    async def slow(ctx: Context) -> AsyncIterator[str]:
        ok = await ctx.approve("sure?")
        await anyio.sleep(0.3)
        yield f"{ok}"

    await fleet.worker(slow)
    turn = await fleet.session(agent="asks").send("x", id="t1")
    await fleet.until("input.required")
    await turn.answer("ask-1", True)
    second = await fleet.append(wire.TurnAnswer(turn="t1", request="ask-1", value=False), agent="asks")
    assert (await turn.result(5)).text == "True"
    assert await rejected(fleet) == [(second, "not_waiting")]


async def test_an_unusable_answer_that_was_stored_while_the_owner_was_dead(fleet: Fleet) -> None:
    first = await fleet.worker(asks)
    turn = await fleet.session(agent="asks").send("x", id="t1")
    await fleet.until("input.required")
    await first.crash()
    wrong = await fleet.append(wire.TurnAnswer(turn="t1", request="ask-1", value="perhaps"), agent="asks")
    await fleet.worker(asks)
    await fleet.until("input.rejected")
    await turn.answer("ask-1", False)
    assert (await turn.result(10)).text == "may I? False"
    assert await rejected(fleet) == [(wrong, "invalid_answer")]


async def test_a_question_survives_a_retry(memory_fleet: Fleet) -> None:
    @agent(name="asks")
    async def shaky(ctx: Context) -> AsyncIterator[str]:
        ok = await ctx.approve("sure?")
        if ctx.attempt == 1:
            raise ValueError("boom")
        yield f"{ok}"

    await memory_fleet.worker(shaky)
    turn = await memory_fleet.session(agent="asks").send("x")
    await memory_fleet.until("input.required")
    await turn.answer("ask-1", True)
    assert (await turn.result(5)).text == "True"
    types = await memory_fleet.types()
    assert (types.count("input.required"), types.count("turn.resumed")) == (1, 1)


async def test_a_drain_in_mid_question_lets_the_turn_be_answered_elsewhere(fleet: Fleet) -> None:
    first = await fleet.worker(asks, drain=0.05)
    turn = await fleet.session(agent="asks").send("x")
    await fleet.until("input.required")
    await first.drain()
    await turn.answer("ask-1", True)
    await fleet.worker(asks)
    assert (await turn.result(5)).text == "may I? True"


async def test_an_expired_answerer_finds_the_turn_ended(memory_fleet: Fleet) -> None:
    await memory_fleet.worker(asks, ask_hold=0.05)
    turn = await memory_fleet.session(agent="asks").send("x", deadline=0.3)
    with pytest.raises(TurnFailed):
        await turn.result(5)
    with pytest.raises(NotWaiting):
        await turn.answer("ask-1", True)
