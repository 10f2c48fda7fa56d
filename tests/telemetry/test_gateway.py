"""What is seen of a gateway: its requests as spans above what they ask for, and what it counts of its readers."""

from __future__ import annotations

import gc
import json
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import httpx
import pytest
from opentelemetry import baggage, context, propagate, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import ReadableSpan, Span
from opentelemetry.trace import StatusCode
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from websockets.asyncio.client import connect as websocket

from agentrun import wire
from agentrun.agent import Context, Retry, agent
from agentrun.brokers.memory import MemoryState
from agentrun.gateway import Auth, Gateway, GatewaySettings, Keys, mint
from agentrun.gateway.hub import Closed
from agentrun.gateway.server import serving
from agentrun.gateway.telemetry import Observed
from agentrun.telemetry import Telemetry, default
from agentrun.telemetry.logs import JsonFormatter
from tests.gateway.conftest import Served, frames
from tests.gateway.test_hub import bench, read_to
from tests.telemetry.conftest import Seen
from tests.telemetry.test_spans import plain, until_told
from tests.telemetry.trees import shape
from tests.worker.fleet import Fleet, eventually

DOCUMENT = Path(__file__).parents[2] / "docs" / "observability.md"
SECRET = "0123456789abcdef" * 2
TURNS = "/v1/sessions/s/turns"
EVENTS = "/v1/sessions/s/events"
SSE = {"accept": "text/event-stream"}


@asynccontextmanager
async def served(
    fleet: Fleet, *, auth: Auth | None = None, settings: GatewaySettings | None = None
) -> AsyncGenerator[Served]:
    """A gateway on the fleet's broker, watched like its client, and a client of it that tells where it is at."""

    async def tell(request: httpx.Request) -> None:
        fields: dict[str, str] = {}
        propagate.inject(fields)
        request.headers.update(fields)

    gateway = Gateway(fleet.client, auth=auth or Auth.insecure(), agent="plain", settings=settings)
    fleet.sessions.add("s")
    async with (
        serving(gateway, drain=gateway.drain) as url,
        httpx.AsyncClient(base_url=url, timeout=20, event_hooks={"request": [tell]}) as http,
    ):
        yield Served(gateway, url, http)


def span(seen: Seen, name: str) -> ReadableSpan:
    (found,) = [span for span in seen.spans.get_finished_spans() if span.name == name]
    return found


def durations(seen: Seen) -> dict[tuple[object, ...], float]:
    """How many requests there were, by method, route and status."""
    keys = ("http.request.method", "http.route", "http.response.status_code")
    points = seen.metrics()["http.server.request.duration"]
    return {tuple(dict(at).get(key) for key in keys): count for at, count in points.items()}


# ------------------------------------------------------------------------------------------------------------ requests


async def test_a_request_joins_the_trace_of_who_sends_it(seen: Seen, fleet: Fleet) -> None:
    heard: list[object] = []

    @agent(name="plain")
    async def hears(ctx: Context) -> AsyncIterator[str]:
        heard.append(baggage.get_baggage("tenant"))
        yield "yes"

    await fleet.worker(hears)
    async with served(fleet) as site:
        token = context.attach(baggage.set_baggage("tenant", "acme"))
        with seen.backend.start_as_current_span("click"):
            sent = await site.http.post(TURNS, json={"input": "go"})
        context.detach(token)
        assert sent.status_code == 202
        await until_told(seen, "process plain")
    assert seen.tree == shape("""
        click
          POST /v1/sessions/{session}/turns
            send plain
              process plain #1 completed (first_token)
                invoke_agent plain
    """)
    assert heard == ["acme"]
    request = span(seen, "POST /v1/sessions/{session}/turns")
    assert request.kind is trace.SpanKind.SERVER
    assert dict(request.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v1/sessions/{session}/turns",
        "http.response.status_code": 202,
        "url.scheme": "http",
        "url.path": TURNS,
    }
    assert durations(seen) == {("POST", "/v1/sessions/{session}/turns", 202): 1}


