"""Slot, lease, claim, run, last word, settle: what a worker does when nothing goes wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from importlib.metadata import version
from typing import Any

import anyio
import msgspec
import pytest

from agentrun import wire
from agentrun.agent import Context, agent
from agentrun.errors import InvalidInput, Retry, TurnFailed
from agentrun.worker import WORKERS, AgentLoad, Worker, WorkerInfo
from tests.worker.fleet import Fleet, eventually


@agent
async def echo(ctx: Context) -> AsyncIterator[str]:
    for word in ctx.text.split():
        yield f"{word} "
        await anyio.sleep(0.005)


async def test_a_turn_runs_from_its_request_to_its_end(fleet: Fleet) -> None:
    await fleet.worker(echo, name="w1")
    turn = await fleet.session(agent="echo").send("one two three")
    result = await turn.result(5)
    assert (result.text, result.attempt, result.finish_reason) == ("one two three ", 1, "stop")
    records = await fleet.records()
    assert [e.type for _, e in records] == [
        "turn.requested",
        "turn.started",
        *["text.delta"] * (len(records) - 3),
        "turn.completed",
    ]
    started = records[1][1]
    assert isinstance(started, wire.TurnStarted)
    assert (started.worker, started.resumes_from, started.message) == ("w1", None, None)
    assert str(records[1][0].pending) == "1a"
    assert records[-1][0].pending == ()
    assert await fleet.broker.turns.open("echo") == 0.6


async def test_a_settled_turn_is_not_leased_again(fleet: Fleet) -> None:
    runs: list[str] = []

    @agent
    async def once(ctx: Context) -> None:
        runs.append(ctx.turn)

    await fleet.worker(once)
    turn = await fleet.session(agent="once").send("x", id="t1")
    await turn.result(5)
    await anyio.sleep(1.5)
    assert runs == ["t1"]
    assert await fleet.types() == ["turn.started", "turn.completed"]


async def test_turns_of_a_session_run_in_order_over_several_workers(fleet: Fleet) -> None:
    busy: Counter[str] = Counter()
    order: list[str] = []

    @agent
    async def count(ctx: Context) -> AsyncIterator[str]:
        busy[ctx.session] += 1
        assert busy[ctx.session] == 1
        order.append(f"{ctx.session}{ctx.turn}")
        yield "a"
        await anyio.sleep(0.01)
        busy[ctx.session] -= 1

    for _ in range(3):
        await fleet.worker(count, concurrency=2)
    turns = [await fleet.session(s, "count").send("x", id=f"{n}") for n in range(6) for s in ("a", "b", "c")]
    for turn in turns:
        await turn.result(20)
    for s in "abc":
        assert [o for o in order if o[0] == s] == [f"{s}{n}" for n in range(6)]


async def test_a_busy_session_delays_no_other_and_takes_one_slot(fleet: Fleet) -> None:
    release = anyio.Event()

    @agent
    async def wait(ctx: Context) -> AsyncIterator[str]:
        yield "a"
        if ctx.session == "busy":
            await release.wait()

    await fleet.worker(wait, concurrency=2)
    for _ in range(5):
        await fleet.session("busy", "wait").send("x")
    await fleet.until("turn.started", "busy")
    for n in range(4):
        await (await fleet.session(f"free{n}", "wait").send("x")).result(5)
    release.set()
    await fleet.until("turn.completed", "busy", times=5)


async def test_the_concurrency_limit_is_kept_and_used(fleet: Fleet) -> None:
    now: list[int] = [0]
    most: list[int] = [0]

    @agent
    async def count(ctx: Context) -> None:
        now[0] += 1
        most[0] = max(most[0], now[0])
        await anyio.sleep(0.1)
        now[0] -= 1

    running = await fleet.worker(count, concurrency=3)
    turns = [await fleet.session(f"s{n}", "count").send("x") for n in range(9)]
    for turn in turns:
        await turn.result(10)
    assert most[0] == 3
    assert running.worker.info.slots == 3
    await eventually(lambda: not running.worker.info.running)


async def test_agents_of_one_worker_have_slots_of_their_own(fleet: Fleet) -> None:
    release = anyio.Event()

    @agent
    async def stuck(ctx: Context) -> None:
        await release.wait()

    running = await fleet.worker(stuck, echo, concurrency=1)
    first = await fleet.session("a", "stuck").send("x", id="t1")
    await fleet.until("turn.started", "a")
    assert (await (await fleet.session("b", "echo").send("hi")).result(5)).text == "hi "
    await eventually(lambda: running.worker.info.load == [AgentLoad("stuck", 1, 1), AgentLoad("echo", 1, 0)])
    (info,) = running.worker.info.running
    assert (info.session, info.turn, info.agent, info.attempt) == ("a", "t1", "stuck", 1)
    release.set()
    await first.result(5)


async def test_a_worker_says_who_it_is(fleet: Fleet) -> None:
    await fleet.worker(echo, name="w1")
    await fleet.worker(echo, name="w2")
    replies = await fleet.broker.signals.gather(WORKERS, b"", wait=0.5)
    found = [msgspec.json.decode(r, type=WorkerInfo) for r in replies]
    assert {info.worker for info in found} == {"w1", "w2"}
    assert {info.version for info in found} == {version("agentrun")}
    assert all(0 < info.uptime < 60 for info in found)


async def test_a_worker_counts_the_tokens_of_each_attempt_and_says_which_is_being_stopped(fleet: Fleet) -> None:
    release = anyio.Event()

    @agent
    async def talks(ctx: Context) -> AsyncGenerator[str]:
        if ctx.attempt == 1:
            yield "one "
            raise Retry("again")
        try:
            yield "one "
            yield "two "
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await release.wait()

    running = await fleet.worker(talks, cancel_grace=20.0)
    turn = await fleet.session("s", "talks").send("x", id="t1")

    def told() -> list[tuple[int, int, bool]]:
        return [(t.attempt, t.tokens, t.stopping) for t in running.worker.info.running]

    await eventually(lambda: told() == [(2, 2, False)])
    async with anyio.create_task_group() as group:
        group.start_soon(turn.cancel)
        await eventually(lambda: told() == [(2, 2, True)])
        release.set()
    await eventually(lambda: told() == [])


async def test_the_agent_gets_the_conversation(fleet: Fleet) -> None:
    seen: list[list[dict[str, Any]]] = []

    @agent
    async def remember(ctx: Context) -> AsyncIterator[str]:
        seen.append(ctx.messages)
        yield f"answer to {ctx.text}"

    await fleet.worker(remember)
    session = fleet.session(agent="remember")
    for text in ("one", "two", "three"):
        await (await session.send(text)).result(5)
    assert seen[-1] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "answer to one"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "answer to two"},
        {"role": "user", "content": "three"},
    ]


async def test_the_agent_gets_the_conversation_without_what_was_replaced(fleet: Fleet) -> None:
    seen: list[list[dict[str, Any]]] = []

    @agent
    async def remember(ctx: Context) -> AsyncIterator[str]:
        seen.append(ctx.messages)
        yield f"answer {len(seen)}"

    await fleet.worker(remember)
    session = fleet.session(agent="remember")
    for turn, text in (("t1", "one"), ("t2", "two"), ("t3", "three")):
        await (await session.send(text, id=turn)).result(5)
    kept = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "answer 1"}]
    regenerated = await session.send("two", id="t4", replaces="t2")
    assert (await regenerated.result(5)).text == "answer 4"
    assert seen[-1] == [*kept, {"role": "user", "content": "two"}]
    await (await session.send("four", id="t5")).result(5)
    assert seen[-1] == [
        *kept,
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "answer 4"},
        {"role": "user", "content": "four"},
    ]
    views = (await session.history()).turns
    assert {id: view.replaced_by for id, view in views.items() if view.replaced_by} == {"t2": "t4", "t3": "t4"}


async def test_usage_and_finish_reason_stand_in_the_end(memory_fleet: Fleet) -> None:
    @agent
    async def spend(ctx: Context) -> AsyncIterator[str | wire.Usage]:
        yield wire.Usage(input_tokens=3, output_tokens=1)
        yield "a"
        yield wire.Usage(input_tokens=4)
        ctx.finish_reason = "length"

    await memory_fleet.worker(spend)
    result = await (await memory_fleet.session(agent="spend").send("x")).result(5)
    assert result.usage == wire.Usage(input_tokens=7, output_tokens=1)
    assert result.finish_reason == "length"


async def test_an_agent_that_says_nothing_completes(memory_fleet: Fleet) -> None:
    @agent
    async def silent(ctx: Context) -> None: ...

    await memory_fleet.worker(silent)
    assert (await (await memory_fleet.session(agent="silent").send("x")).result(5)).text == ""


async def test_agents_of_one_worker_need_different_names(memory_fleet: Fleet) -> None:
    with pytest.raises(InvalidInput, match="different names"):
        Worker(memory_fleet.broker, [echo, echo])
    with pytest.raises(InvalidInput):
        Worker(memory_fleet.broker, [])


async def test_tool_events_are_kept_and_folded(memory_fleet: Fleet) -> None:
    @agent
    async def tools(ctx: Context) -> AsyncIterator[str | wire.OutputEvent]:
        yield "look: "
        yield wire.ToolInputDelta(call="c1", name="find", text='{"q":')
        yield wire.ToolInputDelta(call="c1", text="1}")
        yield wire.ToolCall(call="c1", name="find", input={"q": 1})
        yield wire.ToolProgress(call="c1", data=50)
        yield wire.ToolResult(call="c1", output=[1, 2])
        yield wire.Data(name="chart", data={"x": 1}, id="d")
        yield "done"

    await memory_fleet.worker(tools)
    result = await (await memory_fleet.session(agent="tools").send("x")).result(5)
    text, tool, data, end = result.message.parts
    assert (text, end) == (wire.TextPart("look: "), wire.TextPart("done"))
    assert isinstance(tool, wire.ToolPart)
    assert (tool.name, tool.input, tool.output) == ("find", {"q": 1}, [1, 2])
    assert data == wire.DataPart("chart", {"x": 1}, "d")


async def test_the_same_event_object_may_be_given_in_every_turn(memory_fleet: Fleet) -> None:
    constant = wire.Data(name="mark", data=1)

    @agent
    async def marked(ctx: Context) -> AsyncIterator[wire.OutputEvent]:
        yield constant

    await memory_fleet.worker(marked)
    for turn in ("t1", "t2"):
        await (await memory_fleet.session(agent="marked").send("x", id=turn)).result(5)
    assert [e.turn for e in await memory_fleet.events() if isinstance(e, wire.Data)] == ["t1", "t2"]


async def test_what_cannot_be_stored_is_the_agents_error(memory_fleet: Fleet) -> None:
    @agent
    async def wrong(ctx: Context) -> AsyncIterator[Any]:
        if ctx.text == "object":
            yield wire.Data(name="x", data=object())
        elif ctx.text == "field":
            yield wire.ToolCall(call=7, name="x", input={})
        else:
            yield wire.TurnCompleted(turn_offset=1)

    await memory_fleet.worker(wrong, max_attempts=1)
    for text in ("object", "field", "terminal"):
        turn = await memory_fleet.session(text, "wrong").send(text)
        end = (await memory_fleet.events(text))[-1] if await _ended(turn) else None
        assert isinstance(end, wire.TurnFailed)
        assert end.error.code == "agent_error"
        assert "InvalidInput" in end.error.message


async def _ended(turn: Any) -> bool:
    try:
        await turn.result(5)
    except TurnFailed:
        return True
    return False


async def test_half_a_character_is_put_together_or_replaced(memory_fleet: Fleet) -> None:
    @agent
    async def torn(ctx: Context) -> AsyncIterator[str | wire.OutputEvent]:
        yield "first "  # what follows is merged while this is on its way
        yield "a\ud83d"
        yield "\ude00b"
        yield wire.ToolResult(call="c", output="x\ud83d")
        yield "\ud83d"

    await memory_fleet.worker(torn, tick=0, min_gap=0.05)
    result = await (await memory_fleet.session(agent="torn").send("x")).result(5)
    assert result.text == "first a😀b�"
