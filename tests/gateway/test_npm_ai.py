"""The unmodified npm packages ``ai``, ``@ai-sdk/react`` and ``@ai-sdk/workflow`` against a gateway."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio.abc import SocketAttribute, SocketStream

from tests.gateway.ai_agents import Gates, both, curious, gated, over, slow
from tests.gateway.conftest import Served, Site
from tests.gateway.npm import Node, node

WORDS = "".join(f"w{n} " for n in range(40))
GATED = {"body": {"agent": "gated"}}
transports = pytest.mark.parametrize(("surface", "kind"), [("react", "default"), ("react", "workflow")])
surfaces = pytest.mark.parametrize(
    ("surface", "kind"), [("chat", "default"), ("react", "default"), ("chat", "workflow"), ("react", "workflow")]
)


class Device:
    """A device of a user."""

    def __init__(self, script: Node) -> None:
        self._script = script
        self.seen: list[dict[str, Any]] = []

    async def do(self, command: str, **fields: Any) -> None:
        """Say what to do; that it is done is told later."""
        await self._script.say({"do": command, **fields})

    async def until(self, test: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Read on until the device tells such a thing."""
        with anyio.move_on_after(20):
            while True:
                self.seen.append(await self._script.line())
                if test(self.seen[-1]):
                    return self.seen[-1]
        raise AssertionError(f"the device did not tell; its last words: {self.seen[-5:]}")

    async def done(self, command: str, **fields: Any) -> Any:
        """Do it, and wait until it is done."""
        await self.do(command, **fields)
        return await self.finished(command)

    async def finished(self, command: str) -> Any:
        told = await self.until(lambda told: told.get("done") == command)
        assert "failed" not in told, told
        return told["result"]

    async def text(self, part: str) -> None:
        """Wait until the answer has this in it."""
        await self.until(lambda told: part in told.get("text", ""))

    async def state(self) -> dict[str, Any]:
        return await self.done("state")

    async def messages(self) -> list[tuple[str, str]]:
        """Roles and texts."""
        return [(m["role"], said(m)) for m in (await self.state())["messages"]]


def said(message: dict[str, Any]) -> str:
    return "".join(part["text"] for part in message["parts"] if part["type"] == "text")


def tools(state: dict[str, Any]) -> list[tuple[str, str]]:
    parts = state["messages"][-1]["parts"]
    return [(part["toolCallId"], part["state"]) for part in parts if "toolCallId" in part]


class Devices:
    """Devices of a test, and the network between them and the gateway, which can be cut."""

    def __init__(self, stack: AsyncExitStack, url: str) -> None:
        self._stack = stack
        self._port = int(url.rsplit(":", 1)[1])
        self._streams: list[SocketStream] = []
        self.url = url
        self.connections = 0

    async def open(
        self, surface: str, kind: str, chat: str = "s1", *, cuttable: bool = False, **options: Any
    ) -> Device:
        url = self.url if not cuttable else await self._network()
        script = await self._stack.enter_async_context(
            node("ai_device.mjs", surface, kind, url, chat, json.dumps({"named": True, **options}))
        )
        device = Device(script)
        await device.until(lambda told: "ready" in told)
        return device

    def point(self, url: str) -> None:
        """Let the network lead to another gateway."""
        self._port = int(url.rsplit(":", 1)[1])

    async def cut(self) -> None:
        """Cut all connections."""
        streams, self._streams = self._streams, []
        for stream in streams:
            with anyio.CancelScope(shield=True):
                await anyio.aclose_forcefully(stream)

    async def _network(self) -> str:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        group = await self._stack.enter_async_context(_group())
        group.start_soon(self._serve, listener)
        return f"http://127.0.0.1:{listener.extra(SocketAttribute.local_port)}"

    async def _serve(self, listener: anyio.abc.Listener[SocketStream]) -> None:
        async with listener:
            await listener.serve(self._connect)

    async def _connect(self, near: SocketStream) -> None:
        self.connections += 1
        try:
            far = await anyio.connect_tcp("127.0.0.1", self._port)
        except OSError:
            await near.aclose()
            return
        self._streams += [near, far]
        async with near, far, anyio.create_task_group() as group:
            group.start_soon(_pass, near, far, group)
            group.start_soon(_pass, far, near, group)


async def _pass(source: SocketStream, target: SocketStream, group: anyio.abc.TaskGroup) -> None:
    try:
        async for data in source:
            await target.send(data)
    except (anyio.BrokenResourceError, anyio.ClosedResourceError):
        pass
    group.cancel_scope.cancel()


@asynccontextmanager
async def _group() -> AsyncGenerator[anyio.abc.TaskGroup]:
    async with anyio.create_task_group() as group:
        yield group
        group.cancel_scope.cancel()


@pytest.fixture
def devices(site: Site, served: Served) -> Devices:
    return Devices(site._stack, served.url)


@pytest.fixture
async def gates(site: Site) -> Gates:
    """An agent that says as many of 40 words as it is let."""
    gates = Gates()
    await site.worker(gated(gates, 40))
    return gates


# ------------------------------------------------------------------------------------------------------- the surfaces


