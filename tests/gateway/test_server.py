"""A gateway opened, mounted, bound and closed, in this process."""

from __future__ import annotations

import errno
import signal
import socket
import time
import uuid
from collections.abc import Iterator
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from agentrun.brokers.memory import MemoryBroker
from agentrun.client import Client
from agentrun.errors import Unavailable
from agentrun.gateway import Auth, Gateway, GatewaySettings, Keys
from agentrun.gateway import server as server_module
from agentrun.gateway.server import bind, serving
from tests.gateway.conftest import Site, frames

SSE = {"accept": "text/event-stream"}


@pytest.fixture
def handlers() -> Iterator[dict[int, Any]]:
    """Somebody else's signal handlers, which count."""
    heard: dict[int, Any] = {signal.SIGTERM: 0, signal.SIGINT: 0}

    def hear(number: int, frame: Any) -> None:
        heard[number] += 1

    before = {number: signal.signal(number, hear) for number in heard}
    yield heard
    for number, handler in before.items():
        assert signal.getsignal(number) is hear, "what was found was not put back"
        signal.signal(number, handler)


def mounted(site: Site, **settings: Any) -> tuple[FastAPI, Gateway]:
    gateway = Gateway(f"memory://{site.name}", auth=Auth.insecure(), agent="echo", settings=GatewaySettings(**settings))
    app = FastAPI(lifespan=gateway.lifespan)
    app.mount("/agents", gateway)

    @app.get("/own")
    def own() -> str:
        return "own"

    return app, gateway


async def test_mounted_it_serves_below_its_path(site: Site) -> None:
    app, gateway = mounted(site)
    async with serving(app, drain=gateway.drain) as url, httpx.AsyncClient(base_url=url, timeout=10) as http:
        assert (await http.get("/own")).json() == "own"
        sent = await http.post("/agents/v1/sessions/s/turns", json={"input": "hello"})
        assert sent.status_code == 202
        path = f"/agents/v1/sessions/s/turns/{sent.json()['turn']}/events"
        async with http.stream("GET", path, headers=SSE) as response:
            found = [frame async for frame in frames(response)]
        assert "turn.completed" in found[-1]["data"]
        assert (await http.get("/v1/sessions/s")).status_code == 404
        assert (await http.get("/agents/v1/none")).json()["code"] == "no_such_path"
    assert gateway._opened is None


async def test_not_opened_it_says_what_is_missing(site: Site) -> None:
    gateway = Gateway(f"memory://{site.name}", auth=Auth.insecure(), agent="echo")
    app = FastAPI()
    app.mount("/agents", gateway)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=10) as http:
        for method, path, headers in (
            ("GET", "/v1/sessions/s", {}),
            ("GET", "/v1/sessions/s/events", SSE),
            ("POST", "/v1/sessions/s/turns", {}),
            ("GET", "/readyz", {}),
        ):
            response = await http.request(method, f"/agents{path}", headers=headers, content=b'{"input":"x"}')
            assert response.status_code == 503
            assert response.json()["code"] == "not_open"
            assert "lifespan=gateway.lifespan" in response.json()["detail"]
        assert (await http.get("/agents/healthz")).status_code == 200


async def test_it_opens_again_after_it_was_closed(site: Site) -> None:
    gateway = Gateway(f"memory://{site.name}", auth=Auth(Keys.secret("x" * 32)), agent="echo")
    for _ in range(2):
        async with gateway:
            assert gateway.hub.watched <= 1  # the revocations
            assert not gateway.hub.closing
            async with gateway.hub.read("s") as reading:
                assert await reading.next(0) == ()


async def test_a_client_that_is_connected_stays_so(site: Site) -> None:
    async with Gateway(site.client, auth=Auth.insecure()) as gateway:
        assert gateway.client is site.client
    assert (await site.client.session("s").history()).offset == 0


