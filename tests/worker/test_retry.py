"""What becomes of a turn whose agent, or whose worker, fails."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import anyio
import pytest

from agentrun import wire
from agentrun.agent import Context, agent
from agentrun.errors import Fail, Retry, TurnFailed
from agentrun.wire import InputRejected
from tests.worker.fleet import Fleet, eventually


async def test_an_error_leads_to_another_attempt(fleet: Fleet) -> None:
    @agent
    async def shaky(ctx: Context) -> AsyncIterator[str]:
        yield f"attempt {ctx.attempt}"
        if ctx.attempt < 3:
            raise ValueError("boom")

    await fleet.worker(shaky)
    result = await (await fleet.session(agent="shaky").send("x")).result(10)
    assert (result.text, result.attempt) == ("attempt 3", 3)
    retries = [e for e in await fleet.events() if isinstance(e, wire.TurnRetrying)]
    assert [(r.attempt, r.error.code, r.error.message) for r in retries] == [
        (1, "agent_error", "ValueError: boom"),
        (2, "agent_error", "ValueError: boom"),
    ]
    assert [r.after for r in retries] == [0.05, 0.1]


async def test_the_budget_ends_in_one_failure(fleet: Fleet) -> None:
    runs: list[int] = []

    @agent
    async def broken(ctx: Context) -> AsyncIterator[str]:
        runs.append(ctx.attempt)
        yield "half "
        raise ValueError("boom")

    await fleet.worker(broken, max_attempts=3)
    turn = await fleet.session(agent="broken").send("x")
    with pytest.raises(TurnFailed, match="gave up after 3 attempts: ValueError: boom"):
        await turn.result(10)
    await anyio.sleep(0.5)
    assert runs == [1, 2, 3]
    assert (await fleet.types()).count("turn.failed") == 1
    end = (await fleet.events())[-1]
    assert isinstance(end, wire.TurnFailed)
    assert end.message.text == "half "


async def test_retry_waits_as_long_as_asked(fleet: Fleet) -> None:
    at: list[float] = []

    @agent
    async def later(ctx: Context) -> AsyncIterator[str]:
        at.append(time.monotonic())
        if ctx.attempt == 1:
            raise Retry("come back", after=1.0)
        yield "ok"

    await fleet.worker(later)
    session = fleet.session(agent="later")
    turn = await session.send("x")
    behind = await session.send("y")
    record = await fleet.until("turn.retrying")
    assert str(record.pending).startswith("1p")
    event = wire.decode(record.body)
    assert isinstance(event, wire.TurnRetrying)
    assert (event.error.code, event.error.message, event.after) == ("retry", "come back", 1.0)
    assert (await turn.result(10)).attempt == 2
    assert at[1] - at[0] >= 0.95
    await behind.result(10)


async def test_a_turn_that_waits_to_be_retried_takes_no_slot(memory_fleet: Fleet) -> None:
    @agent
    async def later(ctx: Context) -> None:
        if ctx.text == "later" and ctx.attempt == 1:
            raise Retry(after=1.0)

    await memory_fleet.worker(later, concurrency=1)
    slow = await memory_fleet.session("a", "later").send("later")
    await memory_fleet.until("turn.retrying", "a")
    await (await memory_fleet.session("b", "later").send("now")).result(0.8)
    await slow.result(10)


async def test_a_stop_ends_the_wait_for_a_retry_at_once(fleet: Fleet) -> None:
    @agent
    async def later(ctx: Context) -> None:
        raise Retry(after=30.0)

    await fleet.worker(later)
    session = fleet.session(agent="later")
    turn = await session.send("x")
    await fleet.until("turn.retrying")
    receipt = await turn.cancel(by="me")
    assert receipt.status == "cancelled"
    assert receipt.took < 2.0
    assert (await fleet.broker.log.last("s")).pending == ()


async def test_retry_at_once(memory_fleet: Fleet) -> None:
    @agent
    async def again(ctx: Context) -> None:
        if ctx.attempt < 3:
            raise Retry

    await memory_fleet.worker(again)
    assert (await (await memory_fleet.session(agent="again").send("x")).result(5)).attempt == 3


async def test_fail_is_final(fleet: Fleet) -> None:
    @agent
    async def fails(ctx: Context) -> AsyncIterator[str]:
        yield "so far"
        raise Fail("no such order", code="unknown_order")

    await fleet.worker(fails)
    turn = await fleet.session(agent="fails").send("x")
    with pytest.raises(TurnFailed) as caught:
        await turn.result(5)
    assert (caught.value.code, caught.value.retryable) == ("unknown_order", False)
    assert await fleet.types() == ["turn.started", "text.delta", "turn.failed"]


@pytest.mark.parametrize("signal", ["retry", "fail", "error"])
async def test_what_a_task_group_of_the_agents_own_wraps_is_found(memory_fleet: Fleet, signal: str) -> None:
    errors = {"retry": Retry("again"), "fail": Fail("done", code="c"), "error": KeyError("k")}

    @agent
    async def grouped(ctx: Context) -> None:
        async def inner() -> None:
            raise errors[signal]

        async with anyio.create_task_group() as outer:
            outer.start_soon(anyio.sleep, 10)
            async with anyio.create_task_group() as group:
                group.start_soon(inner)

    await memory_fleet.worker(grouped, max_attempts=1)
    await memory_fleet.session(agent="grouped").send("x")
    await memory_fleet.until("turn.failed")
    end = (await memory_fleet.events())[-1]
    assert isinstance(end, wire.TurnFailed)
    assert end.error.code == {"retry": "retry", "fail": "c", "error": "agent_error"}[signal]
    if signal == "error":
        assert "KeyError" in end.error.message


async def test_a_signal_counts_more_than_the_errors_beside_it(memory_fleet: Fleet) -> None:
    @agent
    async def grouped(ctx: Context) -> None:
        raise ExceptionGroup("both", [ValueError("x"), ExceptionGroup("in", [Fail("enough", code="c")])])

    await memory_fleet.worker(grouped)
    await memory_fleet.session(agent="grouped").send("x")
    await memory_fleet.until("turn.failed")
    end = (await memory_fleet.events())[-1]
    assert isinstance(end, wire.TurnFailed)
    assert (end.error.code, end.error.message) == ("c", "enough")


async def test_a_turn_that_kills_its_workers_is_given_up_without_running(fleet: Fleet) -> None:
    runs: list[int] = []

    @agent
    async def poison(ctx: Context) -> None:
        runs.append(ctx.attempt)
        await anyio.sleep(60)

    turn = await fleet.session(agent="poison").send("x")
    for attempt in (1, 2):
        worker = await fleet.worker(poison, max_attempts=2)
        await eventually(lambda: len(runs) == attempt)  # noqa: B023 - it is waited for here
        await worker.crash()
    await fleet.worker(poison, max_attempts=2)
    with pytest.raises(TurnFailed) as caught:
        await turn.result(10)
    assert (caught.value.code, runs) == ("max_attempts", [1, 2])
    assert "its workers died" in str(caught.value)


async def test_a_cancellation_from_within_is_an_error_and_no_success(memory_fleet: Fleet) -> None:
    import asyncio

    @agent
    async def stray(ctx: Context) -> AsyncIterator[str]:
        yield "a"
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    await memory_fleet.worker(stray, max_attempts=2)
    await memory_fleet.session(agent="stray").send("x")
    await memory_fleet.until("turn.failed")
    assert await memory_fleet.types() == [
        "turn.started",
        "text.delta",
        "turn.retrying",
        "turn.started",
        "text.delta",
        "turn.failed",
    ]


async def test_a_long_or_garbled_error_fits_the_log(memory_fleet: Fleet) -> None:
    @agent
    async def verbose(ctx: Context) -> None:
        raise ValueError("\ud800" + "x" * 3_000_000)

    await memory_fleet.worker(verbose, max_attempts=1)
    await memory_fleet.session(agent="verbose").send("x")
    await memory_fleet.until("turn.failed")
    end = (await memory_fleet.events())[-1]
    assert isinstance(end, wire.TurnFailed)
    assert len(end.error.message) < 5000


async def test_usage_of_all_attempts_is_added_up(memory_fleet: Fleet) -> None:
    @agent
    async def spends(ctx: Context) -> AsyncIterator[wire.Usage]:
        yield wire.Usage(input_tokens=10)
        if ctx.attempt == 1:
            raise Retry

    await memory_fleet.worker(spends)
    result = await (await memory_fleet.session(agent="spends").send("x")).result(5)
    assert result.usage == wire.Usage(input_tokens=20)


async def test_a_turn_whose_request_was_trimmed_is_not_run_for_ever(memory_fleet: Fleet) -> None:
    # Its answer wakes it, but what it is about is gone.
    runs: list[int] = []

    @agent
    async def asks(ctx: Context) -> None:
        runs.append(ctx.attempt)
        await ctx.approve("sure?")

    await memory_fleet.worker(asks, ask_hold=0.05)
    turn = await memory_fleet.session(agent="asks").send("x")
    suspended = await memory_fleet.until("turn.suspended")
    memory_fleet.sessions.clear()
    await memory_fleet.environment.trim("s", 1)
    await memory_fleet.append(wire.TurnAnswer(turn=turn.id, request="ask-1", value=True), agent="asks")
    memory_fleet.sessions.clear()
    record = await memory_fleet.until(lambda e: isinstance(e, (wire.TurnFailed, InputRejected)))
    assert record.offset > suspended.offset
    await anyio.sleep(0.2)
    assert runs == [1]
    assert (await memory_fleet.broker.log.last("s")).pending == ()
