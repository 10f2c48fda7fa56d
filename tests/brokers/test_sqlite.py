"""What is SQLite's own: several processes on one file, what dies or is locked, files that cannot be used."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from agentrun.broker import Entry, Hold, Kind, Pending, QueueStats, Tail
from agentrun.brokers import connect, sqlite
from agentrun.brokers.sqlite import SqliteBroker
from agentrun.errors import Duplicate, InvalidInput, Misconfigured, NoListener, TooLarge, Unavailable
from agentrun.testing.contract_players import (
    everything,
    gather_through,
    must_not_take,
    must_take,
    offsets,
    own,
    send,
    until,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    path = tmp_path / "broker.db"
    async with SqliteBroker(path, check=False) as broker:
        await broker.setup()
    return path


@contextmanager
def process(what: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of `tests.brokers.sqlite_process`, killed in the end."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.brokers.sqlite_process", what, str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        try:
            yield child
        finally:
            child.kill()


async def line_of(child: subprocess.Popen[str]) -> str:
    assert child.stdout
    return (await anyio.to_thread.run_sync(child.stdout.readline)).strip()


# ------------------------------------------------------------------------------------------------------- processes


async def test_two_processes_meet_on_a_file(path: Path) -> None:
    async with SqliteBroker(path) as broker, broker.log.follow("s") as records:
        with process("work", path) as child:
            assert await line_of(child) == "ready"
            assert await broker.signals.request("c", b"stop", timeout=20) == b"STOP"
            await send(broker, "s")
            found = await gather_through(records, 23)
        assert offsets(found) == list(range(1, 24))
        assert found == await everything(broker, "s")
        with pytest.raises(NoListener):  # at once, although nobody took its socket away
            await broker.signals.request("c", b"stop", timeout=600)
        assert os.listdir(f"{path}-signals") == []


async def test_processes_that_send_at_once_store_each_turn_once(path: Path) -> None:
    with process("send_many", path) as one, process("send_many", path) as two:
        assert await anyio.to_thread.run_sync(one.wait) == await anyio.to_thread.run_sync(two.wait) == 0
    async with SqliteBroker(path) as broker:
        assert offsets(await everything(broker, "s")) == list(range(1, 101))
        assert (await broker.log.last("s")).pending == Pending(Entry(n) for n in range(1, 101))


async def test_a_process_killed_in_mid_append_has_stored_nothing_of_it(path: Path) -> None:
    async with SqliteBroker(path, lease_ttl=1.0) as broker:
        await broker.turns.open("agent")
        await send(broker, "s")
        with process("die_in_an_append", path) as child:
            assert await anyio.to_thread.run_sync(child.wait) == -9
        assert [r.body for r in await everything(broker, "s")] == [b"hello", b"started"]
        owner = await own(broker, "s", 1)
        await owner.deltas(2)
        await owner.finish()
        assert offsets(await everything(broker, "s")) == [1, 2, 3, 4, 5, 6]
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


async def test_a_dead_process_s_input_is_handed_back(path: Path) -> None:
    async with SqliteBroker(path, lease_ttl=600) as broker:
        await broker.turns.open("agent")
        await send(broker, "s")
        with process("hold", path) as child:
            token = await line_of(child)
        await must_not_take(broker, "it is leased for ten minutes")
        await broker.turns.hand_back(Hold("agent", "s", 1, token))
        await must_take(broker, "s", 1)


# ------------------------------------------------------------------------------------------------------- locks


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another process's transaction that does not end, as where it was stopped."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield


@asynccontextmanager
async def ticking() -> AsyncGenerator[list[float]]:
    """The pauses between two turns of the event loop."""
    pauses: list[float] = []

    async def tick() -> None:
        while True:
            start = time.monotonic()
            await anyio.sleep(0.01)
            pauses.append(time.monotonic() - start)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tick)
        yield pauses
        tasks.cancel_scope.cancel()


async def test_a_locked_file_is_waited_for_and_the_loop_goes_on(path: Path) -> None:
    async with SqliteBroker(path) as broker, ticking() as pauses, anyio.create_task_group() as tasks:
        with locked(path):
            tasks.start_soon(send, broker, "s")
            await anyio.sleep(2.5)  # longer than SQLite itself waits
            assert await everything(broker, "s") == []  # who reads is not kept waiting
        assert await until(lambda: stored(broker), within=10)
        assert len(pauses) > 20
        assert max(pauses) < 1.0


async def stored(broker: SqliteBroker) -> bool:
    return (await broker.log.last("s")).offset == 1


async def test_a_file_that_stays_locked_is_unavailable(path: Path) -> None:
    async with SqliteBroker(path) as broker:
        with locked(path), pytest.raises(Unavailable) as raised:
            await broker.log.append("s", b"", kind=Kind.CANCEL, after=Tail(), pending=Pending(), timeout=0.2)
        assert "locked" in str(raised.value.__cause__)
        await send(broker, "s")
        assert offsets(await everything(broker, "s")) == [1]


async def test_a_lease_that_is_given_up_while_it_waits_takes_nothing(path: Path) -> None:
    async with SqliteBroker(path, lease_ttl=600) as broker:
        await broker.turns.open("agent")
        for _ in range(20):
            with anyio.move_on_after(0.01):
                await broker.turns.lease("agent", wait=60)
        await send(broker, "s")
        await must_take(broker, "s", 1)


async def test_leases_are_extended_while_the_loop_is_blocked(path: Path) -> None:
    async with SqliteBroker(path, lease_ttl=1.0) as broker:
        await broker.turns.open("agent")
        await send(broker, "s")
        lease = await must_take(broker, "s", 1)
        stop = threading.Event()

        def extend() -> None:
            while not stop.wait(0.1):
                lease.extend()

        thread = threading.Thread(target=extend)
        thread.start()
        try:
            time.sleep(2.0)  # noqa: ASYNC251 - an agent that blocks
            await must_not_take(broker, "it is extended by a thread")
        finally:
            stop.set()
            thread.join()
        await must_take(broker, "s", 1)


async def test_a_listener_that_reads_nothing_holds_nobody_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[bytes] = []

    async def hear(body: bytes) -> None:
        heard.append(body)

    async with SqliteBroker(path) as one, SqliteBroker(path) as two, two.signals.listen("c", hear):
        (mine,) = os.listdir(f"{path}-signals")
        monkeypatch.chdir(f"{path}-signals")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as frozen:
            frozen.bind(f"{mine.partition('-')[0]}-0000")
            said = [b"%d" % number for number in range(1000)]
            start = time.monotonic()
            for body in said:
                one.signals.announce("c", body)
            assert time.monotonic() - start < 1.0
            assert await until(lambda: heard_all(heard, said))
    assert heard == said


async def heard_all(heard: list[bytes], said: list[bytes]) -> bool:
    return len(heard) >= len(said)


async def test_a_request_over_the_limit_is_refused(path: Path) -> None:
    async with SqliteBroker(path) as broker:
        with pytest.raises(TooLarge):
            await broker.signals.request("c", bytes(1_000_000), timeout=1)


async def test_a_waker_waits_while_the_parked_head_is_still_leased(path: Path) -> None:
    async with SqliteBroker(path, lease_ttl=600) as broker:
        await broker.turns.open("agent")
        await send(broker, "s")
        owner = await own(broker, "s", 1)
        await owner.append(b"suspended", change=Pending.park)
        await send(broker, "s", wakes=True)
        await must_not_take(broker, "the head's holder has not acked it yet")
        await owner.lease.ack()
        await must_take(broker, "s", 4, within=10)


# ------------------------------------------------------------------------------------------------------- time


class Clock:
    """Takes the place of the module `time`."""

    def __init__(self) -> None:
        self.now = 1e9

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(sqlite, "time", clock)
    return clock


async def test_a_clock_that_is_set_back_does_not_change_the_order_of_times(path: Path, clock: Clock) -> None:
    async with SqliteBroker(path) as broker:
        await send(broker, "s", kind=Kind.CANCEL)
        clock.now -= 3600
        await send(broker, "s", kind=Kind.CANCEL)
        clock.now += 3601
        await send(broker, "s", kind=Kind.CANCEL)
        assert [r.time for r in await everything(broker, "s")] == [1e9, 1e9, 1e9 + 1]


async def test_a_key_is_forgotten_after_its_time(path: Path, clock: Clock) -> None:
    async with SqliteBroker(path) as broker:
        await send(broker, "s", dedupe="key")
        clock.now += broker.capabilities.dedupe_window - 1
        with pytest.raises(Duplicate):
            await send(broker, "s", dedupe="key")
        clock.now += 1
        assert (await send(broker, "s", dedupe="key")).offset == 2
        with pytest.raises(Duplicate) as raised:
            await send(broker, "s", dedupe="key")
        assert raised.value.offset == 2


async def test_what_is_done_with_a_lost_lease_does_nothing(path: Path, clock: Clock) -> None:
    async with SqliteBroker(path, lease_ttl=10) as broker:
        await broker.turns.open("agent")
        await send(broker, "s")
        old = await must_take(broker, "s", 1)
        clock.now += 11
        await must_take(broker, "s", 1)
        await old.nack()
        await old.ack()
        old.extend()
        await must_not_take(broker, "another one has it")
        clock.now += 10
        await must_take(broker, "s", 1)


async def test_inputs_for_a_queue_that_nobody_has_opened_are_counted(path: Path) -> None:
    async with SqliteBroker(path, lease_ttl=7) as broker:
        await send(broker, "s", agent="nobody")
        assert await broker.stats() == [QueueStats("nobody", waiting=1, leased=0, lease_ttl=7)]
        with pytest.raises(Misconfigured, match="open"):
            await broker.turns.lease("nobody", wait=0)


# ------------------------------------------------------------------------------------------------------- files


async def test_setup_makes_the_file_once(tmp_path: Path) -> None:
    path = tmp_path / "new.db"
    with pytest.raises(Misconfigured, match="agentrun setup"):
        async with SqliteBroker(path):
            pass
    assert os.listdir(tmp_path) == []
    async with SqliteBroker(path, check=False) as broker:
        assert await broker.setup(dry_run=True) == [f"create {path}"]
        assert not path.exists()
        with pytest.raises(Unavailable):
            await broker.log.last("s")
        assert await broker.setup() == [f"create {path}"]
        assert await broker.setup() == []
        await send(broker, "s")
    async with SqliteBroker(path, check=False) as broker:
        assert await broker.setup() == []
        assert (await broker.log.last("s")).offset == 1


async def test_setups_at_once_make_one_file(tmp_path: Path) -> None:
    async def setup() -> None:
        async with SqliteBroker(tmp_path / "new.db", check=False) as broker:
            await broker.setup()
            await send(broker, "s", kind=Kind.CANCEL)

    async with anyio.create_task_group() as tasks:
        for _ in range(6):
            tasks.start_soon(setup)
    async with SqliteBroker(tmp_path / "new.db") as broker:
        assert (await broker.log.last("s")).offset == 6


@pytest.mark.parametrize("act", ["enter", "setup"])
async def test_a_file_that_is_no_broker_s_is_refused_and_left_alone(tmp_path: Path, act: str) -> None:
    text, other = tmp_path / "notes.txt", tmp_path / "shop.db"
    text.write_text("no database, but longer than the hundred bytes of a database's header. " * 3)
    with closing(sqlite3.connect(other)) as db, db:
        db.execute("CREATE TABLE goods (name TEXT)")
    for path in (text, other):
        before = path.read_bytes()
        with pytest.raises(Misconfigured, match=path.name):
            async with SqliteBroker(path, check=act == "enter") as broker:
                await broker.setup()
        assert path.read_bytes() == before


async def test_a_file_of_another_version_is_refused(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(Misconfigured, match="version 99"):
        async with SqliteBroker(path):
            pass


@contextmanager
def as_somebody() -> Iterator[None]:
    """As a user whom the rights of files concern."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("what", ["file", "directory"])
