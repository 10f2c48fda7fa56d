"""What must hold of every run, by name."""

from __future__ import annotations

import enum

from msgspec import Struct


class Rule(enum.StrEnum):
    """What was broken, as the table says it."""

    READABLE = "every record is an event"
    DENSE = "the n-th record has offset n"
    OWNER = "one owner at a time, nothing after an end or a takeover"
    ATTEMPTS = "attempts are 1, 2, 3"
    ORDER = "turns run in the order sent"
    ENDS = "each turn ends exactly once"
    STOP = "a stop does what its receipt says"
    STEERED = "steering is taken as the log says"
    ANSWERS = "an answer is taken once"
    TOKENS = "tokens are counted without hole"
    FOLD = "a message is what its records say"
    TEXT = "no word is lost, doubled or cut"
    SENT = "what was accepted is stored once"
    ACKED = "what was acknowledged is stored"
    READER = "readers are given the log"
    SAID = "the text read is the text stored"
    QUIET = "sessions come to rest"


class Violation(Struct, frozen=True):
    """A broken rule, with what was expected and what came."""

    rule: Rule
    session: str
    what: str

    def __str__(self) -> str:
        return f"[{self.rule.name}] session {self.session}: {self.what}"
