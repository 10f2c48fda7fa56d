"""Telemetry that fails: the turn that it would tell of does not."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Generator, Sequence
from typing import Any

import anyio
import httpx
import pytest
from opentelemetry import baggage, context, metrics, propagate, trace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Sampler, SamplingResult

from agentrun import InvalidInput, TurnFailed, wire
from agentrun.agent import Context, Fail, agent
from agentrun.gateway import Auth, Gateway
from agentrun.gateway.server import serving
from agentrun.telemetry import Telemetry, spans
from agentrun.telemetry.attempt import Facts, Watch
from agentrun.telemetry.context import carried, span_of
from agentrun.telemetry.names import Attr
from agentrun.testing import Settings, memory_environments
from tests.telemetry.conftest import Seen
from tests.telemetry.test_spans import one, until_told
from tests.worker.fleet import LEASE, Fleet, eventually, fleet_on

SENT = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}


@pytest.fixture(autouse=True)
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known to have failed before."""
    monkeypatch.setattr(spans, "_lost", set[str]())


class _Processor(SpanProcessor):
    def __init__(self, *broken: str) -> None:
        self.broken = broken

    def on_start(self, span: Span, parent_context: context.Context | None = None) -> None:
        if "start" in self.broken:
            raise RuntimeError("no room for a span")

    def on_end(self, span: ReadableSpan) -> None:
        if "end" in self.broken:
            raise RuntimeError("no room for a span")


class _Exporter(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        raise RuntimeError("no receiver")


class _Sampler(Sampler):
    def should_sample(self, *args: Any, **more: Any) -> SamplingResult:
        raise RuntimeError("no decision")

    def get_description(self) -> str:
        return "broken"


class _Instrument(metrics.NoOpCounter, metrics.NoOpHistogram):
    def __init__(self) -> None:
        super().__init__("broken")

    def add(self, *args: Any, **more: Any) -> None:
        raise RuntimeError("no counting")

    def record(self, *args: Any, **more: Any) -> None:
        raise RuntimeError("no recording")


class _Meter(metrics.NoOpMeter):
    def create_counter(self, *args: Any, **more: Any) -> metrics.Counter:
        return _Instrument()

    def create_histogram(self, *args: Any, **more: Any) -> metrics.Histogram:
        return _Instrument()


class _Meters(metrics.MeterProvider):
    def get_meter(self, name: str, *args: Any, **more: Any) -> metrics.Meter:
        return _Meter(name)


class _Propagator(TextMapPropagator):
    def extract(self, *args: Any, **more: Any) -> context.Context:
        raise RuntimeError("no way in")

    def inject(self, *args: Any, **more: Any) -> None:
        raise RuntimeError("no way out")

    @property
    def fields(self) -> set[str]:
        return set()


@pytest.fixture(params=["start", "end", "exporter", "sampler", "metrics", "propagator"])
def broken(request: pytest.FixtureRequest) -> Generator[Telemetry]:
    """Telemetry of which one part raises whatever is asked of it."""
    tracers = TracerProvider(sampler=_Sampler()) if request.param == "sampler" else TracerProvider()
    if request.param == "exporter":
        tracers.add_span_processor(SimpleSpanProcessor(_Exporter()))
    else:
        tracers.add_span_processor(_Processor(request.param))
    before = propagate.get_global_textmap()
    if request.param == "propagator":
        propagate.set_global_textmap(_Propagator())
    yield Telemetry(tracers, _Meters() if request.param == "metrics" else MeterProvider())
    propagate.set_global_textmap(before)


@agent
async def asks(ctx: Context) -> AsyncIterator[str]:
    yield "Well, "
    match ctx.text:
        case "fail":
            raise Fail("not today")
        case "wait":
            await anyio.sleep(60)
        case _:
            yield str(await ctx.ask("sure?", kind="text"))


async def test_turns_go_their_way_whatever_is_broken(broken: Telemetry) -> None:
    async with (
        memory_environments(Settings(lease_ttl=LEASE)) as environment,
        fleet_on(environment, broken) as fleet,
    ):
        await fleet.worker(asks, trace_content=True, ask_hold=0)
        session = fleet.session("s", "asks")
        turn = await session.send("go", user="ann", trace=SENT)
        asked = (await fleet.until("input.required")).body
        question = wire.decode(asked)
        assert isinstance(question, wire.InputRequired)
        await fleet.until("turn.suspended")
        await turn.answer(question.request, "yes")
        assert (await turn.result(10)).text == "Well, yes"
        with pytest.raises(TurnFailed, match="not today"):
            await (await session.send("fail")).result(10)
        stopped = await session.send("wait")
        behind = await session.send("wait")
        await fleet.until("turn.started", times=4)
        assert (await behind.cancel()).status == "cancelled"
        assert (await stopped.cancel()).status == "cancelled"
        started = [e for e in await fleet.events() if isinstance(e, wire.TurnStarted)]
        assert [(e.turn, e.attempt) for e in started] == [(turn.id, 1), (turn.id, 2)] + [
            (e.turn, 1) for e in started[2:]
        ]
        assert len(started) == 4  # none was tried again; the one behind was stopped while it waited


async def test_a_gateway_serves_whatever_is_broken(broken: Telemetry) -> None:
    async with (
        memory_environments(Settings(lease_ttl=LEASE)) as environment,
        fleet_on(environment, broken) as fleet,
    ):
        fleet.sessions.add("s")
        gateway = Gateway(fleet.client, auth=Auth.insecure(), agent="asks")
        async with serving(gateway, drain=gateway.drain) as url, httpx.AsyncClient(base_url=url) as http:
            sent = await http.post("/v1/sessions/s/turns", json={"input": "go"}, headers=SENT)
            assert sent.status_code == 202
            assert (await http.get("/v1/sessions/s/nowhere")).status_code == 404


async def test_a_broken_part_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    tracers = TracerProvider()
    tracers.add_span_processor(_Processor("end"))
    async with memory_environments(Settings()) as environment, fleet_on(environment, Telemetry(tracers)) as fleet:
        with caplog.at_level(logging.INFO):
            for _ in range(3):
                await fleet.session("s", "asks").send("go")
    told = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "agentrun.telemetry"]
    assert told == [("WARNING", "telemetry failed, which changes nothing else; lost: the end of a span")]
    assert "no room for a span" in caplog.text


