"""The wrapper over any broker: its appends are timed. Brokers themselves know no telemetry."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Self

from opentelemetry import trace

from agentrun.broker import Broker, Capabilities, Kind, Pending, Record, SessionLog, Signals, Tail, TurnQueue
from agentrun.telemetry.instruments import Instruments
from agentrun.telemetry.names import SAMPLE, Attr

__all__ = ["ObservedBroker"]

_NO_SPAN = trace.set_span_in_context(trace.INVALID_SPAN)
"""To keep the trace of an append costs twice what the append's own time does, and each turn has two at least."""


class ObservedBroker:
    """A broker whose appends are timed; all else is passed on as it is.

    Args:
        broker: The broker, connected or to be entered by this.
        instruments: Where it is told.
    """

    def __init__(self, broker: Broker, instruments: Instruments) -> None:
        self._broker = broker
        self._log = _ObservedLog(broker.log, instruments)

    @property
    def capabilities(self) -> Capabilities:
        """Those of the broker."""
        return self._broker.capabilities

    @property
    def turns(self) -> TurnQueue:
        """That of the broker."""
        return self._broker.turns

    @property
    def log(self) -> SessionLog:
        """That of the broker, observed."""
        return self._log

    @property
    def signals(self) -> Signals:
        """Those of the broker."""
        return self._broker.signals

    def now(self) -> float:
        """That of the broker."""
        return self._broker.now()

    async def __aenter__(self) -> Self:
        await self._broker.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._broker.__aexit__(*exc)


class _ObservedLog:
    def __init__(self, log: SessionLog, instruments: Instruments) -> None:
        self._log = log
        self._instruments = instruments
        self._passed = 0

    async def append(
        self,
        session: str,
        body: bytes,
        *,
        kind: Kind,
        after: Tail,
        pending: Pending,
        agent: str | None = None,
        dedupe: str | None = None,
        timeout: float = 30.0,
    ) -> Tail:
        timed = True
        if kind is Kind.DELTA:
            self._passed += 1
            timed = not self._passed % SAMPLE
        began = time.monotonic()
        try:
            end = await self._log.append(
                session, body, kind=kind, after=after, pending=pending, agent=agent, dedupe=dedupe, timeout=timeout
            )
        except Exception as error:
            self._took(began, kind, type(error).__name__)
            raise
        if timed:
            self._took(began, kind, "ok")
        return end

    def _took(self, began: float, kind: Kind, outcome: str) -> None:
        attributes = {Attr.KIND: kind.value, Attr.OUTCOME: outcome}
        self._instruments.record("append_duration", time.monotonic() - began, attributes, _NO_SPAN)

    async def last(self, session: str, *, fresh: bool = False) -> Tail:
        return await self._log.last(session, fresh=fresh)

    async def read(self, session: str, *, after: int = 0, deltas: bool = True, limit: int = 1000) -> Sequence[Record]:
        return await self._log.read(session, after=after, deltas=deltas, limit=limit)

    def follow(
        self, session: str, *, after: int = 0, deltas: bool = True, cursor: int = 0
    ) -> AbstractAsyncContextManager[AsyncIterator[Sequence[Record]]]:
        return self._log.follow(session, after=after, deltas=deltas, cursor=cursor)

    async def delete(self, session: str) -> None:
        await self._log.delete(session)
