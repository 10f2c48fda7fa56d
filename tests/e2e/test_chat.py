"""``agentrun chat``, in a terminal of its own and from a pipe."""

from __future__ import annotations

import io
import signal

import pytest

from agentrun.cli.prompt import Editor, Key
from tests.e2e.processes import Cli, Terminal

PROMPT = r"› $"


def _chat(cli: Cli, *arguments: object) -> Terminal:
    terminal = cli.terminal("chat", *arguments)
    terminal.until(PROMPT)
    return terminal


def test_a_line_is_sent_and_its_answer_streams(shared: Cli, session: str) -> None:
    chat = _chat(shared, session)
    chat.type("helo\x7flo wörld\r")
    chat.until("› hello wörld\r\n")
    chat.until("hello wörld")
    chat.until(PROMPT)
    chat.type("count 5 100\r")
    chat.until("w0 ")
    chat.type("typed meanwhile")
    chat.until("w4 ")
    chat.until("› typed meanwhile$")
    chat.type("\x15\x04")
    assert chat.wait() == 0
    assert chat.restored
    states = [turn["state"] for turn in shared.within("history", session, "--json").json["turns"]]
    assert states == ["completed", "completed"]


def test_ctrl_c_stops_the_turn_and_then_leaves(shared: Cli, session: str) -> None:
    chat = _chat(shared, session, "--user", "ann")
    chat.type("count 1000 20\r")
    chat.until("w5 ")
    chat.type("\x03")
    chat.until("stopped by ann")
    chat.until(r"receipt: cancelled at offset \d+, \d")
    chat.until(PROMPT)
    chat.type("half a line")
    chat.until("half a line$")
    chat.type("\x03")
    chat.until(PROMPT)
    chat.type("still here\r")
    chat.until("\nstill here")
    chat.until(PROMPT)
    chat.type("\x03")
    assert chat.wait() == 0
    assert chat.restored


def test_a_signal_stops_the_turn_as_ctrl_c_does(shared: Cli, session: str) -> None:
    chat = _chat(shared, session)
    chat.type("count 1000 20\r")
    chat.until("w5 ")
    chat.process.send_signal(signal.SIGINT)
    chat.until("receipt: cancelled")
    chat.until(PROMPT)
    chat.process.send_signal(signal.SIGTERM)
    assert chat.wait() == 0
    assert chat.restored


def test_questions_are_asked_and_answered_inline(shared: Cli, session: str) -> None:
    chat = _chat(shared, session)
    chat.type("approve 3 1\r")
    chat.until(r"⚙ deploy")
    chat.until(r"\? Deploy\? \[y/n\]")
    chat.until("answer› $")
    chat.type("perhaps\r")
    chat.until("answer yes or no")
    chat.type("\x15y\r")
    chat.until("answered: true")
    chat.until("deployed")
    chat.until("w2 ")
    chat.until(PROMPT)
    chat.type("approve 3 1\r")
    chat.until("answer› $")
    view = shared.within("history", session, "--json").json["turns"][-1]
    shared.within("answer", session, view["turn"], "no", "--user", "bob")
    chat.until("answered by bob: false")
    chat.until("left undone")
    chat.until(PROMPT)


def test_who_joins_sees_what_was_said_and_what_others_say(shared: Cli, session: str) -> None:
    shared.ended(session, "said before", "before")
    shared.send(session, "count 40 50", "counts", user="bob")
    shared.events_until(session, "text.delta", 4)
    chat = shared.terminal("chat", session)
    chat.until("› said before\r\nsaid before\r\n")
    chat.until("bob› count 40 50\r\n")
    shown = "".join(chat.until(f"w{i} ")[0] for i in range(40))
    assert shown == "".join(f"w{i} " for i in range(40))
    chat.until(PROMPT)
    shared.ended(session, "from elsewhere", "elsewhere", user="bob")
    chat.until("bob› from elsewhere\r\nfrom elsewhere")
    chat.until(PROMPT)


def test_that_nobody_comes_is_told(cli: Cli, session: str) -> None:
    chat = _chat(cli, session, "--agent", "echo")
    chat.type("anyone?\r")
    chat.until("no worker for echo has taken the turn yet")
    cli.worker("late")
    chat.until("\nanyone\\?")


def test_lines_from_a_pipe_are_sent_one_after_the_other(shared: Cli, session: str) -> None:
    result = shared.run("chat", session, stdin="count 3 20\napprove 1 1\nyes\nlast words")
    assert "\x1b" not in result.out
    lines = [line.strip() for line in result.out.splitlines()]
    assert lines[:2] == ["› count 3 20", "w0 w1 w2"]
    assert "answered: true" in lines
    assert lines[-2:] == ["› last words", "last words"]


def _typed(data: bytes, *, at_once: bool) -> tuple[Editor, list[Key]]:
    editor = Editor(io.StringIO())
    pieces = [data] if at_once else [data[i : i + 1] for i in range(len(data))]
    return editor, [key for piece in pieces for key in editor.feed(piece)]


@pytest.mark.parametrize("at_once", [True, False])
def test_the_editor_takes_keys_however_they_arrive(at_once: bool) -> None:
    typed = "grüß dicj\x7fh\x1b[A\x1b[1;5C\x1bOP zwei drei\x17\rab\x15c\x03\x04\n\x04"
    editor, keys = _typed(typed.encode(), at_once=at_once)
    assert keys == [Key("line", "grüß dich zwei "), Key("stop"), Key("line", "c"), Key("leave")]
    assert editor.text == ""


@pytest.mark.parametrize("at_once", [True, False])
def test_the_editor_keeps_the_lines_of_what_is_pasted(at_once: bool) -> None:
    _, keys = _typed(b"see: \x1b[200~one\rtwo\x03\nthree\x1b[201~!\r", at_once=at_once)
    assert keys == [Key("line", "see: one\ntwo\nthree!")]


def test_the_editor_takes_all_rows_of_a_long_line_away() -> None:
    out = io.StringIO()
    editor = Editor(out, width=10)
    list(editor.feed(("ü" * 23).encode()))
    editor.draw("> ")
    editor.hide()
    assert out.getvalue() == "> " + "ü" * 23 + "\r\x1b[2A\x1b[J"
    editor.hide()
    assert out.getvalue().count("\x1b[J") == 1
