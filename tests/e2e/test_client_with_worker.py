"""The client with a real worker, on every broker."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.to_thread
import pytest

import agentrun
from agentrun import Client, ClientSettings, Context, Session, Worker, WorkerSettings, agent, wire
from agentrun.broker import BrokerAdmin
from agentrun.brokers import connect
from agentrun.errors import InvalidInput, NotWaiting, QueueFull, SessionBusy, SessionGone, TurnFailed
from tests.e2e.conftest import where

SETTINGS = WorkerSettings(lease=2.0, ask_hold=0.05, cancel_grace=0.2)


@agent
async def echo(ctx: Context) -> AsyncIterator[str]:
    for word in ctx.text.split():
        yield word + " "


@agent
async def talk(ctx: Context) -> AsyncIterator[str]:
    while True:
        yield "bla "
        await anyio.sleep(0.005)


@agent
async def ask(ctx: Context) -> AsyncIterator[str]:
    yield "done" if await ctx.approve("really?", id="q1") else "left"


@agent
async def listen(ctx: Context) -> AsyncIterator[str]:
    yield "go "
    for _ in range(500):
        if inputs := await ctx.steering():
            yield " ".join(inputs)
            return
        await anyio.sleep(0.01)


@pytest.fixture(params=["memory", "nats", "valkey", "sqlite"])
async def url(request: pytest.FixtureRequest) -> str:
    """The broker's URL, and behind a # the namespace where one was made for the test."""
    name = f"t{uuid.uuid4().hex[:12]}"
    if request.param == "memory":
        return f"memory://{name}"
    address = where(request, request.param)
    async with connect(address, namespace=name, check=False) as broker:
        assert isinstance(broker, BrokerAdmin)
        await broker.setup()
    return f"{address}#{name}"


@asynccontextmanager
async def open_client(url: str, **settings: Any) -> AsyncGenerator[Client]:
    address, _, name = url.partition("#")
    async with agentrun.connect(
        address, namespace=name or "default", agent="echo", settings=ClientSettings(**settings)
    ) as client:
        yield client


@pytest.fixture
async def client(url: str) -> AsyncIterator[Client]:
    async with open_client(url) as client:
        yield client


@pytest.fixture
def session(client: Client) -> Session:
    return client.session("s-1")


@asynccontextmanager
async def working(url: str) -> AsyncGenerator[Worker]:
    address, _, name = url.partition("#")
    async with connect(address, namespace=name or "default") as broker:
        worker = Worker(broker, [echo, talk, ask, listen], settings=SETTINGS)
        async with anyio.create_task_group() as group:
            await group.start(worker.run)
            try:
                yield worker
            finally:
                worker.stop()


async def until(session: Session, *types: str) -> int:
    """Wait for an event of one of these types."""
    async with session.follow() as events:
        async for event in events:
            if event.type in types:
                return event.offset
    raise AssertionError


async def test_a_turn_is_answered_once_however_often_it_is_sent(url: str, session: Session) -> None:
    turn = await session.send("one two three", id="t1")
    assert (await session.send("one two three", id="t1")).offset == turn.offset == 1
    async with working(url):
        result = await turn.result(timeout=10)
        assert result.text == "one two three "
        assert (await session.send("one two three", id="t1")).offset == 1
        assert (await (await session.send("four")).result(timeout=10)).text == "four "
    with pytest.raises(InvalidInput, match="sent before"):
        await session.send("other", id="t1")
    types = [e.type async for e in session.events(follow=False)]
    assert types.count("turn.requested") == types.count("turn.completed") == 2


async def test_senders_at_once_store_a_turn_once(client: Client, session: Session) -> None:
    offsets: list[int | None] = []

    async def send() -> None:
        offsets.append((await client.session("s-1").send("hello", id="t1")).offset)

    async with anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(send)
    assert offsets == [1] * 10
    assert len([e async for e in session.events(follow=False)]) == 1


