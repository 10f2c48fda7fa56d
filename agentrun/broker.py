"""The seam to brokers: three Protocols and the contract they keep, in words.

Brokers move bytes. They know no agents beyond a routing name, no JSON and no telemetry. Everything a broker must
know of a session's state to keep order is in one small value, `Pending`, which the caller computes, the broker stores
with each record and hands back with the session's end (`Tail`).

The contract (each line is a check in `agentrun.testing`)
=========================================================

Log
  L1  *Compare-and-append.* `SessionLog.append` stores a record if and only if the session's end is still ``after``;
      else `Conflict`, and nothing is stored. An end that deltas came after is past also when they have expired since.
      It is durable when it returns (if ``capabilities.durable``).
  L2  *Dense offsets.* The record gets the offset ``after.next``: 1, 2, 3 … The only jumps there ever are follow a
      `Tail` with ``lost`` > 0: that of the session's end or, from who restores a log that has holes, a higher one.
  L3  *Unknown outcomes resolve inside.* A lost answer to an append is settled by the broker before it returns: never
      a record twice, never a `Conflict` over our own record. `Unavailable` after ``timeout`` means: not known.
  L4  *Inputs are idempotent.* An append with a ``dedupe`` key that the session stored within
      ``capabilities.dedupe_window`` raises `Duplicate` with the offset of the first one (a caller whose ``after``
      is out of date may get `Conflict` first).
  L5  *Reading.* ``after`` is exclusive. `read` pages what is stored; `follow` gives history, then live records, in
      offset order, without loss or duplicate at the seam or after a broken connection. What has expired or was
      trimmed shows as a jump in the offsets, never as anything else. A deleted session begins at 1 again; who
      followed it gets `SessionGone`, at the latest when it is written to again, and none of the new records. Nobody
      gets it of a session that is there, whatever a server that lags behind may know of it.
  L6  *Expiry.* Records of kind DELTA may disappear ``capabilities.delta_ttl`` seconds after they were stored, oldest
      first, all others not. A session whose last deltas may have expired has ``lost`` in its tail (offsets are never
      given out twice).
  L7  *Fence.* There is no other: an owner that was superseded meets `Conflict`, reads what came, and finds out.

Queue
  Q1  An append of kind TURN both shows the record to readers and queues it for its ``agent``, in one step.
  Q2  *Order.* An input is leased only when `Pending.ready` says so of its session's end: at most one live lease per
      session, in the order of the pending list; a turn that is handed back blocks its session until it is leased
      again. An input that is no longer pending is never leased. (While the head is parked and its lease not settled
      yet, a broker that keeps no account of leases per session may lease a waker beside it; L1 decides between them.)
  Q3  *Side by side.* A busy session never delays another, however many inputs it has waiting.
  Q4  *Expiry.* A lease that is not extended for ``lease_ttl`` seconds is given out again (to anyone). The old holder
      is stopped by L1, not by the queue.
  Q5  `Lease.extend` resets the clock; it may be called from any thread and never blocks.
  Q6  `Lease.nack` with a delay: not leased again before it has passed; without: at once. `Lease.ack`: never again.
  Q7  `TurnQueue.lease` waits at most ``wait`` seconds and gives one input, so that a caller takes one only into a free
      slot. It may return None early.
  Q8  When the pending list changes so that a waiting input becomes ready, it is leased promptly (well within a
      second), without a poll by the caller.
  Q9  `TurnQueue.hand_back` gives out again, at once, what another connection holds and will not settle: `Lease.token`
      and `TurnQueue.early` name it. Whoever has been given it since loses it as well; one that was settled stays so.
  Q10 `TurnQueue.given_out` names what connections have been given and have not settled, also those that are gone. It
      is asked every few seconds, by three connections at most: what it named before should cost little.

Signals
  S1  `Signals.request` reaches every listener of the channel that is connected, and returns the first reply.
  S2  No listener: `NoListener`, at once and not after the timeout (if ``capabilities.detects_no_listener``).
  S3  Channels are apart. Nothing is remembered: what must not be lost is in the log.
  S4  A handler that runs when its `Signals.listen` context closes may still answer, for `HANDLER_GRACE` seconds.
  S5  `Signals.announce` reaches every listener that is connected, in order, from any thread, and waits for nobody.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol, Self, runtime_checkable

from msgspec import Struct

from agentrun.errors import InvalidInput


class Kind(enum.StrEnum):
    """What a record is to the broker: where it goes, who may append it, how long it stays."""

    TURN = "in.turn"
    """May need a worker: a turn, an answer. Queued for an agent. Anyone may append it."""
    CANCEL = "in.cancel"
    """Must be remembered but needs no worker: a stop. Anyone may append it."""
    DELTA = "out.delta"
    """Tokens and progress; expires early. The lease holder appends it."""
    EVENT = "out.turn"
    """Everything else that the lease holder appends."""

    @property
    def input(self) -> bool:
        """Whether anyone may append it."""
        return self in (Kind.TURN, Kind.CANCEL)


class Entry(NamedTuple):
    """One unsettled input of a session."""

    offset: int
    flag: str = ""
    """``a`` the head is being run; ``p`` the head is parked (waits for an input that wakes it, or for a time);
    ``w`` this input wakes a parked head; empty: it waits."""


class Pending(tuple[Entry, ...]):
    """The unsettled inputs of a session, the head first. A value: every change gives a new one.

    Only the head may be leased. It is ready when it is waiting, running (its lease ran out, say) or parked; while it
    is parked, an input flagged ``w`` is ready as well and, when claimed, takes the head's place: it now carries the
    turn that the parked head stood for.

    The text form, as it stands in headers: ``13p,15,17w``.
    """

    __slots__ = ()

    @property
    def head(self) -> Entry | None:
        """The input that may be leased, if there is one."""
        return self[0] if self else None

    @property
    def running(self) -> bool:
        """Whether somebody has claimed the head and not given it back (or died with it)."""
        return bool(self) and self[0].flag == "a"

    @property
    def parked(self) -> bool:
        """Whether the head waits for an answer, a stop, or a time."""
        return bool(self) and self[0].flag == "p"

    def __contains__(self, offset: object) -> bool:
        return any(e.offset == offset for e in self)

    def ready(self, offset: int) -> bool:
        """Whether the input at ``offset`` may be leased now."""
        if not self:
            return False
        if self[0].offset == offset:
            return True
        return self.parked and any(e.offset == offset and e.flag == "w" for e in self[1:])

    def add(self, offset: int, *, wakes: bool = False) -> Pending:
        """With a new input at the end; ``wakes`` if it concerns a parked head."""
        return Pending((*self, Entry(offset, "w" if wakes else "")))

    def claim(self, offset: int) -> Pending:
        """With the ready input at ``offset`` as the running head.

        Raises:
            InvalidInput: It is not ready.
        """
        if not self.ready(offset):
            raise InvalidInput(f"input {offset} cannot be claimed, pending is [{self}]")
        return Pending((Entry(offset, "a"), *(e for e in self[1:] if e.offset != offset)))

    def park(self) -> Pending:
        """With the head waiting for a waker."""
        return Pending((Entry(self[0].offset, "p"), *self[1:]))

    def release(self) -> Pending:
        """With the head given back: to be leased again at once."""
        return Pending((Entry(self[0].offset), *self[1:]))

    def settle(self, *offsets: int) -> Pending:
        """Without these inputs."""
        return Pending(e for e in self if e.offset not in offsets)

    def __str__(self) -> str:
        return ",".join(f"{e.offset}{e.flag}" for e in self)

    @classmethod
    def parse(cls, text: str) -> Pending:
        """Read the text form.

        Raises:
            InvalidInput: It is not one.
        """
        try:
            return cls(
                Entry(int(item[:-1]), item[-1]) if item[-1] in "apw" else Entry(int(item))
                for item in text.split(",")
                if item
            )
        except (ValueError, IndexError) as error:
            raise InvalidInput(f"not a list of pending inputs such as '13p,15,17w': {text!r}") from error


class Tail(Struct, frozen=True):
    """A session's end: the offset of its last record and what is pending after it. An empty session has offset 0."""

    offset: int = 0
    pending: Pending = Pending()
    cursor: int = 0
    """The broker's own position of that record, such as a stream sequence. 0: none."""
    time: float = 0.0
    """When it was stored, in seconds since the epoch, by the broker's clock; from `append` it may be an estimate."""
    lost: int = 0
    """How many offsets may have been given out after it to deltas that have expired since."""
    kind: Kind | None = None
    kept: int | None = None
    """The offset of the last record up to here that is no delta, if the broker keeps account of that."""

    @property
    def next(self) -> int:
        """The offset the next record gets."""
        return self.offset + self.lost + 1


