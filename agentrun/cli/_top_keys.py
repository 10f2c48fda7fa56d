"""The keys of ``agentrun top``."""

from __future__ import annotations

import codecs
import re
from collections.abc import AsyncGenerator

from agentrun.cli import stdin

__all__ = ["Keys", "keys"]

_KEY = re.compile(r"\x1b\[200~.*?\x1b\[201~|\x1b\[[0-?]*[ -/]*[@-~]|\x1bO.|\x1b?.", re.DOTALL)
_UNFINISHED = re.compile(r"(\x1b\[200~((?!\x1b\[201~).)*|\x1b(\[[0-?]*[ -/]*|O)?)\Z", re.DOTALL)
_NAMES = {
    **dict.fromkeys(("\x1b[A", "\x1bOA", "k"), "up"),
    **dict.fromkeys(("\x1b[B", "\x1bOB", "j"), "down"),
    **dict.fromkeys(("q", "\x03", "\x04"), "leave"),
}


class Keys:
    """Finds the keys in what comes from a terminal, however it is cut into pieces.

    They are ``up``, ``down``, ``leave``, or the character; every other key is ``?``. What is pasted is no key: nobody
    stops a turn by it.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._carry = ""

    def feed(self, data: bytes) -> list[str]:
        """Take in what was typed and give the keys in it."""
        text = self._carry + self._decoder.decode(data)
        unfinished = _UNFINISHED.search(text)
        self._carry = unfinished[0] if unfinished else ""
        found = _KEY.findall(text, 0, len(text) - len(self._carry))
        return [_NAMES.get(key, key if key.isprintable() else "?") for key in found if not key.startswith("\x1b[200~")]


async def keys() -> AsyncGenerator[str]:
    """The keys, for ever; the terminal's end is a wish to leave."""
    parser = Keys()
    async for chunk in stdin.chunks():
        for key in parser.feed(chunk):
            yield key
        if not chunk:
            yield "leave"
