"""Mutants of the queue and of the live requests."""

# ruff: noqa: D102, D106 - what is broken stands in the docstring of each mutant, once

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import anyio
from anyio.lowlevel import checkpoint

from agentrun.broker import Handler, Hold
from agentrun.brokers.memory import MemoryQueue, MemorySignals
from agentrun.brokers.memory_state import MemoryLease, MemoryState, QueuedInput, StoredSession
from agentrun.testing.mutants_base import Mutant, Parts, mutant

MUTANTS: list[Mutant] = []


@mutant(MUTANTS, "Q2_turns_run_one_at_a_time_in_order")
class LeasesWhatIsNotReady(Parts):
    """Gives out any input, whatever runs in its session."""

    class State(MemoryState):
        def _ready(self, session: StoredSession, item: QueuedInput) -> bool:
            return True

        def _free_at(self, session: StoredSession, item: QueuedInput) -> float:
            return item.due


@mutant(MUTANTS, "Q2_turns_run_one_at_a_time_in_order")
class LeasesTheLastFirst(Parts):
    """One at a time, but the newest."""

    class State(MemoryState):
        def _ready(self, session: StoredSession, item: QueuedInput) -> bool:
            return item.record.offset == (session.pending[0] if session.pending.running else session.pending[-1]).offset


@mutant(MUTANTS, "Q2_nacked_turn_is_not_overtaken")
class LetsOthersOvertakeANackedTurn(Parts):
    """Gives out the next input while the head waits for its delay."""

    class State(MemoryState):
        def _ready(self, session: StoredSession, item: QueuedInput) -> bool:
            head = self.agent("agent").items.get((item.session, session.pending[0].offset))
            waits = head is not None and head.lease is None and head.due > self.clock()
            return waits or super()._ready(session, item)


@mutant(MUTANTS, "Q2_settled_input_is_never_leased")
class LeasesWhatIsSettled(Parts):
    """Asks the queue and not the log what is pending."""

    class State(MemoryState):
        def _settled(self, session: StoredSession, item: QueuedInput) -> bool:
            return False

        def _ready(self, session: StoredSession, item: QueuedInput) -> bool:
            return item.record.offset not in session.pending or super()._ready(session, item)


@mutant(MUTANTS, "Q2_parked_head_waits_for_its_waker")
class WakesNoParkedHead(Parts):
    """Holds a parked head's waker back with everything else."""

    class State(MemoryState):
        def _ready(self, session: StoredSession, item: QueuedInput) -> bool:
            return session.pending[0].offset == item.record.offset


@mutant(MUTANTS, "Q3_busy_session_delays_no_other")
class QueuesInOneLine(Parts):
    """Gives out nothing behind an input that is not ready."""

    class State(MemoryState):
        def take(self, name: str) -> MemoryLease | float:
            for item in self.agent(name).items.values():
                session = self.session(item.session)
                if not self._settled(session, item) and not self._ready(session, item):
                    return self.clock() + 1
            return super().take(name)


@mutant(MUTANTS, "Q4_lease_runs_out")
class LeasesForEver(Parts):
    """Never gives out again what a dead worker held."""

    class State(MemoryState):
        def _free_at(self, session: StoredSession, item: QueuedInput) -> float:
            return float("inf") if item.lease else super()._free_at(session, item)


@mutant(MUTANTS, "Q4_agents_have_their_own_lease_time")
class HasOneLeaseTimeForAll(Parts):
    """Says what lease time an agent has, and uses another."""

    class Turns(MemoryQueue):
        async def lease(self, agent: str, *, wait: float) -> MemoryLease | None:
            self.state.agent(agent).lease_ttl = self.state.capabilities.lease_ttl
            return await super().lease(agent, wait=wait)


class _LeaseOf:
    """Makes leases of another class."""

    class Turns(MemoryQueue):
        Made: type[MemoryLease] = MemoryLease

        async def lease(self, agent: str, *, wait: float) -> MemoryLease | None:
            lease = await super().lease(agent, wait=wait)
            if lease:
                lease.__class__ = self.Made
            return lease


@mutant(MUTANTS, "Q5_extended_lease_is_given_out_once")
class IgnoresExtend(Parts):
    """Takes no notice of heartbeats."""

    class Turns(_LeaseOf.Turns):
        class Made(MemoryLease):
            def extend(self) -> None:
                pass


