"""Gateways as processes: how they begin, end, die, and what their clients are left with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from agentrun.gateway import mint
from agentrun.gateway.keys import new_key_pair
from tests.e2e.processes import PATIENCE, Cli, Running, environment, on
from tests.gateway.conftest import frames
from tests.gateway.event_source import EventSource

SSE = {"accept": "text/event-stream"}
SECRET = "a-secret-of-tests-that-is-long-enough-for-hs256"


class Served:
    """A gateway's process and a client of it."""

    def __init__(self, process: Running, url: str, http: httpx.AsyncClient) -> None:
        self.process = process
        self.url = url
        self.http = http

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    async def send(self, session: str, input: Any, **more: Any) -> dict[str, Any]:
        response = await self.http.post(f"/v1/sessions/{session}/turns", json={"input": input, **more})
        assert response.status_code == 202, response.text
        return response.json()

    async def stored(self, session: str) -> list[dict[str, Any]]:
        """Every item there is."""
        found: list[dict[str, Any]] = []
        while True:
            after = found[-1]["offset"] if found else 0
            page = (await self.http.get(f"/v1/sessions/{session}/events?after={after}")).json()["events"]
            if not page:
                return found
            found += page

    async def result(self, session: str, turn: str) -> str:
        """The turn's text, when it has completed."""
        last: dict[str, Any] = {}
        with anyio.fail_after(PATIENCE):
            async for item in EventSource(self.http, f"/v1/sessions/{session}/turns/{turn}/events").items():
                last = item["event"]
        assert last["type"] == "turn.completed", last
        return last["message"]["parts"][0]["text"]


@asynccontextmanager
async def gateway(cli: Cli, *flags: object, port: int = 0, env: dict[str, str] | None = None) -> AsyncGenerator[Served]:
    insecure = () if env is not None or "--secret-file" in flags or "--public-key" in flags else ("--insecure",)
    process = cli.start("gateway", *insecure, "--agent", "echo", "--port", port, *flags, env=env)
    url = (await in_thread(lambda: process.until(r"gateway on (http://[\w.:\[\]]+)")))[1]
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as http:
        yield Served(process, url, http)


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110 - what it waits for has no event
            await anyio.sleep(0.005)


async def in_thread(wait: Callable[[], Any]) -> Any:
    return await anyio.to_thread.run_sync(wait)


@pytest.fixture
async def working(cli: Cli) -> Cli:
    cli.worker("w")
    return cli


# --------------------------------------------------------------------------------------------------------- its end


@on("nats", "valkey")
async def test_sigterm_ends_everything_cleanly_and_at_once(working: Cli) -> None:
    async with gateway(working, "--retry", "0.05") as served:
        sent = await served.send("s", "count 1000 20")
        events = "/v1/sessions/s/events"
        ended: dict[str, float] = {}
        open_now: set[str] = set()

        async def sse(name: str, path: str) -> None:
            async with served.http.stream("GET", path, headers=SSE) as response:
                async for _ in frames(response):  # raises if the chunked body is cut short
                    open_now.add(name)
            ended[name] = time.monotonic()

        async def chat() -> None:
            """useChat takes a clean end for the answer's, and comes back only after another."""
            with pytest.raises(httpx.RemoteProtocolError):
                await sse("chat", "/api/chat/s/stream")
            ended["chat"] = time.monotonic()

        async def poll() -> None:
            open_now.add("poll")
            response = await served.http.get("/v1/sessions/quiet/events?wait=30")
            assert response.json() == {"offset": 0, "events": []}
            ended["poll"] = time.monotonic()

        async def websocket() -> None:
            async with connect(f"ws://127.0.0.1:{served.port}/v1/sessions/s/socket") as connection:
                await connection.send('{"op": "read"}')
                offset = 0
                with suppress(ConnectionClosed):
                    while True:
                        offset = json.loads(await connection.recv())["offset"]
                        open_now.add("socket")
                closed = connection.protocol.close_rcvd
            assert closed is not None
            assert (closed.code, closed.reason) == (1012, f"drain, after={offset}")
            ended["socket"] = time.monotonic()

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as group:
                group.start_soon(sse, "session", events)
                group.start_soon(sse, "turn", f"/v1/sessions/s/turns/{sent['turn']}/events")
                group.start_soon(sse, "quiet", "/v1/sessions/quiet/events")
                group.start_soon(sse, "durable", f"{events}?offset=-1&live=sse")
                group.start_soon(chat)
                group.start_soon(poll)
                group.start_soon(websocket)
                await until(lambda: len(open_now) == 7)
                told = time.monotonic()
                served.process.signal(signal.SIGTERM)
        assert len(ended) == 7
        assert max(ended.values()) - told < 3
        result = await in_thread(served.process.wait)
        assert result.code == 0, result
        assert time.monotonic() - told < 5
        assert "Traceback" not in result.err


