"""The stage of a run: servers, workers, gateways, and a cable from each of them to each of those it talks to."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import anyio
from msgspec import Struct, field

from agentrun.broker import Tail
from agentrun.errors import BrokerError
from agentrun.worker import WORKERS
from tests.chaos.agents import AGENTS
from tests.chaos.cable import Cable
from tests.chaos.evidence import Fault, Notebook, Stored, Unended
from tests.chaos.nats_servers import NatsServers
from tests.chaos.place import Place
from tests.chaos.process import Process
from tests.chaos.servers import Servers, free_ports
from tests.chaos.valkey_servers import ValkeyServers
from tests.chaos.worker import POINTS, Options

LOAD = "load"
"""Under what name the load's cables are known."""

_LOOK = 0.05
_STARTING = 30.0
_PAGE = 2000
_CONNECTIONS = 3
"""A worker or gateway that has so many is connected."""
_UNDER_WAY = 0.5
"""Seconds after which nothing that a process has sent is still on its way."""
_NAMESPACE = "chaos"

BROKERS: Mapping[str, Callable[[str], Servers]] = {
    "nats": lambda namespace: NatsServers(1, namespace),
    "nats cluster": lambda namespace: NatsServers(3, namespace),
    "valkey": ValkeyServers,
}
"""What a run may take place on; each is made for a namespace."""


class Setup(Struct, frozen=True, kw_only=True):
    """What is put on the stage."""

    folder: Path
    seed: int = 0
    broker: str = "nats"
    """One of `BROKERS`."""
    workers: int = 4
    gateways: int = 2
    lease: float = 3.0
    concurrency: int = 16
    mutant: str | None = None
    points: Mapping[str, float] = field(default_factory=lambda: POINTS)
    """Where workers may die; none: they die by signals only."""
    small_faults: float = 1.0
    """A factor of the chances of lost, late and doubled acks."""


