"""The document, and whatever else may be sent: never a 500, never a hang, every error a problem."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import schemathesis
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.routing import Route

from agentrun.brokers.memory import MemoryBroker
from agentrun.client import Client
from agentrun.gateway import Auth, Gateway, GatewaySettings, native, openapi
from agentrun.gateway.server import serving
from agentrun.settings import ClientSettings
from agentrun.wire import TurnCancelled, encode
from tests.gateway.conftest import Site
from workers.echo import echo

DOCUMENT = openapi.document()
CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
)
fuzz = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@asynccontextmanager
async def running() -> AsyncIterator[str]:
    """A gateway whose waits are short, with a worker."""
    name = uuid.uuid4().hex
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(MemoryBroker(name))
        await Site(name, broker, stack).worker(echo)
        client = Client(broker, agent="echo", settings=ClientSettings(cancel_live=0.02, cancel_wait=0.05))
        quick = GatewaySettings(
            agent="echo",
            list_sessions=True,
            page=True,
            stream_seconds=0.1,
            durable_seconds=0.1,
            long_poll=1,
            linger=0.1,
        )
        gateway = Gateway(client, auth=Auth.insecure(), settings=quick)
        yield await stack.enter_async_context(serving(gateway, drain=gateway.drain))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """That gateway in a thread: what tests it here is not asynchronous."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(running()) as url:
        yield url


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=8) as client:
        yield client


# ------------------------------------------------------------------------------------------------------- the document


def operations() -> set[tuple[str, str]]:
    methods = {"get", "put", "post", "delete", "patch", "head", "options", "trace"}
    return {(m.upper(), path) for path, item in DOCUMENT["paths"].items() for m in item if m in methods}


def test_it_names_every_route_of_the_native_api_and_nothing_else() -> None:
    gateway = Gateway("memory://x", auth=Auth.insecure())
    routes = [route for route in native.routes(gateway) if isinstance(route, Route)]
    served = {(method, route.path) for route in routes for method in route.methods or ()}
    # Durable Streams is a protocol of its own, with a document of its own.
    served = {(m, path) for m, path in served if m != "HEAD" and (not path.endswith("/events") or m == "GET")}
    assert operations() == served


def test_it_is_openapi() -> None:
    schema.validate()
    assert DOCUMENT["openapi"].startswith("3.1")
    ids = [op["operationId"] for path in DOCUMENT["paths"].values() for m, op in path.items() if m != "parameters"]
    assert len(ids) == len(set(ids)) == len(operations())
    for part in DOCUMENT["components"]["schemas"].values():
        Draft202012Validator.check_schema(part)


def test_every_reference_leads_somewhere() -> None:
    text = json.dumps(DOCUMENT)
    referred = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
    assert referred <= set(DOCUMENT["components"]["schemas"])
    assert text.count('"$ref": "#/') == text.count('"$ref"')


def test_it_is_served(http: httpx.Client) -> None:
    response = http.get("/v1/openapi.json")
    assert (response.status_code, response.json()) == (200, DOCUMENT)


def test_events_are_described_as_they_are_stored() -> None:
    """Every type of event has its schema, of which an event as it is stored is an example."""
    parts = DOCUMENT["components"]["schemas"]
    event = encode(TurnCancelled(turn="t", attempt=1, turn_offset=1, by="ann"))
    validator = Draft202012Validator({"$ref": "#/components/schemas/TurnCancelled", "components": {"schemas": parts}})
    validator.validate(json.loads(event))
    assert not validator.is_valid({"type": "turn.cancelled", "attempt": "one"})


# --------------------------------------------------------------------------------------------------------- the fuzzers


schema = schemathesis.openapi.from_dict(DOCUMENT)


@schema.parametrize()
@settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_it_does_what_the_document_says(case: schemathesis.Case, url: str) -> None:
    case.call_and_validate(base_url=url, checks=list(CHECKS), timeout=8)


