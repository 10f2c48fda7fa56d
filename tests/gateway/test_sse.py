"""Responses that stream, to clients that take what is sent slowly, or not at all."""

from __future__ import annotations

import functools
import time

import anyio
from starlette.types import Message

from agentrun.gateway.sse import Stream, Writer
from agentrun.settings import GatewaySettings
from agentrun.telemetry.instruments import Tally

SCOPE = {"type": "http", "method": "GET"}


class Client:
    """A client that takes ``pause`` seconds for each piece, and for one of them for ever."""

    def __init__(self, *, pause: float = 0.0, stuck_at: int | None = None) -> None:
        self.pieces: list[bytes] = []
        self.whole = False
        self.gone = anyio.Event()
        self._pause = pause
        self._stuck_at = stuck_at

    async def send(self, message: Message) -> None:
        if message["type"] != "http.response.body":
            return
        if len(self.pieces) == self._stuck_at:
            await anyio.sleep_forever()
        await anyio.sleep(self._pause)
        self.whole = not message["more_body"]
        self.pieces.append(message["body"])

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}


async def respond(client: Client, pieces: int, *, send_timeout: float = 0.3) -> int:
    """Return how often somebody was cut off."""

    async def body(writer: Writer) -> None:
        for _ in range(pieces):
            await writer.write(b"piece")

    settings = GatewaySettings(send_timeout=send_timeout)
    slow = Tally({})
    with anyio.fail_after(10):
        await Stream(body, headers={}, settings=settings, slow=slow)(SCOPE, client.receive, client.send)
    return slow.value


async def test_who_takes_nothing_is_left_without_an_end() -> None:
    client = Client(stuck_at=3)
    began = time.monotonic()
    assert await respond(client, 10) == 1
    assert time.monotonic() - began > 0.3
    assert (len(client.pieces), client.whole) == (3, False)


async def test_who_takes_it_slowly_gets_it_all() -> None:
    client = Client(pause=0.1)
    assert await respond(client, 8) == 0
    assert client.pieces == [*[b"piece"] * 8, b""]
    assert client.whole


async def test_who_is_gone_ends_the_body() -> None:
    client = Client(stuck_at=0)
    async with anyio.create_task_group() as group:
        group.start_soon(functools.partial(respond, client, 1, send_timeout=60))
        await anyio.wait_all_tasks_blocked()
        client.gone.set()
    assert not client.whole
