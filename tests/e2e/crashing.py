"""The echo agent in a process that kills itself when it is about to store that a turn failed."""

from __future__ import annotations

import os
import signal
from typing import Any

from agentrun.broker import Tail
from agentrun.brokers.nats_log import NatsLog
from workers.echo import echo

__all__ = ["echo"]

_append = NatsLog.append


async def _append_or_die(self: NatsLog, session: str, body: bytes, **more: Any) -> Tail:
    if b'"turn.failed"' in body:
        os.kill(os.getpid(), signal.SIGKILL)
    return await _append(self, session, body, **more)


NatsLog.append = _append_or_die
