"""Asking all workers who they are."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from agentrun.broker import Signals
from agentrun.worker import WORKERS, WorkerInfo

UNREADABLE = "{} answers cannot be read: a worker of another version?"


class Answers(NamedTuple):
    """The workers that answered, by name, and how many said what cannot be read here."""

    workers: list[WorkerInfo]
    unreadable: int


async def ask_workers(signals: Signals, *, wait: float) -> Answers:
    """Ask all workers, and give what they answer within ``wait`` seconds.

    Raises:
        Unavailable: The broker is away.
    """
    found: list[WorkerInfo] = []
    replies = await signals.gather(WORKERS, b"", wait=wait)
    for reply in replies:
        try:
            found.append(msgspec.json.decode(reply, type=WorkerInfo))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
    return Answers(sorted(found, key=lambda info: info.worker), len(replies) - len(found))
