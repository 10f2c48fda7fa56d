"""What a run leaves behind: each process notes what it saw in a file of its own, a line of JSON at a time.

A line is written with one system call, so that what a process noted before it was killed is there. Times are seconds of
the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Union

import msgspec
from msgspec import Struct, field


class Note(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="note", tag=str.lower):
    """One line."""

    at: float = field(default_factory=time.monotonic)


class Began(Note):
    """The run began. ``epoch``: the wall clock's seconds at ``at``; by it `Stored.stored` is told on our clock."""

    seed: int
    epoch: float = field(default_factory=time.time)


class Sent(Note):
    """A turn was accepted: ``send`` returned this offset, for every time that it was sent."""

    session: str
    turn: str
    offset: int
    on_busy: str
    text: str
    words: int | None = None
    """How many words its whole answer has, ``w0 w1 …``; None where that is not known (see `tests.chaos.agents`)."""
    deadline: bool = False


class Stopped(Note):
    """A receipt came for a stop. ``took``: seconds the caller waited."""

    session: str
    turn: str
    status: str
    offset: int
    took: float


class Steered(Note):
    """`Turn.steer` said what became of it: consumed by which turn, or queued as one of its own."""

    session: str
    turn: str
    consumed_by: str | None = None


class Deleted(Note):
    """A session was deleted; nobody sends to it again."""

    session: str


class Joined(Note):
    """A reader began: it asked for all events behind ``after``. It resumes from what it has, under the same name."""

    reader: str
    session: str
    transport: str
    after: int


class Got(Note):
    """A reader was given an event."""

    reader: str
    offset: int
    hash: str


class Said(Note):
    """A reader that is given no offsets (the AI SDK's) has this text of a turn's answer when its stream ends well."""

    reader: str
    session: str
    turn: str
    text: str


class Left(Note):
    """A reader ended. ``whole``: it read until the run was over, so it must have everything up to ``upto``."""

    reader: str
    whole: bool = False
    upto: int = 0


class Acked(Note):
    """A worker was told that its record is stored."""

    worker: str
    session: str
    offset: int
    hash: str


class Fault(Note):
    """Something was broken. ``seconds``: for how long, where that is known beforehand."""

    kind: str
    target: str = ""
    seconds: float = 0.0


class Stored(Note):
    """A record as the log has it in the end."""

    session: str
    offset: int
    kind: str
    body: str
    stored: float
    """Seconds since the epoch, by the broker's clock."""


class Unended(Note):
    """A session that was not quiet when the run gave up waiting for it."""

    session: str
    pending: str


AnyNote = Union[Began, Sent, Stopped, Steered, Deleted, Joined, Got, Said, Left, Acked, Fault, Stored, Unended]  # noqa: UP007

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(AnyNote)


def digest(body: bytes | str) -> str:
    """A short name of a record's body: the same for the same JSON value, however it is written."""
    value = msgspec.json.decode(body)
    return hashlib.blake2b(msgspec.json.encode(value, order="sorted"), digest_size=8).hexdigest()


class Notebook:
    """Notes of one process.

    Args:
        folder: Where those of all processes are.
        name: Of the process; a new one each time it is started.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._file = os.open(folder / f"{name}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def note(self, note: AnyNote) -> None:
        """Write a line."""
        os.write(self._file, _encoder.encode(note) + b"\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def read_notes(folder: Path) -> Iterator[AnyNote]:
    """All notes of a run, those of one process in the order they were written. A last line that was cut is left out."""
    for path in sorted(folder.glob("*.jsonl")):
        with path.open("rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):
                    yield _decoder.decode(line)
