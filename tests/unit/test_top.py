"""What ``agentrun top`` makes of samples, and how it looks."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from agentrun.broker import QueueStats
from agentrun.cli._top_data import GONE, SILENT, Fleet
from agentrun.cli._top_view import picture
from agentrun.worker import RunningTurn, WorkerInfo


def worker(name: str, *turns: RunningTurn, slots: int = 10, draining: bool = False) -> WorkerInfo:
    return WorkerInfo(name, f"{name}-host", 1, ["echo"], slots, draining, list(turns))


def turn(name: str, tokens: int, seconds: float, *, attempt: int = 1, stopping: bool = False) -> RunningTurn:
    return RunningTurn(f"s-{name}", name, "echo", attempt, seconds, tokens, stopping)


def lines(fleet: Fleet, *, width: int = 80, height: int = 24, now: float = 0.0, **more: object) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, height=height).print(picture(fleet, now=now, height=height, **more))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_rates_are_between_samples_and_begin_with_the_mean() -> None:
    fleet = Fleet()
    fleet.sample(100.0, [worker("w", turn("a", 50, 5.0))], [])
    assert fleet.rate == 10.0
    for second in range(1, 30):
        fleet.sample(100.0 + second, [worker("w", turn("a", 50 + 40 * second, 5.0 + second))], [])
    assert fleet.rate == pytest.approx(40.0, abs=0.1)
    assert fleet.workers["w"].rate == fleet.rate


def test_a_new_attempt_has_a_rate_of_its_own() -> None:
    fleet = Fleet()
    fleet.sample(0.0, [worker("w", turn("a", 500, 5.0))], [])
    fleet.sample(1.0, [worker("w", turn("a", 3, 1.0, attempt=2))], [])
    assert fleet.rate == 3.0


def test_a_silent_worker_stays_for_a_while_with_what_it_ran() -> None:
    fleet = Fleet()
    fleet.sample(0.0, [worker("dead", turn("a", 1, 1.0)), worker("w")], [])
    fleet.sample(SILENT + 1, [worker("w")], [])
    assert fleet.workers["dead"].silent(SILENT + 1) == SILENT + 1
    assert fleet.workers["w"].silent(SILENT + 1) is None
    assert [run.worker for run in fleet.runs] == ["dead"]
    fleet.sample(SILENT + 2, [worker("w", turn("a", 1, 0.5, attempt=2))], [])
    assert [(run.worker, run.info.attempt) for run in fleet.runs] == [("w", 2)]  # taken over
    fleet.sample(GONE + 1, [worker("w")], [])
    assert list(fleet.workers) == ["w"]


def test_totals_leave_out_the_slots_of_who_drains() -> None:
    fleet = Fleet()
    fleet.sample(0.0, [worker("a", slots=5), worker("b", slots=7, draining=True)], [QueueStats("echo", 3, 1, 30.0)])
    assert (fleet.slots, fleet.waiting) == (5, 3)
    assert lines(fleet)[0] == "agentrun    2 workers   0/5 slots   3 waiting   0 tokens/s   echo: 3 wait"


def test_an_error_is_a_line_and_the_rest_stays() -> None:
    fleet = Fleet()
    fleet.sample(0.0, [worker("w")], [])
    fleet.failed("the broker is away")
    shown = lines(fleet)
    assert "cannot look: the broker is away" in shown
    assert any(line.startswith(" w ") for line in shown)
    fleet.sample(1.0, [worker("w")], [])
    assert fleet.error is None


@pytest.mark.parametrize("height", [12, 24, 50])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_it_fits_whatever_the_terminal_is(width: int, height: int) -> None:
    fleet = Fleet()
    turns = [turn(f"t{n:02}", n, 100.0 - n, stopping=n == 40) for n in range(60)]
    fleet.sample(0.0, [worker(f"w{n}", *turns[n::6]) for n in range(6)], [])
    events = [f"{n:>8}  text.delta  {'x' * 300}" for n in range(20)]
    shown = lines(fleet, width=width, height=height, selected=("s-t40", "t40"), events=events, note="a note " * 60)
    assert len(shown) <= max(height, 18)
    assert all(len(line) <= width for line in shown)
    assert any("t40" in line for line in shown)  # the selected one is in sight
    assert any("of 60" in line for line in shown)


def test_what_a_terminal_would_obey_is_left_out() -> None:
    fleet = Fleet()
    fleet.sample(0.0, [worker("w", turn("a", 1, 1.0))], [])
    shown = "\n".join(lines(fleet, selected=("s-a", "a"), events=["1  text.delta  \x1b[2Jboo"]))
    assert "boo" in shown
    assert "\x1b" not in shown