async def test_where_a_span_cannot_begin_the_trace_goes_on(fleet: Fleet) -> None:
    tracers = TracerProvider()
    tracers.add_span_processor(_Processor("start"))
    async with memory_environments(Settings()) as environment, fleet_on(environment, Telemetry(tracers)) as fleet:
        await fleet.session("s", "asks").send("go", trace=SENT)
        ((_, request),) = await fleet.records()
        assert isinstance(request, wire.TurnRequested)
        assert request.trace == SENT


def _nested() -> list[Any]:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    return deep


@pytest.mark.parametrize("content", [_nested(), "half a character: \ud83d", object()], ids=["deep", "half", "no JSON"])
def test_what_is_no_json_is_left_out_and_the_agent_runs(seen: Seen, content: Any) -> None:
    request = wire.TurnRequested(turn="t", agent="plain", input="")
    facts = Facts(system="memory", worker="w", session="s", request=request, attempt=1)
    watch = Watch(seen.telemetry, facts, clock=lambda: 0.0, content=True)
    ran = False
    with watch.current(), watch.invoking([{"role": "user", "content": content}]):
        ran = True
    watch.claimed()
    watch.ended("completed", said=wire.Message(parts=[wire.DataPart("x", data=content)]))
    assert ran
    assert one(seen, "process plain")[Attr.OUTCOME] == "completed"
    invoked = one(seen, "invoke_agent plain")
    assert Attr.ERROR_TYPE not in invoked
    assert Attr.INPUT_MESSAGES not in invoked
    assert Attr.OUTPUT_MESSAGES not in invoked


async def test_half_a_character_keeps_no_span_from_its_exporter(seen: Seen, fleet: Fleet) -> None:
    @agent
    async def halves(ctx: Context) -> AsyncIterator[str]:
        yield "so "
        raise ValueError(f"{ctx.text} \ud83d")

    with pytest.raises(InvalidInput):
        await fleet.session("s", "halves").send("go", user="ann\ud83d")
    await fleet.worker(halves, trace_content=True, max_attempts=1)
    with pytest.raises(TurnFailed):
        await (await fleet.session("s", "halves").send("go")).result(10)
    await until_told(seen, "invoke_agent halves")
    exported = str(encode_spans(seen.spans.get_finished_spans()))
    assert "ann?" in exported
    assert "go ?" in exported


async def test_an_error_whose_code_is_none(seen: Seen, fleet: Fleet) -> None:
    class Odd(Exception):
        @property
        def code(self) -> str:
            raise RuntimeError(self)

        def __str__(self) -> str:
            return "odd"

    class Callable(Exception):
        def code(self) -> int:  # as that of gRPC
            return 7

    @agent
    async def fails(ctx: Context) -> AsyncIterator[str]:
        yield "so "
        raise Odd if ctx.text == "odd" else Callable("odd")

    await fleet.worker(fails, trace_content=True, max_attempts=1)
    for text in ("odd", "callable"):
        with pytest.raises(TurnFailed, match="odd"):
            await (await fleet.session("s", "fails").send(text)).result(10)
    await until_told(seen, "invoke_agent fails", 2)
    kinds = [dict(s.attributes or {})[Attr.ERROR_TYPE] for s in seen.spans.get_finished_spans() if "invoke" in s.name]
    assert kinds == ["Odd", "Callable"]


async def test_baggage_that_cannot_travel_keeps_no_turn(seen: Seen, fleet: Fleet) -> None:
    token = context.attach(baggage.set_baggage("tenant", "\ud83d"))
    try:
        with seen.backend.start_as_current_span("click") as click:
            await fleet.session("s", "plain").send("go")
    finally:
        context.detach(token)
    ((_, request),) = await fleet.records()
    assert isinstance(request, wire.TurnRequested)
    assert f"{click.get_span_context().trace_id:032x}" in request.trace["traceparent"]
    await eventually(lambda: "send plain" in seen.tree)


@pytest.mark.parametrize(
    "fields",
    [
        {"traceparent": "00-yes-no-01", "tracestate": "=,=", "baggage": "=;"},
        {"traceparent": "", "baggage": "a=\ud83d"},
        {"traceparent": SENT["traceparent"] + "-more", "tracestate": "," * 5000},
        {"traceparent": f"00-{'0' * 32}-{'0' * 16}-01"},
        {"traceparent": 5, "baggage": None},
    ],
    ids=str,
)
def test_fields_that_are_none_are_passed_over(fields: Any) -> None:
    where = span_of(fields)
    assert not trace.get_current_span(where).get_span_context().is_valid
    assert baggage.get_all(where) == {}
    assert carried({}, where) == {}
