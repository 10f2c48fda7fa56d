"""One WebSocket for everything."""

from __future__ import annotations

import json
import socket as sockets
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from agentrun.gateway import Auth, Keys, mint
from agentrun.gateway import socket as socket_module
from agentrun.settings import ClientSettings
from tests.gateway.conftest import Served, Site
from tests.gateway.test_native import LONG, asker, stored
from tests.worker.fleet import eventually

SECRET = "0123456789abcdef" * 2
RIGHTS = ["read", "send", "cancel", "steer", "answer"]
PATH = "/v1/sessions/s/socket"


class Socket:
    """A client: replies by ``ref``, and the items that come between."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.items: list[tuple[int, Any]] = []
        self.replies: dict[Any, dict[str, Any]] = {}

    async def send(self, op: str, **fields: Any) -> None:
        await self.connection.send(json.dumps({"op": op, **fields}))

    async def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """The result of an operation."""
        reply = await self.reply(op, **fields)
        assert "result" in reply, reply
        return reply["result"]

    async def refused(self, op: str, **fields: Any) -> dict[str, Any]:
        """The error of an operation."""
        reply = await self.reply(op, **fields)
        assert "error" in reply, reply
        return reply["error"]

    async def reply(self, op: str, **fields: Any) -> dict[str, Any]:
        ref = fields.setdefault("ref", f"r{len(self.replies)}")
        await self.send(op, **fields)
        with anyio.fail_after(10):
            while ref not in self.replies:
                await self.take()
        return self.replies[ref]

    async def take(self) -> None:
        message = json.loads(await self.connection.recv())
        if "event" in message:
            self.items.append((message["offset"], message["event"]))
        else:
            self.replies[message["ref"]] = message

    async def until(self, type: str, within: float = 10) -> list[tuple[int, Any]]:
        """The items up to the first event of a type."""
        with anyio.fail_after(within):
            while not any(event["type"] == type for _, event in self.items):
                await self.take()
        return self.items

    async def closed(self, within: float = 10) -> tuple[int, str]:
        """How it was closed, waited for."""
        with anyio.fail_after(within):
            with suppress(ConnectionClosed):
                while True:
                    await self.take()
        assert self.connection.protocol.close_rcvd is not None, "it was broken off"
        return self.connection.protocol.close_rcvd.code, self.connection.protocol.close_rcvd.reason


@asynccontextmanager
async def opened(served: Served, path: str = PATH, **options: Any) -> AsyncGenerator[Socket]:
    url = served.url.replace("http", "ws", 1) + path
    async with connect(url, compression=None, **options) as connection:
        yield Socket(connection)


def token(**options: Any) -> str:
    values: dict[str, Any] = {"user": "ann", "sessions": ["s"], "rights": RIGHTS, "ttl": 60} | options
    return mint(SECRET, **values)


@pytest.fixture
async def guarded(site: Site) -> Served:
    """A gateway that wants tokens."""
    return await site.gateway(auth=Auth(Keys.secret(SECRET)))


# -------------------------------------------------------------------------------------------------------------- auth


async def test_the_first_message_is_the_token(guarded: Served, site: Site) -> None:
    async with opened(guarded) as socket:
        assert await socket.ask("auth", token=token()) == {"user": "ann"}
        await socket.send("read")
        sent = await socket.ask("send", input="hello")
        await socket.until("turn.completed")
        assert socket.items[0][1]["user"] == "ann"
        assert socket.items == await stored(site)
        assert (await socket.refused("auth", token=token()))["code"] == "authenticated"
        assert sent["offset"] == 1


async def test_the_token_may_stand_in_the_handshake(guarded: Served) -> None:
    headers = {"Authorization": f"Bearer {token()}"}
    async with opened(guarded, additional_headers=headers) as socket:
        assert (await socket.ask("send", input="hello"))["offset"] == 1


async def test_where_no_token_is_needed_one_does_no_harm(served: Served) -> None:
    async with opened(served) as socket:
        assert await socket.ask("auth", token="anything") == {"user": None}
        assert (await socket.ask("send", input="hello"))["offset"] == 1


@pytest.mark.parametrize(
    "first",
    [
        '{"op":"auth"}',
        '{"op":"auth","token":"x"}',
        '{"op":"auth","token":5}',
        '{"op":"send","input":"x"}',
        '{"op":"read"}',
        "hello",
        "",
        b"\xff",
    ],
)
async def test_who_does_not_begin_with_a_good_token_is_turned_away(
    guarded: Served, site: Site, first: str | bytes
) -> None:
    async with opened(guarded) as socket:
        await socket.connection.send(first)
        code, reason = await socket.closed()
        assert code in (4401, 4422)
        assert reason
    assert await stored(site) == []


async def test_a_bad_token_in_the_handshake_is_turned_away(guarded: Served) -> None:
    for header in ("Bearer x", "Basic x", f"Bearer {token(ttl=60)}x"):
        async with opened(guarded, additional_headers={"Authorization": header}) as socket:
            assert (await socket.closed())[0] == 4401


async def test_who_says_nothing_is_turned_away(guarded: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_module, "_AUTH_WAIT", 0.1)
    async with opened(guarded) as socket:
        code, reason = await socket.closed()
        assert code == 4401
        assert "token" in reason


async def test_bad_tokens_are_counted_by_address(site: Site) -> None:
    served = await site.gateway(auth=Auth(Keys.secret(SECRET)), max_failures=3)
    codes: list[int] = []
    for _ in range(5):
        async with opened(served) as socket:
            await socket.send("auth", token="x")
            codes.append((await socket.closed())[0])
    assert codes == [4401] * 3 + [4429] * 2


async def test_a_socket_ends_with_its_token(site: Site) -> None:
    served = await site.gateway(auth=Auth(Keys.secret(SECRET), leeway=0))
    async with opened(served) as reading, opened(served) as idle:
        for socket in (reading, idle):
            await socket.ask("auth", token=token(ttl=1.5))
        await reading.send("read")
        for socket in (reading, idle):
            assert await socket.closed() == (4401, "the token has expired")


async def test_rights_hold_on_a_socket_too(guarded: Served, site: Site) -> None:
    mine = await site.client.session("s").send(LONG, user="ann")
    theirs = await site.client.session("s").send("hello", user="bob")
    async with opened(guarded) as socket:
        await socket.ask("auth", token=token(rights=["cancel"]))
        for op, more in (("send", {"input": "x"}), ("read", {}), ("steer", {"turn": mine.id, "input": "x"})):
            error = await socket.refused(op, **more)
            assert (error["status"], error["code"]) == (403, "forbidden")
        assert (await socket.refused("cancel", turn=theirs.id))["right"] == "cancel:any"
        assert (await socket.refused("cancel"))["right"] == "cancel:any"
        assert (await socket.ask("cancel", turn=mine.id))["status"] == "cancelled"
    async with opened(guarded, "/v1/sessions/other/socket") as socket:
        await socket.ask("auth", token=token())
        assert (await socket.refused("send", input="x"))["status"] == 403


async def test_a_token_has_only_so_many_sockets(site: Site) -> None:
    served = await site.gateway(auth=Auth(Keys.secret(SECRET)), max_streams=2)
    good = token()
    async with opened(served) as one, opened(served) as two, opened(served) as three:
        for socket in (one, two):
            await socket.ask("auth", token=good)
            await socket.ask("read")  # not counted once more
        await three.send("auth", token=good)
        assert (await three.closed())[0] == 4429
    await anyio.sleep(0.1)
    async with opened(served) as again:
        await again.ask("auth", token=good)
        await again.ask("read")


async def test_a_token_sends_only_so_much(site: Site) -> None:
    served = await site.gateway(auth=Auth(Keys.secret(SECRET)), rate=0.001, burst=4)
    async with opened(served) as socket:
        await socket.ask("auth", token=token())
        for _ in range(3):
            await socket.ask("cancel", turn="none")
        assert (await socket.refused("cancel", turn="none"))["status"] == 429
        assert (await socket.refused("read"))["status"] == 429


# -------------------------------------------------------------------------------------------------------- operations


async def test_everything_by_ref(served: Served, site: Site) -> None:
    await site.worker(asker, ask_hold=0.05)
    async with opened(served) as socket:
        assert await socket.ask("read", after=0, ref="reading") == {"after": 0}
        sent = await socket.ask("send", ref=7, input="steer 1000 10", id="t-1", metadata={"a": 1})
        assert sent == {"session": "s", "turn": "t-1", "offset": 1}
        assert await socket.ask("send", input="steer 1000 10", id="t-1") == sent
        assert (await socket.refused("send", input="other", id="t-1"))["code"] == "id_taken"
        await socket.until("text.delta")
        steer = await socket.ask("steer", turn="t-1", input="left")
        await socket.until("steer.consumed")
        receipt = await socket.ask("cancel", turn="t-1", reason="enough")
        assert receipt["status"] == "cancelled"
        await socket.until("turn.cancelled")
        asked = await socket.ask("send", input="go", agent="asker")
        await socket.until("turn.suspended")
        answer = await socket.ask("answer", turn=asked["turn"], request="q1", value="blue")
        assert answer["turn"] == asked["turn"]
        assert (await socket.refused("answer", turn=asked["turn"], request="q1", value="red"))["status"] == 409
        await socket.until("turn.completed")
        assert (await socket.ask("cancel"))["status"] == "already_ended"
        assert socket.items == await stored(site)
        assert steer["turn"] in [event.get("steer") for _, event in socket.items]


@pytest.mark.parametrize(
    ("message", "status"),
    [
        ("hello", 422),
        ("", 422),
        ("null", 422),
        ("[]", 422),
        ("{}", 422),
        ('{"op":"explode"}', 422),
        ('{"op":1}', 422),
        ('{"op":"send","ref":1.5,"input":"x"}', 422),
        ('{"op":"read","after":"x"}', 422),
        (b"\xff\xfe", 422),
        ('{"op":"send","input":' + "[" * 10_000 + "]" * 10_000 + "}", 422),
        ('{"op":"send"}', 422),
        ('{"op":"send","input":"x","user":"mallory"}', 422),
        ('{"op":"send","input":"x","id":"a b"}', 422),
        ('{"op":"send","input":1e999}', 422),
        ('{"op":"steer","input":"x"}', 422),
        ('{"op":"answer","request":"q","value":1}', 422),
        ('{"op":"steer","input":"x","turn":"none"}', 404),
        ('{"op":"steer","input":"x","turn":"a b"}', 422),
        ('{"op":"cancel","reason":5}', 422),
    ],
)
async def test_a_message_that_cannot_be_used_is_answered(served: Served, message: str | bytes, status: int) -> None:
    async with opened(served) as socket:
        await socket.connection.send(message)
        reply = json.loads(await socket.connection.recv())
        assert (reply["ref"], reply["error"]["status"]) == (None, status)
        assert (await socket.ask("send", input="hello"))["offset"] == 1, "and the socket goes on"


async def test_bytes_do_as_well_as_text(served: Served) -> None:
    async with opened(served) as socket:
        await socket.connection.send(b'{"op":"send","ref":1,"input":"hello"}')
        assert json.loads(await socket.connection.recv())["result"]["offset"] == 1


async def test_many_operations_at_once(served: Served, site: Site) -> None:
    async with opened(served) as socket:
        for i in range(50):
            await socket.send("send", ref=i, input=f"hello {i}", id=f"t-{i}")
        with anyio.fail_after(20):
            while len(socket.replies) < 50:
                await socket.take()
        offsets = {reply["result"]["offset"] for reply in socket.replies.values()}
        assert len(offsets) == 50
        assert {reply["result"]["turn"] for reply in socket.replies.values()} == {f"t-{i}" for i in range(50)}


async def test_a_slow_operation_holds_up_no_events(site: Site) -> None:
    site.client.settings = ClientSettings(cancel_wait=1.0)
    served = await site.gateway(client=site.client)
    async with opened(served) as socket:
        await socket.send("read")
        waits = await socket.ask("send", input="hello", agent="nobody")
        await socket.send("cancel", ref="slow", turn=waits["turn"])
        await socket.until("turn.cancel")
        await socket.ask("send", input="more", agent="nobody")
        assert "slow" not in socket.replies
        with anyio.fail_after(10):
            while "slow" not in socket.replies:
                await socket.take()
        assert socket.replies["slow"]["result"]["status"] == "pending"


# ------------------------------------------------------------------------------------------------------------ reading


async def test_reading_is_resumed_behind_any_offset(served: Served, site: Site) -> None:
    sent = await served.send("s", "a b c d")
    await site.client.turn("s", sent["turn"]).result(20)
    events = await stored(site)
    for after in range(len(events)):
        async with opened(served) as socket:
            await socket.send("read", after=after)
            assert await socket.until("turn.completed") == events[after:]


async def test_a_second_read_takes_the_place_of_the_first(served: Served, site: Site) -> None:
    sent = await served.send("s", "a b c d")
    await site.client.turn("s", sent["turn"]).result(20)
    events = await stored(site)
    async with opened(served) as socket:
        for after in (0, 3, 1, len(events)):
            await socket.send("read", after=after, ref=f"from {after}")
        await socket.ask("send", input="more")
        with anyio.fail_after(10):
            while [event["type"] for _, event in socket.items].count("turn.completed") < 1 or socket.items[-1][0] < len(
                events
            ) + len("xxxx"):
                await socket.take()
        tail = [item for item in socket.items if item[0] > len(events)]
        assert tail == (await stored(site))[len(events) : len(events) + len(tail)], "each once"
        assert served.gateway.hub._feeds["s"].readers == 1


@pytest.mark.parametrize("after", [99, 10**30])
async def test_reading_behind_the_end_closes_it(served: Served, after: int) -> None:
    async with opened(served) as socket:
        await socket.send("read", after=after)
        assert (await socket.closed())[0] == 4410


async def test_reading_before_the_beginning_is_refused(served: Served) -> None:
    async with opened(served) as socket:
        assert (await socket.refused("read", after=-1))["status"] == 422


async def test_a_deletion_closes_it(served: Served, site: Site) -> None:
    await served.send("s", "hello")
    async with opened(served) as socket:
        await socket.send("read")
        await socket.until("turn.completed")
        await served.http.delete("/v1/sessions/s")
        assert (await socket.closed())[0] == 4410


async def test_an_id_that_is_none_closes_it(served: Served) -> None:
    async with opened(served, "/v1/sessions/a%20b/socket") as socket:
        assert (await socket.closed())[0] == 4422


async def test_the_gateways_own_sessions_are_not_there(served: Served) -> None:
    async with opened(served, "/v1/sessions/agentrun--revoked/socket") as socket:
        for op, more in (("read", {}), ("send", {"input": "x"}), ("cancel", {}), ("cancel", {"turn": "t"})):
            assert (await socket.refused(op, **more))["status"] == 404


async def test_a_gateway_that_ends_says_where_to_go_on(served: Served) -> None:
    sent = await served.send("s", LONG)
    async with opened(served) as socket:
        await socket.send("read")
        await socket.until("text.delta")
        served.gateway.drain()
        code, reason = await socket.closed()
        assert code == 1012
        assert reason == f"drain, after={socket.items[-1][0]}"
    assert sent["offset"] == 1


def slow(connection: Any) -> None:
    """Let the client's system take little before the server notices."""
    connection.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)


