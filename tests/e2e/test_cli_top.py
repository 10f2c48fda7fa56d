"""``agentrun top`` as a person has it: a terminal, a fleet, keys."""

from __future__ import annotations

import time

from agentrun import wire
from tests.e2e.processes import Cli


def test_a_turn_is_found_and_stopped_with_a_key(cli: Cli) -> None:
    cli.worker("w1")
    cli.send("first", "count 3000 20", "t1")
    cli.events_until("first", "text.delta")
    cli.send("second", "count 3000 20", "t2")
    cli.events_until("second", "text.delta")
    top = cli.terminal("top", "--every", "500ms", "--by", "ann")
    top.until(r"1 worker   2/50 slots")
    top.until(r"w1 .* echo .* 2/50 .* up")
    top.until(r"first +t1 .* w1")
    top.type("j")
    top.until(r"last events of first")
    top.until(r"\d+  text.delta +t1")
    top.type("\x1b[B")
    top.until(r"last events of second")
    top.type("s")
    top.until(r"stop turn t2 of session second\?")
    top.type("n")
    top.until(r"select   s stop   q quit")
    top.type("s")
    top.until(r"stop turn t2 of session second\?")
    top.type("y")
    top.until(r"receipt: cancelled at offset \d+")
    top.until(r"\d+  turn.cancelled +t2")
    top.until(r"1 worker   1/50 slots")
    ended = cli.events_until("second", "turn.cancelled")[-1].data
    assert isinstance(ended, wire.TurnCancelled)
    assert (ended.turn, ended.by) == ("t2", "ann")
    top.type("q")
    assert top.wait() == 0
    assert top.restored


def test_ctrl_c_leaves_the_terminal_as_it_was(cli: Cli) -> None:
    top = cli.terminal("top")
    top.until("none answers")
    top.type("\x03")
    assert top.wait() == 0
    assert top.restored


def test_a_worker_that_dies_is_shown_as_silent(cli: Cli) -> None:
    worker = cli.worker("w1")
    top = cli.terminal("top", "--every", "500ms")
    top.until(r"w1 .* up")
    worker.process.kill()
    top.until(r"silent for \d+ s")
    top.type("q")
    assert top.wait() == 0


def test_without_a_terminal_it_is_shown_once(cli: Cli) -> None:
    cli.worker("w1")
    cli.send("s", "count 3000 20", "t1")
    cli.events_until("s", "text.delta")
    shown = cli.run("top").out
    assert "1 worker   1/50 slots" in shown
    assert "t1" in shown
    assert "\x1b" not in shown
    cli.run("cancel", "s")


def test_what_the_events_say_is_shown_only_when_asked(cli: Cli) -> None:
    cli.worker("w1")
    cli.send("s", "count 3000 50", "t1")
    cli.events_until("s", "text.delta")
    top = cli.terminal("top")
    top.until(r"s +t1 .* w1")
    top.type("j")
    top.until(r"\d+  text.delta +t1")
    time.sleep(0.5)
    top.type("q")
    assert top.wait() == 0
    assert '"text"' not in top.text
    open_top = cli.terminal("top", "--content")
    open_top.until(r"s +t1 .* w1")
    open_top.type("j")
    open_top.until(r'text.delta .*"text":"w\d+')
    open_top.type("q")
    assert open_top.wait() == 0
    cli.run("cancel", "s")