class Stage:
    """What a run takes place on; see `open_stage`.

    Attributes:
        setup: What it was made from.
        servers: The broker.
        workers: The worker processes.
        gateways: The gateway processes.
        cables: By who is connected, and to which server; those of the load to gateways by the gateway's name.
        place: What the load needs.
    """

    def __init__(self, setup: Setup, book: Notebook) -> None:
        self.setup = setup
        self.servers = BROKERS[setup.broker](_NAMESPACE)
        self.workers: list[Process] = []
        self.gateways: list[Process] = []
        self.cables: dict[str, list[Cable]] = {}
        self.to_gateways: list[Cable] = []
        self.place: Place
        self._book = book
        self._dice = random.Random(f"{setup.seed} stage")
        self._keeping = anyio.CancelScope()

    @property
    def processes(self) -> list[Process]:
        """Workers and gateways."""
        return [*self.workers, *self.gateways]

    async def lay_cables(self, stack: AsyncExitStack) -> None:
        """Connect everybody who is to come."""
        ports = free_ports(self.setup.gateways)
        workers = [f"w{n}" for n in range(self.setup.workers)]
        gateways = [f"g{n}" for n in range(self.setup.gateways)]
        for name in (LOAD, *workers, *gateways):
            self.cables[name] = [await stack.enter_async_context(cable) for cable in self.servers.cables()]
        self.to_gateways = [await stack.enter_async_context(Cable(port)) for port in ports]
        self.workers = [self._worker(name) for name in workers]
        self.gateways = [self._gateway(name, port) for name, port in zip(gateways, ports, strict=True)]
        self.place = Place(
            brokers=tuple(self._urls(LOAD)),
            namespace=_NAMESPACE,
            gateways=tuple(f"http://127.0.0.1:{cable.port}" for cable in self.to_gateways),
            agents=tuple(agent.name for agent in AGENTS),
            folder=self.setup.folder,
        )

    def _urls(self, name: str) -> list[str]:
        return [self.servers.url(cable.port) for cable in self.cables[name]]

    def _worker(self, name: str) -> Process:
        def command(life: int) -> list[str]:
            setup = self.setup
            return Options(
                name=name,
                life=life,
                url=",".join(self._urls(name)),
                namespace=_NAMESPACE,
                folder=setup.folder,
                seed=setup.seed,
                lease=setup.lease,
                concurrency=setup.concurrency,
                mutant=setup.mutant,
                points=setup.points,
                faults=setup.small_faults,
            ).arguments

        return Process(name, command, self.setup.folder / f"{name}.log")

    def _gateway(self, name: str, port: int) -> Process:
        command = [
            "tests.chaos.gateway", self.setup.mutant or "", "gateway", "--insecure", "--port", str(port),
            "--url", ",".join(self._urls(name)), "--namespace", _NAMESPACE, "--agent", AGENTS[0].name,
            "--rate", "10000", "--burst", "10000", "--max-streams", "10000", "--stream-seconds", "20s",
            "--linger", "1s", "--send-timeout", "10s",
        ]  # fmt: skip
        return Process(name, lambda _life: command, self.setup.folder / f"{name}.log")

    # ------------------------------------------------------------------------------------------------ processes

    async def keep(self) -> None:
        """Start whoever has ended again, for ever."""
        with self._keeping:
            await self._keep()

    async def _keep(self) -> None:
        ended: dict[str, float] = {}
        while True:
            now = time.monotonic()
            for process in self.processes:
                if process.alive:
                    connections = sum(cable.connections for cable in self.cables[process.name])
                    process.up = process.up or connections >= _CONNECTIONS
                elif process.name not in ended:
                    ended[process.name] = now + (self._dice.uniform(0.0, 1.0) if process.lives else 0.0)
                    self._note_end(process)
                elif ended[process.name] <= now:
                    del ended[process.name]
                    process.start()
            await anyio.sleep(_LOOK)

    def _note_end(self, process: Process) -> None:
        if process.lives and not process.told_to_end:
            code = process.ended_as
            kind = "died at a point" if code == -signal.SIGKILL else f"ended with code {code}"
            self._book.note(Fault(kind=kind, target=process.life))

    async def ready(self) -> None:
        """Wait until all workers and gateways work."""
        with anyio.fail_after(_STARTING):
            while not await self._works():  # noqa: ASYNC110 - processes ring no bell
                await anyio.sleep(_LOOK)

    async def _works(self) -> bool:
        try:
            for cable in self.to_gateways:
                stream = await anyio.connect_tcp("127.0.0.1", cable.target)
                await stream.aclose()
            found = await self.servers.operator.signals.gather(WORKERS, b"", wait=0.3)
        except (OSError, BrokerError):
            return False
        return len(found) >= len(self.workers)

    def end_processes(self) -> None:
        """Kill them all, for good, and wait for them."""
        self._keeping.cancel()
        for process in self.processes:
            process.end()

    async def heal(self) -> None:
        """Make everything well: cables, suspended processes, servers, limits."""
        for cable in (*self.to_gateways, *(cable for cables in self.cables.values() for cable in cables)):
            cable.restore()
        for process in self.processes:
            if process.frozen:
                process.thaw()
        await self.servers.await_health()
        await self.servers.limit(full=False)

    # ------------------------------------------------------------------------------------------------- evidence

    async def await_quiet(self, patience: float) -> None:
        """Wait until no session has anything pending; note those that still have after ``patience`` seconds."""
        operator = self.servers.operator
        until = time.monotonic() + patience
        waiting = await operator.sessions(limit=10**6)
        ends: dict[str, Tail] = {}
        while waiting:
            for session in waiting:
                ends[session] = await operator.log.last(session)
            waiting = [session for session in waiting if ends[session].pending]
            if time.monotonic() > until:
                break
            await anyio.sleep(0.25)
        for session in waiting:
            self._book.note(Unended(session=session, pending=str(ends[session].pending)))

    async def dump(self) -> None:
        """End all processes, so that nothing more is stored, and note what is, of all sessions."""
        self.end_processes()
        await anyio.sleep(_UNDER_WAY)
        operator = self.servers.operator
        for session in sorted(await operator.sessions(limit=10**6)):
            after = 0
            while True:
                page = await operator.log.read(session, after=after, limit=_PAGE)
                for record in page:
                    body = record.body.decode()
                    self._book.note(
                        Stored(session=session, offset=record.offset, kind=record.kind, body=body, stored=record.time)
                    )
                if len(page) < _PAGE:
                    break
                after = page[-1].offset


@asynccontextmanager
async def open_stage(setup: Setup, book: Notebook) -> AsyncGenerator[Stage]:
    """Start everything, keep it running, and leave nothing behind, however the context is left."""
    stage = Stage(setup, book)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(stage.servers.run())
        await stage.lay_cables(stack)
        stack.callback(stage.end_processes)
        async with anyio.create_task_group() as group:
            group.start_soon(stage.keep)
            await stage.ready()
            yield stage
            group.cancel_scope.cancel()
