"""The load of a run: sessions that come and go, their turns, and all that users do to them.

::

    async with open_load(place, book, dice, scale) as load:
        await load.drive(until=…)     # things are broken meanwhile
        await load.drain(patience=…)  # nothing is broken any more
"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskGroup
from msgspec import Struct

from agentrun import Client, ClientSettings, Unavailable, connect
from agentrun.broker import Tail
from agentrun.wire import OnBusy
from tests.chaos.clients import Clients, Order, Refused
from tests.chaos.evidence import Notebook, Unended
from tests.chaos.place import Place
from tests.chaos.readers import READERS, Reader
from tests.chaos.watch import Watch

_SEND_TIMEOUT = 8.0
"""Seconds after which a client tries again by itself, maybe another way."""
_SETTLES = 90.0
_TOLD_ALL = 600.0
"""Seconds in which readers come to a session's end while everything still breaks: gateways are frozen for a minute."""
"""Seconds a session has to come to rest before another begins in its place; it is waited for again in the end."""
_TOLD = 5.0
"""Seconds in which readers may find out that their session was deleted."""
_MOMENT = 12.0
"""Seconds for which a moment to stop, such as a takeover, is waited for."""
_BACK = 3000
"""Events a reader that comes late may have to catch up with; those of a session of hours are not all read each time."""
_FLOOD = 70
"""Turns at once that are more than a session may have waiting."""


class Scale(Struct, frozen=True, kw_only=True):
    """How much of everything. Times are in seconds, on average."""

    sessions: int = 60
    """At once."""
    readers: float = 1.7
    """Of a session, at once. Every twentieth session is read by ten times as many."""
    think: float = 2.0
    """Between the end of a turn and the next one."""
    life: float = 90.0
    """Of a session. Every tenth lives as long as the run."""
    longest: float = 60.0
    """What the longest turns take."""


