"""``agentrun top`` as a person has it: a terminal, a fleet, keys."""

from __future__ import annotations

import signal
import time

import pytest

from agentrun import wire
from agentrun.brokers.server import NatsServer
from tests.e2e.processes import Cli, Terminal, new_cli


def until(
    top: Terminal, *parts: str, gone: str = "", size: tuple[int, int] | None = None, timeout: float = 30.0
) -> str:
    """Wait until the screen shows each of these, and not what is to be gone, on so many rows and columns; return it."""
    end = time.monotonic() + timeout
    while True:
        screen = top.screen
        shown = " ".join(" ".join(screen).split())
        fits = size is None or (len(screen) == size[0] and max(map(len, screen)) <= size[1])
        if fits and not (gone and gone in shown) and all(part in shown for part in parts):
            return shown
        assert top.next_frame(end), "\n".join(screen)


@pytest.fixture
def turns(cli: Cli) -> Cli:
    """A worker that runs two turns."""
    cli.worker("w1")
    for session, turn in (("first", "t1"), ("second", "t2")):
        cli.send(session, "count 3000 20", turn)
        cli.events_until(session, "text.delta")
    return cli


def test_a_turn_is_found_and_stopped_with_a_key(turns: Cli) -> None:
    top = turns.terminal("top", "--every", "500ms", "--by", "ann")
    until(top, "1 worker 2/50 slots", "echo 2/50", "first t1 echo 1", "second t2 echo 1", "q quit")
    top.type("s")
    until(top, "select a turn first")
    top.type("j")
    until(top, "last events of first", "turn.requested t1", "turn.started t1 #1 by w1", "text.delta t1 #1")
    top.type("j\x1b[B\x1b[A\x1b[B")  # as they come from somebody who is quick
    until(top, "last events of second", "text.delta t2 #1")
    top.type("s")
    until(top, "stop turn t2 of session second?")
    top.type("n")
    until(top, "q quit")
    top.type("s\x1b[200~y\x1b[201~s")  # what is pasted says neither yes nor no; s is no yes
    time.sleep(1.0)
    until(top, "q quit", "second t2 echo 1")
    top.type("sy")
    until(top, "turn t2: cancelled at offset", "turn.cancelled t2 #1 by ann", "1 worker 1/50 slots")
    ended = turns.events_until("second", "turn.cancelled")[-1].data
    assert isinstance(ended, wire.TurnCancelled)
    assert (ended.turn, ended.by) == ("t2", "ann")
    top.type("q")
    assert top.wait() == 0
    assert top.restored
    assert turns.events_until("first", "text.delta")[-1].turn == "t1"
    turns.within("cancel", "first")


def test_what_is_said_is_shown_only_when_asked(turns: Cli) -> None:
    top = turns.terminal("top")
    until(top, "first t1")
    top.type("j")
    until(top, "text.delta t1 #1")
    top.type("q")
    assert top.wait() == 0
    assert "w0 w1" not in top.text
    assert "count 3000" not in top.text
    top = turns.terminal("top", "--content")
    until(top, "first t1")
    top.type("j")
    until(top, "count 3000 20")
    until(top, "tokens")
    assert any(f"w{n} w{n + 1}" in " ".join(top.screen) for n in range(3000))
    top.type("q")
    assert top.wait() == 0
    for session in ("first", "second"):
        turns.within("cancel", session)


def test_the_screen_follows_the_terminals_size(turns: Cli) -> None:
    top = turns.terminal("top")
    for rows, columns in ((40, 100), (24, 80), (10, 50), (50, 200)):
        top.resize(rows, columns)
        until(top, "first", "q quit", size=(rows, columns))
    top.process.send_signal(signal.SIGTERM)
    assert top.wait() == 0
    assert top.restored
    for session in ("first", "second"):
        turns.within("cancel", session)


def test_ctrl_c_leaves_the_terminal_as_it_was(cli: Cli) -> None:
    top = cli.terminal("top")
    until(top, "none answers")
    top.type("\x03")
    assert top.wait() == 0
    assert top.restored


def test_a_worker_that_dies_is_silent(cli: Cli) -> None:
    worker = cli.worker("w1")
    top = cli.terminal("top", "--every", "500ms")
    until(top, "echo 0/50 0 up")
    worker.process.kill()
    until(top, "0/50 0 silent")
    top.type("q")
    assert top.wait() == 0


def test_a_broker_that_is_away_is_a_line_and_it_goes_on() -> None:
    with NatsServer() as server:
        cli = new_cli(server.url)
        try:
            cli.worker("w1")
            cli.send("s", "count 3000 20", "t1")
            cli.events_until("s", "text.delta")
            top = cli.terminal("top")
            until(top, "s t1 echo 1")
            top.type("j")
            until(top, "text.delta t1 #1")
            server.kill()
            assert "silent" not in until(top, "no connection to", timeout=40)
            server.start()
            until(top, "1 worker 1/50 slots", "s t1 echo 1", gone="no connection to", timeout=40)
            top.type("sy")
            until(top, "turn t1: cancelled at offset", timeout=40)
            top.type("q")
            assert top.wait() == 0
            assert top.restored
        finally:
            cli.end()


def test_without_a_terminal_it_is_shown_once(turns: Cli) -> None:
    shown = turns.run("top").out
    assert "1 worker   2/50 slots" in shown
    assert "t1" in shown
    assert "\x1b" not in shown
    for session in ("first", "second"):
        turns.within("cancel", session)
