"""A worker: slot → lease → listen for stops → claim → run → last append → settle; and the drain."""

from __future__ import annotations

import logging
import os
import platform
import signal
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import anyio
import msgspec
from anyio.abc import TaskGroup, TaskStatus
from msgspec import Struct

from agentrun import wire
from agentrun.agent import Agent
from agentrun.broker import Broker, BrokerAdmin, Hold, Kind, Lease, QueueStats, Record, Tail
from agentrun.cancel import Cause, Stop
from agentrun.dead import DeadLetters, entry_of
from agentrun.errors import BrokerError, Conflict, InvalidInput, SessionGone, Unavailable
from agentrun.history import History
from agentrun.keeper import Keeper
from agentrun.peers import Peers
from agentrun.plan import Drop, HandBack, Run, Write, decide, input_of
from agentrun.publish import Pacer
from agentrun.recent import NOTHING, Known, Recent, goes_on, weight
from agentrun.run import Attempt, Ended, HandedBack, Lost, Shared
from agentrun.settings import WorkerSettings
from agentrun.telemetry import Telemetry, default
from agentrun.telemetry.broker import ObservedBroker
from agentrun.telemetry.instruments import Levels
from agentrun.telemetry.names import Attr
from agentrun.watching import Watcher

log = logging.getLogger("agentrun.worker")

WORKERS = "workers"
"""The signal channel on which every worker answers who it is."""

_LEASERS = 8
_PAGE = 10_000
"""Records read at a time."""
_LOOK_UP = 15.0
"""Seconds between two looks at how much waits, for metrics."""
_RARE = ("takeovers", "fenced", "dead")
"""What a fleet may see once a month, and is alerted about."""
_LAST_APPENDS = 5.0
"""Seconds turns that are handed back get to say so in the log."""


class RunningTurn(Struct, frozen=True):
    """A turn being run, as a worker reports it. ``seconds`` since its attempt began; ``tokens`` that it has stored."""

    session: str
    turn: str
    agent: str
    attempt: int
    seconds: float
    tokens: int = 0
    stopping: bool = False


class AgentLoad(Struct, frozen=True):
    """An agent's slots at one worker, and the inputs in them: turns that run, and those just taken or about to end."""

    agent: str
    slots: int
    running: int


class WorkerInfo(Struct, frozen=True):
    """What a worker says of itself. ``uptime`` is in seconds; ``version`` is that of agentrun."""

    worker: str
    host: str
    pid: int
    agents: list[str]
    slots: int
    draining: bool
    running: list[RunningTurn]
    load: list[AgentLoad] = []
    uptime: float = 0.0
    version: str = ""


