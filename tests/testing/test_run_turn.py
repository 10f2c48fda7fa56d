from __future__ import annotations

import anyio
import pytest

from agentrun import Context, Fail, Message, Retry, Usage, WorkerSettings, agent, wire
from agentrun.errors import InvalidInput
from agentrun.testing import AckLost, ConnectionLost, WorkerDies, blocking, run_turn
from agentrun.testing.mishaps import Mishap

NUMBERS = [f"{n} " for n in range(8)]


@agent
async def counting(ctx: Context):
    for number in NUMBERS:
        yield number
    yield Usage(input_tokens=2, output_tokens=8)


@agent(resume=True)
async def resuming(ctx: Context):
    done = ctx.partial.text.count(" ") if ctx.partial else 0
    for number in NUMBERS[done:]:
        yield number


async def test_what_a_turn_said_and_how_it_ended() -> None:
    result = await run_turn(counting, "count")
    assert result.outcome == "completed"
    assert result.text == "".join(NUMBERS)
    assert result.message == Message([wire.TextPart("".join(NUMBERS))])
    assert result.attempts == 1
    assert result.usage == Usage(input_tokens=2, output_tokens=8)
    assert result.finish_reason == "stop"
    assert result.types[:2] == ["turn.requested", "turn.started"]
    assert result.types[-1] == "turn.completed"
    assert "".join(event.text for event in result.of(wire.TextDelta)) == result.text
    assert [event.offset for event in result.events] == list(range(1, len(result.events) + 1))


def test_without_an_event_loop() -> None:
    assert blocking.run_turn(counting, "count").text == "".join(NUMBERS)


async def test_the_agent_sees_what_was_said_before() -> None:
    seen: list[dict[str, object]] = []

    @agent
    async def listening(ctx: Context) -> None:
        seen.extend(ctx.messages)
        await ctx.emit(f"{ctx.request.user} {ctx.request.metadata['plan']}")

    called = Message([wire.ToolPart("c1", "look", {"id": 7}, "lost")])
    earlier = [("hello", "Hi!"), ("my parcel", called), ("so?", "")]
    result = await run_turn(listening, "well?", earlier=earlier, user="ann", metadata={"plan": "free"})
    assert result.text == "ann free"
    assert [message["role"] for message in seen] == ["user", "assistant", "user", "assistant", "tool", "user", "user"]
    assert [seen[i]["content"] for i in (0, 1, 2, 4, 5, 6)] == ["hello", "Hi!", "my parcel", "lost", "so?", "well?"]
    assert result.events[0].type == "turn.requested"


async def test_an_agents_errors_are_the_outcome_and_waits_are_skipped() -> None:
    @agent
    async def failing(ctx: Context) -> None:
        raise ValueError("no such thing")

    with anyio.fail_after(20):  # the waits are 1, 2, 4 and 8 s
        result = await run_turn(failing, "x", timeout=60)
    assert result.outcome == "failed"
    assert result.error is not None
    assert "ValueError: no such thing" in result.error.message
    assert result.attempts == 5
    assert [event.after for event in result.of(wire.TurnRetrying)] == [1, 2, 4, 8]


async def test_a_retry_is_run_at_once_and_says_what_it_would_have_waited() -> None:
    @agent
    async def busy(ctx: Context):
        if ctx.attempt == 1:
            raise Retry("rate limit", after=3600)
        yield "at last"

    result = await run_turn(busy, "x")
    assert (result.text, result.attempts) == ("at last", 2)
    assert [event.after for event in result.of(wire.TurnRetrying)] == [3600]


async def test_a_failure_on_purpose() -> None:
    @agent
    async def refusing(ctx: Context) -> None:
        raise Fail("not that", code="policy")

    result = await run_turn(refusing, "x")
    assert (result.outcome, result.attempts) == ("failed", 1)
    assert result.error == wire.ErrorInfo("policy", "not that")


# ------------------------------------------------------------------------------------------------------- questions


@agent
async def careful(ctx: Context):
    if await ctx.approve("Pay 5?", id="pay"):
        size = await ctx.ask("Size?", kind="choice", choices=["S", "M"])
        yield f"paid for {size}"
    else:
        yield "not paid"


@pytest.mark.parametrize("settings", [None, WorkerSettings(lost_after=0, ask_hold=0)], ids=["held", "suspended"])
async def test_questions_are_answered(settings: WorkerSettings | None) -> None:
    result = await run_turn(careful, "buy", answers={"pay": True, "ask-2": "M"}, settings=settings)
    assert result.text == "paid for M"
    assert bool(result.of(wire.TurnSuspended)) == (settings is not None)


async def test_a_function_answers() -> None:
    asked: list[str] = []

    def answer(question: wire.InputRequired) -> object:
        asked.append(question.prompt)
        return False

    assert (await run_turn(careful, "buy", answers=answer)).text == "not paid"
    assert asked == ["Pay 5?"]


async def test_a_question_that_nobody_answers_is_an_error_that_names_it() -> None:
    with pytest.raises(LookupError, match=r"'pay' \(approval\): 'Pay 5\?'"):
        await run_turn(careful, "buy")