@surfaces
async def test_send_and_send_again(devices: Devices, surface: str, kind: str) -> None:
    device = await devices.open(surface, kind)
    await device.done("send", text="hello you")
    await device.done("send", text="count 40 2")
    assert await device.messages() == [
        ("user", "hello you"),
        ("assistant", "hello you"),
        ("user", "count 40 2"),
        ("assistant", WORDS),
    ]
    assert (await device.state())["status"] == "ready"
    assert [told["finished"] for told in device.seen if "finished" in told] == ["stop", "stop"]
    texts = {told["text"] for told in device.seen if "text" in told}
    assert len(texts) > 3, "it came in pieces"


@transports
async def test_a_page_that_is_loaded_in_mid_answer(devices: Devices, gates: Gates, surface: str, kind: str) -> None:
    first = await devices.open("chat", kind)
    await first.done("send", text="before")
    gates.open(20)
    await first.do("send", text="x", more=GATED)
    await first.text("w19 ")
    second = await devices.open(surface, kind, load=True, resume=True)
    await second.text("w19 ")
    gates.open(40)
    await second.until(lambda told: told.get("finished") == "stop")
    await first.finished("send")
    assert await second.messages() == await first.messages()
    assert (await second.messages())[-1] == ("assistant", WORDS)


@transports
async def test_stopped_from_another_device(devices: Devices, surface: str, kind: str) -> None:
    device = await devices.open(surface, kind, auto=True)
    await device.do("send", text="count 1000 20")
    await device.text("w3 ")
    other = await devices.open("chat", kind)
    assert (await other.done("halt"))["status"] == "cancelled"
    told = await device.until(lambda told: "finished" in told)
    assert (told["finished"], told["isError"]) == ("interrupted" if kind == "default" else "stop", False)
    await device.finished("send")
    requests = (await device.state())["requests"]
    await anyio.sleep(0.3)
    state = await device.state()
    assert state["requests"] == requests, "it does not begin again by itself"
    assert (state["status"], said(state["messages"][-1])[:9]) == ("ready", "w0 w1 w2 ")
    await device.done("send", text="still here")
    assert (await device.messages())[-1] == ("assistant", "still here")


@transports
async def test_regenerate_and_edit(devices: Devices, served: Served, surface: str, kind: str) -> None:
    device = await devices.open(surface, kind)
    await device.done("send", text="one")
    before = (await device.state())["messages"]
    await device.done("regenerate")
    after = (await device.state())["messages"]
    assert [said(message) for message in after] == ["one", "one"]
    assert after[0]["id"] == before[0]["id"]
    assert after[1]["id"] != before[1]["id"]
    await device.done("edit", id=before[0]["id"], text="two")
    await device.done("send", text="three")
    assert [text for _, text in await device.messages()] == ["two", "two", "three", "three"]
    history = await served.gateway.client.session("s1").history()
    assert [m["content"] for m in history.messages()] == ["two", "two", "three", "three"]


@transports
@pytest.mark.parametrize("hold", [20.0, 0.05], ids=["held", "suspended"])
async def test_approve(devices: Devices, site: Site, surface: str, kind: str, hold: float) -> None:
    await site.worker(over, ask_hold=hold)
    device = await devices.open(surface, kind, auto=True)
    await device.done("send", text="x", more={"body": {"agent": "over"}})
    state = await device.state()
    assert tools(state) == [("c1", "approval-requested")]
    if hold < 1:
        await anyio.sleep(0.2)
    await device.done("approve", id="c1", approved=True)
    await device.until(lambda told: told.get("finished") == "stop")
    state = await device.state()
    assert tools(state) == [("c1", "output-available")]
    assert said(state["messages"][-1]) == f"attempt {2 if hold < 1 else 1}: may I? done"
    posts = [request for request in state["requests"] if request.startswith("POST")]
    assert len(posts) == 2, "the answer is sent once"


@transports
async def test_two_calls_that_need_approval(devices: Devices, site: Site, surface: str, kind: str) -> None:
    await site.worker(both)
    device = await devices.open(surface, kind, auto=True)
    await device.done("send", text="x", more={"body": {"agent": "both"}})
    assert tools(await device.state()) == [("a", "approval-requested"), ("b", "approval-requested")]
    await device.done("approve", id="a", approved=True)
    await device.done("approve", id="b", approved=False)
    await device.until(lambda told: told.get("finished") == "stop")
    assert (await device.messages())[-1] == ("assistant", "a True, b False")


@transports
async def test_tools_that_run_in_the_client(devices: Devices, site: Site, surface: str, kind: str) -> None:
    await site.worker(curious)
    device = await devices.open(surface, kind, auto=True)
    await device.do("send", text="x", more={"body": {"agent": "curious"}})
    told = await device.until(lambda told: "called" in told)
    assert (told["called"], told["input"]) == ("locate", {"high": True})
    await device.done("output", tool="locate", call=told["call"], output="Ulm")
    for call, output in (("colour", "red"), ("word", "abc")):
        told = await device.until(lambda told, call=call: told.get("call") == call)
        assert told["called"] == "question"
        await device.until(lambda told: told.get("finished") == "tool-calls")
        await device.done("output", tool="question", call=call, output=output)
    await device.until(lambda told: told.get("finished") == "stop")
    assert (await device.messages())[-1] == ("assistant", "at Ulm red abc")


