"""Valkey under chaos: a primary, and a replica that takes its place."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.to_thread
from valkey.asyncio import Valkey
from valkey.exceptions import ValkeyError

from agentrun.brokers.valkey import ValkeyBroker
from agentrun.brokers.valkey_server import ValkeyServer
from agentrun.errors import Unavailable
from tests.chaos.cable import Cable
from tests.chaos.plan import SERVERS, Plan, Plans
from tests.chaos.servers import Servers, free_ports, until_it_works

_SETTINGS = "appendfsync always\nrepl-diskless-sync-delay 0"
"""With ``everysec`` the server answers before it has written while a sync is slow, so a kill of its process alone may
lose what was acknowledged."""
_PAUSE = 5.0
"""Seconds a primary stores nothing for at most, while its replica catches up."""
_PATIENCE = 3.0
"""Seconds that a server gets to carry a command out."""


class ValkeyServers(Servers):
    """One for clients, and one that follows it.

    Args:
        namespace: Is set up.

    Attributes:
        primary: Whom clients reach.
        replica: Who follows it.
        link: The replica's cable to the primary.
    """

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._started: list[ValkeyServer] = []
        self.primary, self.replica = map(self._server, free_ports(2))
        self.link = Cable(self.primary.port)
        self._own = Cable(self.primary.port)
        self._cables = [self.link, self._own]
        self._operator: ValkeyBroker | None = None

    def _server(self, port: int) -> ValkeyServer:
        server = ValkeyServer(port=port, settings=_SETTINGS)
        self._started.append(server)
        return server

    @property
    def all(self) -> list[ValkeyServer]:
        """See `Servers.all`: the primary of the moment."""
        return [self.primary]

    @property
    def operator(self) -> ValkeyBroker:
        """See `Servers.operator`."""
        assert self._operator is not None
        return self._operator

    def cables(self) -> list[Cable]:
        """See `Servers.cables`: after a failover they lead to the new primary, as an address does that moves."""
        cable = Cable(self.primary.port)
        self._cables.append(cable)
        return [cable]

    def url(self, port: int) -> str:
        """See `Servers.url`."""
        return f"valkey://127.0.0.1:{port}"

    @asynccontextmanager
    async def run(self) -> AsyncGenerator[None]:
        """See `Servers.run`."""
        async with self.link, self._own:
            try:
                await anyio.to_thread.run_sync(self.primary.start)
                await self._follow()
                url = self.url(self._own.port)
                async with ValkeyBroker(url, namespace=self._namespace, check=False) as broker:
                    await broker.setup()
                async with ValkeyBroker(url, namespace=self._namespace) as self._operator:
                    yield
            finally:
                with anyio.CancelScope(shield=True):
                    for server in self._started:
                        server.resume()
                        await anyio.to_thread.run_sync(server.stop)

    # ------------------------------------------------------------------------------------------------ what befalls

    def plans(self, dice: random.Random) -> Plans:
        """See `Servers.plans`."""
        return {
            "scripts flushed": (1, self._flush),
            "clients killed": (1, lambda: self._kill_clients(dice)),
            "failover": (1, lambda: Plan(SERVERS, 0.0, self.fail_over)),
        }

    def _flush(self) -> Plan:
        async def act() -> None:
            await self._tell(self.primary, "SCRIPT", "FLUSH")

        return Plan(SERVERS, 0.0, act)

    def _kill_clients(self, dice: random.Random) -> Plan:
        kinds = dice.choice([("normal",), ("pubsub",), ("normal", "pubsub")])

        async def act() -> None:
            for kind in kinds:
                await self._tell(self.primary, "CLIENT", "KILL", "TYPE", kind)

        return Plan(SERVERS, 0.0, act, [f"{' and '.join(kinds)} clients"])

    async def fail_over(self, *, caught_up: bool = True) -> None:
        """Kill the primary, have its replica take its place, and start another replica.

        Args:
            caught_up: As planned failovers are done: the primary stores nothing more, and is killed when its replica
                has all it stored. False: as a host dies, so what the replica had not got is lost.

        Raises:
            Unavailable: The replica does not catch up; nothing was done.
        """
        old, new = self.primary, self.replica
        if caught_up:
            await self._tell(old, "CLIENT", "PAUSE", str(round(_PAUSE * 1000)), "WRITE")
            try:
                with anyio.fail_after(_PAUSE / 2):
                    await self._until_even()
            except TimeoutError:
                await self._tell(old, "CLIENT", "UNPAUSE")
                raise Unavailable("the replica does not catch up") from None
        await anyio.to_thread.run_sync(old.kill)
        await self._tell(new, "REPLICAOF", "NO", "ONE")
        for cable in self._cables:
            cable.target = new.port
        self.link.restore()
        self.primary, self.replica = new, self._server(old.port)
        await anyio.to_thread.run_sync(old.stop)
        await self._follow()

    async def _until_even(self) -> None:
        """Return when the replica has all that the primary, which stores nothing meanwhile, has stored."""
        while True:
            leads, follows = await self._replication(self.primary), await self._replication(self.replica)
            if follows["master_link_status"] == "up" and follows["slave_repl_offset"] == leads["master_repl_offset"]:
                return
            await anyio.sleep(0.005)

    async def _follow(self) -> None:
        """Have the replica follow the primary, and wait until it does."""
        await anyio.to_thread.run_sync(self.replica.start)
        if (await self._replication(self.replica))["role"] == "master":
            await self._tell(self.replica, "REPLICAOF", "127.0.0.1", str(self.link.port))

        async def once() -> None:
            if (await self._replication(self.replica))["master_link_status"] != "up":
                raise Unavailable("the replica is not connected")

        await until_it_works(once)

    async def limit(self, *, full: bool) -> None:
        """See `Servers.limit`."""

        async def once() -> None:
            await self._tell(self.primary, "CONFIG", "SET", "maxmemory", "1" if full else "0")

        await (once() if full else until_it_works(once))

    async def await_health(self) -> None:
        """See `Servers.await_health`: the replica follows the primary."""
        self.link.restore()
        self.primary.resume()
        await anyio.to_thread.run_sync(self.primary.start)
        await self._follow()

        async def once() -> None:
            await self.operator.log.last("health")

        await until_it_works(once)

    # ------------------------------------------------------------------------------------------------------ asking

    async def _tell(self, server: ValkeyServer, *words: str) -> None:
        await _ask(server, lambda valkey: valkey.execute_command(*words))

    async def _replication(self, server: ValkeyServer) -> dict[str, Any]:
        return await _ask(server, lambda valkey: valkey.info("replication"))


async def _ask(server: ValkeyServer, what: Callable[[Valkey], Awaitable[Any]]) -> Any:
    valkey = Valkey(port=server.port)
    try:
        with anyio.fail_after(_PATIENCE):
            return await what(valkey)
    except (ValkeyError, OSError, TimeoutError) as error:
        raise Unavailable(f"port {server.port}: {error!r}") from error
    finally:
        await valkey.aclose()