class Record(Struct, frozen=True):
    """One record of a session's log."""

    offset: int
    kind: Kind
    body: bytes
    time: float = 0.0
    """Seconds since the epoch, by the broker's clock."""
    cursor: int = 0
    """The broker's own position; a reader may keep it as a hint for where to go on (see `SessionLog.follow`)."""
    pending: Pending = Pending()
    agent: str | None = None
    """Records of kind TURN: whom it is queued for."""
    kept: int | None = None
    """As `Tail.kept`."""

    @property
    def tail(self) -> Tail:
        """The session's end as it was when this record was the last one."""
        return Tail(self.offset, self.pending, self.cursor, self.time, 0, self.kind, self.kept)


class Capabilities(Struct, frozen=True, kw_only=True):
    """What truly differs between brokers. Each ``False`` has its own check."""

    name: str
    durable: bool
    """What was stored survives a restart of the broker."""
    detects_no_listener: bool
    """A live request to nobody fails at once."""
    max_body: int
    """Bytes a record's body may have."""
    delta_ttl: float
    """Seconds a DELTA record stays at least."""
    dedupe_window: float
    """Seconds for which a ``dedupe`` key is remembered at least."""
    lease_ttl: float
    """Seconds after which a lease that was not extended is given out again, unless the agent has its own."""


