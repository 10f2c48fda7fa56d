"""What does not fit one record is stored in several, and told as one."""

from __future__ import annotations

from collections.abc import AsyncIterator

from agentrun import wire
from agentrun.agent import Context, agent
from tests.worker.fleet import Fleet

MIB = 1 << 20


async def test_a_tool_result_of_three_mebibytes(fleet: Fleet) -> None:
    output = "é\n" * (3 * MIB // 3)

    @agent
    async def tool(ctx: Context) -> AsyncIterator[str | wire.OutputEvent]:
        yield "a"
        yield wire.ToolCall(call="c", name="dump", input={})
        yield wire.ToolResult(call="c", output=output)
        yield "b"

    await fleet.worker(tool)
    session = fleet.session(agent="tool")
    result = await (await session.send("x")).result(20)
    assert result.text == "ab"
    part = result.message.parts[1]
    assert isinstance(part, wire.ToolPart)
    assert part.output == output
    limit = fleet.broker.capabilities.max_body
    records = await fleet.records()
    assert max(len(r.body) for r, _ in records) <= limit
    whole = next(e for e in await fleet.events() if isinstance(e, wire.ToolResult))
    assert whole.output == output
    folded = (await session.history()).turns[result.turn]
    assert folded.message == result.message


async def test_a_text_of_two_mebibytes_in_one_piece(fleet: Fleet) -> None:
    text = "".join(f"{n:07d} " for n in range(2 * MIB // 8))

    @agent
    async def long(ctx: Context) -> AsyncIterator[str]:
        yield "begin "
        yield text
        yield "end"

    await fleet.worker(long)
    result = await (await fleet.session(agent="long").send("x")).result(20)
    assert result.text == f"begin {text}end"
    deltas = [e for e in await fleet.events() if isinstance(e, wire.TextDelta)]
    assert "".join(e.text for e in deltas) == result.text
    assert sum(e.count for e in deltas) == 3
    assert max(len(e.text) for e in deltas) <= 32_768


async def test_a_stop_while_a_large_event_is_stored(fleet: Fleet) -> None:
    @agent
    async def tool(ctx: Context) -> AsyncIterator[wire.OutputEvent]:
        for n in range(20):
            yield wire.ToolResult(call=f"c{n}", output="x" * 2 * MIB)

    await fleet.worker(tool, buffer_events=1)
    turn = await fleet.session(agent="tool").send("x")
    await fleet.until("tool.result")
    assert (await turn.cancel()).status == "cancelled"
    end = (await fleet.events())[-1]
    assert isinstance(end, wire.TurnCancelled)
    results = [e for e in await fleet.events() if isinstance(e, wire.ToolResult)]
    assert len(end.message.parts) == len(results) < 20


async def test_a_large_answer_is_carried_to_the_next_attempt(fleet: Fleet) -> None:
    contexts: list[Context] = []

    @agent(resume=True)
    async def long(ctx: Context) -> AsyncIterator[str]:
        contexts.append(ctx)
        if ctx.resumes:
            yield "end"
            return
        for n in range(60):
            yield f"{n % 10}" * 32_768
        raise ValueError("boom")

    await fleet.worker(long)
    result = await (await fleet.session(agent="long").send("x")).result(20)
    assert len(result.text) == 60 * 32_768 + 3
    assert contexts[1].partial is not None
    assert len(contexts[1].partial.text) == 60 * 32_768