class Talk:
    """A session: its users and its readers."""

    def __init__(self, load: Load, id: str, *, ends: float, readers: int, mortal: bool) -> None:
        self.id = id
        self.mortal = mortal
        self._ends = ends
        self._count = readers
        self._load = load
        self._dice = load.dice
        self._clients = load.clients
        self._watch = Watch(load.client, id, mortal=mortal)
        self._readers: list[Reader] = []
        self._joined = 0
        self._turns = 0
        self._end = 0
        """The highest offset we were told of."""
        self.over = anyio.Event()

    # ---------------------------------------------------------------------------------------------------------- a life

    async def live(self, until: float) -> None:
        """Have users and readers until its time or the run's has come, and know the outcome of all that users did."""
        self._ends = min(self._ends, until)
        self._load.group.start_soon(self._watch.run)
        async with anyio.create_task_group() as deeds, anyio.create_task_group() as loops:
            loops.start_soon(self._keep_readers)
            loops.start_soon(self._keep_answering, deeds)
            while self._goes_on:
                await self._next(deeds)
            loops.cancel_scope.cancel()
        if self.mortal:
            await self._clients.delete(self.id)
            await self.let_go(None, _TOLD)

    @property
    def _goes_on(self) -> bool:
        return time.monotonic() < self._ends

    async def _sleep(self, seconds: float) -> bool:
        """Sleep, and return whether it is still time to do something."""
        await anyio.sleep(max(0.0, min(seconds, self._ends - time.monotonic())))
        return self._goes_on

    async def _next(self, deeds: TaskGroup) -> None:
        """Send a turn, or several, do what users do meanwhile, and think."""
        dice = self._dice
        count = dice.choices((1, dice.randint(2, 5), _FLOOD), (85, 14.5, 0.5))[0]
        order = self._order()
        for _ in range(count):
            order = self._order() if count < _FLOOD else self._order("count 2 1")
            if not self.mortal:
                self._plan(order, deeds)
            await self._send(order)
            if not self._goes_on:
                return
        if dice.random() < 0.8:
            with anyio.move_on_after(max(0.0, min(self._load.scale.longest, self._ends - time.monotonic()))):
                await self._watch.until(lambda: self._watch.ended(order.turn) or self._refused(order))
        await self._sleep(dice.expovariate(1 / self._load.scale.think))

    def _refused(self, order: Order) -> bool:
        return order.on_busy == "reject" and order.turn not in self._watch.history.turns

    async def _send(self, order: Order) -> int | None:
        try:
            offset = await self._clients.send(self.id, order)
        except Refused:
            return None
        self._end = max(self._end, offset)
        return offset

    # --------------------------------------------------------------------------------------------------------- a turn

    def _order(self, text: str | None = None) -> Order:
        dice = self._dice
        text = text or _script(dice, self._load.scale.longest)
        policies: tuple[OnBusy, ...] = ("enqueue", "reject", "interrupt", "rollback", "steer")
        bounded = text.startswith("stubborn") or dice.random() < 0.05
        self._turns += 1
        return Order(
            turn=f"{self.id}-t{self._turns}",
            agent=self._load.any_agent(),
            text=text,
            on_busy=dice.choices(policies, (70, 8, 7, 5, 10))[0],
            deadline=dice.uniform(1.0, 15.0) if bounded else None,
        )

    def _plan(self, order: Order, deeds: TaskGroup) -> None:
        """Let users do something about a turn that is about to be sent."""
        dice = self._dice
        if dice.random() < 0.05:
            deeds.start_soon(self._send, order)
        if dice.random() < 0.05:
            deeds.start_soon(self._send_later, order)
        if dice.random() < 0.2:
            deeds.start_soon(self._stop, order)
        if dice.random() < (0.6 if order.text.startswith("steer") else 0.05):
            deeds.start_soon(self._steer, order)
        if dice.random() < 0.02:
            deeds.start_soon(self._clients.stop, self.id, f"never-sent-{dice.getrandbits(32):08x}")

    async def _send_later(self, order: Order) -> None:
        # Only what is known to have been accepted; what was refused is not tried again.
        if await self._comes(lambda: order.turn in self._watch.history.turns) and await self._sleep(
            self._dice.expovariate(1 / 5)
        ):
            await self._send(order)

    async def _stop(self, order: Order) -> None:
        dice, watch, turn = self._dice, self._watch, order.turn
        moments: list[tuple[int, Callable[[], bool], float]] = [
            (15, lambda: True, 0.02),
            (20, lambda: turn in watch.history.turns, 0.01),
            (10, lambda: watch.attempt(turn) > 0, 0.0),
            (30, lambda: watch.attempt(turn) > 0, 2.0),
            (10, lambda: turn in watch.called, 0.5),
            (15, lambda: watch.attempt(turn) > 1, 0.2),
            (10, lambda: watch.ended(turn), 1.0),
        ]
        _, moment, within = dice.choices(moments, [weight for weight, _, _ in moments])[0]
        if not await self._comes(moment) or not await self._sleep(dice.random() * within):
            return
        whole = dice.random() < 0.1
        async with anyio.create_task_group() as group:
            for _ in range(dice.choice((1, 1, 1, 2))):
                group.start_soon(self._clients.stop, self.id, None if whole else turn)

    async def _steer(self, order: Order) -> None:
        if not await self._comes(lambda: self._watch.attempt(order.turn) > 0):
            return
        for _ in range(self._dice.choice((1, 1, 2))):
            if not await self._sleep(self._dice.random()):
                return
            self._turns += 1
            steer = Order(
                turn=f"{self.id}-t{self._turns}",
                agent=order.agent,
                text=self._dice.choice(("left please", "count 3 10", "hurry")),
                on_busy="steer",
                steers=order.turn,
            )
            offset = await self._send(steer)
            if offset is not None:
                self._load.group.start_soon(self._clients.await_steering, self.id, steer, offset)

    async def _comes(self, moment: Callable[[], bool]) -> bool:
        """Wait for a moment; return whether it came, and it is still time to do something."""
        with anyio.move_on_after(max(0.0, min(_MOMENT, self._ends - time.monotonic()))):
            await self._watch.until(moment)
            return self._goes_on
        return False

    # -------------------------------------------------------------------------------------------------------- answers

    async def _keep_answering(self, deeds: TaskGroup) -> None:
        seen: set[tuple[str, str]] = set()
        while True:
            await self._watch.until(lambda: not seen.issuperset(self._watch.questions()))
            for turn, question in self._watch.questions():
                if (turn, question) not in seen:
                    seen.add((turn, question))
                    deeds.start_soon(self._answer_some_time, turn, question)

    async def _answer_some_time(self, turn: str, question: str) -> None:
        dice = self._dice
        longest = dice.choices((0.0, 1.0, 20.0, None), (20, 40, 25, 15))[0]
        if longest is None or not await self._sleep(dice.random() * longest):
            return  # in the end all questions are answered
        await self._answer(turn, question, at_once=dice.choice((1, 1, 1, 2)))

    async def _answer(self, turn: str, question: str, *, at_once: int = 1) -> None:
        async with anyio.create_task_group() as group:
            for _ in range(at_once):
                group.start_soon(self._clients.answer, self.id, turn, question, self._dice.random() < 0.8)

    # -------------------------------------------------------------------------------------------------------- readers

    async def _keep_readers(self) -> None:
        """Let readers come and go."""
        dice = self._dice
        while True:
            self._readers = [reader for reader in self._readers if not reader.ended.is_set()]
            if len(self._readers) < self._count:
                self._join()
            elif dice.random() < 0.3:
                dice.choice(self._readers).leave()
            await anyio.sleep(dice.expovariate(self._count / 5))

    def _join(self) -> None:
        dice = self._dice
        known = self._watch.history.offset
        first = max(0, known - _BACK)
        self._joined += 1
        kind = dice.choice(READERS)
        reader = kind(
            self._load.place,
            self._load.client,
            self._load.book,
            random.Random(dice.getrandbits(64)),
            name=f"{self.id}-r{self._joined}",
            session=self.id,
            after=dice.choice((first, first, dice.randint(first, known))),
            slow=dice.choice((0.0,) * 6 + (0.2, 1.0)),
            mortal=self.mortal,
        )
        self._readers.append(reader)
        self._load.group.start_soon(reader.run)

    # -------------------------------------------------------------------------------------------------------- its end

    async def settle(self, patience: float) -> Tail | None:
        """Answer what is asked until nothing is pending, and return the session's end; None if that does not come."""
        with anyio.move_on_after(patience):
            while True:
                for turn, question in self._watch.questions():
                    await self._answer(turn, question)
                try:
                    tail = await self._load.client.broker.log.last(self.id)
                except Unavailable:
                    tail = Tail()
                if tail.offset >= self._end and not tail.pending:
                    return tail
                await anyio.sleep(0.3)
        return None

    async def let_go(self, upto: int | None, patience: float) -> None:
        """Let all readers read up to an offset and leave; those that do not get there leave as they are."""
        if upto is not None:
            for reader in self._readers:
                reader.finish(upto)
        with anyio.move_on_after(patience):
            for reader in self._readers:
                await reader.ended.wait()
        for reader in self._readers:
            reader.leave()
            await reader.ended.wait()
        self._watch.close()
        self.over.set()


