"""The broker in one SQLite file: for development without a server, and for several processes on one machine.

It keeps the whole contract. What is stored survives a process that dies at any moment, but not a loss of power: the
file is not synced with every append (WAL, ``synchronous=NORMAL``). The file must be on a local file system, of a system
with Unix sockets, and its clock is the machine's: when that is set back, leases and deltas last that much longer.

Every step of the contract is one write transaction. SQLite tells nobody of changes, so a thread of each connection
looks whether there was one (``PRAGMA data_version``): 20 times a second, and 100 times while something happens. So much
later than the append a reader or a waiting worker hears of it, in this process as in others.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from sqlite3 import Connection
from typing import Any, NamedTuple, Self

import anyio
import anyio.to_thread

from agentrun.broker import Capabilities, Hold, Kind, Pending, QueueStats, Record, Tail
from agentrun.brokers.checks import check_lease_ttl, check_record, not_open
from agentrun.brokers.sqlite_file import File
from agentrun.brokers.sqlite_signals import SqliteSignals
from agentrun.errors import Conflict, Duplicate, SessionGone, Unavailable

__all__ = ["Append", "SqliteBroker", "SqliteLease", "SqliteLog", "SqliteQueue"]

MAX_BODY = 1_000_000
DEDUPE_WINDOW = 7200.0
_RETRY = 0.05
"""Seconds between tries of an append while the file cannot be written."""


def _record(row: Sequence[Any]) -> Record:
    """The record of a row that begins with the columns of its table."""
    cursor, _, offset, kind, stored, pending, agent, *_, body = row[:11]
    return Record(offset, Kind(kind), body, stored, cursor, Pending.parse(pending), agent)


def _end(db: Connection, session: str) -> tuple[int | None, Tail]:
    """The session's id in the file, if it has begun, and its end."""
    row = db.execute(
        "SELECT s.id, s.given, s.pending, r.offset, r.cursor, r.time, r.kind FROM session s LEFT JOIN record r ON "
        "r.cursor = (SELECT cursor FROM record WHERE session = s.id ORDER BY offset DESC LIMIT 1) WHERE s.name = ?",
        (session,),
    ).fetchone()
    if row is None:
        return None, Tail()
    life, given, pending, offset, cursor, stored, kind = row
    if offset is None:
        return life, Tail(pending=Pending.parse(pending), lost=given)
    return life, Tail(offset, Pending.parse(pending), cursor, stored, given - offset, Kind(kind))


# ------------------------------------------------------------------------------------------------------------- log


class Append(NamedTuple):
    """What `SessionLog.append` was asked to store, and a name by which it is known again if its answer is lost."""

    session: str
    body: bytes
    kind: Kind
    after: Tail
    pending: Pending
    agent: str | None
    dedupe: str | None
    expires: float | None
    writer: str

    def store(self, db: Connection) -> Tail:
        """Compare and append, within a write transaction."""
        life, end = _end(db, self.session)
        own = (life, self.after.next, self.writer)
        if row := db.execute("SELECT * FROM record WHERE session = ? AND offset = ? AND writer = ?", own).fetchone():
            return _record(row).tail
        now = max(time.time(), end.time)  # a clock that was set back must not let later deltas expire first
        key = (life, self.dedupe, now - DEDUPE_WINDOW)
        first = db.execute("SELECT offset FROM record WHERE session = ? AND dedupe = ? AND time > ?", key).fetchone()
        if first and self.dedupe is not None:
            raise Duplicate(self.dedupe, first[0])
        # The offset alone does not do: deltas may have come after it and expired since.
        if self.after.offset != end.offset or self.after.next < end.next:
            raise Conflict(f"session {self.session} ends at {end.offset}, not at {self.after.offset}", end)
        if life is None:
            life = db.execute("INSERT INTO session VALUES (NULL, ?, 0, '')", (self.session,)).lastrowid
        offset, pending = self.after.next, str(self.pending)
        expires = None if self.expires is None else now + self.expires
        shown = (life, offset, self.kind, now, pending, self.agent)
        sql = "INSERT INTO record VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        cursor = db.execute(sql, (*shown, self.dedupe, self.writer, expires, self.body)).lastrowid or 0
        db.execute("UPDATE session SET given = ?, pending = ? WHERE id = ?", (offset, pending, life))
        if self.kind is Kind.TURN:
            db.execute("INSERT INTO input VALUES (?, ?, ?, 0, 0, NULL)", (life, offset, self.agent))
        if self.pending != end.pending:
            self._requeue(db, life)
        return Tail(offset, self.pending, cursor, now, 0, self.kind)

    def _requeue(self, db: Connection, life: int | None) -> None:
        """Note in the queue what is settled and what is ready now, so that a lease need not read pending lists."""
        pending = [e.offset for e in self.pending]
        ready = [offset for offset in pending if self.pending.ready(offset)]
        gone = "DELETE FROM input WHERE session = ? AND offset NOT IN (SELECT value FROM json_each(?))"
        db.execute(gone, (life, str(pending)))
        now_ready = "UPDATE input SET ready = offset IN (SELECT value FROM json_each(?)) WHERE session = ?"
        db.execute(now_ready, (str(ready), life))


