"""Workers that look after each other: a dead one's turns move in seconds, however long the lease is (design.md, D22).

Each worker announces itself, and what it holds, several times a second, from a thread of its own. One that has gone
silent is taken for dead by its peers; one of them writes `turn.lost` into the log of each turn that it was running, by
which it is fenced off, and hands what it held back to the queue. What nobody alive had heard of is looked for
(`agentrun.orphans`). A wrong guess costs an attempt and nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

import anyio
import msgspec
from msgspec import Struct

from agentrun import wire
from agentrun.broker import Broker, Hold, Kind, Record
from agentrun.errors import AgentrunError, Conflict, InvalidInput
from agentrun.orphans import Orphans, wrote_since

log = logging.getLogger("agentrun.worker")

PEERS = "peers"
"""The signal channel of announcements."""

_BEATS = 5
"""Announcements in the time after which a silent worker is taken for dead."""
_WHOLE = 20
"""Announcements after which one repeats all that is held, though nobody has asked."""
_RANKS = 8
"""Peers that try, one after the other, should the first be dead too."""
_LOOKERS = 3
"""Workers that look for what nobody holds, those that have been there for longest: the first may be dying too."""
_TRIES = 5
_AT_ONCE = 8
_PAGE = 1000


class Announcement(Struct, frozen=True, omit_defaults=True):
    """What a worker says: that it is there, and what has changed of what it holds."""

    id: str
    """Of this process's worker; names may be used again."""
    worker: str
    new: list[Hold] = []
    done: list[str] = []
    """Tokens."""
    whole: bool = False
    """Whether ``new`` is all that is held."""
    leaves: bool = False
    age: float = 0.0
    """Seconds since it began."""
    number: int = 0
    """How many it has made before: what was lost on the way shows."""
    asks: bool = False
    """Whether it has missed some of another's: everybody is to say all that is held."""
    agents: list[str] = []
    """Whom it runs; said with what is whole."""


_decoder = msgspec.json.Decoder(Announcement)


class Presence:
    """Announces a worker from a thread of its own, whatever the event loop does.

    Args:
        announce: Publishes; any thread, never blocks.
        worker: The worker's name.
        agents: Whom it runs.
        every: Seconds between two announcements; what is new is announced at once after `poke`.
        holds: What the worker holds now; called from the thread.
        alive: Whether it still works; while it does not, nothing is announced.
    """

    def __init__(
        self,
        announce: Callable[[bytes], None],
        worker: str,
        *,
        agents: Sequence[str],
        every: float,
        holds: Callable[[], Iterable[Hold]],
        alive: Callable[[], bool],
    ) -> None:
        self.id = uuid.uuid4().hex[:16]
        self._announce = announce
        self._worker = worker
        self._agents = list(agents)
        self._every = every
        self._holds = holds
        self._alive = alive
        self._told: dict[str, Hold] = {}
        self._until_whole = 0
        self._number = 0
        self.asks = False
        """Whether others are asked to say all that they hold."""
        self.began = time.monotonic()
        self._poked = threading.Event()
        self._stop = False

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, name="agentrun-presence", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stop = True
        self._poked.set()
        self._thread.join()

    def poke(self) -> None:
        """Announce now what has changed."""
        self._poked.set()

    def tell_all(self) -> None:
        """Let the next announcement name all that is held, not only what has changed."""
        self._until_whole = 0

    def _run(self) -> None:
        while not self._stop:
            if self._alive():
                self._say()
            self._poked.wait(self._every)
            self._poked.clear()
        self._say(leaves=True)

    def _say(self, *, leaves: bool = False) -> None:
        held = {hold.token: hold for hold in self._holds()}
        whole = self._until_whole <= 0
        self._until_whole = _WHOLE if whole else self._until_whole - 1
        said = Announcement(
            self.id,
            self._worker,
            new=[hold for token, hold in held.items() if whole or token not in self._told],
            done=[] if whole else [token for token in self._told if token not in held],
            whole=whole,
            leaves=leaves,
            age=time.monotonic() - self.began,
            number=self._number,
            asks=self.asks,
            agents=self._agents if whole else [],
        )
        self._number += 1
        self._told = held
        self._announce(msgspec.json.encode(said))