async def test_stops_and_answers_are_below_their_requests(seen: Seen, fleet: Fleet) -> None:
    @agent(name="plain")
    async def asks(ctx: Context) -> AsyncIterator[str]:
        yield f"told {await ctx.ask('may I?', kind='text', hold=0.0)}"
        await anyio.sleep(60)

    await fleet.worker(asks)
    async with served(fleet) as site:
        turn = (await site.http.post(TURNS, json={"input": "go"})).json()["turn"]
        await fleet.until("turn.suspended")
        answer = await site.http.post(f"{TURNS}/{turn}/answer", json={"request": "ask-1", "value": "yes"})
        assert answer.status_code == 200, answer.text
        await fleet.until("text.delta")
        assert (await site.http.post(f"{TURNS}/{turn}/cancel")).json()["status"] == "cancelled"
        await until_told(seen, "process plain", 2)
    assert seen.tree == shape("""
        POST /v1/sessions/{session}/turns
          send plain
            process plain #1 suspended suspend (stopped)
              invoke_agent plain
            process plain #2 cancelled cancel (first_token) (stopped) [first_attempt: process plain #1] [answer: answer] [stop: cancel]
              invoke_agent plain
        POST /v1/sessions/{session}/turns/{turn}/answer
          answer
        POST /v1/sessions/{session}/turns/{turn}/cancel
          cancel cancelled
    """)  # noqa: E501


async def test_the_trace_in_the_documentation(seen: Seen, fleet: Fleet) -> None:
    @agent
    async def support(ctx: Context) -> AsyncIterator[str]:
        with seen.backend.start_as_current_span("look up"):
            yield "well "
        if ctx.attempt == 1:
            raise Retry("not yet", after=0.01)
        await anyio.sleep(60)

    await fleet.worker(support)
    async with served(fleet) as site:
        with seen.backend.start_as_current_span("click"):
            sent = await site.http.post(TURNS, json={"input": "go", "agent": "support"})
        await fleet.until("text.delta", times=2)
        with seen.backend.start_as_current_span("stop"):
            await site.http.post(f"{TURNS}/{sent.json()['turn']}/cancel")
        await until_told(seen, "process support", 2)
    picture = DOCUMENT.read_text().partition("```\nclick")[2].partition("```")[0]
    assert seen.tree == re.sub(r" +←.*", "", f"click{picture}").strip()


async def test_what_a_socket_asks_for_is_below_its_handshake(seen: Seen, fleet: Fleet) -> None:
    await fleet.worker(plain)
    fields: dict[str, str] = {}
    async with served(fleet) as site:
        address = str(site.http.base_url.join("/v1/sessions/s/socket")).replace("http", "ws", 1)
        with seen.backend.start_as_current_span("page"):
            propagate.inject(fields)
        async with websocket(address, additional_headers=fields) as socket:
            for ref in (1, 2):
                await socket.send(json.dumps({"op": "send", "ref": ref, "input": "go"}))
                assert "result" in json.loads(await socket.recv())
                await until_told(seen, "process plain", ref)
    assert seen.tree == shape("""
        page
          GET /v1/sessions/{session}/socket
            send plain
              process plain #1 completed (first_token)
                invoke_agent plain
            send plain
              process plain #1 completed (first_token)
                invoke_agent plain
    """)
    handshake = span(seen, "GET /v1/sessions/{session}/socket")
    assert (handshake.attributes or {})["http.response.status_code"] == 101


def open_or_kept() -> list[Span]:
    gc.collect()
    spans = [thing for thing in gc.get_objects() if isinstance(thing, Span)]
    return [span for span in spans if span.kind is trace.SpanKind.SERVER]


async def test_no_span_is_open_or_kept_while_a_reader_stays(seen: Seen, fleet: Fleet) -> None:
    async with served(fleet) as site:
        await site.http.post(TURNS, json={"input": "go"})
        for path, headers in ((EVENTS, SSE), (f"{EVENTS}?offset=-1&live=sse", {})):
            seen.spans.clear()
            async with site.http.stream("GET", path, headers=headers) as response:
                assert await anext(frames(response))
                assert seen.tree == "GET /v1/sessions/{session}/events"
                # What a task that is just ending still holds is let go at once.
                await eventually(lambda: not open_or_kept())


@pytest.mark.parametrize("given", ["query", "header"])
async def test_tokens_are_in_no_span(seen: Seen, fleet: Fleet, given: str) -> None:
    token = mint(SECRET, sessions=["s"], rights=["read", "send"], user="ann")
    async with served(fleet, auth=Auth(Keys.secret(SECRET))) as site:
        bearer = {"authorization": f"Bearer {token}"}
        headers, query = ({}, f"?access_token={token}") if given == "query" else (bearer, "")
        await site.http.post(TURNS, json={"input": "go"}, headers=bearer)
        async with site.http.stream("GET", EVENTS + query, headers=SSE | headers) as response:
            assert response.status_code == 200
        assert (await site.http.get(f"{EVENTS}?access_token=wrong{token}", headers=SSE)).status_code == 401
    told = "".join(span.to_json() for span in seen.spans.get_finished_spans())
    assert "/v1/sessions/s/events" in told
    assert token not in told
    assert "access_token" not in told