_READ = (  # the session's id comes also where there is no such record
    "SELECT r.*, s.id FROM session s LEFT JOIN record r ON r.session = s.id AND r.offset > ? "
    "WHERE s.name = ? ORDER BY r.offset LIMIT ?"
)
_READ_KEPT = _READ.replace("r.offset > ?", "r.offset > ? AND r.kind <> 'out.delta'")


class SqliteLog:
    """`SessionLog` in a file."""

    def __init__(self, file: File, delta_ttl: float) -> None:
        self.file = file
        self._delta_ttl = delta_ttl

    async def last(self, session: str, *, fresh: bool = False) -> Tail:
        """See `SessionLog.last`. It is always fresh."""
        return (await self.file.read(lambda db: _end(db, session)))[1]

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
        """See `SessionLog.append`."""
        check_record(kind, agent, body, MAX_BODY)
        expires = self._delta_ttl if kind is Kind.DELTA else None
        wanted = Append(session, body, kind, after, pending, agent, dedupe, expires, uuid.uuid4().hex)
        failure: Exception | None = None
        with anyio.move_on_after(timeout):
            while True:
                try:
                    return await self.exchange(wanted)
                except (TimeoutError, Unavailable) as error:
                    failure = error  # it may be stored; asked again under its name, it is not stored twice
                await anyio.sleep(_RETRY)
        raise Unavailable(f"no answer within {timeout} s to an append to session {session}") from failure

    async def exchange(self, wanted: Append) -> Tail:
        """One try of an append. TimeoutError or Unavailable: its outcome is not known."""
        return await self.file.write(wanted.store)

    async def read(self, session: str, *, after: int = 0, deltas: bool = True, limit: int = 1000) -> Sequence[Record]:
        """See `SessionLog.read`."""
        return (await self.look(session, after, deltas, limit))[1]

    async def look(self, session: str, after: int, deltas: bool, limit: int) -> tuple[int | None, list[Record]]:
        """The session's id in the file, and up to ``limit`` of its records."""
        values = (after, session, limit)
        rows = await self.file.read(lambda db: db.execute(_READ if deltas else _READ_KEPT, values).fetchall())
        return rows[0][-1] if rows else None, [_record(row) for row in rows if row[0] is not None]

    @asynccontextmanager
    async def follow(
        self, session: str, *, after: int = 0, deltas: bool = True, cursor: int = 0
    ) -> AsyncGenerator[AsyncIterator[Sequence[Record]]]:
        """See `SessionLog.follow`. Seeking costs nothing here, ``cursor`` is not used."""
        life, _ = await self.file.read(lambda db: _end(db, session))
        yield _Follower(self, session, life, after, deltas)

    async def delete(self, session: str) -> None:
        """See `SessionLog.delete`."""

        def remove(db: Connection) -> None:
            life, _ = _end(db, session)
            db.execute("DELETE FROM record WHERE session = ?", (life,))
            db.execute("DELETE FROM input WHERE session = ?", (life,))
            db.execute("DELETE FROM session WHERE id = ?", (life,))

        await self.file.write(remove)
        self.file.ring(session)


class _Follower:
    """Iterates a session's records from an offset on, for ever."""

    def __init__(self, log: SqliteLog, session: str, life: int | None, after: int, deltas: bool) -> None:
        self._log = log
        self._session = session
        self._life = life
        self._after = after
        self._deltas = deltas

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Sequence[Record]:
        while True:
            changed = self._log.file.changed(self._session)  # asked for before the look, so that nothing is missed
            life, records = await self._log.look(self._session, self._after, self._deltas, 1000)
            if self._life not in (None, life):
                raise SessionGone(f"session {self._session} was deleted")
            self._life = life
            if records:
                self._after = records[-1].offset
                return records
            await changed.wait()


