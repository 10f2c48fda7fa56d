"""What is counted of turns, and the wrapper over brokers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from agentrun import TurnFailed, wire
from agentrun.agent import Context, agent
from agentrun.broker import Broker, Kind
from agentrun.errors import Conflict
from agentrun.telemetry import Telemetry
from agentrun.telemetry.broker import ObservedBroker
from agentrun.telemetry.names import METRICS, SAMPLE
from agentrun.testing import CHECKS, Environment, MemoryEnvironment, Settings, run_contract
from tests.telemetry.conftest import Seen
from tests.worker.fleet import Fleet, eventually

AGENT = ("gen_ai.agent.name", "talk")


def outcome(name: str) -> tuple[tuple[str, str], ...]:
    return (("agentrun.outcome", name), AGENT)


@agent
async def talk(ctx: Context) -> AsyncIterator[str]:
    if ctx.text == "fail":
        raise ValueError
    for n in range(3 * SAMPLE):
        yield f"w{n} "
        await anyio.sleep(0.003)


async def test_a_turn_is_counted(seen: Seen, fleet: Fleet) -> None:
    worker = await fleet.worker(talk, concurrency=7)
    turn = await fleet.session("s", "talk").send("go")
    text = (await turn.result(10)).text
    await eventually(lambda: "agentrun.turns" in seen.metrics())
    metrics = seen.metrics()
    deltas = [r for r, e in await fleet.records() if isinstance(e, wire.TextDelta)]
    assert metrics["agentrun.sends"] == {outcome("ok"): 1}
    assert metrics["agentrun.turns"] == metrics["agentrun.attempts"] == {outcome("completed"): 1}
    for name in ("agentrun.queue.wait", "agentrun.time_to_first_token", "agentrun.time_between_tokens"):
        assert metrics[name] == {(AGENT,): 1}, name
    assert metrics["agentrun.turn.duration"] == {outcome("completed"): 1}
    assert metrics["agentrun.send.duration"] == {(AGENT,): 1}
    assert metrics["agentrun.tokens"] == {(AGENT,): 3 * SAMPLE}
    assert metrics["agentrun.appends"] == {(AGENT,): len(deltas)}
    assert metrics["agentrun.append.bytes"] == {(AGENT,): sum(len(r.body) for r in deltas)}
    assert metrics["agentrun.text.bytes"] == {(AGENT,): len(text)}
    assert metrics["agentrun.append.batch"] == {(): len(deltas) // SAMPLE}
    timed = metrics["agentrun.append.duration"]
    assert timed[(("agentrun.kind", "out.delta"), ("agentrun.outcome", "ok"))] == len(deltas) // SAMPLE
    assert timed[(("agentrun.kind", "out.turn"), ("agentrun.outcome", "ok"))] == 2  # started, completed
    await eventually(lambda: seen.metrics()["agentrun.worker.running"] == {(AGENT,): 0})
    assert metrics["agentrun.worker.slots"] == {(AGENT,): 7}
    assert metrics["agentrun.queue.waiting"] == {(AGENT,): 0}
    assert metrics["agentrun.queue.leased"] == {(AGENT,): 0}
    for name in ("agentrun.takeovers", "agentrun.fenced", "agentrun.dead_turns"):
        assert metrics[name] == {(AGENT,): 0}, f"the first {name} would be no increase"
    worker.worker.drain()
    await worker.ended.wait()
    assert "agentrun.worker.slots" not in seen.metrics()  # of a worker that is gone nothing is told


async def test_what_is_measured_of_a_turn_leads_to_its_trace(seen: Seen, fleet: Fleet) -> None:
    await fleet.worker(talk)
    await (await fleet.session("s", "talk").send("go")).result(10)
    await eventually(lambda: "process talk" in seen.tree)
    data = seen.reader.get_metrics_data()
    assert data is not None
    exemplars = {
        metric.name: {exemplar.trace_id for point in metric.data.data_points for exemplar in point.exemplars}
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if any(point.exemplars for point in metric.data.data_points)
    }
    (process,) = [span for span in seen.spans.get_finished_spans() if span.name == "process talk"]
    assert process.context
    for name in ("queue.wait", "time_to_first_token", "time_between_tokens", "turn.duration", "turns", "attempts"):
        assert exemplars[f"agentrun.{name}"] == {process.context.trace_id}, name


async def test_running_turns_and_slots_of_a_worker_that_drains(seen: Seen, fleet: Fleet) -> None:
    @agent(name="talk")
    async def waits(ctx: Context) -> AsyncIterator[str]:
        yield "so "
        await anyio.sleep(60)

    worker = await fleet.worker(waits)
    turn = await fleet.session("s", "talk").send("go")
    await fleet.until("text.delta")
    assert seen.metrics()["agentrun.worker.running"] == {(AGENT,): 1}
    worker.worker.drain()
    assert seen.metrics()["agentrun.worker.slots"] == {(AGENT,): 0}
    await turn.cancel()
    assert seen.metrics()["agentrun.cancel.duration"] == {(("agentrun.receipt", "cancelled"),): 1}


async def test_a_turn_that_gives_up(seen: Seen, fleet: Fleet) -> None:
    await fleet.worker(talk, max_attempts=2)
    with pytest.raises(TurnFailed):
        await (await fleet.session("s", "talk").send("fail")).result(10)
    await eventually(lambda: "agentrun.turns" in seen.metrics())
    metrics = seen.metrics()
    assert metrics["agentrun.turns"] == {outcome("failed"): 1}
    assert metrics["agentrun.attempts"] == {outcome("retrying"): 1, outcome("failed"): 1}
    assert metrics["agentrun.dead_turns"] == {(AGENT,): 1}
    assert "agentrun.time_to_first_token" not in metrics


async def test_an_attempt_that_is_fenced_off(seen: Seen, fleet: Fleet) -> None:
    @agent(name="talk")
    async def waits(ctx: Context) -> AsyncIterator[str]:
        yield "so "
        await anyio.sleep(60)

    await fleet.worker(waits)
    await fleet.session("s", "talk").send("go")
    await fleet.until("text.delta")
    await fleet.client.session("s").delete()
    fleet.sessions.clear()
    await eventually(lambda: "agentrun.attempts" in seen.metrics())
    metrics = seen.metrics()
    assert metrics["agentrun.fenced"] == {(AGENT,): 1}
    assert metrics["agentrun.attempts"] == {outcome("fenced"): 1}
    assert "agentrun.turns" not in metrics


@pytest.mark.parametrize("kind", [Kind.CANCEL, Kind.DELTA])
async def test_appends_that_are_refused_are_told_apart(kind: Kind) -> None:
    reader = InMemoryMetricReader()
    seen = Telemetry(meter_provider=MeterProvider([reader]))
    async with MemoryEnvironment(Settings()).open() as plain:
        broker = ObservedBroker(plain, seen.instruments)
        end = await broker.log.last("s")
        args = {"kind": kind, "after": end, "pending": end.pending}
        await broker.log.append("s", b"1", **args)
        for _ in range(2):
            with pytest.raises(Conflict):
                await broker.log.append("s", b"2", **args)
    data = reader.get_metrics_data()
    assert data is not None
    (metric,) = [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics]
    assert metric.name == METRICS["append_duration"].name
    counts = {p.attributes["agentrun.outcome"]: p.count for p in metric.data.data_points}
    assert counts.pop("Conflict") == 2  # of tokens too, of which few appends that succeed are timed
    assert counts == ({} if kind is Kind.DELTA else {"ok": 1})


async def test_the_contract_holds_through_the_wrapper() -> None:
    instruments = Telemetry(meter_provider=MeterProvider([InMemoryMetricReader()])).instruments
    inner: dict[int, Broker] = {}

    class Wrapped(MemoryEnvironment):
        def open(self) -> AbstractAsyncContextManager[Broker]:
            plain = self.connect()
            broker = ObservedBroker(plain, instruments)
            inner[id(broker)] = plain
            return broker

        async def drop_next_ack(self, broker: Broker) -> None:
            await super().drop_next_ack(inner[id(broker)])

    @asynccontextmanager
    async def environments(settings: Settings) -> AsyncGenerator[Environment]:
        yield Wrapped(settings)

    # What an operator does is done on the broker itself.
    checks = [c for c in CHECKS if "operator" not in c.name]
    outcomes = await run_contract(environments, checks, at_once=10)
    assert {o.check.name: o.error for o in outcomes if o.error} == {}


def test_nothing_is_collected_where_no_provider_is_set() -> None:
    assert not Telemetry().instruments.enabled
    assert Telemetry(meter_provider=MeterProvider()).instruments.enabled
