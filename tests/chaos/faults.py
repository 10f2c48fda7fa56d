"""What goes wrong in a run: drawn from a seeded dice, noted, done, and mended after a while."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Sequence

import anyio

from agentrun.errors import AgentrunError
from tests.chaos.cable import Cable
from tests.chaos.evidence import Fault, Notebook
from tests.chaos.plan import SERVERS, Plan, Plans
from tests.chaos.process import Process
from tests.chaos.stage import LOAD, Stage

_OVERTIME = 60.0
"""Seconds past its time for which a run waits for what is to happen surely."""


class Faults:
    """Breaks things on a stage. Whatever it breaks, somebody is left, or back within seconds.

    Args:
        stage: Where.
        book: Notes each fault.
        dice: Draws kinds, targets and times.
        pace: Seconds between two faults, on average.
        kinds: Which there are; default: all that the stage has a use for.
        surely: Those that come first, in this order, whatever the dice say.
    """

    def __init__(
        self,
        stage: Stage,
        book: Notebook,
        dice: random.Random,
        *,
        pace: float = 2.0,
        kinds: Sequence[str] = (),
        surely: Sequence[str] = (),
    ) -> None:
        self._stage = stage
        self._book = book
        self._dice = dice
        self._pace = pace
        self._surely = list(surely)
        self._busy: set[str] = set()
        self._plans: Plans = {
            "kill": (3, self._kill),
            "kill all workers": (0.5, self._kill_workers),
            "suspend": (3, self._suspend),
            "terminate": (2, self._terminate),
            "die at points": (2, self._burst),
            "clock jump": (1, self._clock),
            "server crash": (1, self._server_crash),
            "server restart": (1, self._server_restart),
            "server suspend": (1, self._server_suspend),
            "stream full": (1, self._full),
            "cable cut": (3, self._cut),
            "cable silent": (3, self._silence),
            "cable slow": (1, self._slow),
            **stage.servers.plans(dice),
        }
        self._kinds = list(kinds or self._plans)

    async def run(self, until: float) -> None:
        """Go on until then, on the monotonic clock; returns when what was broken last is mended.

        What is to happen surely happens also later: on a slow machine each takes its time.
        """
        weights = [self._plans[kind][0] for kind in self._kinds]
        async with anyio.create_task_group() as group:
            while (left := until - time.monotonic()) > (-_OVERTIME if self._surely else 0.0):
                await anyio.sleep(min(self._dice.expovariate(1 / self._pace), left if left > 0 else 1.0))
                if self._surely:
                    if await self.apply(self._surely[0]):
                        del self._surely[0]
                else:
                    group.start_soon(self.apply, self._dice.choices(self._kinds, weights)[0])

    async def apply(self, kind: str) -> bool:
        """Do one fault of this kind, if there is something to do it to; whether it was done."""
        plan = self._plans[kind][1]()
        if plan is None or plan.target in self._busy:
            return False
        self._busy.add(plan.target)
        for target in plan.lives or (plan.target,):
            self._book.note(Fault(kind=kind, target=target, seconds=round(plan.seconds, 3)))
        try:
            await plan.act()
        except AgentrunError as error:
            # Asked of a broker that is away at the moment.
            self._book.note(Fault(kind=f"{kind}: not done, {error}", target=plan.target))
            return False
        finally:
            self._busy.discard(plan.target)
        return True

    # ------------------------------------------------------------------------------------------------ processes

    def _well(self, processes: list[Process]) -> list[Process]:
        return [p for p in processes if p.alive and p.up and not p.frozen and p.name not in self._busy]

    def _process(self) -> Process | None:
        """One that has a peer that is well."""
        well = self._well(self._stage.gateways if self._dice.random() < 0.25 else self._stage.workers)
        return self._dice.choice(well) if len(well) > 1 else None

    def _signal(self, number: signal.Signals) -> Plan | None:
        process = self._process()

        async def act() -> None:
            assert process is not None
            process.signal(number)

        return Plan(process.name, 0.0, act, [process.life]) if process else None

    def _kill(self) -> Plan | None:
        return self._signal(signal.SIGKILL)

    def _terminate(self) -> Plan | None:
        return self._signal(signal.SIGTERM)

    def _kill_workers(self) -> Plan:
        workers = self._well(self._stage.workers)

        async def act() -> None:
            for worker in workers:
                worker.signal(signal.SIGKILL)

        return Plan("all workers", 0.0, act, [worker.life for worker in workers])

    def _suspend(self) -> Plan | None:
        process = self._process()
        # Also for longer than a lease lasts.
        seconds = self._dice.uniform(0.2, 2 * self._stage.setup.lease + 2)

        async def act() -> None:
            assert process is not None
            process.freeze()
            try:
                await anyio.sleep(seconds)
            finally:
                process.thaw()

        return Plan(process.name, seconds, act, [process.life]) if process else None

    def _worker(self) -> Process | None:
        well = self._well(self._stage.workers)
        return self._dice.choice(well) if well else None

    def _burst(self) -> Plan | None:
        worker = self._worker()

        async def act() -> None:
            assert worker is not None
            worker.signal(signal.SIGUSR1)

        return Plan(worker.name, 0.0, act, [worker.life]) if worker else None

    def _clock(self) -> Plan | None:
        # It stays so until the next jump, or the end of this life.
        worker = self._worker()

        async def act() -> None:
            assert worker is not None
            worker.signal(signal.SIGUSR2)

        return Plan(worker.name, 0.0, act, [worker.life]) if worker else None

    # -------------------------------------------------------------------------------------------------- servers

    def _server_crash(self) -> Plan:
        server, away = self._dice.choice(self._stage.servers.all), self._dice.uniform(0.0, 3.0)
        return Plan(SERVERS, away, lambda: self._stage.servers.crash(server, away))

    def _server_restart(self) -> Plan:
        server = self._dice.choice(self._stage.servers.all)
        return Plan(SERVERS, 0.0, lambda: self._stage.servers.restart(server))

    def _server_suspend(self) -> Plan:
        server, seconds = self._dice.choice(self._stage.servers.all), self._dice.uniform(0.2, 6.0)
        return Plan(SERVERS, seconds, lambda: self._stage.servers.freeze(server, seconds))

    def _full(self) -> Plan:
        seconds = self._dice.uniform(0.5, 3.0)

        async def act() -> None:
            await self._stage.servers.limit(full=True)
            try:
                await anyio.sleep(seconds)
            finally:
                await self._stage.servers.limit(full=False)

        return Plan(SERVERS, seconds, act)

    # --------------------------------------------------------------------------------------------------- cables

    def _cables(self) -> tuple[str, list[Cable]]:
        """Those of one process to one server or all, those of all to one server, or those of the load to a gateway."""
        stage = self._stage
        names = list(stage.cables)
        which = self._dice.random()
        if which < 0.15:
            n = self._dice.randrange(len(stage.to_gateways))
            return f"{LOAD} to g{n}", [stage.to_gateways[n]]
        if which < 0.25:
            n = self._dice.randrange(len(stage.cables[LOAD]))
            return f"all to server {n}", [stage.cables[name][n] for name in names]
        name = self._dice.choice(names)
        cables = stage.cables[name]
        if which < 0.5:
            n = self._dice.randrange(len(cables))
            return f"{name} to server {n}", [cables[n]]
        return f"{name} to servers", cables

    def _cable_plan(self, seconds: float, breaks: Callable[[Cable], None]) -> Plan:
        target, cables = self._cables()

        async def act() -> None:
            for cable in cables:
                breaks(cable)
            try:
                await anyio.sleep(seconds)
            finally:
                for cable in cables:
                    cable.restore()

        return Plan(target, seconds, act)

    def _cut(self) -> Plan:
        seconds = self._dice.choice([0.0, self._dice.uniform(0.0, 1.0), self._dice.uniform(0.0, 5.0)])
        return self._cable_plan(seconds, Cable.cut)

    def _silence(self) -> Plan:
        up, down = self._dice.choice([(True, True), (True, False), (False, True)])
        # Also for longer than clients take to give a silent connection up.
        return self._cable_plan(self._dice.uniform(0.3, 9.0), lambda cable: cable.silence(up=up, down=down))

    def _slow(self) -> Plan:
        latency = self._dice.uniform(0.01, 0.4)
        return self._cable_plan(self._dice.uniform(1.0, 6.0), lambda cable: cable.slow(latency))
