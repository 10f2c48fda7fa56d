"""Each bench once, in its smallest form: that it runs, and that nothing was lost or double. Never how fast."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from agentrun.cli._place import version
from tests.e2e.processes import one_line, within


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agentrun", "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, **(env or {})},
    )


def parsed(done: subprocess.CompletedProcess[str], *, said: str = "") -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["violations"] == []
    assert re.fullmatch(said, report["worker_log"]), report["worker_log"]
    assert report["machine"]["cores"] >= 1
    return report


def measure(*arguments: str, said: str = "") -> dict[str, dict[str, Any]]:
    report = parsed(run(*arguments, "--json"), said=said)
    assert {row["bench"] for row in report["rows"]} == {arguments[0]}
    return {row["case"]: row["figures"] for row in report["rows"]}


def test_turns() -> None:
    rows = measure("turns", "--sessions", "1,3", "--rounds", "1", "--seconds", "0.5")
    assert list(rows) == ["1 sessions", "3 sessions"]
    for sessions, figures in zip((1, 3), rows.values(), strict=True):
        assert figures["turns_measured"] == sessions
        # A reader may see the turn's start before the sender hears that it was stored.
        assert figures["send_stored_p50_ms"] > 0
        assert 0 < figures["turn_started_p50_ms"] <= figures["first_token_p50_ms"]
        assert figures["first_token_p50_ms"] <= figures["first_token_p90_ms"] <= figures["first_token_p99_ms"]
        assert figures["turns_per_s"] > 0


def test_tokens() -> None:
    (figures,) = measure("tokens", "--sessions", "2", "--seconds", "0.5").values()
    assert figures["tokens"] == 2 * 25
    assert figures["lost"] == figures["doubled"] == 0
    assert 0 < figures["latency_p50_ms"] <= figures["latency_p99_ms"] <= figures["latency_max_ms"]
    assert 0 < figures["appends_per_token"] <= 1
    assert figures["slowest_turn_tokens_per_s"] > 0
    assert {"worker_cpu_per_token_us", "server_cpu_per_token_us", "reader_cpu_per_token_us"} <= set(figures)


def test_cancel() -> None:
    (figures,) = measure("cancel", "--sessions", "2", "--rounds", "1").values()
    assert figures["stops_measured"] == 2
    assert figures["receipts"] == "2 cancelled"
    assert figures["receipt_p50_ms"] > 0
    assert figures["stopped_p50_ms"] > 0


def test_resume() -> None:
    rows = measure("resume", "--events", "300", "--rounds", "1", "--readers", "5", "--seconds", "1")
    assert [figures["events"] for figures in list(rows.values())[:3]] == [300, 150, 100]
    # The turn before it, a request, a start, 50 words and an end.
    assert rows["5 join late"]["exact"] == "5 of 5"
    assert rows["5 join late"]["events"] > 50


def test_takeover() -> None:
    # With so short a lease it is the lease, or the dead worker's peer that speaks first.
    peer = r"(\S+ WARNING worker \S+ has been silent for 2\.5 s: handing over what it held, \d+ inputs\n?)*"
    (figures,) = measure("takeover", "--sessions", "3", "--kills", "1", "--lease", "1", said=peer).values()
    assert figures["kills"] == 1
    assert figures["turns_taken_over"] >= 2
    assert figures["turns_taken_over"] + figures["turns_not_concerned"] == 3
    assert figures["lost"] == figures["doubled"] == 0
    assert 0 < figures["next_token_min_s"] <= figures["next_token_max_s"]


def test_telemetry() -> None:
    rows = measure("telemetry", "--sessions", "2", "--rounds", "8", "--seconds", "0.2")
    assert list(rows) == ["off", "on", "on, of off"]
    assert rows["off"]["rounds"] == rows["on"]["rounds"] == 2
    for figures in list(rows.values())[:2]:
        assert figures["tokens_per_s"] > 0
        assert figures["turns_per_s"] > 0
    assert rows["on, of off"]["tokens_per_s_percent"] > 0


def test_a_table_for_people() -> None:
    done = run("tokens", "--sessions", "1", "--seconds", "0.2")
    assert done.returncode == 0, done.stderr
    assert "latency p50 ms" in done.stdout
    assert "nats-server" in done.stdout


# Each bench that needs no worker process once, and each broker once.
@pytest.mark.parametrize(
    ("what", "broker", "expected"),
    [
        ("turns", ("--url", "memory://bench"), {"turns_measured": 2}),
        ("resume", ("--url", "memory://bench"), {"exact": "2 of 2"}),
        ("tokens", ("--broker", "nats"), {"tokens": 50, "lost": 0, "doubled": 0}),
        ("tokens", ("--broker", "valkey"), {"tokens": 50, "lost": 0, "doubled": 0}),
        ("cancel", ("--broker", "sqlite"), {"receipts": "2 cancelled"}),
    ],
)
def test_within_one_process(what: str, broker: tuple[str, str], expected: dict[str, Any]) -> None:
    small = ("--sessions", "2", "--rounds", "1", "--seconds", "0.5", "--events", "200", "--readers", "2")
    *_, figures = measure(what, "--workers", "0", *small, *broker).values()
    assert expected.items() <= figures.items()
    assert all(value > 0 for name, value in figures.items() if name.endswith("_p50_ms"))
    assert {name.partition("_cpu_")[0] for name in figures if "_cpu_" in name} <= {"process", "server"}


@pytest.mark.parametrize("what", ["takeover", "gateway", "scale", "all"])
def test_what_needs_worker_processes_is_refused_without(what: str) -> None:
    assert f"{what} needs worker processes" in one_line(within("bench", what, "--workers", "0", code=2).err)


def test_what_processes_cannot_share_is_refused() -> None:
    done = run("tokens", "--url", "memory://x")
    assert done.returncode == 1
    assert "lives in one process" in done.stderr


@pytest.mark.parametrize(
    ("kind", "named"), [("nats", "nats-server"), ("valkey", "valkey-server"), ("sqlite", "SQLite")]
)
def test_what_was_measured_is_named_with_its_version(kind: str, named: str) -> None:
    assert re.fullmatch(rf"{named} \d+\.\d+\.\d+", version(kind))


def test_a_broker_named_in_the_environment_is_left_alone() -> None:
    done = run("tokens", "--sessions", "1", "--seconds", "0.2", env={"AGENTRUN_URL": "nats://127.0.0.1:1"})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("sessions", ["0", "many", "1,,2"])
def test_sessions_that_are_no_numbers(sessions: str) -> None:
    done = run("tokens", "--sessions", sessions)
    assert done.returncode == 2
    assert "1,20,50" in done.stderr


def test_scale() -> None:
    report = parsed(run("scale", "--small", "--sessions", "10,40", "--rounds", "2", "--json"))
    rows = {(row["bench"], row["case"]): row["figures"] for row in report["rows"]}
    assert [case for bench, case in rows if bench == "scale: sessions in one stream"] == ["10", "40"]
    for shape in ("200 events a turn", "5 events a turn"):
        cases = [case for bench, case in rows if bench == f"scale: a session, {shape}"]
        assert cases == ["10 events", "100 events", "1000 events"]
    for figures in rows.values():
        assert all(value is not None and value > 0 for name, value in figures.items() if name.endswith("_ms"))
    queue = rows["scale: a queue", "100 turns of 20 sessions, 4 workers"]
    assert queue["run_in_order"] == 100
    assert queue["most_leased"] <= 100  # looked at now and then: of so short a queue none may be seen