async def test_only_an_error_of_the_gateway_is_one_in_its_span(seen: Seen, fleet: Fleet) -> None:
    async with served(fleet) as site:
        assert (await site.http.get("/nowhere?a=b")).status_code == 404
        assert (await site.http.delete(TURNS)).status_code == 405
        assert (await site.http.post(TURNS, content="{")).status_code == 400
        assert (await site.http.request("PROPFIND", TURNS)).status_code == 405
        assert (await site.http.get("/v1/openapi.json", headers={"origin": "https://evil.example"})).status_code == 403
        assert not any(s.status.status_code is StatusCode.ERROR for s in seen.spans.get_finished_spans())
        site.gateway.drain()
        assert (await site.http.get(f"{EVENTS}?offset=-1&live=sse")).status_code == 503
    assert seen.tree == shape("""
        GET
        DELETE /v1/sessions/{session}/turns
        POST /v1/sessions/{session}/turns
        HTTP /v1/sessions/{session}/turns
        GET /v1/openapi.json
        GET /v1/sessions/{session}/events error=503
    """)
    assert span(seen, "GET /v1/sessions/{session}/events").status.status_code is StatusCode.ERROR
    assert durations(seen) == {
        ("GET", None, 404): 1,
        ("DELETE", "/v1/sessions/{session}/turns", 405): 1,
        ("POST", "/v1/sessions/{session}/turns", 400): 1,
        ("_OTHER", "/v1/sessions/{session}/turns", 405): 1,
        ("GET", "/v1/openapi.json", 403): 1,
        ("GET", "/v1/sessions/{session}/events", 503): 1,
    }


async def test_what_watches_the_process_is_counted_and_leaves_no_spans(seen: Seen, fleet: Fleet) -> None:
    async with served(fleet) as site:
        for path in ("/healthz", "/readyz"):
            assert (await site.http.get(path)).status_code == 200
    assert seen.tree == ""
    assert durations(seen) == {("GET", "/healthz", 200): 1, ("GET", "/readyz", 200): 1}


async def test_pages_of_other_origins_may_send_their_trace(seen: Seen, fleet: Fleet) -> None:
    settings = GatewaySettings(origins=("https://app.example",))
    async with served(fleet, settings=settings) as site:
        asked = {
            "origin": "https://app.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "traceparent, tracestate, baggage",
        }
        response = await site.http.options(TURNS, headers=asked)
    assert response.status_code == 200
    allowed = response.headers["access-control-allow-headers"].lower()
    assert {"traceparent", "tracestate", "baggage"} <= {name.strip() for name in allowed.split(",")}


async def test_the_line_of_a_request_in_the_log_has_its_trace(
    seen: Seen, fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    lines: list[dict[str, object]] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(JsonFormatter().format(record)))

    access = logging.getLogger("agentrun.access")
    handler = Handler()
    access.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO, access.name):
            async with served(fleet) as site:
                await site.http.post(TURNS, json={"input": "go"})
                await eventually(lambda: bool(lines))
    finally:
        access.removeHandler(handler)
    (line,) = lines
    request = span(seen, "POST /v1/sessions/{session}/turns").context
    assert request is not None
    assert line["trace_id"] == f"{request.trace_id:032x}"
    assert line["span_id"] == f"{request.span_id:016x}"


@pytest.mark.parametrize("metrics", [False, True], ids=["nothing", "metrics alone"])
async def test_where_no_traces_are_set_up_the_context_travels_all_the_same(fleet: Fleet, metrics: bool) -> None:
    fleet.client.telemetry = Telemetry(meter_provider=MeterProvider()) if metrics else default()
    assert fleet.client.telemetry.enabled == metrics
    named = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with served(fleet) as site:
        await site.http.post(TURNS, json={"input": "go"}, headers={"traceparent": named, "baggage": "tenant=acme"})
    ((_, request), *_) = await fleet.records()
    assert isinstance(request, wire.TurnRequested)
    assert request.trace == {"traceparent": named, "baggage": "tenant=acme"}


