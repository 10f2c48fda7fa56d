"""The broker on NATS JetStream, the reference.

One stream per partition holds everything about its sessions (docs/design.md, D1); `setup` makes the streams, entering
the broker only checks them. Needs nats-server 2.12 or newer.
"""

from __future__ import annotations

import ssl
from typing import Self

import anyio
from nats.aio.client import Client

from agentrun.broker import Capabilities, QueueStats
from agentrun.brokers.nats_admin import NatsAdmin, check_server, load
from agentrun.brokers.nats_beat import Heartbeats
from agentrun.brokers.nats_core import Core
from agentrun.brokers.nats_layout import HEADROOM, RECORD_LIMIT, Layout
from agentrun.brokers.nats_link import Link, LinkOptions, log
from agentrun.brokers.nats_log import NatsLog
from agentrun.brokers.nats_queue import NatsQueue
from agentrun.brokers.nats_read import Reader
from agentrun.brokers.nats_signals import NatsSignals
from agentrun.brokers.streams import Streams
from agentrun.brokers.watch import Watch
from agentrun.errors import Unavailable
from agentrun.wire import check_id

__all__ = ["NatsBroker", "Streams"]


class NatsBroker:
    """`agentrun.broker.Broker` and `BrokerAdmin` on JetStream.

    Args:
        url: ``nats://``, ``tls://``, ``ws://`` or ``wss://``; several servers with commas. May hold user and password.
        namespace: Sessions, agents and signals of different namespaces do not see each other.
        lease_ttl: The lease time of queues that are opened without one, in seconds.
        user_credentials: Path of a NATS ``.creds`` file.
        tls: For servers whose certificate the system does not know.
        connect_timeout: Seconds until a first connection is given up as `Unavailable`.
        check: False: enter also where nothing is set up yet, so that `setup` can be called.
        streams: What `setup` makes.
        min_dedupe_window: The least time, in seconds, for which the streams must remember ids of inputs.
    """

    def __init__(
        self,
        url: str = "nats://127.0.0.1:4222",
        *,
        namespace: str = "default",
        lease_ttl: float = 30.0,
        user_credentials: str | None = None,
        tls: ssl.SSLContext | None = None,
        connect_timeout: float = 5.0,
        check: bool = True,
        streams: Streams | None = None,
        min_dedupe_window: float = 3600.0,
    ) -> None:
        check_id("namespace", namespace)
        options = LinkOptions(url=url, user_credentials=user_credentials, tls=tls, connect_timeout=connect_timeout)
        self._core = Core(
            namespace=namespace,
            lease_ttl=lease_ttl,
            appends=Link(options, "appends"),
            queue=Link(options, "queue"),
            reads=Link(options, "reads"),
        )
        self._check = check
        self._min_dedupe_window = min_dedupe_window
        reader = Reader(self._core)
        self._beats = Heartbeats(options)
        self.turns = NatsQueue(self._core, reader, self._beats)
        self.log = NatsLog(self._core, reader)
        self.signals = NatsSignals(self._core, self._beats)
        self._admin = NatsAdmin(self._core, streams or Streams())
        self._watch = Watch(self._core, self._load, log)

    @property
    def capabilities(self) -> Capabilities:
        """What this broker can; its limits are known once it was entered."""
        found = self._core.layout
        return Capabilities(
            name="nats",
            durable=True,
            detects_no_listener=True,
            max_body=found.max_body if found else RECORD_LIMIT - HEADROOM,
            delta_ttl=found.delta_ttl if found else 3600.0,
            dedupe_window=found.dedupe_window if found else self._min_dedupe_window,
            lease_ttl=self._core.lease_ttl,
        )

    def now(self) -> float:
        """See `Broker.now`."""
        return self._core.now()

    @property
    def connection(self) -> Client:
        """The nats-py client used for queue and signals, for what agentrun does not cover."""
        return self._core.queue.client

    # ------------------------------------------------------------------------------------------------ life

    async def __aenter__(self) -> Self:
        """Connect and check.

        Raises:
            Unavailable: The server cannot be reached.
            Misconfigured: It is too old, or not set up as needed.
        """
        links = (self._core.appends, self._core.queue, self._core.reads)
        try:
            for link in links:
                await link.open()
            if self._check:
                await check_server(self._core)
                self._core.layout = await self._load()
        except BaseException:
            for link in links:
                await link.close()
            raise
        await self._core.tasks.__aenter__()
        for link in links:
            link.on_closed = self._on_closed
            link.on_nobody = self._watch.look
        self._core.suspect = self._watch.look
        self._core.appends.on_reconnect.add(self._watch.look)
        if self._check:
            self._core.background.start_soon(self._watch.run)
        return self

    async def _load(self) -> Layout:
        return await load(self._core, self._min_dedupe_window)

    def _on_closed(self, reason: str) -> None:
        self._core.background.start_soon(self._fail, reason)

    async def _fail(self, reason: str) -> None:
        # It will not come back (credentials withdrawn, say): whoever runs on this broker must end.
        raise Unavailable(reason)

    async def __aexit__(self, *exc: object) -> None:
        """Hand back what is held, end the background tasks, close the connections."""
        try:
            await self._core.tasks.__aexit__(*exc)
        finally:
            with anyio.CancelScope(shield=True):
                await self._beats.stop()
                for link in (self._core.appends, self._core.queue, self._core.reads):
                    await link.close()

    # ----------------------------------------------------------------------------------------------- admin

    async def setup(self, *, dry_run: bool = False) -> list[str]:
        """Create or update the namespace's streams; idempotent. Return what was (or would be) done, a line each.

        Raises:
            Misconfigured: Another number of partitions, or less time for deltas, than there is; or the server refuses.
        """
        done = await self._admin.setup(dry_run=dry_run)
        if not dry_run:
            self._core.forget_routes()
            self._core.layout = await self._load()
        return done

    async def stats(self) -> list[QueueStats]:
        """The queues of all agents. ``leased`` counts turns that are held early as well."""
        return await self._admin.stats()

    async def sessions(self, *, limit: int = 1000) -> list[str]:
        """See `BrokerAdmin.sessions`. Costs the servers a list of all sessions, 100,000 to a request.

        Raises:
            Unavailable: A stream's leader does not answer.
        """
        return await self._admin.sessions(limit)