async def test_what_may_not_be_written_is_refused(what: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "broker.db"
        async with SqliteBroker(path, check=False) as broker:
            await broker.setup()
        os.chmod(path, 0o444 if what == "file" else 0o666)
        os.chmod(folder, 0o777 if what == "file" else 0o555)
        with as_somebody(), pytest.raises(Misconfigured, match="writable"):
            async with SqliteBroker(path):
                pass
        os.chmod(folder, 0o777)


async def test_a_path_too_long_for_a_socket_is_no_matter(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    async with SqliteBroker(folder / "broker.db", check=False) as broker:
        await broker.setup()

        async def echo(body: bytes) -> bytes:
            return body

        async with broker.signals.listen("c", echo):
            assert await broker.signals.request("c", b"x", timeout=20) == b"x"


async def test_a_closed_broker_is_unavailable(path: Path) -> None:
    async with SqliteBroker(path) as broker:
        await broker.turns.open("agent")
        await send(broker, "s")
        lease = await must_take(broker, "s", 1)
    lease.extend()
    broker.signals.announce("c", b"x")
    for act in (broker.log.last("s"), lease.ack(), broker.signals.request("c", b"x", timeout=1)):
        with pytest.raises(Unavailable):
            await act


# ------------------------------------------------------------------------------------------------------- URLs


async def test_urls_name_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for namespace in ("default", "other"):
        async with connect("sqlite:///dev file.db", namespace=namespace, check=False) as broker:
            await broker.setup()
            await send(broker, namespace)
    async with connect(f"sqlite:///{tmp_path}/dev file.db") as broker:
        assert (await broker.log.last("default")).offset == 1
        assert (await broker.log.last("other")).offset == 0


@pytest.mark.parametrize(
    "url", ["sqlite://", "sqlite:///", "sqlite://dev.db", "sqlite://tmp/dev.db", "sqlite:///:memory:", "sqlite:///tmp/"]
)
def test_urls_that_name_no_file_are_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="sqlite:///"):
        connect(url)