async def raw(served: Served, hello: dict[str, Any]) -> sockets.socket:
    """A WebSocket that reads nothing: its handshake and one message."""
    from websockets.frames import Frame, Opcode

    port = int(served.url.rpartition(":")[2])
    connection = sockets.socket()
    slow(connection)
    connection.connect(("127.0.0.1", port))
    connection.setblocking(False)
    connection.send(
        f"GET {PATH} HTTP/1.1\r\nHost: localhost:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    await anyio.sleep(0.2)
    connection.send(Frame(Opcode.TEXT, json.dumps(hello).encode()).serialize(mask=True))
    return connection


async def test_a_client_that_takes_nothing_is_broken_off_and_nobody_else_is_held_up(site: Site) -> None:
    served = await site.gateway(send_timeout=0.5, ring_events=64)
    cut_off = served.gateway.hub.counts.slow
    before = cut_off.value
    async with opened(served) as quick:
        stuck = await raw(served, {"op": "read"})
        try:
            await quick.send("read")
            await eventually(lambda: "s" in served.gateway.hub._feeds and served.gateway.hub._feeds["s"].readers == 2)
            began = time.monotonic()
            for i in range(40):
                await served.send("s", "x" * 200_000, agent="nobody", id=f"t-{i}", on_busy="enqueue")
            with anyio.fail_after(20):
                while len(quick.items) < 40:
                    await quick.take()
            await eventually(lambda: served.gateway.hub._feeds["s"].readers == 1)
            assert time.monotonic() - began < 15
            assert cut_off.value - before == 1
        finally:
            stuck.close()


async def test_a_client_that_falls_behind_is_told_where_to_go_on(site: Site) -> None:
    served = await site.gateway(send_timeout=20, ring_bytes=300_000)
    async with opened(served, max_queue=1) as late:
        await late.send("read")
        await late.ask("send", input="x", agent="nobody", id="first")
        for i in range(60):  # more than the systems between take, and than is kept
            await served.send("s", "x" * 200_000, agent="nobody", id=f"t-{i}")
        code, reason = await late.closed(20)
        assert code == 1013
        seen = [offset for offset, _ in late.items]
        assert seen == list(range(1, len(seen) + 1))
        assert reason == f"slow, after={len(seen)}"
        assert len(seen) < 61
    async with opened(served) as again:
        await again.send("read", after=len(seen))
        with anyio.fail_after(20):
            while len(again.items) < 61 - len(seen):
                await again.take()
        assert [offset for offset, _ in again.items] == list(range(len(seen) + 1, 62))


async def test_who_goes_away_is_forgotten(site: Site) -> None:
    served = await site.gateway(linger=0.1)
    for _ in range(3):
        async with opened(served) as socket:
            await socket.ask("read")
            await socket.send("cancel", turn="none")
    async with opened(served) as socket:
        await socket.ask("read")
        socket.connection.transport.abort()
    await eventually(lambda: served.gateway.hub.watched == 0)
