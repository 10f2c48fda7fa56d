"""The tree of spans as processes export it, for whatever becomes of a turn; and that nobody waits for a receiver."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager

import anyio
import pytest
from opentelemetry import baggage, context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from agentrun import TurnFailed, connect, wire
from agentrun.brokers.server import NatsServer
from agentrun.client import Client, Turn
from agentrun.telemetry import Telemetry
from agentrun.testing.openai_server import Call, FakeOpenAI, Text
from tests.e2e.processes import Cli, Running, new_cli
from tests.telemetry.receiver import Receiver
from tests.telemetry.trees import shape

AGENTS = "tests.e2e.agents"


class Backend:
    """A program that sends turns, and exports its own spans.

    Attributes:
        traces: The traces it began, in order.
    """

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._provider = TracerProvider(resource=Resource({"service.name": "backend"}))
        self._provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(f"{receiver.url}/v1/traces")))
        self._tracer = self._provider.get_tracer("backend")
        self.telemetry = Telemetry(self._provider)
        self.traces: list[int] = []

    @contextmanager
    def request(self, name: str) -> Generator[None]:
        """Answer a request of somebody's."""
        with self._tracer.start_as_current_span(name) as span:
            self.traces.append(span.get_span_context().trace_id)
            yield

    def exports(self, expected: str) -> None:
        """See that exactly this tree comes of its requests."""
        expected = shape(expected)
        assert self._receiver.tree(self.traces, len(expected.splitlines())) == expected

    def end(self) -> None:
        self._provider.shutdown()


def seen_by(receiver: Receiver, **more: str) -> dict[str, str]:
    """The environment of a process that exports to this."""
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        "OTEL_METRIC_EXPORT_INTERVAL": "200",
        **more,
    }


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def backend(receiver: Receiver) -> Iterator[Backend]:
    backend = Backend(receiver)
    yield backend
    backend.end()


@pytest.fixture(scope="module")
def telling(nats_server: NatsServer, receiver: Receiver) -> Iterator[tuple[Cli, Running]]:
    """A namespace with a worker that tells, and writes its log as JSON."""
    cli = new_cli(nats_server.url)
    try:
        worker = cli.start(
            *("worker", "workers.echo:echo", f"{AGENTS}:looks_up", "--name", "w", "--log-format", "json"),
            env=seen_by(receiver, OTEL_EXPORTER_OTLP_COMPRESSION="gzip", OTEL_SERVICE_NAME="answers"),
        )
        worker.until("worker w runs", err=True)
        yield cli, worker
    finally:
        cli.end()


def worker_of(cli: Cli, receiver: Receiver, name: str, agent: str = "workers.echo:echo", **env: str) -> Running:
    return cli.worker(name, "--drain", "0", agent=agent, env=seen_by(receiver, **env))


@asynccontextmanager
async def client_of(cli: Cli, backend: Backend) -> AsyncGenerator[Client]:
    async with connect(cli.url, namespace=cli.namespace, telemetry=backend.telemetry) as client:
        yield client


async def until(turn: Turn, type: str) -> str:
    """Wait for an event of the turn, and return the name of the worker that has the turn by then."""
    worker = ""
    with anyio.fail_after(20):
        async for event in turn.events():
            if isinstance(event.data, wire.TurnStarted):
                worker = event.data.worker
            if event.type == type:
                return worker
    raise AssertionError(f"it ended without {type}")


# ------------------------------------------------------------------------------------------------------- one process


async def test_a_turn(telling: tuple[Cli, Running], receiver: Receiver, backend: Backend) -> None:
    cli, worker = telling
    async with client_of(cli, backend) as client:
        with backend.request("POST /ask"):
            turn = await client.session("plain", agent="looks_up").send("go")
        assert (await turn.result(20)).text == "found it"
    backend.exports("""
        POST /ask
          send looks_up
            process looks_up #1 completed (first_token)
              invoke_agent looks_up
                look up
    """)
    spans = {span.name: span for span in receiver.of(backend.traces)}
    services = {name: span.resource.attributes["service.name"] for name, span in spans.items()}
    assert services == {
        "POST /ask": "backend",
        "send looks_up": "backend",
        "process looks_up": "answers",
        "invoke_agent looks_up": "answers",
        "look up": "answers",
    }
    assert {encoding for encoding, _ in receiver.encodings} == {"gzip", ""}, "the worker's, and the backend's"
    said = worker.until(r'\{.*"looking up".*\}', err=True)
    line = json.loads(said.group())
    assert (line["logger"], line["session"], line["turn"], line["attempt"]) == ("mine", "plain", turn.id, 1)
    (own,) = [span.context for span in receiver.of(backend.traces) if span.name == "look up"]
    assert own
    assert (line["trace_id"], line["span_id"]) == (f"{own.trace_id:032x}", f"{own.span_id:016x}")