@mutant(MUTANTS, "Q6_ack_is_for_ever")
class ForgetsAcks(Parts):
    """Gives out again what was acked."""

    class Turns(_LeaseOf.Turns):
        class Made(MemoryLease):
            async def ack(self) -> None:
                await checkpoint()


@mutant(MUTANTS, "Q6_nack_waits_for_its_delay")
class IgnoresTheDelay(Parts):
    """Gives out at once what was handed back for a time."""

    class Turns(_LeaseOf.Turns):
        class Made(MemoryLease):
            async def nack(self, *, delay: float = 0.0) -> None:
                await super().nack()


@mutant(MUTANTS, "Q7_lease_waits_no_longer_than_asked")
class WaitsTooLong(Parts):
    """Comes back from an empty queue in its own time."""

    class Turns(MemoryQueue):
        async def lease(self, agent: str, *, wait: float) -> MemoryLease | None:
            return await super().lease(agent, wait=wait + 2)


@mutant(MUTANTS, "Q8_waiting_lease_wakes_up")
class SleepsWhileItWaits(Parts):
    """Looks once in two seconds."""

    class Turns(MemoryQueue):
        async def lease(self, agent: str, *, wait: float) -> MemoryLease | None:
            with anyio.move_on_after(wait):
                if lease := await super().lease(agent, wait=0):
                    return lease
                await anyio.sleep(2)
            return None


@mutant(MUTANTS, "Q9_dead_holder_s_input_is_handed_back")
class KeepsWhatIsHandedBack(Parts):
    """Lets the dead holder's lease run out instead."""

    class Turns(MemoryQueue):
        async def hand_back(self, hold: Hold) -> None:
            await checkpoint()


@mutant(MUTANTS, "Q10_given_out_names_what_the_dead_hold")
class KnowsOnlyItsOwn(Parts):
    """Names what the asking connection itself was given."""

    class Turns(MemoryQueue):
        def __init__(self, state: MemoryState) -> None:
            super().__init__(state)
            self.mine: set[str] = set()

        async def lease(self, agent: str, *, wait: float) -> MemoryLease | None:
            lease = await super().lease(agent, wait=wait)
            self.mine |= {lease.token} if lease else set()
            return lease

        async def given_out(self, agent: str) -> Sequence[Hold]:
            return [hold for hold in await super().given_out(agent) if hold.token in self.mine]


@mutant(MUTANTS, "S1_every_listener_is_reached")
class ReachesOneListener(Parts):
    """Gives a request to one listener, as a queue would."""

    class Signals(MemorySignals):
        @asynccontextmanager
        async def listen(self, channel: str, handler: Handler) -> AsyncGenerator[None]:
            async def only_the_first(body: bytes) -> bytes | None:
                mine = self.state.listeners[channel][0].handler is only_the_first
                return await handler(body) if mine else None

            async with super().listen(channel, only_the_first):
                yield


@mutant(MUTANTS, "S2_no_listener_is_told")
class WaitsForAnybody(Parts):
    """Tells of no listener only when the time is over."""

    class Signals(MemorySignals):
        async def request(self, channel: str, body: bytes, *, timeout: float) -> bytes:
            if channel not in self.state.listeners:
                await anyio.sleep(timeout)
            return await super().request(channel, body, timeout=timeout)


@mutant(MUTANTS, "S3_channels_are_apart")
class MixesChannels(Parts):
    """Takes channels that differ in case for one."""

    class Signals(MemorySignals):
        @asynccontextmanager
        async def listen(self, channel: str, handler: Handler) -> AsyncGenerator[None]:
            async with super().listen(channel.lower(), handler):
                yield

        async def request(self, channel: str, body: bytes, *, timeout: float) -> bytes:
            return await super().request(channel.lower(), body, timeout=timeout)


@mutant(MUTANTS, "S4_handler_may_still_answer")
class CutsHandlersOff(Parts):
    """Ends the handlers with their listener."""

    class Signals(MemorySignals):
        @asynccontextmanager
        async def listen(self, channel: str, handler: Handler) -> AsyncGenerator[None]:
            async with super().listen(channel, handler):
                tasks = self.state.listeners[channel][-1].tasks
                yield
                tasks.cancel_scope.cancel()


@mutant(MUTANTS, "S5_announcement_reaches_all")
class AnnouncesToOne(Parts):
    """Tells only who came first."""

    class Signals(MemorySignals):
        def announce(self, channel: str, body: bytes) -> None:
            first = self.state.listeners[channel][0]
            assert self.state.loop is not None
            self.state.loop.call_soon_threadsafe(first.told.send_nowait, body)
