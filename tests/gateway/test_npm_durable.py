"""The unmodified npm package ``@durable-streams/client`` reads sessions."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterable
from contextlib import suppress
from typing import Any

import anyio
import pytest
from anyio.abc import SocketAttribute, SocketStream, TaskStatus

from agentrun.gateway import Auth, Keys
from tests.gateway.conftest import Served, Site
from tests.gateway.npm import NPM, Node, node, run_node
from tests.gateway.test_durable import SECRET, answered, pairs, served_directly, small_pieces, stored, token, wire

LIVE = ("true", "long-poll", "sse")
WORDS = 120


def url(served: Served, session: str = "s") -> str:
    return f"{served.url}/v1/sessions/{session}/events"


def items_of(batches: Iterable[Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for batch in batches:
        assert "error" not in batch, batch
        found += batch["items"]
    return found


def text_of(items: Iterable[dict[str, Any]]) -> str:
    return "".join(item["event"]["text"] for item in items if item["event"]["type"] == "text.delta")


def counted(words: int) -> str:
    return "".join(f"w{i} " for i in range(words))


async def read_until(reader: Node, words: int) -> list[Any]:
    """Batches until so many words have come."""
    batches: list[Any] = []
    while text_of(items_of(batches)).count(" ") < words:
        batches.append(await reader.line())
    return batches


async def test_all_there_is_at_once(served: Served, site: Site) -> None:
    await answered(served, site, "count 50 1")
    (result,) = await run_node("durable.mjs", url(served), "false", "-1", 1)
    events = await stored(site)
    assert pairs(result["items"]) == events
    assert text_of(result["items"]) == counted(50)
    assert (result["offset"], result["upToDate"]) == (wire(events[-1][0]), True)


async def test_all_there_is_at_once_of_a_large_session(
    served: Served, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch)
    for _ in range(5):
        await answered(served, site, "count 30 4")
    (result,) = await run_node("durable.mjs", url(served), "false", "-1", 1)
    assert pairs(result["items"]) == await stored(site)
    assert text_of(result["items"]) == counted(30) * 5


@pytest.mark.parametrize("live", LIVE)
async def test_live_from_before_the_first_turn(served: Served, site: Site, live: str) -> None:
    async with node("durable.mjs", url(served), live, "-1", 2) as reader:
        first = await reader.line()
        assert (first["items"], first["offset"], first["upToDate"]) == ([], wire(0), True)
        await answered(served, site, f"count {WORDS} 5")
        await answered(served, site, "one two three")
        items = items_of(await reader.rest())
    assert pairs(items) == await stored(site)
    assert text_of(items) == counted(WORDS) + "one two three"


@pytest.mark.parametrize("live", LIVE)
async def test_joining_in_mid_answer(served: Served, site: Site, live: str) -> None:
    sent = await served.send("s", f"count {2 * WORDS} 10")
    await anyio.sleep(0.4)
    items = items_of(await run_node("durable.mjs", url(served), live, "-1", 1))
    await site.client.turn("s", sent["turn"]).result(timeout=20)
    assert pairs(items) == await stored(site)
    assert text_of(items) == counted(2 * WORDS)


@pytest.mark.parametrize("live", LIVE)
async def test_now_gives_only_what_comes(served: Served, site: Site, live: str) -> None:
    await answered(served, site, "before")
    end = (await stored(site))[-1][0]
    async with node("durable.mjs", url(served), live, "now", 1) as reader:
        assert (await reader.line())["offset"] == wire(end)
        await answered(served, site, "after that")
        items = items_of(await reader.rest())
    assert pairs(items) == await stored(site, after=end)


@pytest.mark.parametrize("live", LIVE)
async def test_going_on_from_a_saved_offset_at_another_gateway(site: Site, live: str) -> None:
    async with site.serving() as served, node("durable.mjs", url(served), live, "-1", 1) as reader:
        sent = await served.send("s", f"count {WORDS} 10")
        seen = await read_until(reader, WORDS // 4)
    async with site.serving() as served:
        saved = seen[-1]["offset"]
        seen += await run_node("durable.mjs", url(served), live, saved, 1)
    await site.client.turn("s", sent["turn"]).result(timeout=20)
    assert pairs(items_of(seen)) == await stored(site)
    assert text_of(items_of(seen)) == counted(WORDS)


@pytest.mark.parametrize("live", LIVE)
async def test_a_gateway_restarted_in_mid_answer_is_not_noticed(site: Site, live: str) -> None:
    async with site.serving() as served:
        port = int(served.url.rpartition(":")[2])
    async with node("durable.mjs", url(served), live, "-1", 1) as reader:
        async with site.serving(port=port) as served:
            sent = await served.send("s", f"count {2 * WORDS} 10")
            seen = await read_until(reader, WORDS // 4)
            served.gateway.drain()  # as SIGTERM does
        await anyio.sleep(0.3)
        async with site.serving(port=port) as served:
            seen += await reader.rest()
    await site.client.turn("s", sent["turn"]).result(timeout=20)
    assert pairs(items_of(seen)) == await stored(site)
    assert text_of(items_of(seen)) == counted(2 * WORDS)


async def test_sse_that_ends_every_second_is_not_noticed(site: Site) -> None:
    served = await site.gateway(durable_seconds=1.2)
    sent = await served.send("s", f"count {3 * WORDS} 10")
    items = items_of(await run_node("durable.mjs", url(served), "sse", "-1", 1))
    await site.client.turn("s", sent["turn"]).result(timeout=20)
    assert pairs(items) == await stored(site)
    assert text_of(items) == counted(3 * WORDS)


class Wire:
    """A TCP proxy before a gateway, whose connections can be cut."""

    def __init__(self, served: Served) -> None:
        self._port = int(served.url.rpartition(":")[2])
        self._open: set[anyio.CancelScope] = set()
        self.url = ""

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
            self.url = f"http://127.0.0.1:{listener.extra(SocketAttribute.local_port)}/v1/sessions/s/events"
            task_status.started()
            await listener.serve(self._connection)

    def cut(self) -> None:
        assert self._open
        for scope in self._open:
            scope.cancel()

    async def _connection(self, near: SocketStream) -> None:
        with anyio.CancelScope() as scope:
            self._open.add(scope)
            async with (
                near,
                await anyio.connect_tcp("127.0.0.1", self._port) as far,
                anyio.create_task_group() as group,
            ):
                group.start_soon(self._pump, near, far, group.cancel_scope)
                await self._pump(far, near, group.cancel_scope)
        self._open.discard(scope)

    async def _pump(self, source: SocketStream, target: SocketStream, scope: anyio.CancelScope) -> None:
        with suppress(anyio.BrokenResourceError):
            async for data in source:
                await target.send(data)
        scope.cancel()


@pytest.fixture
async def wire_between(served: Served) -> AsyncGenerator[Wire]:
    async with anyio.create_task_group() as group:
        between = Wire(served)
        await group.start(between.run)
        yield between
        group.cancel_scope.cancel()


@pytest.mark.parametrize("live", ["true", "long-poll"])
async def test_polling_goes_on_when_its_connection_breaks(
    served: Served, site: Site, wire_between: Wire, live: str
) -> None:
    async with node("durable.mjs", wire_between.url, live, "-1", 3) as reader:
        seen = [await reader.line()]
        for said in range(1, 4):
            wire_between.cut()
            await answered(served, site, f"count {WORDS} 2")
            if said < 3:
                seen += await read_until(reader, WORDS)
                await anyio.sleep(0.1)  # until the client waits again
        items = items_of(seen + await reader.rest())
    assert pairs(items) == await stored(site)
    assert text_of(items) == counted(WORDS) * 3


async def test_sse_that_breaks_goes_on_from_the_saved_offset(served: Served, site: Site, wire_between: Wire) -> None:
    async with node("durable.mjs", wire_between.url, "sse", "-1", 1) as reader:
        seen = [await reader.line(), await reader.line()]  # the second is of the stream
        sent = await served.send("s", f"count {WORDS} 10")
        seen += await read_until(reader, WORDS // 4)
        wire_between.cut()
        seen += await reader.rest()
    # The client takes a broken stream for an error; it would only go on by itself after a clean end.
    assert "error" in seen.pop()
    seen += await run_node("durable.mjs", url(served), "sse", seen[-1]["offset"], 1)
    await site.client.turn("s", sent["turn"]).result(timeout=20)
    assert pairs(items_of(seen)) == await stored(site)
    assert text_of(items_of(seen)) == counted(WORDS)


async def test_an_offset_of_a_deleted_session_is_told(served: Served, site: Site) -> None:
    for live in ("false", *LIVE):
        (result,) = await run_node("durable.mjs", url(served), live, wire(99), 1)
        assert result["status"] == 410


async def test_with_a_token(site: Site) -> None:
    served = await site.gateway(auth=Auth(Keys.secret(SECRET)))
    await served_directly(site)
    for live in LIVE:
        items = items_of(await run_node("durable.mjs", url(served), live, "-1", 1, token()))
        assert pairs(items) == await stored(site)
        (result,) = await run_node("durable.mjs", url(served, "other"), live, "-1", 1, token())
        assert result["status"] == 403


async def test_what_is_installed_names_no_address() -> None:
    lock = (NPM / "package-lock.json").read_text()
    assert "://" not in lock
    packages = json.loads(lock)["packages"]
    asked_for = json.loads((NPM / "package.json").read_text())["dependencies"]
    assert {name: packages[f"node_modules/{name}"]["version"] for name in asked_for} == asked_for
