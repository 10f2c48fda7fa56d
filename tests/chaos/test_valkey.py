"""An answer on Valkey while one thing breaks in its middle, and what is told when a failover has lost records.

A server that restarts within a second, one that hangs for three, a worker that is killed: where tokens are kept in
pub/sub or in the worker's memory, each of them cuts the answer short. Here they are read from the log.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest

from agentrun import Event, RecordsLost, SessionGone
from agentrun.wire import TERMINAL, TextDelta, TurnCompleted, TurnStarted
from tests.chaos.checker import Rule, check
from tests.chaos.evidence import read_notes
from tests.chaos.readers import EventStream
from tests.chaos.scene import Scene, open_scene
from tests.chaos.valkey_servers import ValkeyServers

pytestmark = pytest.mark.timeout(180)

PATIENCE = 60
WORDS = 250
ASKED = f"count {WORDS} 20"
SAID = "".join(f"w{n} " for n in range(WORDS))


def servers_of(scene: Scene) -> ValkeyServers:
    assert isinstance(scene.stage.servers, ValkeyServers)
    return scene.stage.servers


class Follower:
    """Reads a session with the library, from before anything is sent."""

    def __init__(self, scene: Scene, session: str) -> None:
        self.events: list[Event] = []
        self.lost: RecordsLost | None = None
        self._session = scene.client.session(session)

    async def run(self) -> None:
        try:
            async with self._session.follow() as events:
                async for event in events:
                    self.events.append(event)
        except RecordsLost as error:
            self.lost = error

    @property
    def worker(self) -> str:
        """Who runs the turn."""
        return [event.data.worker for event in self.events if isinstance(event.data, TurnStarted)][-1]

    async def has(self, count: int) -> None:
        """Wait for so many events."""
        await until(lambda: len(self.events) >= count)


async def until(what: Callable[[], bool]) -> None:
    """Wait until something holds."""
    with anyio.fail_after(PATIENCE):
        while not what():  # noqa: ASYNC110 - it rings no bell
            await anyio.sleep(0.01)


def reader_of(scene: Scene, session: str, *, mortal: bool = False) -> EventStream:
    """Reads it from the gateway; a ``mortal`` session may be gone, and then it leaves."""
    place, dice = scene.stage.place, random.Random(3)
    return EventStream(place, scene.client, scene.book, dice, name="r", session=session, mortal=mortal)


async def crash(scene: Scene, worker: str) -> None:
    servers = servers_of(scene)
    await servers.crash(servers.primary, away=1.0)


async def freeze(scene: Scene, worker: str) -> None:
    servers = servers_of(scene)
    await servers.freeze(servers.primary, 3.0)


async def fail_over(scene: Scene, worker: str) -> None:
    await servers_of(scene).fail_over()


async def kill_worker(scene: Scene, worker: str) -> None:
    (process,) = [process for process in scene.stage.workers if process.life == worker]
    process.signal(signal.SIGKILL)


@pytest.mark.parametrize("breaks", [crash, freeze, fail_over, kill_worker])
async def test_an_answer_is_whole_for_readers_from_before(
    tmp_path: Path, breaks: Callable[[Scene, str], Awaitable[None]]
) -> None:
    async with open_scene(tmp_path, broker="valkey", workers=2) as scene, anyio.create_task_group() as group:
        follower, reader = Follower(scene, "s"), reader_of(scene, "s")
        group.start_soon(follower.run)
        group.start_soon(reader.run)
        turn = await scene.send("s", "t", ASKED)
        await follower.has(30)
        await breaks(scene, follower.worker)
        result = await turn.result(PATIENCE)
        reader.finish(result.offset)
        await follower.has(result.offset)
        await until(reader.ended.is_set)
        group.cancel_scope.cancel()
    assert result.text == SAID
    events = follower.events
    assert [event.offset for event in events] == list(range(1, result.offset + 1))
    assert "".join(event.data.text for event in events if isinstance(event.data, TextDelta)) == SAID
    assert [type(event.data) for event in events if isinstance(event.data, TERMINAL)] == [TurnCompleted]
    # What the other reader was given, what the worker was told, and the log, compared record by record.
    assert check(read_notes(tmp_path)).violations == []


async def test_a_failover_that_loses_records_is_told_to_all_who_know_of_them(tmp_path: Path) -> None:
    async with open_scene(tmp_path, broker="valkey", workers=1) as scene, anyio.create_task_group() as group:
        servers = servers_of(scene)
        follower, reader = Follower(scene, "s"), reader_of(scene, "s", mortal=True)
        group.start_soon(follower.run)
        group.start_soon(reader.run)
        turn = await scene.send("s", "t", ASKED)
        await follower.has(30)
        servers.link.silence()
        most = (await servers.operator.log.last("s")).offset  # that the replica may have
        unheard = await scene.send("other", "t", "count 3 0")
        await unheard.result(PATIENCE)
        await follower.has(most + 30)
        await until(lambda: reader.offset > most)
        # While its worker hangs, the session does not grow again past what was lost: who comes back with nothing but an
        # offset could not be told then.
        (worker,) = scene.stage.workers
        worker.freeze()
        await servers.fail_over(caught_up=False)

        # Whoever was given what is gone, or waits for it, is told.
        await until(lambda: follower.lost is not None and reader.ended.is_set())
        seen, lost = follower.events, follower.lost
        assert lost is not None
        assert lost.after == seen[-1].offset > lost.end
        with pytest.raises(SessionGone):
            await unheard.result(PATIENCE)

        # The worker's attempt is refused; the next one goes on from what is left, and so do the session and others.
        worker.thaw()
        result = await turn.result(PATIENCE)
        assert (result.text, result.attempt) == (SAID, 2)
        assert (await (await scene.send("s", "t2", "count 3 0")).result(PATIENCE)).text == "w0 w1 w2 "
        assert (await (await scene.send("other", "t", "count 3 0")).result(PATIENCE)).text == "w0 w1 w2 "
        log = [event async for event in scene.client.session("s").events(follow=False)]
        group.cancel_scope.cancel()
    assert [event.offset for event in log] == list(range(1, len(log) + 1))
    assert [event.raw for event in log[: lost.end]] == [event.raw for event in seen[: lost.end]]
    assert log[lost.end].raw != seen[lost.end].raw
    ends = [(event.turn, type(event.data)) for event in log if isinstance(event.data, TERMINAL)]
    assert ends == [("t", TurnCompleted), ("t2", TurnCompleted)]
    # The checker of the random runs finds out such a failover: they have none.
    assert {Rule.ACKED, Rule.READER} <= {violation.rule for violation in check(read_notes(tmp_path)).violations}