@transports
async def test_a_worker_dies_in_mid_answer(devices: Devices, site: Site, surface: str, kind: str) -> None:
    worker = await site.worker(slow, lease=0.6)
    device = await devices.open(surface, kind)
    await device.do("send", text="40", more={"body": {"agent": "slow"}})
    await device.text("w5 ")
    worker.cancel()
    await site.worker(slow, lease=0.6)
    await device.finished("send")
    assert await device.messages() == [("user", "40"), ("assistant", "attempt 2: " + WORDS)]


async def test_three_devices_show_the_same(devices: Devices, gates: Gates) -> None:
    first = await devices.open("react", "default")
    gates.open(20)
    await first.do("send", text="x", more=GATED)
    await first.text("w19 ")
    others = [await devices.open("react", kind, load=True, resume=True) for kind in ("default", "workflow")]
    for other in others:
        await other.text("w19 ")
    gates.open(40)
    for other in others:
        await other.until(lambda told: told.get("finished") == "stop")
    await first.finished("send")
    shown = [(await device.state())["messages"] for device in (first, *others)]
    assert [(m["id"], said(m)) for m in shown[0]] == [(m["id"], said(m)) for m in shown[1]]
    assert [(m["id"], said(m)) for m in shown[0]] == [(m["id"], said(m)) for m in shown[2]]
    assert said(shown[0][-1]) == WORDS


# ------------------------------------------------------------------------------------------------------- the network


async def test_a_dropped_connection_is_no_success_and_can_be_resumed(devices: Devices, gates: Gates) -> None:
    device = await devices.open("react", "default", cuttable=True)
    gates.open(10)
    await device.do("send", text="x", more=GATED)
    await device.text("w9 ")
    await devices.cut()
    told = await device.until(lambda told: "finished" in told)
    assert told["isError"] is True
    await device.finished("send")
    await device.do("resume")
    await device.until(lambda told: told.get("status") == "streaming")
    gates.open(40)
    await device.finished("resume")
    assert await device.messages() == [("user", "x"), ("assistant", WORDS)]


async def test_the_counting_transport_resumes_by_itself(devices: Devices, gates: Gates) -> None:
    device = await devices.open("react", "workflow", cuttable=True)
    gates.open(10)
    await device.do("send", text="x", more=GATED)
    for words in (10, 20, 30):
        await device.text(f"w{words - 1} ")
        await devices.cut()
        gates.open(words + 10)
    await device.finished("send")
    state = await device.state()
    assert [said(message) for message in state["messages"]] == ["x", WORDS]
    gets = [request for request in state["requests"] if request.startswith("GET")]
    assert len(gets) == 3
    assert all("startIndex=" in request for request in gets)
    assert state["status"] == "ready"


async def test_the_gateway_restarts_in_mid_answer(devices: Devices, site: Site, gates: Gates) -> None:
    second = await site.gateway()
    counting = await devices.open("react", "workflow", cuttable=True)
    plain = await devices.open("react", "default", "s2", cuttable=True)
    gates.open(10)
    async with site.serving() as first:
        devices.point(first.url)
        for device in (counting, plain):
            await device.do("send", text="x", more=GATED)
            await device.text("w9 ")
        devices.point(second.url)
    gates.open(40)
    await counting.finished("send")
    told = await plain.until(lambda told: "finished" in told)
    assert told["isError"] is True, "a truncated answer must not look whole"
    await plain.finished("send")
    await plain.done("resume")
    for device in (counting, plain):
        assert await device.messages() == [("user", "x"), ("assistant", WORDS)]


async def test_a_device_that_leaves_stops_nothing(devices: Devices, served: Served, gates: Gates) -> None:
    device = await devices.open("react", "default")
    gates.open(10)
    await device.do("send", text="x", more=GATED)
    await device.text("w9 ")
    await device.done("stop")
    await device.do("resume")
    await device.until(lambda told: told.get("status") == "streaming")
    gates.open(40)
    await device.finished("resume")
    assert (await device.messages())[-1] == ("assistant", WORDS)


async def test_without_a_chat_id_the_counting_transport_keeps_to_one_session(devices: Devices, served: Served) -> None:
    device = await devices.open("chat", "workflow", named=False)
    await device.done("send", text="one")
    await device.done("send", text="two")
    state = await device.state()
    session = "w_" + state["messages"][0]["id"]
    history = await served.gateway.client.session(session).history()
    assert [m["content"] for m in history.messages()] == ["one", "one", "two", "two"]


async def test_a_page_of_an_idle_chat(devices: Devices) -> None:
    for kind in ("default", "workflow"):
        device = await devices.open("react", kind, "nobody", load=True, resume=True)
        await anyio.sleep(0.5)
        state = await device.state()
        assert (state["status"], state["messages"]) == ("ready", [])