async def test_ctrl_c_ends_it_as_well(cli: Cli) -> None:
    async with (
        gateway(cli) as served,
        served.http.stream("GET", "/v1/sessions/s/events", headers=SSE) as response,
    ):
        served.process.signal(signal.SIGINT)
        async for _ in response.aiter_lines():
            pass
        assert (await in_thread(served.process.wait)).code == 0


async def test_a_request_under_way_is_answered(cli: Cli) -> None:
    """A stop that nobody obeys takes its five seconds, also from a gateway that has been told to end."""
    async with gateway(cli) as served, anyio.create_task_group() as group:
        sent = await served.send("s", "hello", agent="nobody")
        answers: list[httpx.Response] = []

        async def stop() -> None:
            answers.append(await served.http.post(f"/v1/sessions/s/turns/{sent['turn']}/cancel"))

        group.start_soon(stop)
        await anyio.sleep(0.5)
        served.process.signal(signal.SIGTERM)
        assert (await in_thread(served.process.wait)).code == 0
    assert answers[0].json()["status"] == "pending"


# ------------------------------------------------------------------------------------------------------- its death


@on("nats", "valkey")
async def test_killed_and_started_again_an_event_source_misses_nothing(working: Cli) -> None:
    found: list[dict[str, Any]] = []
    async with httpx.AsyncClient() as http, anyio.create_task_group() as group:
        async with gateway(working, "--retry", "0.05") as first:
            source = EventSource(http, f"{first.url}/v1/sessions/s/events")

            async def read() -> None:
                found.extend(await source.until("turn.completed", within=PATIENCE))

            sent = await first.send("s", "count 250 20")
            group.start_soon(read)
            await until(lambda: int(source.last or 0) >= 20)
            first.process.signal(signal.SIGKILL)
            await in_thread(first.process.wait)
        seen = int(source.last)
        async with gateway(working, port=first.port) as second:
            text = await second.result("s", sent["turn"])
            await until(lambda: bool(found))
            assert found == await second.stored("s")
    assert 20 <= seen < found[-1]["offset"] - 5, "it was killed in mid-answer"
    assert [item["offset"] for item in found] == list(range(1, len(found) + 1))
    assert source.broken + source.refused >= 1
    assert text == "".join(f"w{i} " for i in range(250))


async def test_two_gateways_serve_one_session(working: Cli) -> None:
    async with gateway(working) as one, gateway(working) as two:
        sent = await one.send("s", "count 1000 10", id="t-1")
        assert await two.send("s", "count 1000 10", id="t-1") == sent
        found: dict[int, list[dict[str, Any]]] = {}

        async def read(served: Served) -> None:
            source = EventSource(served.http, "/v1/sessions/s/events")
            found[served.port] = await source.until("turn.cancelled")

        async with anyio.create_task_group() as group:
            group.start_soon(read, one)
            group.start_soon(read, two)
            await anyio.sleep(0.5)
            receipt = (await two.http.post("/v1/sessions/s/turns/t-1/cancel")).json()
            assert receipt["status"] == "cancelled"
        assert found[one.port] == found[two.port] == await one.stored("s") == await two.stored("s")
        # What one has shown the other knows, or waits for: offsets are the broker's, not a gateway's.
        for _ in range(20):
            sent = await one.send("s", "hello")
            page = await two.http.get(f"/v1/sessions/s/events?after={sent['offset']}")
            assert page.status_code == 200


# ------------------------------------------------------------------------------------- clients that take nothing


