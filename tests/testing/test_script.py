from __future__ import annotations

from typing import Any

import anyio
import pytest

from agentrun import Context, Retry, Usage, agent, wire
from agentrun.testing import ModelError, Script, ScriptedModel, run_turn
from agentrun.testing.openai_server import FakeOpenAI
from agentrun.testing.steps import Fail


async def said(model: ScriptedModel, *args: Any, **kwargs: Any) -> list[Any]:
    return [item async for item in model(*args, **kwargs)]


async def test_a_model_says_what_an_agent_yields() -> None:
    script = Script().think("hm").say("It is 3.").call("add", {"a": 1}).call("sub", "{", id="x").count(5, 3)
    assert await said(ScriptedModel(script)) == [
        wire.ReasoningDelta(text="hm"),
        "It ",
        "is ",
        "3.",
        wire.ToolCall(call="call_0", name="add", input={"a": 1}),
        wire.ToolCall(call="x", name="sub", input="{"),
        Usage(input_tokens=5, output_tokens=3),
    ]


async def test_calls_are_answered_in_order_and_remembered() -> None:
    model = ScriptedModel(Script().say("a"), Script().say("b"))
    assert [await said(model, [1], n=1), await said(model)] == [["a"], ["b"]]
    assert (model.calls[0].args, model.calls[0].kwargs) == (([1],), {"n": 1})
    with pytest.raises(AssertionError, match="call 3 of the model, and 2 answers"):
        model()


def test_a_step_more_leaves_a_script_as_it_was() -> None:
    begun = Script().say("a")
    assert begun.say("b") != begun
    assert begun == Script().say("a")


async def test_a_model_fails_before_and_in_the_middle() -> None:
    model = ScriptedModel(
        Script().pause(0.01).fail(429, "slow down", retry_after=7), Script().say("a").fail(503), Script().drop()
    )
    with pytest.raises(ModelError, match="slow down") as refused:
        await said(model)
    assert (refused.value.status, refused.value.retry_after) == (429, 7)
    answer = model()
    assert await anext(answer) == "a"
    with pytest.raises(ModelError) as broken:
        await anext(answer)
    assert broken.value.status == 503
    with pytest.raises(ModelError, match="connection") as dropped:
        await said(model)
    assert dropped.value.status is None


async def test_a_code_that_is_a_name_is_no_status() -> None:
    with pytest.raises(ModelError, match="too long") as failed:
        await said(ScriptedModel(Script((Fail("too long", code="context_length_exceeded"),))))
    assert failed.value.status == 500


async def test_a_model_that_stalls_says_nothing() -> None:
    with anyio.move_on_after(0.05) as scope:
        await said(ScriptedModel(Script().stall()))
    assert scope.cancelled_caught


async def test_an_agent_on_a_scripted_model() -> None:
    model = ScriptedModel(Script().fail(429, retry_after=60), Script().say("on its way"))

    @agent
    async def support(ctx: Context):
        try:
            async for item in model(ctx.messages):
                yield item
        except ModelError as error:
            raise Retry(str(error), after=error.retry_after or 1) from error

    result = await run_turn(support, "my parcel?")
    assert (result.text, result.attempts) == ("on its way", 2)
    assert model.calls[1].args == ([{"role": "user", "content": "my parcel?"}],)


async def test_scripts_are_played_over_http() -> None:
    answers = (Script().fail(429, retry_after=1.5), Script().say("a b").count(7, 2), Script().call("add", {"a": 1}))
    async with FakeOpenAI() as fake:
        fake.play(*answers)
        heads, bodies = zip(*[await ask(fake) for _ in answers], strict=True)
    assert heads[0].startswith("HTTP/1.1 429")
    assert "retry-after: 1.5" in heads[0]
    assert '"content": "a b"' in bodies[1]
    assert '"prompt_tokens": 7, "completion_tokens": 2' in bodies[1]
    assert '"name": "add"' in bodies[2]


async def ask(fake: FakeOpenAI) -> tuple[str, str]:
    body = b'{"model": "m", "messages": []}'
    host, port = fake.url.removeprefix("http://").removesuffix("/v1").split(":")
    async with await anyio.connect_tcp(host, int(port)) as stream:
        await stream.send(b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        answer = ""
        while "\r\n\r\n" not in answer or not answer.endswith("}"):
            answer += (await stream.receive()).decode()
    head, _, content = answer.partition("\r\n\r\n")
    return head, content
