"""What goes on at the other broker: readers, turns, answers, deadlines, and what was sent before."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

import anyio
import pytest

from agentrun import wire
from agentrun.agent import Context, agent
from agentrun.errors import Fail, IdTaken, Retry, TurnFailed
from tests.moving.conftest import Named
from tests.moving.places import exported, imported, two_fleets
from tests.worker.fleet import Fleet

WORDS = [f"w{n} " for n in range(40)]


@agent(name="talk", resume=True)
async def talk(ctx: Context) -> AsyncIterator[str]:
    if ctx.text == "ask":
        yield "so " + ("be it" if await ctx.approve("sure?") else "not")
    elif ctx.text == "break":
        raise Retry("no luck")
    elif ctx.text == "fail":
        raise Fail("no")
    elif ctx.text == "count":
        said = ctx.partial.text if ctx.partial is not None else ""
        for word in WORDS:
            if word not in said:
                yield word
                await anyio.sleep(0.02)
    else:
        yield f"<{ctx.text}>"


@pytest.fixture(
    params=[("memory", "sqlite"), ("sqlite", "nats"), ("nats", "valkey"), ("valkey", "memory")], ids="-to-".join
)
async def fleets(named: Named, request: pytest.FixtureRequest) -> AsyncGenerator[tuple[Fleet, Fleet]]:
    source, target = request.param
    async with two_fleets(named(source), named(target)) as both:
        yield both


Fleets = tuple[Fleet, Fleet]


async def test_a_reader_goes_on_where_it_was(fleets: Fleets) -> None:
    here, there = fleets
    worker = await here.worker(talk, drain=0.05)
    turn = await here.session(agent="talk").send("count")
    seen: list[int] = []
    text = ""
    async with here.client.session("s").follow() as events:
        async for event in events:
            seen.append(event.offset)
            text += event.data.text if isinstance(event.data, wire.TextDelta) else ""
            if text.count("w") == 10:
                break
    await worker.drain()
    await imported(there.broker, await exported(here.broker))

    there.session()
    await there.worker(talk)
    async with there.client.session("s").follow(seen[-1]) as events:
        async for event in events:
            seen.append(event.offset)
            text += event.data.text if isinstance(event.data, wire.TextDelta) else ""
            if isinstance(event.data, wire.TurnCompleted):
                break
    assert seen == list(range(1, len(seen) + 1))
    assert text == "".join(WORDS)
    assert (await there.client.turn("s", turn.id).result(5)).text == text


async def test_a_suspended_turn_is_answered_after_the_move(fleets: Fleets) -> None:
    here, there = fleets
    worker = await here.worker(talk, ask_hold=0.05)
    turn = await here.session(agent="talk").send("ask")
    waiting = await here.session(agent="talk").send("next")
    await here.until("turn.suspended")
    await worker.drain()
    assert (await here.broker.log.last("s")).pending.parked
    await imported(there.broker, await exported(here.broker))
    assert (await there.broker.log.last("s")).pending == (await here.broker.log.last("s")).pending

    there.session()
    await there.worker(talk)
    moved = there.client.turn("s", turn.id)
    (question,) = (await there.client.session("s").history()).turns[turn.id].questions
    await moved.answer(question, True)
    assert (await moved.result(10)).text.endswith("be it")
    assert (await there.client.turn("s", waiting.id).result(10)).text == "<next>"


async def test_turns_that_wait_run_in_their_order_and_only_once(fleets: Fleets) -> None:
    here, there = fleets
    turns = [await here.session(agent="talk").send(text) for text in ("one", "two", "three")]
    await there.worker(talk)  # it works before the first record comes
    await imported(there.broker, await exported(here.broker))
    there.session()
    texts = [(await there.client.turn("s", turn.id).result(10)).text for turn in turns]
    assert texts == ["<one>", "<two>", "<three>"]
    types = await there.types()
    assert types.count("turn.started") == types.count("turn.completed") == 3


async def test_deadlines_hold(fleets: Fleets) -> None:
    here, there = fleets
    turn = await here.session(agent="talk").send("late", deadline=0.3)
    await imported(there.broker, await exported(here.broker))
    await anyio.sleep(0.4)
    there.session()
    await there.worker(talk)
    with pytest.raises(TurnFailed, match="deadline"):
        await there.client.turn("s", turn.id).result(10)


async def test_sending_again_changes_nothing(fleets: Fleets) -> None:
    here, there = fleets
    worker = await here.worker(talk)
    first = await here.session(agent="talk").send("one", id="t1")
    await first.result(10)
    await here.append(wire.TurnRequested(turn="t1", agent="talk", input="one"), agent="talk")
    await here.until("input.rejected")
    await worker.drain()
    (moved,) = await imported(there.broker, await exported(here.broker))
    assert moved.refused is None
    end = await there.broker.log.last("s")

    session = there.session(agent="talk")
    again = await session.send("one", id="t1")
    assert again.offset == first.offset
    with pytest.raises(IdTaken):
        await session.send("two", id="t1")
    assert (await there.broker.log.last("s")).offset == end.offset


async def test_dead_turns_are_on_the_list(fleets: Fleets) -> None:
    here, there = fleets
    worker = await here.worker(talk, max_attempts=1)
    turn = await here.session(agent="talk").send("break", id="t1")
    with pytest.raises(TurnFailed):
        await turn.result(10)
    await worker.drain()
    await imported(there.broker, await exported(here.broker, "agentrun--dead", "s"))
    (dead,) = [entry async for entry in there.client.dead()]
    assert (dead.session, dead.turn, dead.offset) == ("s", "t1", 1)
    await there.client.drop_dead(dead)
    assert [entry async for entry in there.client.dead()] == []