class Load:
    """All of it; made by `open_load`.

    Attributes:
        place: Where.
        book: For notes.
        dice: What chance decides.
        scale: How much.
        client: The library's.
        clients: The users'.
        group: Runs what outlives a session's users: readers, and who waits for something.
    """

    def __init__(
        self, place: Place, book: Notebook, dice: random.Random, scale: Scale, *, client: Client, group: TaskGroup
    ) -> None:
        self.place = place
        self.book = book
        self.dice = dice
        self.scale = scale
        self.client = client
        self.clients = Clients(place, client, book, dice)
        self.group = group
        self._prefix = f"s{dice.getrandbits(32):08x}"
        self._talks = 0
        self._unsettled: list[Talk] = []
        self._leaving: set[Talk] = set()

    def any_agent(self) -> str:
        """Whom a turn is for; mostly the first."""
        return self.dice.choice((self.place.agents[0], *self.place.agents))

    async def drive(self, *, until: float) -> None:
        """Keep up the load until a time of the monotonic clock; nothing is sent any more when it returns.

        Raises:
            AssertionError: A client or reader was told what it never may be told.
        """
        async with anyio.create_task_group() as group:
            for place in range(self.scale.sessions):
                group.start_soon(self._fill, place, until)

    async def _fill(self, place: int, until: float) -> None:
        """Have one session after another."""
        dice, scale = self.dice, self.scale
        await anyio.sleep(max(0.0, min(dice.random() * scale.think, until - time.monotonic())))
        while (now := time.monotonic()) < until:
            mortal = place % 10 != 0 and dice.random() < 0.03
            lives = dice.expovariate(1 / scale.life) + 2.0
            readers = round(scale.readers * 10 if place % 20 == 0 else scale.readers * dice.uniform(0.5, 1.5))
            self._talks += 1
            talk = Talk(
                self,
                f"{self._prefix}-{self._talks}",
                ends=until if place % 10 == 0 else now + lives * (0.3 if mortal else 1.0),
                readers=max(readers, 1),
                mortal=mortal,
            )
            await talk.live(until)
            if talk.mortal:
                continue
            tail = await talk.settle(min(_SETTLES, until - time.monotonic()))
            if tail is None:
                self._unsettled.append(talk)
            else:
                self._leaving.add(talk)
                self.group.start_soon(self._let_go, talk, tail.offset)

    async def _let_go(self, talk: Talk, upto: int) -> None:
        await talk.let_go(upto, _TOLD_ALL)
        self._leaving.discard(talk)

    async def drain(self, *, patience: float) -> None:
        """Wait until all sessions are quiet, and let all readers read to the end and leave.

        A session that is not quiet after ``patience`` seconds is noted; its readers read to where it is then. Readers
        have as long again.
        """
        async with anyio.create_task_group() as group:
            for talk in self._unsettled:
                group.start_soon(self._end, talk, patience)
            for talk in self._leaving:
                group.start_soon(talk.over.wait)

    async def _end(self, talk: Talk, patience: float) -> None:
        tail = await talk.settle(patience)
        if tail is None:
            tail = await self._last(talk.id)
            self.book.note(Unended(session=talk.id, pending=str(tail.pending)))
        await talk.let_go(tail.offset, patience)

    async def _last(self, session: str) -> Tail:
        while True:
            try:
                return await self.client.broker.log.last(session)
            except Unavailable:
                await anyio.sleep(0.5)


