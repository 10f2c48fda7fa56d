"""Reading lines from a person while other things are printed: a small line editor, or plain lines from a pipe."""

from __future__ import annotations

import codecs
import re
from collections.abc import AsyncGenerator, Generator
from contextlib import contextmanager
from typing import Literal, NamedTuple, TextIO

from rich.cells import cell_len

from agentrun.cli import stdin

__all__ = ["Editor", "Key", "cooked_lines", "keys", "raw_terminal"]

_ESCAPE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1bO.|\x1b[^\[O]", re.DOTALL)
_PASTE, _PASTED = "\x1b[200~", "\x1b[201~"
_UNFINISHED = re.compile(r"\x1b(\[[0-?]*[ -/]*|O)?\Z")


class Key(NamedTuple):
    """What a person did: sent a line, or asked to stop or to leave."""

    kind: Literal["line", "stop", "leave"]
    text: str = ""


class Editor:
    """One line being written at the bottom of the terminal, to be taken away while something else is printed.

    Backspace, Ctrl-U and Ctrl-W erase; a pasted text keeps its line breaks.
    """

    def __init__(self, out: TextIO, width: int = 80) -> None:
        self.width = width
        self.text = ""
        self._out = out
        self._shown: str | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._carry = ""
        self._pasting = False

    def draw(self, prompt: str) -> None:
        """Show the prompt with what is written so far, in place of what was shown."""
        line = prompt + self.text.replace("\n", "⏎").replace("\t", " ")
        if line == self._shown:
            return
        if self._shown is not None and line.startswith(self._shown):
            self._out.write(line[len(self._shown) :])
        else:
            self.hide()
            self._out.write(line)
        self._out.flush()
        self._shown = line

    def hide(self) -> None:
        """Take it away; the cursor is at the beginning of an empty line then."""
        if self._shown is None:
            return
        rows = max(cell_len(self._shown) - 1, 0) // max(self.width, 1)
        self._out.write("\r" + (f"\x1b[{rows}A" if rows else "") + "\x1b[J")
        self._out.flush()
        self._shown = None

    def feed(self, data: bytes) -> Generator[Key]:
        """Take in what was typed and give what follows from it."""
        text = self._carry + self._decoder.decode(data)
        unfinished = _UNFINISHED.search(text)
        self._carry = unfinished[0] if unfinished else ""
        text = text[: len(text) - len(self._carry)]
        at = 0
        while at < len(text):
            escape = _ESCAPE.match(text, at)
            if escape is not None:
                at = escape.end()
                if escape[0] in (_PASTE, _PASTED):
                    self._pasting = escape[0] == _PASTE
                continue
            char = text[at]
            at += 1
            if self._pasting:
                self._write("\n" if char == "\r" else char)
            else:
                yield from self._press(char)

    def _press(self, char: str) -> Generator[Key]:
        match char:
            case "\r" | "\n":
                line, self.text = self.text, ""
                yield Key("line", line)
            case "\x03":
                yield Key("stop")
            case "\x04":
                if not self.text:
                    yield Key("leave")
            case "\x7f" | "\x08":
                self.text = self.text[:-1]
            case "\x15":
                self.text = ""
            case "\x17":
                self.text = re.sub(r"\S*\s*\Z", "", self.text)
            case _:
                self._write(char)

    def _write(self, char: str) -> None:
        if char.isprintable() or char in "\n\t":
            self.text += char


@contextmanager
def raw_terminal(fd: int, out: TextIO) -> Generator[None]:
    """Have keys as they are typed, Ctrl-C among them, without echo. Output is not affected."""
    import termios  # not on Windows

    before = termios.tcgetattr(fd)
    mode = termios.tcgetattr(fd)
    mode[3] &= ~(termios.ICANON | termios.ECHO | termios.ISIG | termios.IEXTEN)
    mode[6][termios.VMIN] = 1
    mode[6][termios.VTIME] = 0
    termios.tcsetattr(fd, termios.TCSADRAIN, mode)
    out.write("\x1b[?2004h")
    out.flush()
    try:
        yield
    finally:
        out.write("\x1b[?2004l")
        out.flush()
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


async def keys(editor: Editor) -> AsyncGenerator[Key]:
    """What is done at the terminal, for ever; its end is a wish to leave."""
    async for chunk in stdin.chunks():
        for key in editor.feed(chunk):
            yield key
        yield Key("leave") if not chunk else Key("line", "")


async def cooked_lines() -> AsyncGenerator[Key]:
    """The lines of stdin, which is no terminal; its end is a wish to leave."""
    async for line in stdin.lines():
        yield Key("line", line.decode(errors="replace"))
    yield Key("leave")