# ----------------------------------------------------------------------------------------------------------- queue

_TAKE = """
SELECT r.*, s.name FROM input i JOIN session s ON s.id = i.session
JOIN record r ON r.session = i.session AND r.offset = i.offset
WHERE i.agent = ? AND i.ready = 1 AND i.due <= ? AND NOT EXISTS (
    SELECT 1 FROM input h WHERE h.session = i.session AND h.offset <> i.offset AND h.token IS NOT NULL AND h.due > ?)
ORDER BY i.rowid LIMIT 1
"""
_GIVEN_OUT = """
SELECT s.name, i.offset, i.token FROM input i JOIN session s ON s.id = i.session
WHERE i.agent = ? AND i.token IS NOT NULL AND i.due > ? ORDER BY i.rowid DESC LIMIT 5000
"""
_STATS = """
SELECT agent, count(i.offset), total(i.token IS NOT NULL AND i.due > ?), coalesce(q.lease_ttl, ?)
FROM (SELECT agent FROM queue UNION SELECT agent FROM input) LEFT JOIN queue q USING (agent)
LEFT JOIN input i USING (agent) GROUP BY agent ORDER BY agent
"""


class SqliteLease:
    """A lease; what is done with it after it ran out and was given to another does nothing."""

    def __init__(self, file: File, session: str, life: int, record: Record, tail: Tail, ttl: float) -> None:
        self.session = session
        self.record = record
        self.tail = tail
        self.token = uuid.uuid4().hex
        self._file = file
        self._ttl = ttl
        self._key = (life, record.offset, self.token)

    def extend(self) -> None:
        """Reset the clock, from any thread."""
        values = (time.time() + self._ttl, *self._key)
        sql = "UPDATE input SET due = ? WHERE session = ? AND offset = ? AND token = ?"
        self._file.post(lambda db: db.execute(sql, values))

    async def ack(self) -> None:
        """Never lease this input again."""
        sql = "DELETE FROM input WHERE session = ? AND offset = ? AND token = ?"
        await self._file.write(lambda db: db.execute(sql, self._key))

    async def nack(self, *, delay: float = 0.0) -> None:
        """Give it back."""
        values = (time.time() + delay, *self._key)
        sql = "UPDATE input SET token = NULL, due = ? WHERE session = ? AND offset = ? AND token = ?"
        await self._file.write(lambda db: db.execute(sql, values))


class SqliteQueue:
    """`TurnQueue` in a file."""

    def __init__(self, file: File, lease_ttl: float) -> None:
        self._file = file
        self._lease_ttl = lease_ttl

    async def open(self, agent: str, *, lease_ttl: float | None = None) -> float:
        """See `TurnQueue.open`."""

        def make(db: Connection) -> float:
            db.execute("INSERT OR IGNORE INTO queue VALUES (?, ?)", (agent, lease_ttl or self._lease_ttl))
            return db.execute("SELECT lease_ttl FROM queue WHERE agent = ?", (agent,)).fetchone()[0]

        found = await self._file.write(make)
        check_lease_ttl(agent, found, lease_ttl)
        return found

    async def lease(self, agent: str, *, wait: float) -> SqliteLease | None:
        """See `TurnQueue.lease`."""
        deadline = anyio.current_time() + wait
        while True:
            changed = self._file.changed(None)  # asked for before the look, so that nothing is missed
            # Not cancelled half-way, or an input would be leased to nobody: a job in a thread is waited for.
            found = await self._file.write(lambda db: self._take(db, agent))
            if isinstance(found, SqliteLease):
                return found
            left = deadline - anyio.current_time()
            if left <= 0:
                return None
            with anyio.move_on_after(min(left, found)):
                await changed.wait()

    def _take(self, db: Connection, agent: str) -> SqliteLease | float:
        """A lease on a ready input of the agent, or in how many seconds there may be one without a change."""
        ttl = db.execute("SELECT lease_ttl FROM queue WHERE agent = ?", (agent,)).fetchone()
        if ttl is None:
            raise not_open(agent)
        now = time.time()
        row = db.execute(_TAKE, (agent, now, now)).fetchone()
        if row is None:
            (due,) = db.execute("SELECT min(due) FROM input WHERE due > ?", (now,)).fetchone()
            return float("inf") if due is None else due - now
        session = row[-1]
        life, tail = _end(db, session)
        assert life
        lease = SqliteLease(self._file, session, life, _record(row), tail, ttl[0])
        sql = "UPDATE input SET token = ?, due = ? WHERE session = ? AND offset = ?"
        db.execute(sql, (lease.token, now + ttl[0], life, lease.record.offset))
        return lease

    def early(self) -> Sequence[Hold]:
        """Nothing: the file knows what is not ready."""
        return ()

    async def given_out(self, agent: str) -> Sequence[Hold]:
        """See `TurnQueue.given_out`."""
        rows = await self._file.read(lambda db: db.execute(_GIVEN_OUT, (agent, time.time())).fetchall())
        return [Hold(agent, *row) for row in rows]

    async def hand_back(self, hold: Hold) -> None:
        """See `TurnQueue.hand_back`."""
        sql = (
            "UPDATE input SET token = NULL, due = 0 WHERE token IS NOT NULL AND agent = ? AND offset = ? "
            "AND session = (SELECT id FROM session WHERE name = ?)"
        )
        await self._file.write(lambda db: db.execute(sql, (hold.agent, hold.offset, hold.session)))


