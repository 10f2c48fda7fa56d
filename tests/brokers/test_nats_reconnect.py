"""Connections come back from whatever befalls them, on the event loop that the commands use."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import anyio
import pytest

from agentrun.broker import Kind, Pending, Tail
from agentrun.brokers.nats import NatsBroker
from agentrun.brokers.server import NatsServer
from tests.brokers.server_environment import new_namespace

GREETED = 40


@contextmanager
def greeter(port: int, to: NatsServer) -> Iterator[list[int]]:
    """Takes connections as the server does, and resets each as soon as it has said who it is. Gives the count."""
    with socket.create_connection(("127.0.0.1", to.port)) as connection, connection.makefile("rb") as lines:
        info = lines.readline()
    greeted = [0]
    listener = socket.create_server(("127.0.0.1", port))

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                greeted[0] += 1
                connection.sendall(info)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield greeted
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@pytest.mark.parametrize("uvloop", [True, False], ids=["uvloop", "asyncio"])
def test_a_server_that_resets_what_it_has_greeted_does_not_end_the_reconnecting(uvloop: bool) -> None:
    async def main() -> None:
        with NatsServer() as server:
            namespace = new_namespace()
            async with NatsBroker(server.url, namespace=namespace, check=False) as operator:
                await operator.setup()
            async with NatsBroker(server.url, namespace=namespace) as broker:
                tail = await broker.log.append("s", b"1", kind=Kind.EVENT, after=Tail(), pending=Pending())
                server.kill()
                other = NatsServer()
                with other, greeter(server.port, other) as greeted, anyio.fail_after(50):
                    while greeted[0] < GREETED:  # noqa: ASYNC110 - it counts in a thread
                        await anyio.sleep(0.05)
                server.start()
                await broker.log.append("s", b"2", kind=Kind.EVENT, after=tail, pending=Pending(), timeout=20)
                assert [r.body for r in await broker.log.read("s")] == [b"1", b"2"]
                await broker.turns.open("agent")

    anyio.run(main, backend_options={"use_uvloop": uvloop})
