"""A session's records, kept small: a run has millions of them."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from agentrun import wire
from agentrun.broker import Kind
from agentrun.errors import InvalidInput
from tests.chaos.evidence import Stored, digest

_KINDS = tuple(Kind)


class Entry(NamedTuple):
    """One record. ``stored``: seconds since the epoch."""

    offset: int
    kind: Kind
    body: bytes
    stored: float


class Records:
    """The log of one session, in the order it was noted."""

    def __init__(self) -> None:
        self.offsets = array("Q")
        self.hashes = array("Q")
        self._stored = array("d")
        self._kinds = bytearray()
        self._bodies = bytearray()
        self._ends = array("Q", [0])

    def __len__(self) -> int:
        return len(self.offsets)

    def __iter__(self) -> Iterator[Entry]:
        for i, offset in enumerate(self.offsets):
            body = bytes(self._bodies[self._ends[i] : self._ends[i + 1]])
            yield Entry(offset, _KINDS[self._kinds[i]], body, self._stored[i])

    def add(self, note: Stored) -> None:
        """Take in the next record."""
        self.offsets.append(note.offset)
        self.hashes.append(_hash(note.body))
        self._stored.append(note.stored)
        self._kinds.append(_KINDS.index(Kind(note.kind)))
        self._bodies += note.body.encode()
        self._ends.append(len(self._bodies))


class Shown:
    """The events that a reader of a session is given: of an event in pieces, the whole at its last piece."""

    def __init__(self, records: Records) -> None:
        self.offsets, self.hashes = records.offsets, records.hashes
        if any(_piece(entry) for entry in records):
            self._join(records)

    def _join(self, records: Records) -> None:
        self.offsets, self.hashes = array("Q"), array("Q")
        pieces: list[wire.Chunk] = []
        for entry, hashed in zip(records, records.hashes, strict=True):
            shown = hashed
            if (piece := _piece(entry)) is not None:
                pieces = [piece] if piece.index == 0 else [*pieces, piece]
                if piece.index < piece.total - 1:
                    continue
                if [p.index for p in pieces] == list(range(piece.total)):
                    shown = _hash("".join(p.data for p in pieces))
                pieces = []
            self.offsets.append(entry.offset)
            self.hashes.append(shown)


def _hash(body: str) -> int:
    try:
        return int(digest(body), 16)
    except msgspec.DecodeError:
        return 0  # what is no JSON is nothing that a reader can have been given


def _piece(entry: Entry) -> wire.Chunk | None:
    if entry.kind.input or b'"chunk"' not in entry.body:
        return None
    try:
        event = wire.decode(entry.body)
    except InvalidInput:
        return None
    return event if isinstance(event, wire.Chunk) else None
