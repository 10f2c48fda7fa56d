"""What ``agentrun top`` makes of samples, events and keys, and how it looks."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from agentrun import wire
from agentrun.broker import QueueStats
from agentrun.cli._top_data import GONE, SILENT, Fleet
from agentrun.cli._top_events import Line, Recently
from agentrun.cli._top_keys import Keys
from agentrun.cli._top_view import picture
from agentrun.client import Event
from agentrun.worker import AgentLoad, RunningTurn, WorkerInfo


def worker(name: str, *turns: RunningTurn, slots: int = 10, draining: bool = False, **more: object) -> WorkerInfo:
    return WorkerInfo(name, f"{name}-host", 1, ["echo"], slots, draining, list(turns), **more)


def turn(name: str, tokens: int, seconds: float, *, attempt: int = 1, stopping: bool = False) -> RunningTurn:
    return RunningTurn(f"s-{name}", name, "echo", attempt, seconds, tokens, stopping)


def lines(fleet: Fleet, *, width: int = 80, height: int | None = 24, **more: object) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, height=height or 1000).print(picture(fleet, height=height, width=width, **more))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def cells(shown: list[str], first: str) -> list[str]:
    """The words of the row that begins with one."""
    (row,) = [line.split() for line in shown if line.split()[:1] == [first]]
    return row


# ------------------------------------------------------------------------------------------------------------- data


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
    for second in range(int(GONE) + 1):
        answers = [worker("w")] if second else [worker("dead", turn("a", 1, 1.0)), worker("w")]
        fleet.sample(float(second), answers, [])
        known = list(fleet.workers)
        assert known == (["dead", "w"] if second < GONE else ["w"])
        if "dead" in known:
            assert fleet.silent(fleet.workers["dead"]) == (second >= SILENT)
        assert [(run.worker, run.rate > 0) for run in fleet.runs] == ([("dead", second == 0)] if second < GONE else [])
        assert not fleet.silent(fleet.workers["w"])


def test_what_is_taken_over_is_told_once() -> None:
    fleet = Fleet()
    before, after = turn("a", 7, 9.0), turn("a", 1, 0.5, attempt=2)
    fleet.sample(0.0, [worker("old", before)], [])
    fleet.sample(1.0, [worker("new", after)], [])
    assert [(run.worker, run.info.attempt) for run in fleet.runs] == [("new", 2)]
    for answers in ([worker("new", after), worker("old", before)], [worker("old", before), worker("new", after)]):
        fleet.sample(2.0, answers, [])
        assert [(run.worker, run.info.attempt) for run in fleet.runs] == [("new", 2)]


def test_nobody_is_silent_while_the_broker_is_away() -> None:
    fleet = Fleet()
    fleet.sample(0.0, [worker("w", turn("a", 10, 1.0))], [])
    for second in range(1, 60):
        fleet.failed(float(second), "the broker is away")
        assert not fleet.silent(fleet.workers["w"])
    fleet.sample(60.0, [], [])  # its own connection comes back a moment later
    assert not fleet.silent(fleet.workers["w"])
    fleet.sample(61.0, [worker("w", turn("a", 70, 61.0))], [])
    assert fleet.error is None
    assert fleet.workers["w"].unheard == 0


def test_who_is_asked_seldom_may_miss_once() -> None:
    fleet = Fleet(every=10.0)
    for second, answers, silent in ((0, [worker("w")], False), (10, [], False), (20, [], True)):
        fleet.sample(float(second), answers, [])
        assert fleet.silent(fleet.workers["w"]) == silent


def test_a_worker_that_drains_has_no_free_slots() -> None:
    fleet = Fleet()
    draining = worker("b", turn("x", 1, 1.0), turn("y", 1, 1.0), slots=7, draining=True)
    fleet.sample(0.0, [worker("a", turn("z", 1, 1.0), slots=5), draining], [QueueStats("echo", 3, 1, 30.0)])
    assert fleet.slots == (3, 7)
    assert fleet.waiting == 3


# ----------------------------------------------------------------------------------------------------------- events


def told(*events: wire.AnyEvent, content: bool = False) -> list[Line]:
    recently = Recently(content=content)
    for offset, event in enumerate(events, 1):
        recently.add(Event(offset, b"{}", decoded=event))
    return list(recently.lines)


def test_tokens_in_a_row_are_one_line() -> None:
    found = told(
        wire.TurnStarted(turn="t", attempt=1, worker="w", lease="1"),
        *(wire.TextDelta(turn="t", attempt=1, text="x", count=2) for _ in range(50)),
        wire.ReasoningDelta(turn="t", attempt=1, text="x", count=1),
        wire.TextDelta(turn="t", attempt=1, text="x", count=1),
        wire.TextDelta(turn="t", attempt=2, text="x", count=1),
    )
    assert [(line.first, line.last, line.type, line.turn, line.tokens) for line in found] == [
        (1, 1, "turn.started", "t #1", None),
        (2, 51, "text.delta", "t #1", 100),
        (52, 52, "reasoning.delta", "t #1", 1),
        (53, 53, "text.delta", "t #1", 1),
        (54, 54, "text.delta", "t #2", 1),
    ]


SECRETS = (
    wire.TurnRequested(turn="t", agent="a", input="secret", user="ann", metadata={"k": "secret"}),
    wire.TextDelta(turn="t", attempt=1, text="secret "),
    wire.ReasoningDelta(turn="t", attempt=1, text="secret "),
    wire.ToolInputDelta(turn="t", attempt=1, call="1", text="secret"),
    wire.ToolCall(turn="t", attempt=1, call="1", name="look_up", input={"q": "secret"}),
    wire.ToolResult(turn="t", attempt=1, call="1", output="secret"),
    wire.Data(turn="t", attempt=1, name="n", data="secret"),
    wire.InputRequired(turn="t", attempt=1, request="r", kind="text", prompt="secret"),
    wire.TurnAnswer(turn="t", request="r", value="secret"),
    wire.TurnRetrying(turn="t", attempt=1, error=wire.ErrorInfo("retry", "secret"), after=1.0),
    wire.UnknownEvent("new.event", b'{"type":"new.event","text":"secret"}'),
)


def test_what_is_said_is_shown_only_when_asked() -> None:
    hidden, shown = told(*SECRETS), told(*SECRETS, content=True)
    assert [line.type for line in hidden] == [line.type for line in shown] == [event.type for event in SECRETS]
    assert "secret" not in "".join(line.text for line in hidden)
    assert [line.type for line in shown if "secret" not in line.text] == []
    assert {line.type: line.text for line in hidden if line.text} == {
        "tool.call": "look_up",
        "input.required": "text",
        "turn.retrying": "retry",
    }


def test_of_a_long_text_the_end_is_kept() -> None:
    words = [wire.TextDelta(turn="t", attempt=1, text=f"w{n} ") for n in range(5000)]
    (line,) = told(*words, content=True)
    assert line.text.endswith("w4998 w4999 ")
    assert len(line.text) < 200


# ------------------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("at_once", [True, False])
def test_keys_are_found_however_they_arrive(at_once: bool) -> None:
    typed = "jjk\x1b[B\x1bOAs\x1b[5~ü\x1b[200~yyq\x03\x1b[201~y\ry\x03".encode()
    keys = Keys()
    pieces = [typed] if at_once else [typed[i : i + 1] for i in range(len(typed))]
    found = [key for piece in pieces for key in keys.feed(piece)]
    assert found == ["down", "down", "up", "down", "up", "s", "?", "ü", "y", "?", "y", "leave"]


# ------------------------------------------------------------------------------------------------------------- view


def test_the_screen_says_how_the_fleet_stands() -> None:
    fleet = Fleet()
    many = worker("w1", turn("a", 50, 5.0), turn("b", 700, 65.0, attempt=3, stopping=True), uptime=4000.0)
    fleet.sample(0.0, [many, worker("w2", draining=True)], [QueueStats("echo", 3, 1, 30.0)])
    fleet.dead = 2
    shown = lines(fleet, selected=("s-a", "a"), title="prod")
    assert shown[0] == "agentrun prod   2 workers   2/10 slots   3 waiting   21 tokens/s   2 gave up"
    assert cells(shown, "w1") == ["w1", "w1-host", "echo", "2/10", "21", "up", "1:06:40"]
    assert cells(shown, "w2") == ["w2", "w2-host", "echo", "0/10", "0", "draining"]
    assert cells(shown, "s-a") == ["s-a", "a", "echo", "1", "0:05", "50", "10", "w1"]
    assert cells(shown, "s-b") == ["s-b", "b", "echo", "3", "1:05", "700", "11", "stopping"]
    assert shown[-1] == "↑↓ select   s stop   q quit"


def test_agents_are_told_apart_and_so_are_versions() -> None:
    fleet = Fleet()
    load = [AgentLoad("echo", 5, 2), AgentLoad("chat", 5, 0)]
    fleet.sample(0.0, [worker("w1", load=load, version="1.1"), worker("w2", version="1.0")], [])
    shown = lines(fleet, width=120)
    assert "echo 2/5 chat 0/5" in "\n".join(shown)
    assert cells(shown, "w1")[-1] == "1.1"
    fleet.sample(1.0, [worker("w1", version="1.1"), worker("w2", version="1.1")], [])
    assert "1.1" not in "\n".join(lines(fleet, width=120))


def test_before_the_first_look_nothing_is_claimed() -> None:
    shown = "\n".join(lines(Fleet()))
    assert "asking" in shown
    assert "none answers" not in shown


def test_an_error_is_a_line_and_the_rest_stays() -> None:
    fleet = Fleet()
    fleet.sample(0.0, [worker("w")], [])
    fleet.failed(1.0, "the broker is away")
    shown = lines(fleet)
    assert shown[-2:] == ["the broker is away", "↑↓ select   s stop   q quit"]
    assert cells(shown, "w")
    fleet.sample(2.0, [worker("w")], [])
    assert "the broker is away" not in lines(fleet)


@pytest.mark.parametrize("height", [14, 24, None])
def test_a_long_error_goes_on_in_the_next_line(height: int | None) -> None:
    fleet = Fleet()
    fleet.sample(0.0, [worker("w")], [])
    fleet.failed(
        1.0, "$JS.API.CONSUMER.LIST.AGENTRUN_team_0 at nats://10.0.0.1:4222: no connection to the server\n" * 20
    )
    shown = [line for line in lines(fleet, height=height) if line.startswith(("$JS", "connection", "no connection"))]
    assert len(lines(fleet, height=height)) <= (height or 24)
    assert all(len(line) <= 80 for line in shown)
    assert "10.0.0.1" in shown[0]
    assert len(shown) == (1 if height == 14 else 2)


@pytest.mark.parametrize("error", [None, "the broker is away"])
@pytest.mark.parametrize("height", [6, 9, 10, 12, 15, 24, 50])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_it_fills_the_terminal_whatever_that_is(width: int, height: int, error: str | None) -> None:
    fleet = Fleet()
    turns = [turn(f"t{n:02}", n, 100.0 - n, stopping=n == 40) for n in range(60)]
    fleet.sample(0.0, [worker(f"w{n}", *turns[n::6]) for n in range(6)], [], error)
    events = [Line(n, n, "turn.started", "t", "x" * 300) for n in range(20)]
    shown = lines(fleet, width=width, height=height, selected=("s-t40", "t40"), events=events, question="sure? " * 60)
    assert len(shown) == height
    assert all(len(line) <= width for line in shown)
    assert cells(shown, "s-t40"), "the selected one is in sight"
    assert any("of 60 running turns" in line for line in shown)
    assert shown[-1].startswith("sure?")
    assert (shown[-2] == error) == (error is not None)
    if height >= 24:
        assert "last events of s-t40" in shown
        assert [line for line in shown if "turn.started" in line]


def test_without_a_height_nothing_is_cut() -> None:
    fleet = Fleet()
    fleet.sample(0.0, [worker(f"w{n:02}", turn(f"t{n:02}", n, 1.0)) for n in range(70)], [])
    shown = lines(fleet, height=None)
    assert [line.split()[0] for line in shown if line.startswith("s-t")] == [f"s-t{n:02}" for n in range(70)]
    assert "quit" not in shown[-1]


def test_a_long_name_is_cut_in_its_middle() -> None:
    fleet = Fleet()
    fleet.sample(0.0, [worker(f"support-agents-of-production-5d8c7b-{n}" * 2, turn(n, 1, 1.0)) for n in "xy"], [])
    shown = "\n".join(lines(fleet))
    for n in "xy":
        assert shown.count(f"7b-{n}") == 2, shown


def test_of_tokens_the_newest_are_in_sight() -> None:
    fleet = Fleet()
    fleet.sample(0.0, [worker("w", turn("a", 1, 1.0))], [])
    text = " ".join(f"w{n}" for n in range(40))
    for said, newest in ((text, "w39"), (text + "漢字" * 40, "漢字")):
        shown = lines(fleet, selected=("s-a", "a"), events=[Line(1, 40, "text.delta", "a #1", said, 40)])
        (line,) = [line for line in shown if "text.delta" in line]
        assert "  40 tokens" in line
        assert line.endswith(newest)
        assert cell_len(line) <= 80


def test_what_a_terminal_would_obey_is_left_out() -> None:
    fleet = Fleet()
    evil = "[/red]\x1b[2J\r\n[bold]boo"
    info = WorkerInfo(evil, evil, 1, [evil], 1, False, [RunningTurn(evil, evil, evil, 1, 1.0)], version=evil)
    fleet.sample(0.0, [info, worker("w")], [QueueStats(evil, 1, 1, 1.0), QueueStats("b", 1, 1, 1.0)], evil)
    line = Line(1, 1, evil, evil, evil)
    shown = lines(fleet, width=200, selected=(evil, evil), events=[line], title=evil, note=evil)
    text = "\n".join(shown)
    assert "[/red]" in text, "no markup"
    assert "\x1b" not in text
    assert "\r" not in text
    assert len(shown) == 24
