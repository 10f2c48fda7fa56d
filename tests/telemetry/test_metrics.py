"""What is counted of turns, and the wrapper over brokers."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio
import httpx
import prometheus_client
import pytest
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from agentrun import TurnFailed, errors, wire
from agentrun.agent import Context, agent
from agentrun.broker import Broker, Kind
from agentrun.client import Client
from agentrun.errors import Conflict
from agentrun.gateway import Auth, Gateway
from agentrun.telemetry import Telemetry
from agentrun.telemetry.broker import ObservedBroker
from agentrun.telemetry.names import ATTEMPT_OUTCOMES, METRICS, SAMPLE, TURN_OUTCOMES, prometheus_name
from agentrun.testing import CHECKS, Environment, MemoryEnvironment, Settings, memory_environments, run_contract
from tests.telemetry.conftest import Seen
from tests.worker.fleet import Fleet, eventually, fleet_on

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
    await eventually(lambda: bool(seen.counted("agentrun.turns")))
    metrics = seen.metrics()
    deltas = [r for r, e in await fleet.records() if isinstance(e, wire.TextDelta)]
    assert metrics["agentrun.sends"] == {outcome("ok"): 1}
    assert seen.counted("agentrun.turns") == seen.counted("agentrun.attempts") == {outcome("completed"): 1}
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
    worker.worker.drain()
    await worker.ended.wait()
    assert "agentrun.worker.slots" not in seen.metrics()  # of a worker that is gone nothing is told


COUNTERS = [metric for metric in METRICS.values() if metric.kind.endswith("counter")]


async def test_counts_begin_at_0_or_their_first_events_would_be_no_increase(seen: Seen, fleet: Fleet) -> None:
    await fleet.worker(talk)
    async with Gateway(fleet.client, auth=Auth.insecure(), telemetry=seen.telemetry):
        await eventually(lambda: {metric.name for metric in COUNTERS} <= {*seen.metrics()})
        metrics = seen.metrics()
    for metric in COUNTERS:
        ends = [outcome(name) for name in metric.outcomes] if metric.outcomes else [(AGENT,)]
        assert metrics[metric.name] == dict.fromkeys(ends if metric.attributes else [()], 0), metric.name


async def test_what_prometheus_reads_begins_at_0() -> None:
    meters = MeterProvider([PrometheusMetricReader()])
    server, thread = prometheus_client.start_http_server(0, "127.0.0.1")
    try:
        async with (
            memory_environments(Settings()) as environment,
            fleet_on(environment, Telemetry(meter_provider=meters)) as fleet,
            httpx.AsyncClient() as http,
        ):
            await fleet.worker(talk)

            async def read(series: str) -> list[str]:
                page = await http.get(f"http://127.0.0.1:{server.server_port}/metrics")
                return [line.rpartition(" ")[2] for line in page.text.splitlines() if line.startswith(series)]

            for metric in (METRICS["turns"], METRICS["attempts"], METRICS["fenced"], METRICS["tokens"]):
                values = await read(f"{prometheus_name(metric)}{{")
                assert values == ["0.0"] * max(1, len(metric.outcomes)), metric.name
            await (await fleet.session("s", "talk").send("go")).result(10)
            done = ""
            with anyio.fail_after(10):
                while done != "1.0":
                    (done,) = await read('agentrun_turns_total{agentrun_outcome="completed"')
    finally:
        meters.shutdown()
        server.shutdown()
        server.server_close()
        thread.join()


async def test_sends_to_the_agent_of_a_client_are_counted_from_0_on(seen: Seen, fleet: Fleet) -> None:
    client = Client(fleet.broker, agent="talk", telemetry=seen.telemetry)
    assert set(seen.metrics()["agentrun.sends"].values()) == {0}
    await client.session("s").send("go")
    fleet.sessions.add("s")
    assert seen.counted("agentrun.sends") == {outcome("ok"): 1}


def test_outcomes_are_those_that_events_tell_of() -> None:
    def words(*events: type[wire.OutputEvent]) -> set[str]:
        return {str(event.__struct_config__.tag).removeprefix("turn.") for event in events}

    ends = words(*wire.TERMINAL)
    pauses = words(wire.TurnSuspended, wire.TurnRetrying, wire.TurnReleased)
    assert ends < {*TURN_OUTCOMES}
    assert ends | pauses < {*ATTEMPT_OUTCOMES}
    for name in METRICS["sends"].outcomes[1:]:
        assert issubclass(getattr(errors, name), errors.AgentrunError)


@pytest.mark.parametrize("key", ["turns", "attempts"])
def test_what_a_metric_means_names_each_outcome(key: str) -> None:
    assert set(METRICS[key].outcomes) <= set(re.findall(r"\w+", METRICS[key].help))


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
    for name in ("queue.wait", "time_to_first_token", "time_between_tokens", "turn.duration"):
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
    await eventually(lambda: bool(seen.counted("agentrun.turns")))
    assert seen.counted("agentrun.turns") == {outcome("failed"): 1}
    assert seen.counted("agentrun.attempts") == {outcome("retrying"): 1, outcome("failed"): 1}
    assert seen.counted("agentrun.dead_turns") == {(AGENT,): 1}
    assert "agentrun.time_to_first_token" not in seen.metrics()


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
    await eventually(lambda: bool(seen.counted("agentrun.attempts")))
    assert seen.counted("agentrun.fenced") == {(AGENT,): 1}
    assert seen.counted("agentrun.attempts") == {outcome("fenced"): 1}
    assert seen.counted("agentrun.turns") == {}


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


@pytest.mark.parametrize(
    ("key", "apart"),
    [
        ("token_gap", (0.001, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.08, 0.2)),  # 200 to 5 tokens a second
        ("append_duration", (0.0002, 0.0005, 0.001, 0.002, 0.01, 1, 20, 40)),  # a broker beside us, one that is away
        ("send_duration", (0.0005, 0.001, 0.002, 0.01, 1, 20)),
        ("queue_wait", (0.001, 0.002, 0.005, 1, 60, 120, 600, 3000)),  # an idle fleet, one that is overrun
        ("first_token", (0.2, 0.3, 0.5, 1, 1.5, 2, 60, 600)),
        ("turn_duration", (0.5, 1, 2, 5, 10, 20, 60, 600, 3000)),
        ("cancel_duration", (0.001, 0.003, 0.01, 1, 5, 8)),  # 5 s is what a stop waits for its receipt
        ("http_duration", (0.001, 0.002, 0.005, 1, 10, 25)),  # a long poll
    ],
)
def test_what_an_operator_would_tell_apart_falls_into_buckets_of_its_own(
    seen: Seen, key: str, apart: tuple[float, ...]
) -> None:
    for value in apart:
        seen.telemetry.instruments.record(key, value)
    data = seen.reader.get_metrics_data()
    assert data is not None
    (metric,) = [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics if m.data.data_points]
    (point,) = metric.data.data_points
    assert metric.name == METRICS[key].name
    assert sorted(point.bucket_counts, reverse=True)[: len(apart) + 1] == [1] * len(apart) + [0]


def test_nothing_is_collected_where_no_provider_is_set() -> None:
    assert not Telemetry().instruments.enabled
    assert Telemetry(meter_provider=MeterProvider()).instruments.enabled
