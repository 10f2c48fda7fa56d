"""What the parts of the Valkey broker share: connections, names, the clock, and how a script is run."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import anyio
from msgspec import Struct
from valkey.exceptions import NoScriptError, ResponseError

from agentrun.broker import Kind, Pending, Record, Tail
from agentrun.brokers.shared import Shared
from agentrun.brokers.streams import partition_of
from agentrun.brokers.valkey_channels import Channels
from agentrun.brokers.valkey_link import Link, NotConnected, NotSent
from agentrun.brokers.valkey_scripts import Script
from agentrun.errors import Unavailable
from agentrun.wire import check_id

PATIENCE = 15.0
"""Seconds a request is tried for."""
MAX_BODY = 1_000_000
_PLACES = 10_000
_CODES = {Kind.TURN: "t", Kind.CANCEL: "c", Kind.DELTA: "d", Kind.EVENT: "e"}
_KINDS = {code.encode(): kind for kind, code in _CODES.items()}

_pending = lru_cache(1024)(Pending.parse)  # the same for all that a turn streams


def code_of(kind: Kind) -> str:
    """A kind as it is stored."""
    return _CODES[kind]


class Stored(NamedTuple):
    """A record as it is stored, with what only its readers' bookkeeping needs."""

    record: Record
    kept_before: int
    """The offset of the last record before this one that is no delta."""

    @classmethod
    def parse(cls, data: bytes) -> Stored:
        """Read a stored record, or the first line of one."""
        line, _, body = data.partition(b"\n")
        offset, code, time, kept_before, _, pending, agent = line.split(b" ")
        kind, number, before, cursor = _KINDS[code], int(offset), int(kept_before), int(time)
        return cls(
            Record(
                number,
                kind,
                body,
                cursor / 1e6,
                cursor,
                Pending() if pending == b"-" else _pending(pending.decode()),
                None if agent == b"-" else agent.decode(),
                before if kind is Kind.DELTA else number,
            ),
            before,
        )


def tail_of(reply: Sequence[bytes]) -> Tail:
    """A session's end, as the scripts give it."""
    offset, given, time, kind, pending, kept = reply
    number, cursor = int(offset), int(time)
    return Tail(
        number,
        _pending(pending.decode()) if pending else Pending(),
        cursor,
        cursor / 1e6,
        int(given) - number,
        _KINDS.get(kind),
        int(kept) if number else None,
    )


class Place(NamedTuple):
    """Where a session's records are."""

    prefix: str
    key: str
    """One of the session's keys, by which a cluster finds the others."""


class Layout(Struct, frozen=True):
    """What `setup` has agreed on, and what was found at the server."""

    partitions: int
    delta_ttl: float
    dedupe_window: float
    durable: bool


@dataclass(kw_only=True)
class Core(Shared[Layout]):
    """Shared state of one `ValkeyBroker`."""

    commands: Link
    live: Channels
    signals: Channels
    id: str = field(default_factory=lambda: secrets.token_hex(6))
    """Names this connection among all."""
    _places: dict[str, Place] = field(default_factory=dict[str, Place])

    @property
    def names(self) -> str:
        """What the namespace's keys outside the partitions begin with."""
        return f"ar:{self.namespace}:"

    @property
    def topics(self) -> str:
        """What its channels begin with: those of all databases of a server are the same."""
        return f"ar:{self.namespace}:{self.commands.options.database}:"

    def prefix(self, partition: int) -> str:
        """What a partition's keys begin with."""
        return f"{{ar:{self.namespace}:{partition}}}:"

    def place(self, session: str) -> Place:
        """Where the session's records are; checks the id."""
        place = self._places.get(session)
        if place is None:
            check_id("session", session)
            if len(self._places) >= _PLACES:
                self._places.clear()
            prefix = self.prefix(partition_of(session, self.found.partitions))
            place = self._places[session] = Place(prefix, f"{prefix}t:{session}")
        return place

    def forget_places(self) -> None:
        """After the layout has changed."""
        self._places.clear()

    # ------------------------------------------------------------------------------------------------ asking

    async def run(self, script: Script, key: str, args: Sequence[str | bytes], *, patience: float = PATIENCE) -> Any:
        """Run a script, again as long as its outcome is not known: it must do no harm done twice.

        Raises:
            Unavailable: No answer for ``patience`` seconds.
            Misconfigured: The server refuses.
        """
        with anyio.move_on_after(patience):
            while True:
                try:
                    return await self.run_once(script, key, args)
                except NotConnected:
                    await self.until_connected()
        raise Unavailable(self.silence(patience))

    async def run_unless_done(
        self, script: Script, key: str, args: Sequence[str | bytes], *, patience: float = PATIENCE
    ) -> Any:
        """Run a script, again only where it is known that nothing was done.

        Raises:
            Unavailable: It was not run, or that is not known.
            Misconfigured: The server refuses.
        """
        with anyio.move_on_after(patience):
            while True:
                try:
                    return await self.run_once(script, key, args)
                except NotSent:
                    await self.until_connected()
                except NotConnected:
                    break
        raise Unavailable(self.silence(patience))

    async def run_once(self, script: Script, key: str, args: Sequence[str | bytes]) -> Any:
        """Run a script.

        Raises:
            NotConnected: The connection was lost; `NotSent`: nothing was done.
            Misconfigured: The server refuses.
        """
        return await self.answer(script, self.commands.evaluate(script, key, args))

    async def answer(self, script: Script, future: asyncio.Future[Any]) -> Any:
        """Wait for a script's answer; as `run_once`."""
        try:
            return await future
        except NoScriptError:
            await self.commands.call("SCRIPT", "LOAD", script.text)
            raise NotSent(script.name) from None
        except ResponseError as error:
            raise self.commands.meaning(error) from None

    async def command(self, *words: str | bytes, patience: float = PATIENCE) -> Any:
        """Run a command that does no harm done twice; as `run`."""
        with anyio.move_on_after(patience):
            while True:
                try:
                    return await self.commands.call(*words)
                except NotConnected:
                    await self.until_connected()
        raise Unavailable(self.silence(patience))

    async def until_connected(self) -> None:
        """Wait before a command is sent again."""
        if self.commands.connected:
            await anyio.sleep(random.uniform(0.0, 0.05))  # noqa: S311 - spreads the tries, nothing more
        await self.commands.wait_connected()

    def silence(self, seconds: float) -> str:
        """What to say when no answer came."""
        if self.commands.connected:
            because = f" ({self.commands.last_error})" if self.commands.last_error else ""
            return f"no answer from {self.commands.options.shown} within {seconds:g} s{because}"
        return self.commands.gone