def stuck(port: int, path: str) -> socket.socket:
    """A client that asks for a stream and never reads it."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", port))
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n".encode())
    return connection


def memory(process: Running) -> int:
    """Resident bytes."""
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:"))) << 10


def connections(process: Running) -> int:
    found = 0
    for fd in Path(f"/proc/{process.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            found += os.readlink(fd).startswith("socket:")
    return found


async def test_clients_that_take_nothing_cost_little_and_are_dropped(cli: Cli) -> None:
    async with gateway(cli, "--send-timeout", "1.5", "--linger", "0.2") as served:
        await served.send("s", "x", agent="nobody")
        await served.stored("s")
        before, open_before = memory(served.process), connections(served.process)
        sockets = [stuck(served.port, "/v1/sessions/s/events") for _ in range(30)]
        try:
            source = EventSource(served.http, "/v1/sessions/s/events")
            slowest = 0.0
            seen: list[int] = []

            async def read() -> None:
                async for item in source.items():
                    seen.append(item["offset"])  # noqa: PERF401 - looked at while it grows

            async with anyio.create_task_group() as group:
                group.start_soon(read)
                for i in range(60):  # 12 MB for each of them
                    began = time.monotonic()
                    await served.send("s", "x" * 200_000, agent="nobody", id=f"t-{i}")
                    await until(lambda end=i + 2: seen[-1:] == [end])
                    slowest = max(slowest, time.monotonic() - began)
                grown = memory(served.process) - before
                group.cancel_scope.cancel()
            assert source.connections == 1
            assert seen == list(range(1, 62))
            assert slowest < 2
            assert grown < 90 << 20, f"{grown >> 20} MB"
            await until(lambda: connections(served.process) <= open_before + 2)
            assert (await served.http.get("/readyz")).json()["watched"] <= 1
        finally:
            for connection in sockets:
                connection.close()


# ------------------------------------------------------------------------------------------------ how it is started


def test_without_keys_it_does_not_start(cli: Cli) -> None:
    result = cli.within("gateway", "--port", "0", code=2)
    assert "--secret-file" in result.err
    assert "--insecure" in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_open_to_everybody_only_on_this_machine(cli: Cli, host: str) -> None:
    result = cli.within("gateway", "--insecure", "--host", host, code=2)
    assert "loopback" in result.err
    assert len(result.err.splitlines()) == 1


def test_keys_and_none_contradict(cli: Cli) -> None:
    result = cli.within("gateway", "--insecure", "--port", "0", code=2, env={"AGENTRUN_GATEWAY_SECRET": SECRET})
    assert "contradict" in result.err


def test_a_port_in_use_is_said(cli: Cli) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = cli.within("gateway", "--insecure", "--port", port, code=1)
    assert f"cannot listen on 127.0.0.1:{port}" in result.err
    assert "in use" in result.err
    assert len(result.err.splitlines()) == 1


def test_a_broker_that_is_not_there_is_said(cli: Cli) -> None:
    result = cli.within("gateway", "--insecure", "--port", "0", "--url", "nats://127.0.0.1:9", code=1)
    assert "127.0.0.1:9" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("module", ["starlette", "uvicorn", "jwt"])
def test_a_missing_extra_is_said(module: str) -> None:
    code = f"import sys; sys.modules[{module!r}] = None; from agentrun.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "gateway", "--insecure"], capture_output=True, text=True, timeout=20, check=False
    )
    assert result.returncode == 2, result
    assert "pip install 'agentrun[gateway]'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
async def test_it_listens_where_it_says(cli: Cli, host: str) -> None:
    if host == "::1" and not _has_ipv6():
        host = "127.0.0.1"
    async with gateway(cli, "--host", host) as served:
        assert (await served.http.get("/healthz")).status_code == 200


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as listener:
            listener.bind(("::1", 0))
    except OSError:
        return False
    return True


async def test_tokens_of_a_secret_and_of_a_key(cli: Cli, tmp_path: Path) -> None:
    private, public = new_key_pair()
    (tmp_path / "secret").write_text(SECRET + "\n")
    (tmp_path / "public.pem").write_bytes(public)
    grants: dict[str, Any] = {"user": "ann", "sessions": ["s"], "rights": ["read"], "ttl": 60}
    flags = ("--secret-file", tmp_path / "secret", "--public-key", tmp_path / "public.pem")
    async with gateway(cli, *flags) as served:
        path = "/v1/sessions/s"
        assert (await served.http.get(path)).status_code == 401
        for token in (mint(SECRET, **grants), mint(private, **grants)):
            headers = {"authorization": f"Bearer {token}"}
            assert (await served.http.get(path, headers=headers)).status_code == 200
            assert (await served.http.delete(path, headers=headers)).status_code == 403
            async with served.http.stream("GET", f"{path}/events?access_token={token}", headers=SSE) as response:
                assert response.status_code == 200
            assert token not in served.process.result_so_far().err


# ----------------------------------------------------------------------------------------- in another application

MOUNTED = """
import os
from fastapi import FastAPI
from agentrun.gateway import Auth, Gateway

gateway = Gateway(os.environ["AGENTRUN_URL"], namespace=os.environ["AGENTRUN_NAMESPACE"], auth=Auth.insecure(),
                  agent="echo")
app = FastAPI(lifespan=gateway.lifespan)
app.mount("/agents", gateway)
"""


@pytest.mark.parametrize(("name", "prefix"), [("app", "/agents"), ("gateway", "")])
async def test_under_a_server_of_its_own(working: Cli, tmp_path: Path, name: str, prefix: str) -> None:
    """``uvicorn module:app``: it knows nothing of streams, and would wait for ever for those that are open."""
    (tmp_path / "module.py").write_text(MOUNTED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = environment(working.url, working.namespace, {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"})
    command = [sys.executable, "-m", "uvicorn", f"module:{name}", "--port", str(port)]
    process = Running(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env))  # noqa: ASYNC220
    try:
        await in_thread(lambda: process.until("Application startup complete", err=True))
        url = f"http://127.0.0.1:{port}{prefix}"
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as http:
            served = Served(process, url, http)
            sent = await served.send("s", "hello")
            assert await served.result("s", sent["turn"]) == "hello"
            async with http.stream("GET", "/v1/sessions/s/events", headers=SSE) as response:
                told = time.monotonic()
                process.signal(signal.SIGTERM)
                async for _ in response.aiter_lines():  # raises if it is cut short
                    pass
                assert time.monotonic() - told < 3
            result = await in_thread(process.wait)
        assert result.code in (0, -signal.SIGTERM), result
        assert "Traceback" not in result.err
        assert time.monotonic() - told < 5
    finally:
        process.end()