class Hold(NamedTuple):
    """An input that some connection has been given, named so that another one can hand it back."""

    agent: str
    session: str
    offset: int
    token: str
    """The broker's name of this one giving out; opaque to others."""


class Lease(Protocol):
    """One input, given to one holder for a time."""

    @property
    def session(self) -> str: ...
    @property
    def record(self) -> Record:
        """The input."""
        ...

    @property
    def tail(self) -> Tail:
        """The session's end when the lease was given; ``tail.pending.ready(record.offset)`` held."""
        ...

    @property
    def token(self) -> str:
        """The broker's name of this lease, as in `Hold`; each giving out has another."""
        ...

    def extend(self) -> None:
        """Reset the clock. Any thread, never blocks, best effort: the next one mends a lost one."""
        ...

    async def ack(self) -> None:
        """Never lease this input again. Its settlement must be in the log before."""
        ...

    async def nack(self, *, delay: float = 0.0) -> None:
        """Give it back, to be leased again after ``delay`` seconds."""
        ...


class TurnQueue(Protocol):
    """Who works next: inputs, in order per session."""

    async def open(self, agent: str, *, lease_ttl: float | None = None) -> float:
        """Make the queue of an agent ready for leasing and return the lease time in force, in seconds.

        Raises:
            Misconfigured: The queue exists with another lease time than the one asked for.
        """
        ...

    async def lease(self, agent: str, *, wait: float) -> Lease | None:
        """Give one ready input, or None after at most ``wait`` seconds."""
        ...

    def early(self) -> Sequence[Hold]:
        """What this connection keeps until its turn comes. Any thread, never blocks; empty where nothing is kept."""
        ...

    async def given_out(self, agent: str) -> Sequence[Hold]:
        """What all connections together have been given of an agent's inputs and have not settled, the newest 5,000.

        It names more where the broker cannot tell: look at the log.

        Raises:
            Unavailable: The broker does not answer.
        """
        ...

    async def hand_back(self, hold: Hold) -> None:
        """Give out again at once what another connection holds.

        For holders that are dead: from one that is not, its input is taken, and only the log decides between it and the
        next one (L1). So look at the log first.

        Raises:
            Unavailable: There is no connection.
        """
        ...


