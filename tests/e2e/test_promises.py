"""The promises of docs/design.md, one test each, kept by real processes against a real broker; a lease is 2 seconds."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Sequence

from agentrun.client import Event
from agentrun.wire import TERMINAL, TextDelta, TurnRequested, TurnStarted
from tests.e2e.processes import Cli, on

LEASE = 2.0
TAKEOVER = LEASE + 4.0
"""Seconds within which a dead worker's turn must go on; the lease, and a margin for a machine that is busy."""


def words(n: int) -> list[str]:
    return [f"w{i}" for i in range(n)]


def terminals(events: Sequence[Event]) -> Counter[str]:
    return Counter(event.turn for event in events if isinstance(event.data, TERMINAL))


def check_order(events: Sequence[Event]) -> None:
    """See that turns ran one at a time, in the order sent."""
    sent = [e.turn for e in events if isinstance(e.data, TurnRequested)]
    started: list[str | None] = []
    running: str | None = None
    for event in events:
        if isinstance(event.data, TurnStarted):
            assert running in (None, event.turn), f"{event.turn} was started while {running} ran"
            running = event.turn
            if event.turn not in started:
                started.append(event.turn)
        elif isinstance(event.data, TERMINAL):
            running = None
    assert started == sent


@on("nats", "valkey", "sqlite")
def test_p1_the_log_is_the_only_truth(cli: Cli, session: str) -> None:
    first = cli.worker("first")
    live = cli.start("tail", session, "--json")
    sending = cli.start("send", session, "count 50 40", "--id", "t1", "--json")
    sending.until("w5 ")
    middle = cli.start("tail", session, "--json", "--after", "4")
    cli.worker("second")
    first.signal(signal.SIGKILL)
    sent = sending.wait()
    for reader in (live, middle):
        reader.until("turn.completed")
        reader.signal(signal.SIGINT)
    replayed = cli.run("tail", session, "--json", "--no-follow").out
    assert live.wait().out == replayed
    assert sent.out == replayed
    assert middle.wait().out == "".join(replayed.splitlines(keepends=True)[4:])
    offsets = [json.loads(line)["offset"] for line in replayed.splitlines()]
    assert offsets == list(range(1, len(offsets) + 1))


@on("nats", "valkey")
def test_p2_one_turn_at_a_time_in_the_order_sent(cli: Cli, session: str) -> None:
    first = cli.worker("first")
    cli.worker("second")
    for turn in ("t1", "t2", "t3", "t4"):
        cli.send(session, "count 15 40", turn)
    runner = cli.events_until(session, "turn.started")[-1].data
    assert isinstance(runner, TurnStarted)
    if runner.worker == "first":
        first.signal(signal.SIGKILL)
    else:
        first.signal(signal.SIGTERM)
    for turn in ("t1", "t2", "t3", "t4"):
        assert cli.result(session, turn).text.split() == words(15)
    check_order(cli.log(session))


@on("nats", "valkey")
def test_p3_one_terminal_event_per_turn(cli: Cli, session: str) -> None:
    first = cli.worker("first")
    cli.ended(session, "hello", "completes")
    cli.ended(session, "fail", "fails")
    cli.send(session, "count 120 50", "moves")
    cli.send(session, "hello", "stopped-waiting")
    cli.send(session, "hello", "expires", deadline=1.0)
    cli.send(session, "count 1000 20", "stopped-running")
    assert cli.within("cancel", session, "stopped-waiting", "--json").json["status"] == "cancelled"
    first.signal(signal.SIGKILL)
    cli.worker("second")
    while cli.log(session)[-1].turn != "stopped-running":
        time.sleep(0.1)
    assert cli.within("cancel", session, "stopped-running", "--json").json["status"] == "cancelled"
    states = {turn["turn"]: turn["state"] for turn in cli.within("history", session, "--json").json["turns"]}
    assert states == {
        "completes": "completed",
        "fails": "failed",
        "moves": "completed",
        "stopped-waiting": "cancelled",
        "expires": "expired",
        "stopped-running": "cancelled",
    }
    assert terminals(cli.log(session)) == dict.fromkeys(states, 1)


@on("nats", "valkey", "sqlite")
def test_p4_no_zombie_writes(cli: Cli, session: str) -> None:
    zombie = cli.worker("zombie")
    cli.send(session, "count 100 40", "t1")
    cli.events_until(session, "text.delta", 5)
    zombie.signal(signal.SIGSTOP)
    cli.worker("second")
    cli.events_until(session, "turn.started", 2)
    zombie.signal(signal.SIGCONT)
    assert cli.result(session, "t1").text.split() == words(100)
    events = cli.log(session)
    attempts = [e.data.attempt for e in events if isinstance(e.data, (TurnStarted, TextDelta, *TERMINAL))]
    assert attempts == sorted(attempts), "an attempt wrote after the next one had begun"
    assert attempts[-1] > 1
    zombie.until(r"turn t1, attempt 1: .*taken over at offset \d+", err=True)
    assert [worker["running"] for worker in cli.within("status", "--json").json["workers"]] == [[], []]
    zombie.signal(signal.SIGTERM)
    assert zombie.wait(5).code == 0