async def test_reading_goes_on_behind_every_offset_and_equals_what_came_live(url: str, session: Session) -> None:
    live: list[tuple[int, bytes]] = []

    async def read() -> None:
        async for event in session.events():
            live.append((event.offset, event.raw))
            if event.type == "turn.completed" and event.turn == "t2":
                return

    async with working(url), anyio.create_task_group() as group:
        group.start_soon(read)
        first = await session.send("one two three", id="t1")
        second = await session.send("four five", id="t2")
        await first.result(timeout=10)
        mine = [e async for e in second.events()]
        assert {e.turn for e in mine} == {"t2"}
        assert (mine[0].type, mine[-1].type) == ("turn.requested", "turn.completed")
    stored = [(e.offset, e.raw) async for e in session.events(follow=False)]
    assert live == stored
    assert [offset for offset, _ in stored] == list(range(1, len(stored) + 1))
    for after in range(len(stored)):
        assert [(e.offset, e.raw) async for e in session.events(after, follow=False)] == stored[after:]
        async with session.follow(after) as events:
            event = await anext(events)
            assert (event.offset, event.raw) == stored[after]
    with pytest.raises(SessionGone):
        [e async for e in session.events(len(stored) + 1, follow=False)]


async def test_senders_get_in_beside_a_talking_worker(url: str, session: Session) -> None:
    async with working(url):
        turn = await session.send("go", agent="talk")
        await until(session, "text.delta")
        with anyio.fail_after(10):
            offsets = [(await session.send(str(n))).offset for n in range(20)]
        assert len(set(offsets)) == 20
        assert (await turn.cancel()).status == "cancelled"


async def test_a_busy_session_refuses_and_knows_what_it_holds(client: Client, session: Session) -> None:
    await session.send("a", id="t1", on_busy="reject")
    with pytest.raises(SessionBusy):
        await session.send("b", id="t2", on_busy="reject")
    await session.send("b", id="t2")
    assert (await session.send("a", id="t1", on_busy="reject")).offset == 1
    full = Client(client.broker, agent="echo", settings=ClientSettings(max_queued=2)).session("s-1")
    with pytest.raises(QueueFull):
        await full.send("c", id="t3")
    assert (await full.send("b", id="t2")).offset == 2
    assert len([e async for e in session.events(follow=False)]) == 2


async def test_a_refused_session_knows_what_has_ended(url: str, session: Session) -> None:
    async with working(url):
        await (await session.send("a", id="t1", on_busy="reject")).result(timeout=10)
        talking = await session.send("go", id="t2", agent="talk")
        assert (await session.send("a", id="t1", on_busy="reject")).offset == 1
        with pytest.raises(SessionBusy):
            await session.send("a", id="t3", on_busy="reject")
        await talking.cancel()


async def test_every_stop_has_its_receipt(url: str, client: Client, session: Session) -> None:
    async with working(url):
        running = await session.send("go", id="t1", agent="talk")
        queued = await session.send("b", id="t2")
        await until(session, "text.delta")
        receipt = await queued.cancel(by="ann")
        assert receipt.status == "cancelled"
        receipt = await running.cancel(by="ann", reason="enough")
        assert receipt.status == "cancelled"
        with pytest.raises(TurnFailed, match="by ann: enough"):
            await running.result(timeout=5)
        last = [e async for e in running.events()][-1]
        assert (last.offset, last.type) == (receipt.offset, "turn.cancelled")
        assert (await running.cancel()).status == "already_ended"
        assert (await queued.cancel()).status == "already_ended"
        assert (await client.turn("s-1", "t9").cancel()).status == "not_found"
    waiting = await session.send("c", id="t3")
    short = Client(client.broker, settings=ClientSettings(cancel_wait=0.3)).turn("s-1", "t3")
    assert (await short.cancel()).status == "pending"
    async with working(url):
        with pytest.raises(TurnFailed) as failed:
            await waiting.result(timeout=10)
    assert failed.value.state == "cancelled"


async def test_a_suspended_turn_is_stopped_through_any_worker(url: str, session: Session) -> None:
    async with working(url):
        turn = await session.send("go", agent="ask")
        behind = await session.send("hello")
        await until(session, "turn.suspended")
    async with working(url):
        assert (await turn.cancel()).status == "cancelled"
        assert (await behind.result(timeout=10)).text == "hello "


async def test_a_turn_behind_a_suspended_one_is_stopped(url: str, session: Session) -> None:
    async with working(url):
        turn = await session.send("go", agent="ask")
        behind = await session.send("hello")
        await until(session, "turn.suspended")
        assert (await behind.cancel()).status == "cancelled"
        await turn.answer("q1", True)
        assert (await turn.result(timeout=10)).text == "done"


async def test_a_whole_session_is_stopped(url: str, session: Session) -> None:
    async with working(url):
        turns = [await session.send("go", agent="talk") for _ in range(3)]
        await until(session, "text.delta")
        assert (await session.cancel(by="ann")).status == "cancelled"
        for turn in turns:
            with pytest.raises(TurnFailed, match="by ann"):
                await turn.result(timeout=5)
        assert (await session.cancel()).status == "already_ended"