class _Carrier:
    """A leased input in hand. ``lease`` is the newest: while we were cut off, an older one may have run out."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.renewed = False


class Worker:
    """Runs agents for the turns that a broker holds.

    Every turn gets at most one live attempt across the fleet; a turn of a worker that dies is taken over within the
    lease time. Each agent has ``settings.concurrency`` slots of its own.

    Args:
        broker: A connected broker.
        agents: The agents this worker runs; their names must differ.
        settings: Times and limits.
        name: Stands in the log as who ran an attempt; default is host, process id and a random part.
        telemetry: Where it is told what this worker does; default is what is set for the process.

    Raises:
        InvalidInput: No agent, or two of one name.
    """

    def __init__(
        self,
        broker: Broker,
        agents: Sequence[Agent],
        *,
        settings: WorkerSettings | None = None,
        name: str | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.settings = settings or WorkerSettings()
        self.name = name or f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._telemetry = telemetry or default()
        self._admin = broker if isinstance(broker, BrokerAdmin) else None
        watched = self._telemetry.instruments.enabled
        self._broker = ObservedBroker(broker, self._telemetry.instruments) if watched else broker
        self._watcher = Watcher(self._telemetry, self._broker, self.name, self.settings.trace_content)
        self._agents = {a.name: a for a in agents}
        if not agents or len(self._agents) != len(agents):
            raise InvalidInput(f"a worker needs agents of different names, not {[a.name for a in agents]}")
        self._attempts: dict[Attempt, str] = {}
        self._carried: dict[tuple[str, int], _Carrier] = {}
        self._recent = Recent()
        self._drain = anyio.Event()
        self._now = anyio.Event()
        self._idle = anyio.Event()
        self._busy = 0
        self._in_hand = Counter[str]()
        self._began = time.monotonic()

    @property
    def info(self) -> WorkerInfo:
        """What this worker is doing."""
        now = time.monotonic()
        running = [
            RunningTurn(a.session, a.turn, agent, a.number, now - a.started if a.started else 0.0, a.tokens, a.stopping)
            for a, agent in self._attempts.items()
        ]
        return WorkerInfo(
            worker=self.name,
            host=platform.node(),
            pid=os.getpid(),
            agents=list(self._agents),
            slots=self.settings.concurrency * len(self._agents),
            draining=self._drain.is_set(),
            running=running,
            load=[AgentLoad(name, self.settings.concurrency, self._in_hand[name]) for name in self._agents],
            uptime=now - self._began,
            version=self._telemetry.version,
        )

    def drain(self) -> None:
        """Take no more turns; running ones get ``settings.drain`` seconds, then they are handed back, uncharged."""
        self._drain.set()

    def stop(self) -> None:
        """Hand all running turns back now."""
        self._drain.set()
        self._now.set()

    async def serve(self) -> None:
        """`run`, with the signals of a process: SIGTERM or SIGINT drains, a second one stops now.

        Where an agent still does not end some seconds after its turn was handed back, the process ends with status 1.
        """
        async with anyio.create_task_group() as group:
            group.start_soon(self._obey_signals)
            group.start_soon(self._give_up)
            await self.run()
            group.cancel_scope.cancel()

    async def _give_up(self) -> None:
        """End the process where an agent that never ends would keep it: its turn was handed back long ago."""
        await self._now.wait()
        await anyio.sleep(2 * self.settings.cancel_grace + _LAST_APPENDS)
        log.error("agents of worker %s do not end; the process ends without them", self.name)
        os._exit(1)

    async def _obey_signals(self) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                if self._drain.is_set():
                    log.warning("%s again: handing %d turns back now", number.name, self._busy)
                    self.stop()
                else:
                    log.info("%s: draining, %d turns running", number.name, self._busy)
                    self.drain()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Work until `drain` or `stop` and all turns are settled or handed back.

        Raises:
            Misconfigured: The broker is not set up for this.
        """
        lease_ttl = 0.0
        for name in self._agents:
            lease_ttl = await self._broker.turns.open(name, lease_ttl=self.settings.lease)
        keeper = Keeper(
            lease_ttl / 3, report=self.settings.block_report, limit=max(self.settings.block_limit, lease_ttl)
        )
        pacer = Pacer(self.settings.tick, self.settings.tick_above)
        async with anyio.create_task_group() as agents:
            with keeper:
                async with (
                    self._broker.signals.listen(WORKERS, self._report),
                    anyio.create_task_group() as turns,
                ):
                    turns.start_soon(self._be_observed)
                    if self.settings.lost_after > 0:
                        turns.start_soon(self._peers(keeper).run)
                    dead = DeadLetters(self._broker.log)
                    turns.start_soon(dead.run)
                    shared = Shared(self._broker, self.name, self.settings, pacer, dead, self._watcher, agents)
                    for agent in self._agents.values():
                        turns.start_soon(self._lease_for, agent, shared, keeper, turns)
                    log.info("worker %s runs %s", self.name, ", ".join(self._agents))
                    task_status.started()
                    await self._drain.wait()
                    await self._empty()
                    turns.cancel_scope.cancel()
            agents.cancel_scope.cancel()

    async def _be_observed(self) -> None:
        """Let the gauges be read, and look up the queues for them, while anybody collects."""
        instruments = self._telemetry.instruments
        if not instruments.enabled:
            return
        for name in self._agents:
            counts = instruments.of(name)
            for rare in _RARE:
                instruments.expect(rare, counts.attributes)
        queues: list[QueueStats] = []
        levels: dict[str, Levels] = {
            "running": lambda: [(self._in_hand[name], {Attr.AGENT: name}) for name in self._agents],
            "slots": lambda: [
                (0 if self._drain.is_set() else self.settings.concurrency, {Attr.AGENT: name}) for name in self._agents
            ],
            "waiting": lambda: [(queue.waiting, {Attr.AGENT: queue.agent}) for queue in queues],
            "leased": lambda: [(queue.leased, {Attr.AGENT: queue.agent}) for queue in queues],
        }
        with instruments.observing(levels):
            while True:
                if self._admin is not None:
                    with suppress(BrokerError):
                        found = await self._admin.stats()
                        queues = [queue for queue in found if queue.agent in self._agents]
                await anyio.sleep(_LOOK_UP)

    def _peers(self, keeper: Keeper) -> Peers:
        turns = self._broker.turns

        def holds() -> list[Hold]:
            leases = [Hold(x.record.agent or "", x.session, x.record.offset, x.token) for x in keeper.leases]
            return [*leases, *turns.early()]

        peers = Peers(
            self._broker,
            self.name,
            lost_after=self.settings.lost_after,
            agents=self._agents,
            holds=holds,
            alive=lambda: not keeper.given_up,
        )
        keeper.on_hold = peers.poke
        return peers

    async def _report(self, body: bytes) -> bytes:
        return msgspec.json.encode(self.info)

    async def _empty(self) -> None:
        """Wait for the running turns, first for them to end, then for them to be handed back."""
        async with anyio.create_task_group() as group:

            async def until_now() -> None:
                await self._now.wait()
                group.cancel_scope.cancel()

            group.start_soon(until_now)
            with anyio.move_on_after(self.settings.drain):
                await self._until_idle()
            group.cancel_scope.cancel()
        self._now.set()
        for attempt in list(self._attempts):
            attempt.stop(Stop(Cause.DRAIN))
        with anyio.move_on_after(self.settings.cancel_grace + _LAST_APPENDS):
            await self._until_idle()

    async def _until_idle(self) -> None:
        while self._busy:
            self._idle = anyio.Event()
            await self._idle.wait()

    # ---------------------------------------------------------------------------------------------------- leasing

    async def _lease_for(self, agent: Agent, shared: Shared, keeper: Keeper, turns: TaskGroup) -> None:
        slots = anyio.Semaphore(self.settings.concurrency)
        async with anyio.create_task_group() as leasers:
            for _ in range(min(_LEASERS, self.settings.concurrency)):
                leasers.start_soon(self._lease_loop, agent, shared, keeper, turns, slots)
            await self._drain.wait()
            leasers.cancel_scope.cancel()

    async def _lease_loop(
        self, agent: Agent, shared: Shared, keeper: Keeper, turns: TaskGroup, slots: anyio.Semaphore
    ) -> None:
        while True:
            await slots.acquire()
            lease: Lease | None = None
            try:
                lease = await self._broker.turns.lease(agent.name, wait=30.0)
            except Unavailable as error:
                log.warning("cannot lease for %s: %s", agent.name, error)
                await anyio.sleep(1.0)
            finally:
                if lease is None:
                    slots.release()
            if lease is None:
                continue
            keeper.hold(lease)
            ours = self._carried.get((lease.session, lease.record.offset))
            if ours is not None:
                # Our lease ran out (an outage, a blocked loop) and nobody else got it: what is under way goes on.
                keeper.drop(ours.lease)
                ours.lease, ours.renewed = lease, True
                slots.release()
                continue
            self._busy += 1
            self._in_hand[agent.name] += 1
            turns.start_soon(self._handle, lease, agent.name, shared, keeper, slots)

    async def _handle(self, lease: Lease, agent: str, shared: Shared, keeper: Keeper, slots: anyio.Semaphore) -> None:
        carrier = _Carrier(lease)
        try:
            await self._settle(carrier, shared)
        except SessionGone:
            await self._quietly(carrier, 0.0)
        except BrokerError as error:
            log.warning("session %s: %s; its input is handed back", lease.session, error)
            await self._quietly(carrier, 1.0)
        except Exception:
            log.exception("session %s: the worker failed; its input is handed back", lease.session)
            await self._quietly(carrier, 5.0)
        finally:
            keeper.drop(carrier.lease)
            slots.release()
            self._busy -= 1
            self._in_hand[agent] -= 1
            self._idle.set()

    async def _quietly(self, carrier: _Carrier, delay: float) -> None:
        try:
            await carrier.lease.nack(delay=delay)
        except BrokerError as error:
            log.warning("session %s: %s; the lease will run out", carrier.lease.session, error)

    # --------------------------------------------------------------------------------------------------- one input

    async def _settle(self, carrier: _Carrier, shared: Shared) -> None:
        """Carry the leased input as far as it goes, and settle its queue message."""
        attempts: list[Attempt] = []

        async def on_signal(body: bytes) -> bytes | None:
            return await attempts[-1].on_signal(body) if attempts else None

        failure: Exception | None = None
        async with self._broker.signals.listen(f"s.{carrier.lease.session}", on_signal):
            try:
                await self._carry(carrier, shared, attempts)
            except Exception as error:
                # Not through the broker's context, which may wrap it.
                failure = error
        if failure is not None:
            raise failure

    async def _carry(self, carrier: _Carrier, shared: Shared, attempts: list[Attempt]) -> None:
        lease = carrier.lease
        history, tail, heavy = await self._load(lease)
        while True:
            action = decide(
                history, tail.pending, lease.record, now=self._broker.now(), max_attempts=self.settings.max_attempts
            )
            try:
                match action:
                    case Drop():
                        await lease.ack()
                        return
                    case HandBack(delay):
                        await lease.nack(delay=delay)
                        return
                    case Write(event, settles):
                        view = history.turns.get(event.turn)
                        dead = entry_of(lease.session, event, view=view, record=lease.record, after=tail.offset)
                        if dead is not None:
                            self._watcher.dead(dead.agent)
                            await shared.dead.report(dead)
                        tail = await self._write(lease.session, event, settles, history, tail)
                    case Run() if self._drain.is_set():
                        await lease.nack()
                        return
                    case Run(turn):
                        agent = self._agents[turn.agent]
                        attempt = Attempt(shared, agent, lease, history, turn, tail)
                        attempts.append(attempt)
                        attempt.on_ended = partial(self._keep, lease.session, heavy)
                        await self._attempt(attempt, agent.name, carrier)
                        return
            except Conflict:
                history, tail, heavy = await self._load(lease)

    def _keep(self, session: str, heavy: int, end: Ended) -> None:
        self._recent.put(session, Known(end.history, end.tail, heavy + weight(end.body)))

    async def _attempt(self, attempt: Attempt, agent: str, carrier: _Carrier) -> None:
        key = (carrier.lease.session, carrier.lease.record.offset)
        self._attempts[attempt] = agent
        # A queue that gives an input out twice at once makes two attempts of it here; the log decides between them.
        self._carried[key] = carrier
        try:
            outcome = await attempt.run()
        finally:
            # From here on a lease that comes back is a new one.
            del self._attempts[attempt]
            if self._carried.get(key) is carrier:
                del self._carried[key]
        match outcome:
            case HandedBack(delay):
                await carrier.lease.nack(delay=delay)
            case Lost():
                if carrier.renewed:
                    await carrier.lease.nack()
            case _:
                await carrier.lease.ack()

    async def _write(
        self, session: str, event: wire.OutputEvent, settles: tuple[int, ...], history: History, tail: Tail
    ) -> Tail:
        # A terminal's message may be too large for one record; it stands in the log in other records then.
        bodies = wire.split(event, self._broker.capabilities.max_body)
        for body in bodies:
            pending = tail.pending.settle(*settles) if body is bodies[-1] else tail.pending
            tail = await self._broker.log.append(session, body, kind=Kind.EVENT, after=tail, pending=pending)
            history.apply(tail.offset, wire.decode(body), time=self._broker.now())
        self._watcher.stored(session, history, event)
        return tail

    async def _load(self, lease: Lease) -> tuple[History, Tail, int]:
        """Fold the session to its end: what lasts of it all, and the deltas of a turn that was begun; weigh it."""
        known, records = await self._news(lease.session)
        history = _fold(known.history, records)
        begun = next((turn for turn in history.open if turn.attempt > 0), None)
        if begun is not None:
            before = [r for r in records if r.offset <= begun.offset]
            records = before + await self._read(lease.session, after=begun.offset, deltas=True)
            history = _fold(known.history, records, dense_after=begun.offset)
        if not records:
            raise SessionGone(f"session {lease.session} was deleted")
        tail = records[-1].tail
        if tail.offset < lease.record.offset:
            # What is not pending in it may just not have come yet: it must not be taken for settled.
            raise Unavailable(f"what is read of the session ends before its input at {lease.record.offset}")
        if tail.pending.running and tail.kind is not Kind.DELTA:
            # Only the broker knows whether deltas after it may have expired (`Tail.lost`).
            last = await self._broker.log.last(lease.session)
            if last.offset == tail.offset:
                tail = last
            if tail.lost:
                history.apply(tail.next - 1, wire.Gap(from_=tail.offset + 1, to=tail.next - 1))
        return history, tail, known.weight + weight(*(r.body for r in records))

    async def _news(self, session: str) -> tuple[Known, list[Record]]:
        """What is known of the session, and its lasting records from there on."""
        if (known := self._recent.get(session)) is not None:
            # From the last record that is known, so that it is seen to be there.
            records = await self._read(session, after=known.tail.offset - 1, deltas=False)
            if goes_on(known, next(iter(records), None)):
                return known, records
            self._recent.forget(session)
        return NOTHING, await self._read(session, after=0, deltas=False)

    async def _read(self, session: str, *, after: int, deltas: bool) -> list[Record]:
        records: list[Record] = []
        while True:
            page = await self._broker.log.read(session, after=after, deltas=deltas, limit=_PAGE)
            records += page
            if len(page) < _PAGE:
                return records
            after = page[-1].offset


def _fold(known: History, records: Sequence[Record], *, dense_after: int | None = None) -> History:
    """Go on with records; above ``dense_after`` a jump in the offsets is a hole, below it only left-out deltas."""
    history = known.fork()
    before = 0
    for record in records:
        if dense_after is not None and record.offset > before + 1 and before >= dense_after:
            history.apply(record.offset - 1, wire.Gap(from_=before + 1, to=record.offset - 1))
        before = record.offset
        try:
            event = input_of(record) if record.kind.input else wire.decode(record.body)
        except InvalidInput:
            # It is rejected, with its reason, when its turn comes.
            continue
        history.apply(record.offset, event, time=record.time)
    return history