# --------------------------------------------------------------------------------------------------- in another program


async def ok(request: Request) -> PlainTextResponse:
    """Says where it is."""
    fields: dict[str, str] = {}
    propagate.inject(fields)
    return PlainTextResponse(fields.get("traceparent", ""))


async def fail(request: Request) -> PlainTextResponse:
    raise RuntimeError("what it is about")


ROUTES = [Route("/x/{id:path}/ok", ok), Route("/x/fail", fail)]


async def ask(app: ASGIApp, path: str, *, headers: list[tuple[bytes, bytes]] | None = None) -> str:
    """What an application answers."""
    body = b""

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        nonlocal body
        body += message.get("body", b"")

    scope: Scope = {
        "type": "http",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "query_string": b"",
        "headers": headers or [],
    }
    await app(scope, receive, send)
    return body.decode()


@pytest.fixture
def observed(seen: Seen) -> ASGIApp:
    return Observed(Starlette(routes=ROUTES), ROUTES, seen.telemetry)


async def test_within_a_program_that_sees_its_requests_they_are_its(seen: Seen, observed: ASGIApp) -> None:
    with seen.backend.start_as_current_span("GET /of/mine") as mine:
        said = await ask(
            observed, "/x/1/ok", headers=[(b"traceparent", b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01")]
        )
        assert said.split("-")[2] == f"{mine.get_span_context().span_id:016x}"
    assert seen.tree == "GET /of/mine"
    unsampled = trace.NonRecordingSpan(trace.SpanContext(1, 2, is_remote=False))
    with trace.use_span(unsampled):
        await ask(observed, "/x/1/ok")
    assert seen.tree == "GET /of/mine"
    assert "http.server.request.duration" not in seen.metrics()


async def test_a_span_that_ended_before_is_not_above_a_request(seen: Seen, observed: ASGIApp) -> None:
    with seen.backend.start_as_current_span("start") as start:
        pass
    with trace.use_span(start):
        await ask(observed, "/x/1/ok")
    assert seen.tree == "start\nGET /x/{id}/ok"


async def test_where_it_is_mounted_is_part_of_the_route(seen: Seen, observed: ASGIApp) -> None:
    outer = Starlette(routes=[Mount("/agents", observed), Mount("/of/{tenant}", observed)])
    await ask(outer, "/agents/x/1/ok")
    await ask(outer, "/of/acme/x/1/ok")
    assert seen.tree == "GET /agents/x/{id}/ok\nGET /x/{id}/ok"


async def test_an_error_is_told_without_its_text(seen: Seen, observed: ASGIApp) -> None:
    with pytest.raises(RuntimeError):
        await ask(observed, "/x/fail")
    assert seen.tree == "GET /x/fail error=500"

    async def worse(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("what it is about")

    with pytest.raises(RuntimeError):
        await ask(Observed(worse, ROUTES, seen.telemetry), "/x/fail")
    assert seen.tree == "GET /x/fail error=500\nGET /x/fail error=RuntimeError"
    assert durations(seen) == {("GET", "/x/fail", 500): 2}
    assert "what it is about" not in "".join(span.to_json() for span in seen.spans.get_finished_spans())


async def test_a_request_that_is_given_up_has_no_status(seen: Seen) -> None:
    async def waits(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.sleep_forever()

    with anyio.move_on_after(0.05):
        await ask(Observed(waits, ROUTES, seen.telemetry), "/x/fail")
    assert seen.tree == "GET /x/fail"
    assert durations(seen) == {("GET", "/x/fail", None): 1}


async def test_headers_that_come_twice_are_one(seen: Seen, observed: ASGIApp) -> None:
    named = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = [(b"traceparent", named), (b"tracestate", b"a=1"), (b"tracestate", b"b=2")]
    await ask(observed, "/x/1/ok", headers=headers)
    request = span(seen, "GET /x/{id}/ok").context
    assert request is not None
    assert request.trace_state.to_header() == "a=1,b=2"


# ------------------------------------------------------------------------------------------------------------- readers


async def test_readers_and_what_they_are_given_are_counted(seen: Seen, fleet: Fleet) -> None:
    await fleet.worker(plain)
    async with served(fleet) as site:
        await (await fleet.session("s", "plain").send("go")).result(10)
        stored = len(await fleet.records())
        await site.http.get(EVENTS)
        await site.http.get(f"{EVENTS}?after=2")
        await site.http.get(f"{EVENTS}?offset=2")
        for query in ("offset=now", "offset=-1"):
            await site.http.get(f"{EVENTS}?{query}")
        metrics = seen.metrics()
        assert metrics["agentrun.gateway.resumes"] == {(): 2}
        assert metrics["agentrun.gateway.events"] == {(): 2 * stored + 2 * (stored - 2)}
        assert metrics["agentrun.gateway.readers"] == {(): 0}
        async with (
            site.http.stream("GET", EVENTS, headers=SSE),
            site.http.stream("GET", EVENTS, headers=SSE | {"last-event-id": "1"}),
        ):
            await eventually(lambda: seen.metrics()["agentrun.gateway.events"] == {(): 6 * stored - 5})
            metrics = seen.metrics()
            assert metrics["agentrun.gateway.readers"] == {(): 2}
            assert metrics["agentrun.gateway.sessions"] == {(): 1}
            assert metrics["agentrun.gateway.resumes"] == {(): 3}
        assert metrics["agentrun.gateway.gaps"] == metrics["agentrun.gateway.slow_readers"] == {(): 0}
    assert "agentrun.gateway.readers" not in seen.metrics()  # of a gateway that is gone nothing is told


async def test_who_comes_with_an_offset_is_counted_however_he_comes(seen: Seen, fleet: Fleet) -> None:
    await fleet.worker(plain)
    async with served(fleet) as site:
        await (await fleet.session("s", "plain").send("go")).result(10)
        counts = site.gateway.hub.counts
        for query in ("offset=-1&live=sse", "offset=now&live=sse"):
            async with site.http.stream("GET", f"{EVENTS}?{query}") as response:
                assert await anext(frames(response))
        await site.http.get("/api/chat/s/stream")
        await site.http.get("/api/chat/s/stream?startIndex=0")
        assert counts.resumes.value == 0
        await site.http.get("/api/chat/s/stream?startIndex=1")
        assert counts.resumes.value == 1
        address = str(site.http.base_url.join("/v1/sessions/s/socket")).replace("http", "ws", 1)
        async with websocket(address) as socket:
            for after in (0, 2):
                await socket.send(json.dumps({"op": "read", "ref": 1, "after": after}))
                while "result" not in json.loads(await socket.recv()):
                    pass
        assert counts.resumes.value == 2


@pytest.mark.parametrize(("query", "resumes"), [("", 0), ("?after=0", 0), ("?after=1", 1)])
async def test_a_turns_stream_begins_at_the_turn_which_is_no_resume(
    seen: Seen, fleet: Fleet, query: str, resumes: int
) -> None:
    async with served(fleet) as site:
        await fleet.session("s", "plain").send("first")
        turn = await fleet.session("s", "plain").send("second")
        assert (await site.http.get(f"{TURNS}/{turn.id}/events{query}")).json()["offset"] == 2
    assert seen.metrics()["agentrun.gateway.resumes"] == {(): resumes}


async def test_gaps_are_counted_for_each_who_is_given_them(seen: Seen) -> None:
    now = [1000.0]
    state = MemoryState(delta_ttl=10.0, clock=lambda: now[0])
    async with bench(state=state, telemetry=seen.telemetry) as b:
        await b.store(wire.TurnRequested(turn="t", agent="a", input="x"))
        async with b.hub.read("s", after=1) as live, b.hub.read("s", after=1) as other:
            b.log.late = anyio.Event()  # what comes now has expired before anybody is told
            await b.words(3)
            now[0] += 20
            await b.store(wire.TurnStarted(turn="t", attempt=1, worker="w", lease="l"))
            b.log.late.set()
            async with b.hub.read("s") as stored:
                for reading in (live, other, stored):
                    types = [event["type"] for _, event in await read_to(reading, 5)]
                    assert types[-2:] == ["gap", "turn.started"]
    assert seen.metrics()["agentrun.gateway.gaps"] == {(): 3}


async def test_readers_that_fall_behind_are_counted(seen: Seen) -> None:
    async with bench(ring_events=8, telemetry=seen.telemetry) as b:
        await b.words(1)
        async with b.hub.read("s", after=1) as slow:
            await b.words(1)
            await read_to(slow, 2)
            await b.words(30)
            await eventually(lambda: b.feeds["s"].end == 32)
            with pytest.raises(Closed, match="slow"):
                await slow.next(1)
    assert seen.metrics()["agentrun.gateway.slow_readers"] == {(): 1}