async def test_the_first_of_two_answers_wins(url: str, session: Session) -> None:
    outcomes: list[str] = []

    async def answer(client: Client, user: str, value: bool) -> None:
        try:
            await client.turn("s-1", "t1").answer("q1", value, user=user)
            outcomes.append(f"{value}")
        except NotWaiting:
            outcomes.append("late")

    async with working(url), open_client(url) as one, open_client(url) as other:
        turn = await session.send("go", id="t1", agent="ask")
        await until(session, "turn.suspended")
        async with anyio.create_task_group() as group:
            group.start_soon(answer, one, "ann", True)
            group.start_soon(answer, other, "bob", False)
        text = (await turn.result(timeout=10)).text
    assert sorted(outcomes) in (["True", "late"], ["False", "late"])
    assert text == ("done" if "True" in outcomes else "left")


async def test_steering_is_taken_in_or_runs(url: str, session: Session) -> None:
    async with working(url):
        turn = await session.send("go", id="t1", agent="listen")
        await until(session, "text.delta")
        steer = await turn.steer("in French", id="t2")
        assert await steer.consumed_by(timeout=10) == "t1"
        assert (await turn.result(timeout=10)).text == "go in French"
        talking = await session.send("go", id="t3", agent="talk")
        await until(session, "text.delta")
        steer = await talking.steer("hello", id="t4")
        await talking.cancel()
        assert await steer.consumed_by(timeout=10) is None
        assert (await steer.cancel()).status == "cancelled"


@pytest.mark.parametrize(("policy", "left"), [("interrupt", ["user", "assistant", "user"]), ("rollback", ["user"])])
async def test_interrupting_runs_next(url: str, session: Session, policy: wire.OnBusy, left: list[str]) -> None:
    async with working(url):
        first = await session.send("go", agent="talk")
        await until(session, "text.delta")
        second = await session.send("hello", on_busy=policy)
        assert (await second.result(timeout=10)).text == "hello "
        with pytest.raises(TurnFailed):
            await first.result(timeout=5)
    messages = (await session.history()).messages()
    assert [m["role"] for m in messages] == [*left, "assistant"]


async def test_history_joins_a_turn_in_flight(url: str, session: Session) -> None:
    async with working(url):
        turn = await session.send("go", id="t1", agent="talk")
        await until(session, "text.delta")
        await anyio.sleep(0.05)
        history = await session.history()
        view = history.turns["t1"]
        assert view.state == "running"
        assert view.message.text.startswith("bla ")
        await turn.cancel()
        async for event in session.events(history.offset, follow=False):
            assert event.offset == history.offset + 1
            history.apply(event.offset, event.data, time=event.time)
    assert view.state == "cancelled"
    assert view.message.text == "bla " * (len(view.message.text) // 4)
    assert view.message == (await session.history()).turns["t1"].message


async def test_a_deleted_session_begins_anew(url: str, session: Session) -> None:
    async with working(url):
        await (await session.send("a", id="t1")).result(timeout=10)
        await session.delete()
        assert [e async for e in session.events(follow=False)] == []
        with pytest.raises(SessionGone):
            [e async for e in session.events(3, follow=False)]
        turn = await session.send("b", id="t2")
        assert turn.offset == 1
        assert (await turn.result(timeout=10)).text == "b "


async def test_leaving_loops_and_cancelled_readers_disturb_nobody(url: str, session: Session) -> None:
    async with working(url):
        turn = await session.send("go", agent="talk")
        for _ in range(5):
            async for _ in turn.events():
                break
            with anyio.move_on_after(0.03):
                async for _ in session.events():
                    pass
        assert (await turn.cancel()).status == "cancelled"


@pytest.mark.parametrize("url", ["nats"], indirect=True)
async def test_the_blocking_client_meets_a_worker_elsewhere(url: str) -> None:
    address, _, name = url.partition("#")

    def talk_to_it() -> list[str]:
        with agentrun.blocking.connect(address, namespace=name, agent="echo") as client:
            turn = client.session("s-1").send("one two")
            types = [e.type for e in turn.events()]
            for _ in client.session("s-1").events():
                break
            assert turn.result(timeout=10).text == "one two "
            return types

    async with working(url):
        types = await anyio.to_thread.run_sync(talk_to_it)
    assert (types[0], types[-1]) == ("turn.requested", "turn.completed")
