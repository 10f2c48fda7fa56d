"""What stands before the routes: origins, hosts, sizes, headers."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from agentrun.errors import InvalidInput
from agentrun.gateway.auth import Auth
from agentrun.gateway.guard import guarded
from agentrun.gateway.keys import Keys
from agentrun.gateway.problems import Problem
from agentrun.settings import GatewaySettings
from tests.gateway.tokens import SECRET, signed, until


async def _echo(request: Request) -> Response:
    return PlainTextResponse(f"{len(await request.body())} {request.url.query}")


async def _page(request: Request) -> Response:
    headers = {"cache-control": "max-age=60", "content-security-policy": "default-src 'self'"}
    return Response("<!doctype html>", media_type="text/html", headers=headers)


async def _stream(request: Request) -> Response:
    async def chunks() -> AsyncIterator[str]:
        for i in range(3):
            yield f"data: {i}\n\n"
            await anyio.sleep(0.01)

    return StreamingResponse(chunks(), media_type="text/event-stream")


async def _late(request: Request) -> Response:
    """Answers before it reads."""

    async def chunks() -> AsyncIterator[str]:
        yield "first"
        async for _ in request.stream():
            pass
        yield "last"

    return StreamingResponse(chunks())


async def _socket(socket: WebSocket) -> None:
    await socket.accept()
    async for text in socket.iter_text():
        await socket.send_text(text[:10])


async def _on_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return error.response()


def app() -> Starlette:
    routes = [
        Route("/echo", _echo, methods=["GET", "POST", "DELETE"]),
        Route("/page", _page),
        Route("/stream", _stream),
        Route("/late", _late, methods=["POST"]),
        WebSocketRoute("/socket", _socket),
    ]
    return Starlette(routes=routes, exception_handlers={Problem: _on_problem})


def client(auth: Auth | None = None, host: str = "gw.example", **settings: Any) -> httpx.AsyncClient:
    inner = guarded(app(), GatewaySettings(**settings), auth or Auth(Keys.secret(SECRET)))
    return httpx.AsyncClient(transport=httpx.ASGITransport(inner), base_url=f"https://{host}")


# ------------------------------------------------------------------------------------------------------------ origins


@pytest.mark.parametrize(
    "origin",
    [
        None,
        "https://gw.example",
        "https://gw.example:443",
        "https://GW.example",
        "https://app.example",
        "http://dev.example:5173",
    ],
)
async def test_origins_that_may(origin: str | None) -> None:
    async with client(origins=("https://app.example", "http://dev.example:5173")) as http:
        response = await http.post("/echo", content=b"abc", headers={} if origin is None else {"origin": origin})
        assert (response.status_code, response.text) == (200, "3 ")


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "https://gw.example.evil.example",
        "https://gw.example:8443",
        "https://app.example:8443",
        "http://app.example",
        "https://evil.example/https://gw.example",
        "null",
        "",
        "https://",
        "https://gw.example:port",
        "https://[gw.example",
        "file://",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
async def test_origins_that_may_not(origin: str, method: str) -> None:
    async with client(origins=("https://app.example",)) as http:
        headers = {"origin": origin, "access-control-request-method": "POST"}
        response = await http.request(method, "/echo", headers=headers)
        assert response.status_code == 403
        assert response.json()["code"] == "origin_refused"
        assert "access-control-allow-origin" not in response.headers


async def test_an_allowed_origin_may_read_what_it_needs() -> None:
    async with client(origins=("https://app.example",)) as http:
        preflight = await http.options(
            "/echo",
            headers={
                "origin": "https://app.example",
                "access-control-request-method": "DELETE",
                "access-control-request-headers": "authorization,content-type,last-event-id,x-anything",
            },
        )
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://app.example"
        assert "x-anything" in preflight.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in preflight.headers
        response = await http.get("/echo", headers={"origin": "https://app.example"})
        exposed = response.headers["access-control-expose-headers"].lower().split(", ")
        assert {"stream-next-offset", "etag", "retry-after", "x-workflow-run-id"} <= set(exposed)
        assert response.headers["vary"] == "Origin"


async def test_errors_can_be_read_by_an_allowed_origin() -> None:
    async with client(origins=("https://app.example",), max_body=10) as http:
        response = await http.post("/echo", content=b"x" * 11, headers={"origin": "https://app.example"})
        assert response.status_code == 413
        assert response.headers["access-control-allow-origin"] == "https://app.example"


async def test_every_origin_may_where_tokens_are_needed() -> None:
    async with client(origins=("*",)) as http:
        assert (await http.get("/echo", headers={"origin": "https://any.example"})).status_code == 200
    with pytest.raises(InvalidInput, match="any web site"):
        guarded(app(), GatewaySettings(origins=("*",)), Auth.insecure())


@pytest.mark.parametrize(
    "origin", ["app.example", "https://app.example/", "https://", "ftp://a", "null", "https://A.example"]
)
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(InvalidInput, match="an origin is"):
        guarded(app(), GatewaySettings(origins=(origin,)), Auth(Keys.secret(SECRET)))


# -------------------------------------------------------------------------------------------------------------- hosts


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8080", "app.localhost", "127.0.0.1:80", "127.1.2.3", "[::1]:80"]
)
async def test_insecure_answers_as_this_machine(host: str) -> None:
    async with client(Auth.insecure()) as http:
        assert (await http.get("/echo", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "10.0.0.1",
        "",
        "localhost@evil.example",
        "[::2]",
    ],
)
async def test_insecure_answers_as_nobody_else(host: str) -> None:
    async with client(Auth.insecure()) as http:
        response = await http.get("/echo", headers={"host": host})
        assert (response.status_code, response.json()["code"]) == (403, "host_refused")
    async with client() as http:
        assert (await http.get("/echo", headers={"host": host})).status_code == 200


# -------------------------------------------------------------------------------------------------------------- sizes


async def _in_pieces(count: int, size: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x" * size


async def test_bodies() -> None:
    async with client(max_body=1000) as http:
        assert (await http.post("/echo", content=b"x" * 1000)).text == "1000 "
        assert (await http.post("/echo", content=_in_pieces(10, 100))).text == "1000 "
        for content in (b"x" * 1001, _in_pieces(11, 100)):
            response = await http.post("/echo", content=content)
            assert (response.status_code, response.json()["code"]) == (413, "too_large")
        lying = await http.post("/echo", content=_in_pieces(11, 100), headers={"content-length": "7"})
        assert lying.status_code == 413


async def test_a_body_that_grows_too_large_after_the_answer_has_begun_ends_like_a_client_that_left() -> None:
    async with client(max_body=1000) as http:
        with pytest.raises(BaseExceptionGroup) as caught:
            await http.post("/late", content=_in_pieces(11, 100))
        assert caught.group_contains(ClientDisconnect)


async def test_headers() -> None:
    async with client(max_header=1000) as http:
        assert (await http.get("/echo", headers={"x": "y" * 500})).status_code == 200
        for request in (
            http.get("/echo", headers={"x": "y" * 1000}),
            http.get("/echo?" + "y" * 1000),
            http.get("/echo", headers=[("x", "y")] * 600),
        ):
            response = await request
            assert (response.status_code, response.json()["code"]) == (431, "headers_too_large")


# ------------------------------------------------------------------------------------------------------------- headers


async def test_browsers_are_told_what_not_to_do() -> None:
    async with client() as http:
        for path in ("/echo", "/stream", "/nowhere"):
            headers = (await http.get(path)).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "no-referrer"
            assert headers["cache-control"] == "no-store"
            assert headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
        headers = (await http.get("/page")).headers
        assert headers.get_list("cache-control") == ["max-age=60"]
        assert headers.get_list("content-security-policy") == ["default-src 'self'"]
        assert headers["x-content-type-options"] == "nosniff"


async def test_routes_never_see_a_token_in_the_query() -> None:
    async with client() as http:
        assert (await http.get("/echo?a=1&access_token=abc&b=2")).text == "0 a=1&b=2"


# ------------------------------------------------------------------------------------------------- by a real server


@pytest.fixture
async def server() -> AsyncIterator[str]:
    inner = guarded(app(), GatewaySettings(max_body=1000, origins=("https://app.example",)), Auth(Keys.secret(SECRET)))
    server = uvicorn.Server(uvicorn.Config(inner, port=0, log_config=None, access_log=True, lifespan="off"))
    async with anyio.create_task_group() as group:
        group.start_soon(server._serve)
        await until(lambda: server.started, within=10)
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        yield f"{host}:{port}"
        server.should_exit = True


async def test_the_access_log_of_a_server_has_no_token(server: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "uvicorn.access")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    token = signed()
    async with httpx.AsyncClient(base_url=f"http://{server}") as http:
        assert (await http.get(f"/stream?after=1&access_token={token}")).status_code == 200
    async with connect(f"ws://{server}/socket?access_token={token}") as socket:
        await socket.send("hello")
        assert await socket.recv() == "hello"
    assert "/stream?after=1" in caplog.text
    assert token not in caplog.text


async def test_a_large_body_is_refused_by_a_real_server(server: str) -> None:
    async with httpx.AsyncClient(base_url=f"http://{server}") as http:
        for content in (b"x" * 1001, _in_pieces(11, 100)):
            assert (await http.post("/echo", content=content)).status_code == 413
        assert (await http.post("/echo", content=b"x" * 1000)).text == "1000 "


async def test_sockets(server: str) -> None:
    for origin in (None, "https://app.example", f"http://{server}"):
        async with connect(f"ws://{server}/socket", origin=origin) as socket:
            await socket.send("x" * 1000)
            assert await socket.recv() == "x" * 10
            await socket.send("ä" * 501)
            with pytest.raises(ConnectionClosed) as closed:
                await socket.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1009
    for origin in ("https://evil.example", "null"):
        with pytest.raises(InvalidStatus) as refused:
            async with connect(f"ws://{server}/socket", origin=origin):
                pass
        assert refused.value.response.status_code == 403
        assert b"origin_refused" in refused.value.response.body
