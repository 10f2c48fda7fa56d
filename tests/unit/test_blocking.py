from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import anyio
import pytest
from scripted_owner import Owner

import agentrun
from agentrun import blocking, client, wire
from agentrun.brokers.memory import MemoryBroker
from agentrun.dead import DeadLetters, DeadTurn
from agentrun.errors import InvalidInput, NotWaiting, TurnFailed


class Setting:
    """A blocking client, and an owner of session ``s`` that acts in the client's event loop."""

    def __init__(self, client: blocking.Client, broker: MemoryBroker) -> None:
        self.client = client
        self.session = client.session("s")
        self.owner = Owner(broker)

    async def give_up(self, turn: str, at: int) -> None:
        log = self.owner.broker.log
        letters = DeadLetters(log)
        async with anyio.create_task_group() as group:
            group.start_soon(letters.run)
            await letters.report(DeadTurn(session="s", turn=turn, agent="echo", offset=at, after=at, time=float(at)))
            group.cancel_scope.cancel()
        error = wire.ErrorInfo("max_attempts", "gave up after 5 attempts")
        failed = wire.TurnFailed(turn=turn, turn_offset=at, error=error)
        await self.owner.append(failed, lambda pending: pending.settle(at))

    def do(self, function: Any, *args: Any, **options: Any) -> Any:
        return self.client._loop.call(function, *args, **options)


@pytest.fixture
def setting() -> Iterator[Setting]:
    name = uuid.uuid4().hex
    with blocking.connect(f"memory://{name}", agent="echo") as connected:
        yield Setting(connected, MemoryBroker(name))


def test_the_same_nouns_and_names() -> None:
    for cls in ("Client", "Session", "Turn", "Steer"):
        names = {n for n in vars(getattr(client, cls)) if not n.startswith("_")} - {"follow"}
        missing = names - set(dir(getattr(blocking, cls)))
        assert not missing, f"{cls} lacks {missing}"
    assert blocking.Turn.cancel.__doc__ == client.Turn.cancel.__doc__


def test_a_turn_from_its_request_to_its_result(setting: Setting) -> None:
    turn = setting.session.send("hello", id="t1")
    assert (turn.id, turn.offset, turn.session.id, setting.session.id) == ("t1", 1, "s", "s")
    setting.do(setting.owner.run, "t1", 1, "hi", " there")
    assert [e.type for e in turn.events()] == [
        "turn.requested",
        "turn.started",
        "text.delta",
        "text.delta",
        "turn.completed",
    ]
    assert turn.result(timeout=5).text == "hi there"
    assert [e.offset for e in setting.session.events(2, follow=False)] == [3, 4, 5]
    assert setting.session.history().offset == 5
    assert setting.client.turn("s", "t1").result(timeout=5).text == "hi there"
    assert turn.cancel().status == "already_ended"
    assert setting.session.cancel().status == "already_ended"
    setting.session.delete()
    assert list(setting.session.events(follow=False)) == []


def test_steering_and_answers(setting: Setting) -> None:
    turn = setting.session.send("hello", id="t1")
    setting.do(setting.owner.start, "t1", 1)
    steer = turn.steer("louder", id="t2")
    setting.do(setting.owner.append, wire.SteerConsumed(turn="t1", attempt=1, steer="t2", offset=3))
    assert steer.consumed_by(timeout=5) == "t1"
    setting.do(setting.owner.ask, "q1")
    assert turn.answer("q1", True) == 6
    with pytest.raises(NotWaiting):
        turn.answer("q1", False)


def test_dead_turns_are_listed_retried_and_dropped(setting: Setting) -> None:
    for turn in ("t1", "t2"):
        setting.session.send("hello", id=turn)
    for at, turn in enumerate(("t1", "t2"), 1):
        setting.do(setting.give_up, turn, at)
    first, second = setting.client.dead()
    assert (first.turn, second.turn) == ("t1", "t2")
    (again,) = setting.client.retry_dead(first)
    assert (again.id, again.session.id) == ("t1-retry1", "s")
    setting.client.drop_dead(second)
    assert list(setting.client.dead()) == []


def test_errors_come_as_they_are(setting: Setting) -> None:
    with pytest.raises(InvalidInput, match="has passed"):
        setting.session.send("hello", deadline=-1)
    turn = setting.session.send("hello", id="t1")
    with pytest.raises(TimeoutError):
        turn.result(timeout=0.02)
    setting.do(setting.owner.start, "t1", 1)
    setting.do(setting.owner.end, wire.TurnCancelled, by="ann")
    with pytest.raises(TurnFailed, match="by ann"):
        turn.result(timeout=5)


def test_events_come_live_to_several_threads(setting: Setting) -> None:
    def read() -> list[int]:
        found: list[int] = []
        for event in setting.session.events():
            found.append(event.offset)
            if event.type == "turn.completed":
                break
        return found

    with ThreadPoolExecutor(4) as threads:
        readers = [threads.submit(read) for _ in range(4)]
        setting.session.send("hello", id="t1")
        setting.do(setting.owner.run, "t1", 1, *"abcdef")
        assert [r.result(10) for r in readers] == [list(range(1, 10))] * 4


def test_several_threads_may_send(setting: Setting) -> None:
    with ThreadPoolExecutor(8) as threads:
        offsets = [t.offset for t in threads.map(setting.session.send, range(40))]
    assert sorted(offsets) == list(range(1, 41))


def test_a_loop_may_be_left(setting: Setting) -> None:
    setting.session.send("hello", id="t1")
    for _ in range(3):
        for event in setting.session.events():
            assert event.offset == 1
            break
    events = setting.session.events()
    assert next(events).offset == 1
    events.close()
    with pytest.raises(StopIteration):
        next(events)


def test_closing_the_client_ends_what_waits() -> None:
    ended: list[BaseException] = []
    began = threading.Event()

    def wait(session: blocking.Session) -> None:
        try:
            for _ in session.events():
                began.set()
        except BaseException as error:
            ended.append(error)

    with blocking.connect(f"memory://{uuid.uuid4().hex}", agent="echo") as connected:
        session = connected.session("s")
        session.send("hello")
        thread = threading.Thread(target=wait, args=(session,))
        thread.start()
        assert began.wait(5)
        kept = session.events()
        assert next(kept).offset == 1
    thread.join(5)
    assert not thread.is_alive()
    assert [type(e) for e in ended] == [CancelledError]
    kept.close()
    with pytest.raises(RuntimeError, match="client is closed"):
        session.send("too late")


def test_a_call_that_races_the_closing_ends(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = setting.client._loop
    start = loop._portal.start_task_soon

    def closing(function: Any) -> Any:
        loop.close()
        return start(function)

    monkeypatch.setattr(loop._portal, "start_task_soon", closing)
    with pytest.raises(CancelledError):
        next(setting.session.events())


def test_an_interrupted_call_is_taken_back(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    setting.session.send("hello", id="t1")
    events = setting.session.events()
    assert next(events).offset == 1
    loop = setting.client._loop
    start = loop._portal.start_task_soon
    started: list[Any] = []

    def interrupted(function: Any) -> Any:
        future = start(function)
        started.append(future)
        if len(started) == 1:

            def result() -> None:
                raise KeyboardInterrupt

            monkeypatch.setattr(future, "result", result)
        return future

    monkeypatch.setattr(loop._portal, "start_task_soon", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(events)
    assert started[0].cancelled()
    assert setting.session.send("more").offset == 2


def test_it_is_at_hand() -> None:
    assert agentrun.blocking is blocking