async def test_an_answer_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="pay"):
        await run_turn(careful, "buy", answers={"pay": "perhaps"})


async def test_a_question_may_be_left_open() -> None:
    stopped = await run_turn(careful, "buy", stop_after="input.required")
    assert (stopped.outcome, stopped.text) == ("cancelled", "")
    expired = await run_turn(careful, "buy", deadline=0.2)
    assert expired.outcome == "expired"


# ----------------------------------------------------------------------------------------------------------- stops


@pytest.mark.parametrize("count", [0, 1, 5])
async def test_a_stop_in_mid_answer_leaves_so_many_tokens(count: int) -> None:
    result = await run_turn(counting, "count", stop_after=count)
    assert result.outcome == "cancelled"
    assert result.text == "".join(NUMBERS[:count])
    assert result.receipt is not None
    assert (result.receipt.status, result.receipt.offset) == ("cancelled", result.events[-1].offset)


async def test_a_stop_behind_the_end_changes_nothing() -> None:
    result = await run_turn(counting, "count", stop_after=100)
    assert (result.outcome, result.receipt) == ("completed", None)


async def test_a_stop_at_an_event_meets_the_agent_at_work() -> None:
    cleaned: list[str] = []

    @agent
    async def tooling(ctx: Context):
        yield wire.ToolCall(call="c1", name="wait", input={})
        try:
            await anyio.sleep_forever()
        finally:
            cleaned.append("wait")

    result = await run_turn(tooling, "x", stop_after="tool.call")
    assert result.outcome == "cancelled"
    assert cleaned == ["wait"]


async def test_a_turn_that_does_not_end_says_how_far_it_came() -> None:
    @agent
    async def stuck(ctx: Context):
        yield "a"
        await anyio.sleep_forever()

    with pytest.raises(TimeoutError, match=r"within 0\.5 s; its events: 1 turn\.requested, 1 turn\.started, 1 text\.d"):
        await run_turn(stuck, "x", timeout=0.5)


async def test_an_answerers_timeout_is_its_own() -> None:
    def answer(_question: wire.InputRequired) -> bool:
        raise TimeoutError("no human at hand")

    with pytest.raises(TimeoutError, match="no human at hand"):
        await run_turn(careful, "x", answers=answer)


# --------------------------------------------------------------------------------------------------------- mishaps


@pytest.mark.parametrize("after", [0, 3, 8])
async def test_the_worker_dies_at_a_token_and_another_goes_on(after: int) -> None:
    result = await run_turn(resuming, "count", mishaps=[WorkerDies(after=after)])
    assert (result.outcome, result.text, result.attempts) == ("completed", "".join(NUMBERS), 2)
    first = [e for e in result.of(wire.TextDelta) if e.attempt == 1]
    assert "".join(e.text for e in first) == "".join(NUMBERS[:after])
    assert [e.attempt for e in result.of(wire.TurnLost)] == [1]
    starts = result.of(wire.TurnStarted)
    assert starts[0].worker != starts[1].worker


async def test_an_agent_that_does_not_resume_starts_over() -> None:
    result = await run_turn(counting, "count", mishaps=[WorkerDies(after=3), WorkerDies(after=2, attempt=2)])
    assert (result.text, result.attempts) == ("".join(NUMBERS), 3)
    said = {n: "".join(e.text for e in result.of(wire.TextDelta) if e.attempt == n) for n in (1, 2, 3)}
    assert said == {1: "0 1 2 ", 2: "0 1 ", 3: "".join(NUMBERS)}


@pytest.mark.parametrize(
    "mishaps", [[AckLost(after=2)], [AckLost(after=0), ConnectionLost(0.2, after=4)]], ids=["ack", "connection"]
)
async def test_what_a_connection_does_is_not_seen_in_the_answer(mishaps: list[Mishap]) -> None:
    result = await run_turn(counting, "count", mishaps=mishaps)
    assert (result.outcome, result.text, result.attempts) == ("completed", "".join(NUMBERS), 1)
    offsets = [event.offset for event in result.events]
    assert offsets == list(range(1, len(offsets) + 1))


async def test_after_counts_events_and_not_what_the_log_makes_of_them() -> None:
    @agent
    async def mixed(ctx: Context):
        yield ""
        yield wire.ToolInputDelta(call="c", text="{", name="add")
        yield wire.ToolInputDelta(call="c", text="}", name="add")
        yield wire.ToolCall(call="c", name="add", input={})
        yield wire.ReasoningDelta(text="hm")
        yield Usage(output_tokens=1)
        yield wire.Data(name="chart", data=[1])
        yield "never said"

    result = await run_turn(mixed, "x", stop_after=3)
    assert result.outcome == "cancelled"
    assert [part.__struct_config__.tag for part in result.message.parts] == ["tool", "reasoning", "data"]


async def test_a_mishap_that_the_answer_is_too_short_for_is_an_error() -> None:
    with pytest.raises(AssertionError, match=r"WorkerDies\(after=100"):
        await run_turn(counting, "x", mishaps=[AckLost(after=2), WorkerDies(after=100)])
    result = await run_turn(counting, "x", mishaps=[WorkerDies(after=100)], stop_after=2)
    assert result.outcome == "cancelled"
