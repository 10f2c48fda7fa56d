"""The broker on Valkey (8 or newer) or Redis (7 or newer).

Each session's records are two streams, with its end, its lease and its queued inputs beside them; every step that must
be one is a script (docs/design.md, D28). `setup` agrees on the namespace's settings, entering the broker only checks.

What is acknowledged is as durable as the server is: with ``appendfsync everysec`` a crash may lose the last second or
two, with ``always`` none; a failover may lose what the replica had not got. A loss is told (`RecordsLost`) to whoever
goes on from what is gone.
"""

from __future__ import annotations

import ssl
from typing import Self

import anyio

from agentrun.broker import Capabilities, QueueStats
from agentrun.brokers.clock import ServerClock
from agentrun.brokers.streams import Streams
from agentrun.brokers.valkey_admin import ValkeyAdmin, load
from agentrun.brokers.valkey_beat import Heartbeats
from agentrun.brokers.valkey_channels import Channels
from agentrun.brokers.valkey_core import MAX_BODY, Core, Layout
from agentrun.brokers.valkey_link import Link, LinkOptions, log
from agentrun.brokers.valkey_log import ValkeyLog
from agentrun.brokers.valkey_queue import ValkeyQueue
from agentrun.brokers.valkey_signals import ValkeySignals
from agentrun.brokers.watch import Watch
from agentrun.wire import check_id

__all__ = ["Streams", "ValkeyBroker"]


class ValkeyBroker:
    """`agentrun.broker.Broker` and `BrokerAdmin` on Valkey or Redis.

    Args:
        url: ``valkey://`` or ``redis://``, with an ``s`` for TLS; may hold user, password and a database's number.
        namespace: Sessions, agents and signals of different namespaces do not see each other.
        lease_ttl: The lease time of queues that are opened without one, in seconds.
        tls: For servers whose certificate the system does not know.
        connect_timeout: Seconds until a first connection is given up as `Unavailable`.
        check: False: enter also where nothing is set up yet, so that `setup` can be called.
        streams: What `setup` sets; replicas and a greatest age of records are none of its matters here.
        min_dedupe_window: The least time, in seconds, for which ids of inputs must be remembered.
    """

    def __init__(
        self,
        url: str = "valkey://127.0.0.1:6379",
        *,
        namespace: str = "default",
        lease_ttl: float = 30.0,
        tls: ssl.SSLContext | None = None,
        connect_timeout: float = 5.0,
        check: bool = True,
        streams: Streams | None = None,
        min_dedupe_window: float = 3600.0,
    ) -> None:
        check_id("namespace", namespace)
        options = LinkOptions(url=url, tls=tls, connect_timeout=connect_timeout)
        clock = ServerClock()
        self._core = Core(
            namespace=namespace,
            lease_ttl=lease_ttl,
            clock=clock,
            commands=Link(options, "commands", clock),
            live=Channels(options, "live"),
            signals=Channels(options, "signals"),
        )
        self._check = check
        self._min_dedupe_window = min_dedupe_window
        self._beats = Heartbeats(options)
        self.log = ValkeyLog(self._core)
        self.turns = ValkeyQueue(self._core, self._beats)
        self.signals = ValkeySignals(self._core, self._beats)
        self._admin = ValkeyAdmin(self._core, streams or Streams())
        self._watch = Watch(self._core, self._load, log)

    @property
    def capabilities(self) -> Capabilities:
        """What this broker can; some of it is known once it was entered."""
        found = self._core.layout
        return Capabilities(
            name="valkey",
            durable=found.durable if found else False,
            detects_no_listener=True,
            max_body=MAX_BODY,
            delta_ttl=found.delta_ttl if found else 3600.0,
            dedupe_window=found.dedupe_window if found else self._min_dedupe_window,
            lease_ttl=self._core.lease_ttl,
        )

    def now(self) -> float:
        """See `Broker.now`."""
        return self._core.clock.now()

    # ------------------------------------------------------------------------------------------------ life

    async def __aenter__(self) -> Self:
        """Connect and check.

        Raises:
            Unavailable: The server cannot be reached.
            Misconfigured: It is too old, may throw records away, or is not set up.
        """
        await self._core.tasks.__aenter__()
        try:
            for wire in (self._core.commands, self._core.live, self._core.signals):
                await self._core.background.start(wire.run)
            seconds, micros = await self._core.command("TIME")
            self._core.clock.set(int(seconds) + int(micros) / 1e6)
            if self._check:
                self._core.layout = await self._load()
                self._warn(self._core.found.durable)
            await self.signals.begin()
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        self._core.commands.on_connected = self._watch.look
        if self._check:
            self._core.background.start_soon(self._watch.run)
        return self

    async def _load(self) -> Layout:
        return await load(self._core, self._min_dedupe_window)

    async def __aexit__(self, *exc: object) -> None:
        """End the background tasks, close the connections."""
        try:
            await self._core.tasks.__aexit__(*exc)
        finally:
            with anyio.CancelScope(shield=True):
                await self._beats.stop()

    def _warn(self, durable: bool) -> None:
        if not durable:
            log.warning(
                "%s has no append-only file: what is stored there does not survive it (appendonly yes)",
                self._core.commands.options.shown,
            )

    # ----------------------------------------------------------------------------------------------- admin

    async def setup(self, *, dry_run: bool = False) -> list[str]:
        """Agree on the namespace's settings; idempotent. Return what was (or would be) done, a line each.

        Raises:
            Misconfigured: Another number of partitions than there is, or a server that does not do.
        """
        done = await self._admin.setup(dry_run=dry_run)
        if not dry_run:
            self._core.forget_places()
            self._core.layout = await self._load()
        return done

    async def stats(self) -> list[QueueStats]:
        """The queues of all agents."""
        return await self._admin.stats()

    async def sessions(self, *, limit: int = 1000) -> list[str]:
        """See `BrokerAdmin.sessions`.

        Raises:
            Unavailable: The server does not answer.
        """
        return await self._admin.sessions(limit)