async def test_metrics_arrive(telling: tuple[Cli, Running], receiver: Receiver, backend: Backend) -> None:
    cli, _ = telling
    async with client_of(cli, backend) as client:
        for i in range(2):
            with backend.request("POST /ask"):
                turn = await client.session(f"failing-{i}", agent="echo").send("fail")
            with pytest.raises(TurnFailed):
                await turn.result(20)
    receiver.until(lambda: any(span.name == "process echo" for span in receiver.of(backend.traces)))
    processes = [span for span in receiver.of(backend.traces) if span.name == "process echo"]
    who = str(processes[0].resource.attributes["service.instance.id"])
    failed = (("agentrun.outcome", "failed"), ("gen_ai.agent.name", "echo"))
    receiver.until(lambda: receiver.counted("agentrun.turns", who).get(failed) == 2)
    found = {name for process, name in receiver.metrics if process == who}
    assert {
        "agentrun.attempts",
        "agentrun.turn.duration",
        "agentrun.queue.wait",
        "agentrun.queue.waiting",
        "agentrun.append.duration",
        "agentrun.worker.running",
        "agentrun.worker.slots",
    } <= found
    assert ("gzip", "/v1/metrics") in receiver.encodings


async def test_a_retry(telling: tuple[Cli, Running], backend: Backend) -> None:
    cli, _ = telling
    async with client_of(cli, backend) as client:
        with backend.request("POST /ask"):
            turn = await client.session("retry", agent="echo").send("retry 0.05")
        await turn.result(20)
    backend.exports("""
        POST /ask
          send echo
            process echo #1 retrying error=retry
              invoke_agent echo error=Retry
            process echo #2 completed (first_token) [first_attempt: process echo #1]
              invoke_agent echo
    """)


async def test_a_stop(telling: tuple[Cli, Running], backend: Backend) -> None:
    cli, _ = telling
    async with client_of(cli, backend) as client:
        with backend.request("POST /ask"):
            turn = await client.session("stopped", agent="echo").send("count 10000 20")
        await until(turn, "text.delta")
        with backend.request("POST /stop"):
            assert (await turn.cancel(by="ann")).status == "cancelled"
    backend.exports("""
        POST /ask
          send echo
            process echo #1 cancelled cancel (first_token) (stopped) [stop: cancel]
              invoke_agent echo
        POST /stop
          cancel cancelled
    """)


# ----------------------------------------------------------------------------------------------------- two processes


async def test_a_worker_that_is_killed(cli: Cli, receiver: Receiver, backend: Backend) -> None:
    """Its span dies with it; what it began is linked to all the same."""
    workers = {name: worker_of(cli, receiver, name) for name in ("w1", "w2")}
    async with client_of(cli, backend) as client:
        with backend.request("POST /ask"):
            turn = await client.session("s", agent="echo").send("count 60 50")
        workers.pop(await until(turn, "text.delta")).signal(signal.SIGKILL)
        assert len((await turn.result(20)).text.split()) == 60
    backend.exports("""
        POST /ask
          send echo
            process echo #2 completed (taken_over) (first_token) [first_attempt: not exported]
              invoke_agent echo
    """)
    (process,) = [span for span in receiver.of(backend.traces) if span.name == "process echo"]
    assert [(process.attributes or {})["agentrun.worker"]] == list(workers), "the one that is left"
    (link,) = process.links
    assert link.context.trace_id == backend.traces[0]


async def test_a_drain_hands_over(cli: Cli, receiver: Receiver, backend: Backend) -> None:
    workers = {name: worker_of(cli, receiver, name) for name in ("w1", "w2")}
    async with client_of(cli, backend) as client:
        with backend.request("POST /ask"):
            turn = await client.session("s", agent="echo").send("count 60 50")
        first = await until(turn, "text.delta")
        workers[first].signal(signal.SIGTERM)
        assert workers.pop(first).wait().code == 0
        assert len((await turn.result(20)).text.split()) == 60
    backend.exports("""
        POST /ask
          send echo
            process echo #1 released drain (first_token) (stopped)
              invoke_agent echo
            process echo #2 completed (first_token) [first_attempt: process echo #1]
              invoke_agent echo
    """)
    processes = [span for span in receiver.of(backend.traces) if span.name == "process echo"]
    assert [(span.attributes or {})["agentrun.worker"] for span in processes] == [first, *workers]
    assert {span.resource.attributes["service.name"] for span in processes} == {"agentrun-worker"}
    assert len({span.resource.attributes["service.instance.id"] for span in processes}) == 2


