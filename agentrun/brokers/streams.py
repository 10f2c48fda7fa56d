"""What `setup` can be asked for, and which partition a session is in: the same for every broker with a server."""

from __future__ import annotations

from zlib import crc32

from msgspec import Struct

from agentrun.errors import InvalidInput

__all__ = ["MAX_PARTITIONS", "Streams", "partition_of"]

MAX_PARTITIONS = 64


class Streams(Struct, frozen=True, kw_only=True):
    """What `setup` makes. None: leave as it is, or the default where there is nothing yet.

    Args:
        partitions: Streams the sessions are spread over, 1 to 64; cannot be changed later. Default 1.
        replicas: Servers each stream is stored on: 1, 3 or 5. Default 1. Not on Valkey: it has replicas of its own.
        max_age: Seconds after which every record is removed; 0 keeps them. Default 0. Not on Valkey.
        dedupe_window: Seconds for which an input's id is remembered. Default 7200.
        delta_ttl: Seconds tokens stay beside the messages they add up to, at least 1. Default 3600; on NATS it can only
            be raised later.

    Raises:
        InvalidInput: A number that no broker takes.
    """

    partitions: int | None = None
    replicas: int | None = None
    max_age: float | None = None
    dedupe_window: float | None = None
    delta_ttl: float | None = None

    def __post_init__(self) -> None:
        if self.partitions is not None and not 1 <= self.partitions <= MAX_PARTITIONS:
            raise InvalidInput(f"partitions must be 1 to {MAX_PARTITIONS}, not {self.partitions}")
        if self.delta_ttl is not None and self.delta_ttl < 1:
            raise InvalidInput(f"delta_ttl must be at least 1 second, not {self.delta_ttl}")


def partition_of(session: str, partitions: int) -> int:
    """The number of the partition that a session's records are in."""
    return crc32(session.encode()) % partitions