@on("nats", "valkey")
def test_p5_stop_always_works(cli: Cli) -> None:
    # Waiting, with no worker there at all: stored, and obeyed by the next one.
    cli.send("waits", "count 1000 20", "t")
    assert cli.within("cancel", "waits", "t", "--wait", "300ms", "--json", code=3).json["status"] == "pending"
    first = cli.worker("first", "--ask-hold", "0.2")
    assert cli.within("cancel", "waits", "t", "--json").json["status"] in ("cancelled", "already_ended")

    # Running, and in a cleanup that takes its time.
    cli.send("runs", "stubborn 300", "t")
    cli.events_until("runs", "text.delta", 3)
    assert cli.within("cancel", "runs", "t", "--json").json["status"] == "cancelled"

    # Suspended: no worker holds it.
    cli.send("asks", "approve 3 1", "t")
    cli.events_until("asks", "turn.suspended")
    assert cli.within("cancel", "asks", "t", "--json").json["status"] == "cancelled"

    # Between a worker that died and the next.
    cli.send("moves", "count 1000 20", "t")
    cli.events_until("moves", "text.delta", 3)
    first.signal(signal.SIGKILL)
    stopping = cli.start("cancel", "moves", "t", "--wait", "20s", "--json")
    cli.worker("second")
    assert stopping.wait().json["status"] == "cancelled"

    for session in ("waits", "runs", "asks", "moves"):
        events = cli.log(session)
        assert terminals(events) == {"t": 1}
        assert events[-1].type == "turn.cancelled"
    again = cli.within("cancel", "moves", "t", "--json").json
    assert (again["status"], again["offset"]) == ("already_ended", events[-1].offset)


def test_p6_sending_is_idempotent_and_atomic(shared: Cli, session: str) -> None:
    racing = [shared.start("send", session, "count 3 1", "--id", "t1", "--json", "--no-follow") for _ in range(4)]
    assert len({race.wait().out for race in racing}) == 1
    assert "t1 was sent before" in shared.within("send", session, "something else", "--id", "t1", code=1).err
    for ms in (300, 400, 500):
        dies = shared.start("send", session, "count 3 1", "--id", f"killed-after-{ms}")
        time.sleep(ms / 1000)
        dies.signal(signal.SIGKILL)
        dies.wait()
        shared.ended(session, "count 3 1", f"killed-after-{ms}")
    events = shared.log(session)
    requested = Counter(e.turn for e in events if isinstance(e.data, TurnRequested))
    assert set(requested.values()) == {1}
    assert len(requested) == 4
    assert terminals(events) == requested
    check_order(events)


@on("nats", "valkey")
def test_p7_a_workers_death_costs_seconds_not_the_answer(cli: Cli, session: str) -> None:
    first = cli.worker("first")
    sending = cli.start("send", session, "count 200 50", "--id", "t1")
    sending.until("w10 ")
    cli.worker("second")
    died = time.time()
    first.signal(signal.SIGKILL)
    result = sending.wait()
    assert result.code == 0, result
    assert result.out.split() == words(200)
    assert "worker first died; second goes on (attempt 2)" in result.err
    goes_on = next(e for e in cli.log(session) if isinstance(e.data, TurnStarted) and e.data.attempt == 2)
    assert goes_on.time - died < TAKEOVER


@on("nats", "valkey")
def test_p7_however_long_the_lease_is(cli: Cli, session: str) -> None:
    long = ("--lease", "60", "--lost-after", "3")
    workers = {name: cli.worker(name, *long) for name in ("first", "second", "third")}
    sending = cli.start("send", session, "count 200 50", "--id", "t1")
    sending.until("w10 ")
    cli.send(session, "count 3 1", "t2")  # kept by whoever got it, perhaps the one that dies
    runner = next(e.data.worker for e in cli.log(session) if isinstance(e.data, TurnStarted))
    died = time.time()
    workers[runner].signal(signal.SIGKILL)
    result = sending.wait(50)
    assert result.out.split() == words(200)
    assert cli.result(session, "t2").text.split() == words(3)
    events = cli.log(session)
    [lost] = [e for e in events if e.type == "turn.lost"]
    assert (lost.turn, lost.data.worker) == ("t1", runner)
    goes_on = next(e for e in events if isinstance(e.data, TurnStarted) and e.data.attempt == 2)
    assert goes_on.time - died < 30, "it waited for the lease"
    assert terminals(events) == {"t1": 1, "t2": 1}


def test_p7_a_blocked_worker_is_not_a_dead_one(cli: Cli, session: str) -> None:
    for name in ("first", "second"):
        cli.worker(name, "--lease", "60", "--lost-after", "2", agent="tests.e2e.agents:blocks")
    cli.ask(lambda client: client.session(session, agent="blocks").send("7", id="t1"))
    assert cli.result(session, "t1", timeout=40).text == "blocked"
    assert [e.type for e in cli.log(session)].count("turn.started") == 1