async def test_a_suspended_turn_goes_on_elsewhere(cli: Cli, receiver: Receiver, backend: Backend) -> None:
    first = worker_of(cli, receiver, "first", f"{AGENTS}:asks")
    async with client_of(cli, backend) as client:
        token = context.attach(baggage.set_baggage("tenant", "acme"))
        with backend.request("POST /ask"):
            turn = await client.session("s", agent="asks").send("go")
        context.detach(token)
        await until(turn, "turn.suspended")
        first.signal(signal.SIGTERM)
        assert first.wait().code == 0
        worker_of(cli, receiver, "second", f"{AGENTS}:asks")
        with backend.request("POST /answer"):
            await turn.answer("ask-1", "yes")
        assert (await turn.result(20)).text == "yes, acme"
    backend.exports("""
        POST /ask
          send asks
            process asks #1 suspended suspend (stopped)
              invoke_agent asks
            process asks #2 completed (first_token) [first_attempt: process asks #1] [answer: answer]
              invoke_agent asks
        POST /answer
          answer
    """)


# ------------------------------------------------------------------------------------------------------------- litellm


async def test_a_turn_with_a_model_and_a_tool(cli: Cli, receiver: Receiver, backend: Backend) -> None:
    async with FakeOpenAI() as model:
        model.script(Call("weather", {"city": "Ulm"}), usage=(11, 5))
        model.script(Text("It rains."), usage=(20, 6))
        worker = cli.start(
            *("worker", "tests.e2e.forecasting:forecast", "--name", "w"), env=seen_by(receiver, MODEL_URL=model.url)
        )
        worker.until("worker w runs", err=True, timeout=90)  # litellm takes its time to be imported
        async with client_of(cli, backend) as client:
            with backend.request("POST /ask"):
                turn = await client.session("s", agent="forecast").send("go")
            assert (await turn.result(60)).text == "It rains."
    backend.exports("""
        POST /ask
          send forecast
            process forecast #1 completed (first_token)
              invoke_agent forecast
                litellm_request
                weather station
                litellm_request
    """)
    worker.signal(signal.SIGTERM)
    assert worker.wait().code == 0
    spans = receiver.of(backend.traces)
    assert len(spans) == 7, "and nothing comes later"
    used = [
        (span.name, key[13:], value)
        for span in spans
        for key, value in (span.attributes or {}).items()
        if key.startswith("gen_ai.usage.")
    ]
    assert sorted(used) == [
        ("litellm_request", "input_tokens", 11),
        ("litellm_request", "input_tokens", 20),
        ("litellm_request", "output_tokens", 5),
        ("litellm_request", "output_tokens", 6),
        ("litellm_request", "total_tokens", 16),
        ("litellm_request", "total_tokens", 26),
    ]


# ------------------------------------------------------------------------------------------------- receivers that fail


@pytest.mark.parametrize("fault", ["hangs", "is not there"])
def test_nobody_waits_for_a_receiver_that(fault: str, cli: Cli) -> None:
    with Receiver(hangs=True) as receiver, socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        url = receiver.url if fault == "hangs" else f"http://127.0.0.1:{deaf.getsockname()[1]}"
        env = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": url,
            "OTEL_EXPORTER_OTLP_TIMEOUT": "300",
            "OTEL_BSP_SCHEDULE_DELAY": "20",
            "OTEL_METRIC_EXPORT_INTERVAL": "100",
        }
        worker = cli.worker("w", "--drain", "1", env=env)
        for i in range(2):
            cli.send(f"s{i}", "hello", f"t{i}")
            assert cli.result(f"s{i}", f"t{i}").text == "hello"
            if fault == "hangs":
                receiver.until(lambda: receiver.requests >= 2)  # of both signals: the rest is in the midst of both
        worker.signal(signal.SIGTERM)
        began = time.monotonic()
        assert worker.wait(60).code == 0
        assert time.monotonic() - began < 30, "it may wait for 5 s, and the exporter for 300"
