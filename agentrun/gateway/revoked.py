"""Tokens that are accepted no longer: remembered by the broker, known to every gateway within milliseconds.

The reserved session ``agentrun--revoked`` of the namespace holds one record per revocation. It is of kind CANCEL, so
that no worker is given it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

import anyio
import msgspec
from anyio.abc import TaskStatus
from msgspec import Struct

from agentrun.broker import Kind, Record, SessionLog, Tail
from agentrun.client import Client
from agentrun.errors import BrokerError, InvalidInput, SessionGone
from agentrun.gateway.rights import RESERVED
from agentrun.inputs import Input, append_input

__all__ = ["SESSION", "Revocations", "revoke"]

SESSION = f"{RESERVED}revoked"

_PAGE = 1000
_PAUSE = 1.0
_LONGEST_JTI = 256
_SWEEP = 1024

_log = logging.getLogger("agentrun.gateway")


class _Revoked(Struct, tag_field="type", tag="token.revoked", omit_defaults=True):
    jti: str
    until: float | None = None
    by: str | None = None


_decoder = msgspec.json.Decoder(_Revoked)


async def revoke(client: Client, jti: str, *, until: float | None = None, by: str | None = None) -> int:
    """Let no gateway of this namespace accept the token of this id any more; return the offset of the record.

    Gateways that are connected know it at once, and end the streams the token has open.

    Args:
        client: A client of the gateways' namespace.
        jti: The token's ``jti`` claim.
        until: When it may be forgotten, in seconds since the epoch: after the token has expired. None: never.
        by: Who revokes it, for whoever reads the log.

    Raises:
        InvalidInput: ``jti`` is not 1 to 256 characters, or ``until`` no time.
        Unavailable: The broker is away.
    """
    if not 0 < len(jti) <= _LONGEST_JTI:
        raise InvalidInput(f"a token's id (jti) has 1 to {_LONGEST_JTI} characters, not {len(jti)}")
    if until is not None and not math.isfinite(until):
        raise InvalidInput(f"until is a time in seconds since the epoch, not {until}")
    body = msgspec.json.encode(_Revoked(jti, until, by))

    async def plan(tail: Tail) -> Input:
        return Input(body)

    stored = await append_input(client.broker.log, SESSION, plan, timeout=client.settings.send_timeout)
    assert stored is not None
    return stored.offset


class Revocations:
    """The ids of the tokens revoked, followed live. ``jti in revocations`` costs one look into a dict.

    Attributes:
        ready: Whether what was revoked so far is known. Until then nobody may be let in.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self.ready = False
        self._clock = clock
        self._until: dict[str, float] = {}
        self._sweep_at = _SWEEP

    def __contains__(self, jti: object) -> bool:
        return jti in self._until

    def __len__(self) -> int:
        return len(self._until)

    async def run(
        self,
        client: Client,
        changed: Callable[[], None],
        *,
        task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Follow the revocations for ever; ``task_status`` is told when those stored so far are known.

        ``changed`` is called when there are new ones. While the broker is away, what is known goes on being known.
        """
        try:
            await self._follow(client.broker.log, changed, task_status)
        finally:
            self.ready = False  # what is revoked from now on nobody tells us

    async def _follow(self, log: SessionLog, changed: Callable[[], None], task_status: TaskStatus[None]) -> None:
        said = ""
        while True:
            try:
                after = await self._load(log, changed)
                said = ""
                if not self.ready:
                    self.ready = True
                    task_status.started()
                async with log.follow(SESSION, after=after, deltas=False) as batches:
                    async for records in batches:
                        self._take(records, changed)
            except SessionGone:
                _log.warning("the session %s was deleted: what is revoked is known to running gateways only", SESSION)
            except BrokerError as error:
                if said != (said := str(error)):
                    _log.warning("revocations cannot be followed: %s", error)
            await anyio.sleep(_PAUSE)

    async def _load(self, log: SessionLog, changed: Callable[[], None]) -> int:
        after = 0
        while records := await log.read(SESSION, after=after, deltas=False, limit=_PAGE):
            self._take(records, changed)
            after = records[-1].offset
            if len(records) < _PAGE:
                break
        return after

    def _take(self, records: Sequence[Record], changed: Callable[[], None]) -> None:
        before = len(self._until)
        for record in records:
            if record.kind is not Kind.CANCEL:
                continue
            try:
                self._add(_decoder.decode(record.body))
            except (msgspec.MsgspecError, UnicodeDecodeError):
                _log.warning("offset %d of session %s is no revocation", record.offset, SESSION)
        if len(self._until) > before:
            changed()
            self._sweep()

    def _add(self, revoked: _Revoked) -> None:
        until = math.inf if revoked.until is None else revoked.until
        if until >= self._clock():
            self._until[revoked.jti] = max(until, self._until.get(revoked.jti, 0.0))

    def _sweep(self) -> None:
        """Forget tokens that have expired since."""
        if len(self._until) > self._sweep_at:
            now = self._clock()
            self._until = {jti: until for jti, until in self._until.items() if until >= now}
            self._sweep_at = max(2 * len(self._until), _SWEEP)