# ---------------------------------------------------------------------------------------------------------- broker


class SqliteBroker:
    """A connection to the broker in a file. `setup` makes the file.

    Args:
        path: The file. Two more stand beside it while it is used, and a directory of sockets, ``<path>-signals``.
        lease_ttl: The lease time of queues that are opened without one, in seconds.
        delta_ttl: Seconds the DELTA records stay that are appended through this connection.
        check: False: enter also where nothing is set up yet, so that `setup` can be called.
    """

    def __init__(
        self, path: str | Path, *, lease_ttl: float = 30.0, delta_ttl: float = 3600.0, check: bool = True
    ) -> None:
        self._file = File(Path(path), sweep_every=min(delta_ttl / 4, 60.0))
        self._check = check
        self.capabilities = Capabilities(
            name="sqlite",
            durable=True,
            detects_no_listener=True,
            max_body=MAX_BODY,
            delta_ttl=delta_ttl,
            dedupe_window=DEDUPE_WINDOW,
            lease_ttl=lease_ttl,
        )
        self.log = SqliteLog(self._file, delta_ttl)
        self.turns = SqliteQueue(self._file, lease_ttl)
        self.signals = SqliteSignals(Path(f"{path}-signals"))

    def now(self) -> float:
        """See `Broker.now`."""
        return time.time()

    async def __aenter__(self) -> Self:
        """Open and check the file.

        Raises:
            Misconfigured: It is not there, is not a broker's, or may not be written.
        """
        if self._check:
            try:
                await self._open()
            except BaseException:
                await self.__aexit__()
                raise
        return self

    async def _open(self) -> None:
        await anyio.to_thread.run_sync(self._file.open, asyncio.get_running_loop())
        self.signals.open()

    async def __aexit__(self, *exc: object) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self.signals.close)
            await anyio.to_thread.run_sync(self._file.close)

    async def setup(self, *, dry_run: bool = False) -> list[str]:
        """See `BrokerAdmin.setup`.

        Raises:
            Misconfigured: The file is something else's, or may not be written.
        """
        done = await anyio.to_thread.run_sync(self._file.create, dry_run)
        if not dry_run and not self._file.opened:
            await self._open()
        return done

    async def stats(self) -> list[QueueStats]:
        """See `BrokerAdmin.stats`."""
        values = (self.now(), self.capabilities.lease_ttl)
        rows = await self._file.read(lambda db: db.execute(_STATS, values).fetchall())
        return [QueueStats(agent, all_ - int(leased), int(leased), ttl) for agent, all_, leased, ttl in rows]

    async def sessions(self, *, limit: int = 1000) -> list[str]:
        """See `BrokerAdmin.sessions`."""
        sql = (
            "SELECT name FROM session s WHERE EXISTS "
            "(SELECT 1 FROM record WHERE session = s.id AND kind <> 'out.delta' AND kind = 'in.turn') LIMIT ?"
        )
        return [name for (name,) in await self._file.read(lambda db: db.execute(sql, (limit,)).fetchall())]