def is_fine(response: httpx.Response) -> None:
    assert response.status_code < 500 or response.status_code == 501, response.text
    if response.status_code >= 400 and response.request.method != "HEAD":
        assert response.headers["content-type"] == "application/problem+json", response.text
        problem = response.json()
        assert problem["status"] == response.status_code
        assert problem["code"]
        assert problem["detail"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
names = ["input", "id", "agent", "on_busy", "deadline", "metadata", "replaces", "reason", "request", "value", "parent"]
chat_names = ["id", "messages", "message", "trigger", "messageId", "parts", "role", "type", "text", "state", "approval"]
objects = st.dictionaries(st.sampled_from(names) | st.text(max_size=5), json_values, max_size=6)
chats = st.recursive(
    st.none() | st.booleans() | st.text(max_size=8) | st.sampled_from(["user", "assistant", "submit-message", "text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(chat_names), inner, max_size=6),
    max_leaves=25,
)
bodies = st.one_of(
    st.binary(max_size=200),
    (objects | json_values).map(json.dumps).map(str.encode),
    chats.map(json.dumps).map(str.encode),
    st.integers(1, 3000).map(lambda n: b'{"input":' + b"[" * n + b"]" * n + b"}"),
)
ids = st.one_of(
    st.sampled_from(["s", "t", "agentrun--revoked", "%00", "%ff", "%2F", "..", "%2e%2e", "a%20b", "*", "a" * 200]),
    st.text("abc%20FEé/.*>\u0000", max_size=12).map(lambda text: quote(text, safe="%.*")),
)
PATHS = (
    "/v1/sessions/{}/turns",
    "/v1/sessions/{}/cancel",
    "/v1/sessions/s/turns/{}/cancel",
    "/v1/sessions/s/turns/{}/steer",
    "/v1/sessions/s/turns/{}/answer",
    "/v1/sessions/s/turns/{}",
    "/v1/sessions/{}/events",
    "/v1/sessions/s/turns/{}/events",
    "/v1/sessions/{}",
    "/v1/sessions/{}/socket",
    "/api/chat",
    "/api/chat/{}/stream",
    "/api/chat/{}/stop",
    "/api/chat/{}",
    "/{}",
)


@fuzz
@given(body=bodies, type=st.sampled_from(["application/json", "text/plain", "", "multipart/form-data"]), name=ids)
@pytest.mark.parametrize("path", [path for path in PATHS if not path.endswith(("events", "stream", "socket"))])
def test_any_body(http: httpx.Client, path: str, body: bytes, type: str, name: str) -> None:
    is_fine(http.post(path.format(name), content=body, headers={"content-type": type}))


@fuzz
@given(
    method=st.sampled_from(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"]),
    path=st.sampled_from(PATHS),
    name=ids,
    query=st.dictionaries(
        st.sampled_from(["after", "wait", "limit", "offset", "live", "cursor", "startIndex", "access_token", "x"]),
        st.sampled_from(
            ["", "0", "1", "-1", "now", "sse", "long-poll", "NaN", "1e9", "9" * 30, "\u0000", "é", "0" * 16]
        ),
        max_size=3,
    ),
    headers=st.dictionaries(
        st.sampled_from(["accept", "last-event-id", "authorization", "if-none-match", "range", "origin", "expect"]),
        st.sampled_from(
            ["", "1", "-1", "x", "*", '"', "text/event-stream", "Bearer x", "bytes=0-1", "null", "http://a", "\xff"]
        ),
        max_size=3,
    ),
)
def test_any_request(
    http: httpx.Client, method: str, path: str, name: str, query: dict[str, str], headers: dict[str, str]
) -> None:
    sent = {key: value.encode("latin-1") for key, value in headers.items()}
    is_fine(http.request(method, path.format(name), params=query, headers=sent))


@fuzz
@given(head=st.binary(min_size=1, max_size=300), rest=st.binary(max_size=100))
def test_anything_at_all_on_a_connection(url: str, head: bytes, rest: bytes) -> None:
    """Whatever it is, it is answered or hung up on, and others are served."""
    import socket

    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=8) as connection:
        connection.sendall(b"GET /v1/sessions/s/events?after=" + head + b" HTTP/1.1\r\nHost: localhost\r\n")
        try:
            connection.sendall(rest + b"\r\nConnection: close\r\n\r\n")
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
        except OSError:
            pass
    assert httpx.get(f"{url}/healthz", timeout=8).status_code == 200


# ------------------------------------------------------------------------------------------------- what it says is so


def fits(response: httpx.Response, operation: str) -> Any:
    """The body of an answer, which is as the document says."""
    assert response.is_success, response.text
    path, method = next(
        (path, m)
        for path, item in DOCUMENT["paths"].items()
        for m, found in item.items()
        if m != "parameters" and found["operationId"] == operation
    )
    described = DOCUMENT["paths"][path][method]["responses"][str(response.status_code)]["content"]["application/json"]
    body = response.json()
    Draft202012Validator({**described["schema"], "components": DOCUMENT["components"]}).validate(body)
    return body


def test_answers_are_as_described(http: httpx.Client) -> None:
    base = "/v1/sessions/described"
    fits(http.post(f"{base}/turns", json={"id": "t-1", "input": "approve 2 5"}), "sendTurn")
    events: list[Any] = []
    while not any(item["event"]["type"] == "input.required" for item in events):
        after = events[-1]["offset"] if events else 0
        events += fits(http.get(f"{base}/events", params={"after": after, "wait": 1}), "readEvents")["events"]
    fits(http.post(f"{base}/turns/t-1/steer", json={"input": "x"}), "steerTurn")
    fits(http.post(f"{base}/turns/t-1/answer", json={"request": "deploy", "value": True}), "answerTurn")
    while not (page := fits(http.get(f"{base}/turns/t-1/events", params={"wait": 1}), "readTurn")).get("ended"):
        pass
    fits(http.get(f"{base}/turns/t-1"), "getTurn")
    fits(http.post(f"{base}/turns/t-1/cancel"), "cancelTurn")
    fits(http.post(f"{base}/cancel"), "cancelSession")
    assert len(fits(http.get(base), "getSession")["turns"]) == 2
    assert fits(http.get("/v1/sessions"), "listSessions")["sessions"]
    for item in page["events"]:
        of = next(
            schema
            for schema in DOCUMENT["components"]["schemas"].values()
            if schema.get("properties", {}).get("type", {}).get("enum") == [item["event"]["type"]]
            or schema.get("properties", {}).get("type", {}).get("const") == item["event"]["type"]
        )
        Draft202012Validator({**of, "components": DOCUMENT["components"]}).validate(item["event"])