async def test_what_cannot_be_opened_is_closed(monkeypatch: pytest.MonkeyPatch, handlers: dict[int, Any]) -> None:
    class Away:
        async def __aenter__(self) -> Client:
            raise Unavailable("nobody is there")

        async def __aexit__(self, *exc: object) -> None: ...

    monkeypatch.setattr("agentrun.gateway.app.connect", lambda *_, **__: Away())
    gateway = Gateway("nats://127.0.0.1:1", auth=Auth.insecure())
    with pytest.raises(Unavailable, match="nobody is there"):
        async with gateway:
            pass
    with pytest.raises(Exception, match="not open"):
        assert gateway.client


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_it_and_reaches_who_was_to_hear_it(handlers: dict[int, Any], number: int) -> None:
    async with MemoryBroker(uuid.uuid4().hex) as broker, Gateway(Client(broker), auth=Auth.insecure()) as gateway:
        assert not gateway.hub.closing
        signal.raise_signal(number)
        with anyio.fail_after(20):
            while not gateway.hub.closing:  # noqa: ASYNC110 - it has no event
                await anyio.sleep(0.005)
    assert handlers[number] == 1


async def test_closing_ends_its_readers_first(site: Site) -> None:
    app, gateway = mounted(site)
    began = 0.0
    last: list[Any] = []
    async with httpx.AsyncClient(timeout=10) as http, anyio.create_task_group() as group:
        ready = anyio.Event()
        async with serving(app, drain=gateway.drain) as url:

            async def read() -> None:
                async with http.stream("GET", f"{url}/agents/v1/sessions/s/events", headers=SSE) as response:
                    async for frame in frames(response):  # raises if it is cut short
                        ready.set()
                        last.append(frame)

            group.start_soon(read)
            await ready.wait()
            began = time.monotonic()
    assert last[-1] == {"": "drain"}
    assert time.monotonic() - began < 3


# -------------------------------------------------------------------------------------------------------- listening


def ports(listeners: list[socket.socket]) -> set[int]:
    found = {listener.getsockname()[1] for listener in listeners}
    for listener in listeners:
        listener.close()
    return found


def test_a_name_with_several_addresses_is_one_port() -> None:
    listeners = bind("localhost", 0, send_timeout=1)
    assert all(listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1000 for listener in listeners)
    assert len(ports(listeners)) == 1


def test_an_address_of_a_kind_there_is_none_of_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made = server_module._listener

    def without_ipv6(family: int, *rest: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EADDRNOTAVAIL, "no IPv6 here")
        return made(family, *rest)

    both = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
    ]
    monkeypatch.setattr(server_module, "_listener", without_ipv6)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    assert len(ports(bind("localhost", 0, send_timeout=1))) == 1
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both[:1])
    with pytest.raises(OSError, match="no IPv6"):
        bind("::1", 0, send_timeout=1)


def test_an_address_in_use_leaves_nothing_open() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="in use"):
            bind("127.0.0.1", taken.getsockname()[1], send_timeout=1)


async def test_whoever_is_told_the_address_may_connect() -> None:
    (listener,) = bind("127.0.0.1", 0, send_timeout=1)
    with socket.create_connection(listener.getsockname()[:2], timeout=5):
        listener.close()


async def test_a_websocket_says_where_it_stopped_before_the_server_closes_it() -> None:
    drained = anyio.Event()

    async def slow(socket: WebSocket) -> None:
        await socket.accept()
        await drained.wait()
        await anyio.sleep(0.3)  # it has much to do
        await socket.close(1012, "drain, after=4")

    async with serving(Starlette(routes=[WebSocketRoute("/", slow)]), drain=drained.set) as url:
        connection = await connect(url.replace("http", "ws"))
    with pytest.raises(ConnectionClosed) as raised:
        await connection.recv()
    assert raised.value.rcvd is not None
    assert (raised.value.rcvd.code, raised.value.rcvd.reason) == (1012, "drain, after=4")


async def test_a_websocket_that_does_not_end_is_closed() -> None:
    async def endless(socket: WebSocket) -> None:
        await socket.accept()
        await socket.receive()

    async with serving(Starlette(routes=[WebSocketRoute("/", endless)]), drain=lambda: None) as url:
        connection = await connect(url.replace("http", "ws"))
    with pytest.raises(ConnectionClosed) as raised:
        await connection.recv()
    assert raised.value.rcvd is not None
    assert raised.value.rcvd.code == 1012
