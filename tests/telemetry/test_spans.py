"""The tree of spans that a turn leaves, whatever becomes of it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import pytest
from opentelemetry import baggage, context, trace

from agentrun import SessionBusy, TurnFailed, blocking, wire
from agentrun.agent import Context, Retry, agent
from agentrun.telemetry import default
from agentrun.telemetry.attempt import model_known
from agentrun.telemetry.names import Attr
from tests.telemetry.conftest import Seen
from tests.telemetry.trees import shape
from tests.worker.fleet import Fleet, eventually

SECRET = "the-secret-of-the-session"


async def until_told(seen: Seen, name: str, times: int = 1) -> None:
    """A worker tells of an attempt right after its last word is stored, which readers may have seen before."""
    await eventually(lambda: sum(span.name == name for span in seen.spans.get_finished_spans()) >= times)


def one(seen: Seen, name: str) -> dict[str, object]:
    (span,) = [span for span in seen.spans.get_finished_spans() if span.name == name]
    return dict(span.attributes or {})


@agent
async def plain(ctx: Context) -> AsyncIterator[str]:
    with trace.get_tracer("mine").start_as_current_span("look up"):
        model_known("gpt-x")
    yield "Hello "
    yield "you"


async def test_a_turn(seen: Seen, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "get_tracer", lambda _: seen.backend)  # the author's, of the same process
    await fleet.worker(plain, name="w1")
    with seen.backend.start_as_current_span("POST /ask"):
        turn = await fleet.session("s", "plain").send(SECRET, user="ann")
    assert (await turn.result(10)).text == "Hello you"
    await until_told(seen, "process plain")
    assert seen.tree == shape("""
        POST /ask
          send plain
            process plain #1 completed (first_token)
              invoke_agent plain
                look up
    """)
    sent, process, invoked = one(seen, "send plain"), one(seen, "process plain"), one(seen, "invoke_agent plain")
    assert sent == {
        "messaging.system": "memory",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": "plain",
        "messaging.message.id": turn.id,
        "gen_ai.agent.name": "plain",
        "gen_ai.conversation.id": "s",
        "agentrun.turn": turn.id,
        "agentrun.on_busy": "enqueue",
        "agentrun.offset": 1,
        "enduser.id": "ann",
    }
    wait = process.pop("agentrun.queue.wait")
    assert isinstance(wait, float)
    assert 0 <= wait < 10
    assert process == {
        "messaging.system": "memory",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "plain",
        "messaging.message.id": turn.id,
        "gen_ai.agent.name": "plain",
        "gen_ai.conversation.id": "s",
        "agentrun.turn": turn.id,
        "agentrun.on_busy": "enqueue",
        "agentrun.attempt": 1,
        "agentrun.worker": "w1",
        "agentrun.tokens": 2,
        "agentrun.outcome": "completed",
    }
    assert invoked == {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.agent.name": "plain",
        "gen_ai.conversation.id": "s",
        "gen_ai.request.model": "gpt-x",
        "agentrun.turn": turn.id,
    }


async def test_nothing_of_what_is_said_is_told_unless_asked_for(seen: Seen, fleet: Fleet) -> None:
    @agent
    async def rude(ctx: Context) -> AsyncIterator[str]:
        yield f"you said {ctx.text}"
        raise ValueError(f"cannot stand {ctx.text}")

    await fleet.worker(rude, max_attempts=1)
    with pytest.raises(TurnFailed):
        await (await fleet.session("s", "rude").send(SECRET)).result(10)
    await until_told(seen, "process rude")
    told = "".join(span.to_json() for span in seen.spans.get_finished_spans())
    assert "ValueError" in told
    assert SECRET not in told


async def test_content_where_it_is_asked_for(seen: Seen, fleet: Fleet) -> None:
    await fleet.worker(plain, trace_content=True)
    await (await fleet.session("s", "plain").send("who?")).result(10)
    await until_told(seen, "process plain")
    invoked = one(seen, "invoke_agent plain")
    assert invoked[Attr.INPUT_MESSAGES] == '[{"role":"user","content":"who?"}]'
    assert "Hello you" in str(invoked[Attr.OUTPUT_MESSAGES])


async def test_retries_are_siblings_linked_to_the_first(seen: Seen, fleet: Fleet) -> None:
    @agent
    async def flaky(ctx: Context) -> AsyncIterator[str]:
        yield "well "
        if ctx.attempt == 1:
            raise Retry("not yet", after=0.01)
        if ctx.attempt == 2:
            raise ValueError("oh")

    await fleet.worker(flaky)
    await (await fleet.session("s", "flaky").send("go")).result(10)
    await until_told(seen, "process flaky", 3)
    assert seen.tree == shape("""
        send flaky
          process flaky #1 retrying error=retry (first_token)
            invoke_agent flaky error=Retry
          process flaky #2 retrying error=agent_error (first_token) [first_attempt: process flaky #1]
            invoke_agent flaky error=ValueError
          process flaky #3 completed (first_token) [first_attempt: process flaky #1]
            invoke_agent flaky
    """)


async def test_a_takeover(seen: Seen, fleet: Fleet) -> None:
    @agent
    async def stuck(ctx: Context) -> AsyncIterator[str]:
        yield "so "
        if ctx.attempt == 1:
            await anyio.sleep(60)

    first = await fleet.worker(stuck)
    turn = await fleet.session("s", "stuck").send("go")
    await fleet.until("text.delta")
    await first.crash()
    await fleet.worker(stuck)
    await turn.result(10)
    await until_told(seen, "process stuck", 2)
    assert seen.tree == shape("""
        send stuck
          process stuck #1 abandoned error=abandoned (first_token)
            invoke_agent stuck
          process stuck #2 completed (taken_over) (first_token) [first_attempt: process stuck #1]
            invoke_agent stuck
    """)
    takeovers = seen.metrics()["agentrun.takeovers"]
    assert takeovers == {(("gen_ai.agent.name", "stuck"),): 1}


async def test_a_stop_is_linked_to_who_stops(seen: Seen, fleet: Fleet) -> None:
    @agent
    async def long(ctx: Context) -> AsyncIterator[str]:
        yield "on "
        await anyio.sleep(60)

    await fleet.worker(long)
    turn = await fleet.session("s", "long").send("go")
    await fleet.until("text.delta")
    with seen.backend.start_as_current_span("POST /stop"):
        receipt = await turn.cancel(by="bob")
    assert receipt.status == "cancelled"
    await until_told(seen, "process long")
    assert seen.tree == shape("""
        send long
          process long #1 cancelled cancel (first_token) (stopped) [stop: cancel]
            invoke_agent long
        POST /stop
          cancel cancelled
    """)
    assert one(seen, "process long")[Attr.STOP_BY] == "bob"


async def test_a_turn_stopped_while_it_waits_has_its_span_too(seen: Seen, fleet: Fleet) -> None:
    turn = await fleet.session("s", "plain").send("go")
    first = anyio.create_task_group()
    async with first as group:
        group.start_soon(turn.cancel)
        await fleet.until("turn.cancel")
        await fleet.worker(plain)
    await until_told(seen, "process plain")
    assert seen.tree == shape("""
        send plain
          process plain #0 cancelled cancel (stopped) [stop: cancel]
        cancel cancelled
    """)
    assert seen.counted("agentrun.turns") == {(("agentrun.outcome", "cancelled"), ("gen_ai.agent.name", "plain")): 1}


async def test_an_interrupt_and_a_steer_are_told(seen: Seen, fleet: Fleet) -> None:
    @agent
    async def talk(ctx: Context) -> None:
        await ctx.emit("on ")
        while ctx.text == "first":
            if await ctx.steering():
                await ctx.emit("steered ")
            await anyio.sleep(0.01)

    await fleet.worker(talk)
    session = fleet.session("s", "talk")
    await session.send("first")
    await fleet.until("text.delta")
    await session.send("left", on_busy="steer")
    await fleet.until("steer.consumed")
    await (await session.send("second", on_busy="interrupt")).result(10)
    await until_told(seen, "process talk", 3)
    assert seen.tree == shape("""
        send talk
          process talk #1 cancelled interrupt (first_token) (stopped) [stop: send talk]
            invoke_agent talk
        send talk
          process talk #0 consumed
        send talk
          process talk #1 completed (first_token)
            invoke_agent talk
    """)


async def test_a_drain_hands_over(seen: Seen, fleet: Fleet) -> None:
    @agent
    async def slow(ctx: Context) -> AsyncIterator[str]:
        yield "a "
        if ctx.attempt == 1:
            await anyio.sleep(60)

    first = await fleet.worker(slow, drain=0.05)
    turn = await fleet.session("s", "slow").send("go")
    await fleet.until("text.delta")
    await fleet.worker(slow)
    await first.drain()
    await turn.result(10)
    await until_told(seen, "process slow", 2)
    assert seen.tree == shape("""
        send slow
          process slow #1 released drain (first_token) (stopped)
            invoke_agent slow
          process slow #2 completed (first_token) [first_attempt: process slow #1]
            invoke_agent slow
    """)


async def test_a_suspended_turn_goes_on_in_the_trace_of_who_sent_it(seen: Seen, fleet: Fleet) -> None:
    heard: list[object] = []

    @agent
    async def asks(ctx: Context) -> AsyncIterator[str]:
        answer = await ctx.ask("may I?", kind="text", hold=0.0)
        heard.append(baggage.get_baggage("tenant"))
        yield f"told {answer}"

    await fleet.worker(asks)
    token = context.attach(baggage.set_baggage("tenant", "acme"))
    with seen.backend.start_as_current_span("POST /ask"):
        turn = await fleet.session("s", "asks").send("go")
    context.detach(token)
    await fleet.until("turn.suspended")
    with seen.backend.start_as_current_span("POST /answer"):
        await turn.answer("ask-1", "yes")
    assert (await turn.result(10)).text == "told yes"
    await until_told(seen, "process asks", 2)
    assert seen.tree == shape("""
        POST /ask
          send asks
            process asks #1 suspended suspend (stopped)
              invoke_agent asks
            process asks #2 completed (first_token) [first_attempt: process asks #1] [answer: answer]
              invoke_agent asks
        POST /answer
          answer
    """)
    assert heard == ["acme"]


async def test_an_error_of_sending_is_told(seen: Seen, fleet: Fleet) -> None:
    session = fleet.session("s", "plain")
    await session.send("go", id="t1")
    with pytest.raises(SessionBusy):
        await session.send("go", id="t2", on_busy="reject")
    assert seen.tree == "send plain\nsend plain error=SessionBusy"
    assert seen.metrics()["agentrun.sends"] == {
        (("agentrun.outcome", "ok"), ("gen_ai.agent.name", "plain")): 1,
        (("agentrun.outcome", "SessionBusy"), ("gen_ai.agent.name", "plain")): 1,
    }


async def test_trace_fields_that_a_sender_names_win_over_the_current_span(seen: Seen, fleet: Fleet) -> None:
    named = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with seen.backend.start_as_current_span("other"):
        await fleet.session("s", "plain").send("go", trace={"traceparent": named, "x-mine": "kept"})
    (sent,) = [span for span in seen.spans.get_finished_spans() if span.name == "send plain"]
    assert sent.context
    assert sent.parent
    assert f"{sent.parent.trace_id:032x}-{sent.parent.span_id:016x}" == named[3:-3]
    ((_, request), *_) = await fleet.records()
    assert isinstance(request, wire.TurnRequested)
    assert request.trace["traceparent"] == f"00-{sent.context.trace_id:032x}-{sent.context.span_id:016x}-01"
    assert request.trace["x-mine"] == "kept"


async def test_without_a_provider_the_context_travels_all_the_same(fleet: Fleet) -> None:
    fleet.client.telemetry = default()
    named = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await fleet.client.session("s", agent="plain").send("go", trace={"traceparent": named})
    fleet.sessions.add("s")
    ((_, request), *_) = await fleet.records()
    assert isinstance(request, wire.TurnRequested)
    assert request.trace["traceparent"] == named


def test_a_client_of_threads_sends_in_the_span_of_its_thread(seen: Seen) -> None:
    with (
        blocking.connect("memory://spans", agent="plain", telemetry=seen.telemetry) as client,
        seen.backend.start_as_current_span("job"),
    ):
        client.session("s").send("go")
    assert seen.tree == shape("""
        job
          send plain
    """)