@asynccontextmanager
async def open_load(place: Place, book: Notebook, dice: random.Random, scale: Scale) -> AsyncGenerator[Load]:
    """Connect, and give the load of a run. What goes wrong in any task of it ends the context."""
    settings = ClientSettings(send_timeout=_SEND_TIMEOUT)
    async with (
        connect(place.broker, namespace=place.namespace, settings=settings) as client,
        anyio.create_task_group() as group,
    ):
        yield Load(place, book, dice, scale, client=client, group=group)
        group.cancel_scope.cancel()


def _script(dice: random.Random, longest: float) -> str:
    """What a turn is to do: mostly short, rarely long, of all sorts."""
    n, ms = dice.randint(1, 60), dice.choice((0, 5, 20, 50))
    few = dice.randint(1, 20)
    scripts = {
        f"count {dice.randint(1, 5)} 0": 10,
        f"count {n} {ms}": 40,
        f"count {max(1, round(dice.random() * longest * 10))} 100": 1,
        f"silent {few} {ms} {dice.uniform(0.2, 5):.2f}": 8,
        f"tool {few} {ms} {dice.uniform(0.1, 4):.2f}": 10,
        f"block {n} {ms} {dice.uniform(0.1, 3):.2f}": 1,
        f"flaky {n} {ms} {dice.choice((20, 50))}": 5,
        f"approve {few} {ms}": 8,
        f"steer {n} 50": 8,
        f"stubborn {dice.choice((0, 200, 3000))}": 3,
        f"retry {dice.uniform(0.0, 3.0):.2f}": 3,
        "fail": 3,
        f"hello, I am user {dice.getrandbits(16)} and I talk": 3,
    }
    return dice.choices(list(scripts), list(scripts.values()))[0]