class _Peer:
    """Another worker, as it announced itself."""

    def __init__(self, said: Announcement) -> None:
        self.id = said.id
        self.worker = said.worker
        self.agents: list[str] = []
        self.holds: dict[str, Hold] = {}
        self.heard = self.began = 0.0
        self.known = False
        """Whether ``holds`` is all that it has said that it holds."""
        self._next = 0

    def take(self, said: Announcement, now: float) -> None:
        self.heard = now
        self.began = now - said.age
        self.known = said.whole or (self.known and said.number == self._next)
        self._next = said.number + 1
        if said.whole:
            self.holds = {}
            self.agents = said.agents
        self.holds.update((hold.token, hold) for hold in said.new)
        for token in said.done:
            self.holds.pop(token, None)


class Peers:
    """Listens to the other workers, and hands back what dead ones held.

    Silence counts only while this worker hears itself: who does not is cut off, or was stopped, and knows nothing of
    others.

    Args:
        broker: The worker's.
        worker: Its name, for the log.
        lost_after: Seconds of silence.
        agents: Whom it runs.
        holds: What this worker holds; called from another thread.
        alive: Whether this worker still works; called from another thread.
    """

    def __init__(
        self,
        broker: Broker,
        worker: str,
        *,
        lost_after: float,
        agents: Iterable[str],
        holds: Callable[[], Iterable[Hold]],
        alive: Callable[[], bool],
    ) -> None:
        self._broker = broker
        self._worker = worker
        self._lost_after = lost_after
        self._names = list(agents)
        self._holds = holds
        self._presence = Presence(
            functools.partial(broker.signals.announce, PEERS),
            worker,
            agents=self._names,
            every=lost_after / _BEATS,
            holds=holds,
            alive=alive,
        )
        self._me = self._presence.id
        self._peers: dict[str, _Peer] = {}
        self._heard_me = 0.0
        self._hearing_since = 0.0
        self._slots = anyio.Semaphore(_AT_ONCE)
        self._orphans = Orphans(
            broker,
            every=lost_after,
            places=self._places,
            held=self._held_by_the_living,
            hand_over=functools.partial(self._hand_back, dead=None),
        )

    def poke(self) -> None:
        """Announce at once what this worker has been given."""
        self._presence.poke()

    async def run(self) -> None:
        """Be seen, and look after the others, for ever."""
        with self._presence:
            async with self._broker.signals.listen(PEERS, self._hear), anyio.create_task_group() as rescues:
                rescues.start_soon(self._orphans.run)
                while True:
                    await anyio.sleep(self._lost_after / _BEATS / 2)
                    self._presence.asks = not self._knows_all()
                    for dead in self._silent(time.monotonic()):
                        rescues.start_soon(self._rescue, dead)

    async def _hear(self, body: bytes) -> None:
        try:
            said = _decoder.decode(body)
        except msgspec.MsgspecError as error:
            log.warning("an announcement that is not understood: %s", error)
            return
        now = time.monotonic()
        if said.id == self._me:
            if now - self._heard_me > self._lost_after / 2:
                self._hearing_since = now
            self._heard_me = now
        elif said.leaves:
            self._peers.pop(said.id, None)
        else:
            peer = self._peers.get(said.id)
            if peer is None:
                peer = self._peers[said.id] = _Peer(said)
                self._presence.tell_all()  # it may be new, and know nothing of us
            peer.take(said, now)
            if said.asks:
                self._presence.tell_all()

    def _silent(self, now: float) -> list[_Peer]:
        """Take out and return the peers that have been silent for too long."""
        if now - self._heard_me > self._lost_after / 2:
            return []
        dead = [p for p in self._peers.values() if now - max(p.heard, self._hearing_since) > self._lost_after]
        for peer in dead:
            del self._peers[peer.id]
        return dead

    def _rank(self, dead: _Peer) -> int:
        """This worker's place among those who may look after a dead one, the same as seen by all."""

        def lot(id: str) -> bytes:
            return hashlib.blake2b(f"{dead.id} {id}".encode(), digest_size=8).digest()

        return sum(lot(other) < lot(self._me) for other in self._peers)

    async def _my_turn(self, dead: _Peer) -> bool:
        """Wait for those who are to try first; False where it was only silent, or enough others are to."""
        waited = 0
        # Looked at again each time: of those before us some may be found dead meanwhile.
        while waited < self._rank(dead):
            if waited == _RANKS:
                return False
            await anyio.sleep(self._lost_after / 4)
            waited += 1
        return dead.id not in self._peers

    async def _rescue(self, dead: _Peer) -> None:
        if not dead.holds or not await self._my_turn(dead):
            return
        log.warning(
            "worker %s has been silent for %.1f s: handing over what it held, %d inputs",
            dead.worker,
            self._lost_after,
            len(dead.holds),
        )
        async with anyio.create_task_group() as group:
            for hold in dead.holds.values():
                group.start_soon(self._hand_back, hold, dead)

    async def _hand_back(self, hold: Hold, dead: _Peer | None) -> None:
        try:
            async with self._slots:
                # It may have been given to somebody since it was found to be so.
                lost = not self._is_held(hold) and await self._is_lost(hold, dead)
            for _ in range(_TRIES if lost else 0):
                async with self._slots:
                    await self._broker.turns.hand_back(hold)
                # It may be given to a worker that is dead as well: one that was stopped still waits at the queue.
                await anyio.sleep(self._lost_after / 2)
                if self._is_held(hold):
                    return
                async with self._slots:
                    tail = await self._broker.log.last(hold.session)
                if tail.pending.running or not tail.pending.ready(hold.offset):
                    return
        except AgentrunError as error:
            log.warning("session %s: %s; what a dead worker held is handed over later", hold.session, error)

    async def _is_lost(self, hold: Hold, dead: _Peer | None) -> bool:
        """Whether the input is to be handed back; if ``dead`` or nobody was running it, that is in the log then."""
        for _ in range(_TRIES):
            tail = await self._broker.log.last(hold.session)
            if hold.offset not in tail.pending:
                return False
            if not (tail.pending.running and tail.pending.ready(hold.offset)):
                return True  # it was not begun
            started = await self._started(hold)
            if started is None or (dead is not None and not is_lease(started.lease, hold.token)):
                return False  # somebody else has it
            lost = wire.TurnLost(turn=started.turn, attempt=started.attempt, worker=started.worker, by=self._worker)
            try:
                await self._broker.log.append(
                    hold.session, wire.encode(lost), kind=Kind.EVENT, after=tail, pending=tail.pending.release()
                )
            except Conflict:
                alive = dead is not None and dead.id in self._peers
                if alive or await wrote_since(self._broker.log, hold.session, tail):
                    return False
                continue
            return True
        return False

    # ------------------------------------------------------------------------------- what nobody alive has heard of

    def _knows_all(self) -> bool:
        return all(peer.known for peer in self._peers.values())

    def _places(self) -> Mapping[str, int]:
        """The agents whose inputs this worker looks for, and how many others that run them have been there for longer.

        Two may take themselves for the oldest, but never is there none. Who may not know what others hold leaves it.
        """
        if time.monotonic() - self._heard_me > self._lost_after / 2 or not self._knows_all():
            return {}
        older = [peer for peer in self._peers.values() if peer.began < self._presence.began]
        places = {agent: sum(agent in peer.agents for peer in older) for agent in self._names}
        return {agent: place for agent, place in places.items() if place < _LOOKERS}

    def _is_held(self, hold: Hold) -> bool:
        return (hold.session, hold.offset) in self._held_by_the_living()

    def _held_by_the_living(self) -> set[tuple[str, int]]:
        holds = itertools.chain(self._holds(), *(peer.holds.values() for peer in self._peers.values()))
        return {(hold.session, hold.offset) for hold in holds}

    # ----------------------------------------------------------------------------------------------- what the log says

    async def _started(self, hold: Hold) -> wire.TurnStarted | None:
        """The last claim of the session."""
        found: wire.TurnStarted | None = None
        after = hold.offset
        while True:
            records = await self._broker.log.read(hold.session, after=after, deltas=False, limit=_PAGE)
            for record in records:
                event = _event(record)
                found = event if isinstance(event, wire.TurnStarted) else found
            if len(records) < _PAGE:
                return found
            after = records[-1].offset


def _event(record: Record) -> wire.AnyEvent | None:
    try:
        return None if record.kind.input else wire.decode(record.body)
    except InvalidInput:
        return None


def new_lease(token: str) -> str:
    """What stands in the log for a lease that was taken: different each time, and told from the token by `is_lease`."""
    return _digest(token) + uuid.uuid4().hex[:8]


def is_lease(lease: str, token: str) -> bool:
    """Whether `new_lease` made ``lease`` of this token."""
    return lease.startswith(_digest(token))


def _digest(token: str) -> str:
    # The token itself is not for readers: with it the broker can be told to take the turn away.
    return hashlib.blake2b(token.encode(), digest_size=12).hexdigest()
