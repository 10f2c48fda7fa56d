"""The broker of a run, as the stage and the faults see it. What happens to its servers happens to real processes."""

from __future__ import annotations

import random
import socket
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import anyio
import anyio.to_thread

from agentrun.broker import Broker, BrokerAdmin
from agentrun.brokers.process import ServerProcess
from agentrun.errors import AgentrunError
from tests.chaos.cable import Cable
from tests.chaos.plan import Plans

_SETTLING = 30.0
"""Seconds that servers get to work as they should."""


class Operator(Broker, BrokerAdmin, Protocol):
    """A connected broker, with what an operator does."""


class Servers(ABC):
    """Servers of one kind: started, set up for a namespace, broken, mended, and ended again."""

    @property
    @abstractmethod
    def all(self) -> Sequence[ServerProcess]:
        """Those that clients talk to, in an order that stays."""

    @property
    @abstractmethod
    def operator(self) -> Operator:
        """A connection that no fault befalls."""

    @abstractmethod
    def run(self) -> AbstractAsyncContextManager[None]:
        """Have them run. Whatever is stopped when the context is left goes on before."""

    @abstractmethod
    def cables(self) -> list[Cable]:
        """A cable to each server, for one who is connected to all; where it leads stays a matter of the servers."""

    @abstractmethod
    def url(self, port: int) -> str:
        """What a client is given that reaches a server at this port."""

    def plans(self, dice: random.Random) -> Plans:
        """The kinds of faults that only these have, drawn from ``dice``."""
        return {}

    @abstractmethod
    async def limit(self, *, full: bool) -> None:
        """Let them store nothing more, or be as they were set up.

        Raises:
            Unavailable: They do not answer.
        """

    @abstractmethod
    async def await_health(self) -> None:
        """Have all of them run and work as they should, and wait until they do."""

    async def crash(self, server: ServerProcess, away: float) -> None:
        """Kill a server, and start it again after a time, with its data."""
        await anyio.to_thread.run_sync(server.kill)
        await anyio.sleep(away)
        await anyio.to_thread.run_sync(server.start)

    async def restart(self, server: ServerProcess) -> None:
        """Stop a server in good order and start it again."""
        await anyio.to_thread.run_sync(server.restart)

    async def freeze(self, server: ServerProcess, seconds: float) -> None:
        """Stop a server's process for a time."""
        server.suspend()
        try:
            await anyio.sleep(seconds)
        finally:
            server.resume()


def free_ports(count: int) -> list[int]:
    """Ports that are free, and that no outgoing connection is given while their owner is away."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(15_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


async def until_it_works(what: Callable[[], Awaitable[None]]) -> None:
    """Do it again until it works; in the end what goes wrong is raised."""
    with anyio.move_on_after(_SETTLING):
        while True:
            try:
                await what()
            except AgentrunError:
                await anyio.sleep(0.25)
            else:
                return
    await what()