class SessionLog(Protocol):
    """The sessions' records."""

    async def last(self, session: str, *, fresh: bool = False) -> Tail:
        """The session's end. It may lag behind, as a rule by a moment; `append` finds out.

        What an end that lags behind shows is true; what it does not show may be there all the same. So whoever is
        about to say that something is *not* there asks for a ``fresh`` one: nothing that was stored before the call is
        missing in it. That costs more.

        Raises:
            Unavailable: Nobody answers, or nobody can know: a server that is cut off from the others, say.
        """
        ...

    async def append(
        self,
        session: str,
        body: bytes,
        *,
        kind: Kind,
        after: Tail,
        pending: Pending,
        agent: str | None = None,
        dedupe: str | None = None,
        timeout: float = 30.0,
    ) -> Tail:
        """Store one record at the end of the session, if its end is still ``after``; return the new end.

        Args:
            session: The session's id.
            body: The record, at most ``capabilities.max_body`` bytes.
            kind: What it is; TURN needs ``agent``.
            after: The session's end as the caller knows it. With a higher ``lost`` the offsets below ``after.next`` are
                skipped: for who restores a log (see `agentrun.moving`).
            pending: The unsettled inputs once this record is stored.
            agent: For whom a TURN is queued.
            dedupe: Under what key an input is stored only once.
            timeout: Seconds after which an outcome that cannot be found out is given up as `Unavailable`.

        Raises:
            Conflict: The session has moved on.
            Duplicate: ``dedupe`` was stored before.
            TooLarge: ``body`` is over the limit.
            Unavailable: No answer for ``timeout`` seconds; whether it is stored is not known.
        """
        ...

    async def read(self, session: str, *, after: int = 0, deltas: bool = True, limit: int = 1000) -> Sequence[Record]:
        """Up to ``limit`` stored records with an offset above ``after``, in order. Fewer than ``limit``: that is all.

        ``deltas=False`` leaves out the records of kind DELTA, at a cost that does not grow with their number.
        """
        ...

    def follow(
        self, session: str, *, after: int = 0, deltas: bool = True, cursor: int = 0
    ) -> AbstractAsyncContextManager[AsyncIterator[Sequence[Record]]]:
        """Records above ``after``: what is stored, then live ones as they are stored, for ever.

        They come in lists of at least one. ``cursor`` may be that of the record at ``after``, which spares the search.
        The context may be iterated and left by other tasks than the one that entered it, so that an iterator that was
        abandoned can be closed by the event loop.

        Raises:
            SessionGone: From the iterator: the session was deleted.
        """
        ...

    async def delete(self, session: str) -> None:
        """Remove every record of the session."""
        ...


HANDLER_GRACE = 5.0
"""Seconds a handler that runs when its listening ends may still take to answer."""

Handler = Callable[[bytes], Awaitable[bytes | None]]
"""Answers a live request; None sends no reply."""


class Signals(Protocol):
    """Live requests, remembered by nobody."""

    def listen(self, channel: str, handler: Handler) -> AbstractAsyncContextManager[None]:
        """Answer requests on the channel while the context is open. Handlers of one channel run side by side."""
        ...

    async def request(self, channel: str, body: bytes, *, timeout: float) -> bytes:
        """Send a request and return the first reply.

        Raises:
            NoListener: Nobody listens.
            Unavailable: No reply within ``timeout`` seconds.
        """
        ...

    async def gather(self, channel: str, body: bytes, *, wait: float) -> list[bytes]:
        """Send a request and return all replies that come within ``wait`` seconds."""
        ...

    def announce(self, channel: str, body: bytes) -> None:
        """Tell every listener. Any thread, never blocks, best effort: what matters is said again."""
        ...


class Broker(Protocol):
    """A connection to a broker, an async context manager. Entering connects and checks; it never creates streams."""

    @property
    def capabilities(self) -> Capabilities: ...
    @property
    def turns(self) -> TurnQueue: ...
    @property
    def log(self) -> SessionLog: ...
    @property
    def signals(self) -> Signals: ...
    def now(self) -> float:
        """The time by the broker's clock, as well as it is known here, in seconds since the epoch.

        What is stored with a time (a deadline, when to try again) means this clock: those of the machines around the
        broker may be wrong, and may be set while a turn runs.
        """
        ...

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *exc: object) -> None: ...


class QueueStats(Struct, frozen=True):
    """An agent's queue: inputs not yet given out, given out and not settled, and the lease time in seconds."""

    agent: str
    waiting: int
    leased: int
    lease_ttl: float


@runtime_checkable
class BrokerAdmin(Protocol):
    """What an operator does. Creating resources is an explicit act."""

    async def setup(self, *, dry_run: bool = False) -> list[str]:
        """Create or update what is needed; idempotent. Return what was (or would be) done, a line each."""
        ...

    async def stats(self) -> list[QueueStats]:
        """The queues of all agents."""
        ...

    async def sessions(self, *, limit: int = 1000) -> list[str]:
        """The names of sessions that hold an input, at most ``limit`` of them, in no particular order.

        For operators and for development: the cost grows with the number of sessions there are, whatever ``limit``
        is, and the broker bears it.
        """
        ...
