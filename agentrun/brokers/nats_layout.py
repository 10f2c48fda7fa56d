"""Names, headers and stream settings: what the NATS broker puts where."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

from msgspec import Struct

from agentrun.broker import Kind, Pending, Record
from agentrun.brokers.streams import partition_of
from agentrun.errors import InvalidInput

VERSION = "1"
RECORD_LIMIT = 1 << 20
HEADROOM = 4096
"""Bytes of a record's limit that are kept for its headers."""

OFFSET = "Agentrun-Offset"
PENDING = "Agentrun-Pending"
KEPT = "Agentrun-Kept"
"""The offset of the last record before this one that is no delta: readers without deltas miss none by it."""
WRITER = "Agentrun-Writer"
"""Names the append call a record came from, so that it knows its own record again after a lost answer."""
EXPECTED = "Nats-Expected-Last-Subject-Sequence"
EXPECTED_SUBJECT = "Nats-Expected-Last-Subject-Sequence-Subject"

_TURN = "in.turn."
_KINDS = {str(kind): kind for kind in (Kind.CANCEL, Kind.DELTA, Kind.EVENT)}


_pending = lru_cache(1024)(Pending.parse)  # the same for all that a turn streams


class Route(NamedTuple):
    """Where a session's records are."""

    partition: int
    stream: str
    base: str
    """Subjects of records, up to the kind."""
    live: str
    """The same, as republished."""
    all: str
    """The filter that takes in all of the session's records."""


class Layout(Struct, frozen=True):
    """What was found at the broker, and the names that follow from it."""

    namespace: str
    partitions: int
    replicas: int
    delta_ttl: float
    dedupe_window: float
    max_body: int

    @property
    def ttl_header(self) -> str:
        """The deltas' time to live, as the server wants it: whole seconds, at least one."""
        return f"{max(1, math.ceil(self.delta_ttl))}s"

    def route(self, session: str) -> Route:
        """The session's place. Costs a checksum and some formatting: keep it."""
        p = partition_of(session, self.partitions)
        base = f"agentrun.{self.namespace}.{p}.{session}"
        live = f"agentrun.{self.namespace}.live.{p}.{session}"
        return Route(p, stream_name(self.namespace, p), base, live, f"{base}.>")


def stream_name(namespace: str, partition: int) -> str:
    """The stream of a partition."""
    return f"AGENTRUN_{namespace}_{partition}"


def consumer_name(agent: str) -> str:
    """The consumer of an agent, in every partition's stream."""
    return f"q-{agent}"


def consumer_filter(namespace: str, partition: int, agent: str) -> str:
    """What an agent's consumer takes from a partition."""
    return f"agentrun.{namespace}.{partition}.*.in.turn.{agent}"


def stream_needs(namespace: str, partition: int) -> dict[str, Any]:
    """The settings without which the promises do not hold."""
    src = f"agentrun.{namespace}.{partition}.>"
    return {
        "subjects": [src],
        "retention": "limits",
        "discard": "old",
        "max_msgs_per_subject": -1,
        "allow_direct": True,
        "allow_msg_ttl": True,
        "republish": {"src": src, "dest": f"agentrun.{namespace}.live.{partition}.>"},
    }


def differences(config: Mapping[str, Any], needs: Mapping[str, Any]) -> list[str]:
    """What in ``config`` is not as needed, as readable lines."""
    return [
        f"{key} is {config.get(key)!r}, needed is {value!r}" for key, value in needs.items() if config.get(key) != value
    ]


class Stored(NamedTuple):
    """A message as the stream has it."""

    subject: str
    seq: int
    time: float
    headers: Mapping[str, str]
    body: bytes

    @property
    def offset(self) -> int:
        """The record's offset; `InvalidInput` where it is no record."""
        try:
            return int(self.headers[OFFSET])
        except (KeyError, ValueError):
            raise InvalidInput(f"the message at {self.subject} seq {self.seq} has no valid {OFFSET}") from None

    @property
    def kept_before(self) -> int | None:
        """The offset of the last record before this one that is no delta; None where its writer did not know."""
        text = self.headers.get(KEPT, "")
        return int(text) if text.isdecimal() else None

    def record(self) -> Record:
        """The record in it.

        Raises:
            InvalidInput: It is none.
        """
        kind, agent = kind_of(self.subject)
        text = self.headers.get(PENDING)
        offset = self.offset
        pending = _pending(text) if text else Pending()
        kept = self.kept_before if kind is Kind.DELTA else offset
        return Record(offset, kind, self.body, self.time, self.seq, pending, agent, kept)


@lru_cache(1024)
def kind_of(subject: str) -> tuple[Kind, str | None]:
    """What a record's subject says of it.

    Raises:
        InvalidInput: The subject is not one of ours.
    """
    rest = subject.split(".", 4)[-1]
    if rest.startswith(_TURN):
        return Kind.TURN, rest[len(_TURN) :]
    kind = _KINDS.get(rest)
    if kind is None:
        raise InvalidInput(f"{subject!r} is not the subject of a record")
    return kind, None


def session_of(subject: str) -> str:
    """The session a record's subject names."""
    return subject.split(".", 4)[3]


def parse_time(text: str) -> float:
    """Seconds since the epoch from the server's time format."""
    return datetime.fromisoformat(text).timestamp()


def stored_of(headers: Mapping[str, str], body: bytes) -> Stored:
    """A message from a direct get or from the republished stream."""
    return Stored(
        headers["Nats-Subject"], int(headers["Nats-Sequence"]), parse_time(headers["Nats-Time-Stamp"]), headers, body
    )


def parse_headers(lines: bytes) -> dict[str, str]:
    """The headers in a block, without or with its version line."""
    out: dict[str, str] = {}
    for line in lines.decode("utf-8", "replace").split("\r\n"):
        name, colon, value = line.partition(":")
        if colon:
            out[name] = value.strip()
    return out
