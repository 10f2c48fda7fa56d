"""The file behind `agentrun.brokers.sqlite`: its tables, who uses it when, and how a change is noticed."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from sqlite3 import Connection
from typing import TypeVar
from urllib.parse import quote
from weakref import WeakValueDictionary

import anyio
import anyio.to_thread

from agentrun.errors import Misconfigured, Unavailable

T = TypeVar("T")
Job = Callable[[Connection], T]

_LIVELY, _QUIET = 0.01, 0.05
"""Seconds between two looks whether the file was changed: for a second after each change, and else."""
_BUSY = 2.0
"""Seconds to wait for another transaction. Each is short, unless its process was stopped in the middle."""
_SWEEP = 5000
"""Expired records removed in one transaction, so that it is short as well."""
_OURS, _VERSION = 0x61677274, 1
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS session (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- a deleted session that begins again has another
    name TEXT NOT NULL UNIQUE,
    given INTEGER NOT NULL,                -- the last offset ever given out
    pending TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS record (
    cursor INTEGER PRIMARY KEY AUTOINCREMENT,
    session INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    kind TEXT NOT NULL,
    time REAL NOT NULL,
    pending TEXT NOT NULL,
    agent TEXT,
    dedupe TEXT,
    writer TEXT NOT NULL,                  -- names one append, by which it is known again
    expires REAL,
    body BLOB NOT NULL,                    -- last: what stands behind a large value is slow to get at
    UNIQUE (session, offset)
);
CREATE INDEX IF NOT EXISTS record_kept ON record (session, offset) WHERE kind <> 'out.delta';
CREATE INDEX IF NOT EXISTS record_dedupe ON record (session, dedupe) WHERE dedupe IS NOT NULL;
CREATE INDEX IF NOT EXISTS record_expires ON record (expires) WHERE expires IS NOT NULL;
CREATE TABLE IF NOT EXISTS queue (agent TEXT PRIMARY KEY, lease_ttl REAL NOT NULL);
CREATE TABLE IF NOT EXISTS input (         -- what is queued, in the order it was sent
    session INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    agent TEXT NOT NULL,
    ready INTEGER NOT NULL,                -- whether the session's pending list lets it be leased
    due REAL NOT NULL,                     -- when its lease ends or, without one, its delay
    token TEXT,                            -- names the lease
    UNIQUE (session, offset)
);
CREATE INDEX IF NOT EXISTS input_ready ON input (agent, ready);
CREATE INDEX IF NOT EXISTS input_due ON input (due);
PRAGMA application_id = {_OURS};
PRAGMA user_version = {_VERSION};
COMMIT;
"""


class File:
    """What one connection to the broker has of the file, never used on the event loop's thread.

    Args:
        path: The file.
        sweep_every: Seconds between two looks for records that have expired.
    """

    def __init__(self, path: Path, *, sweep_every: float) -> None:
        self.path = path
        self._sweep_every = sweep_every
        self._writer: Connection | None = None
        self._reader: Connection | None = None
        self._writing, self._reading = anyio.CapacityLimiter(1), anyio.CapacityLimiter(1)
        self._posted: deque[Job[object]] = deque()
        self._changed: WeakValueDictionary[str | None, anyio.Event] = WeakValueDictionary()
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None

    # ------------------------------------------------------------------------------------------------ life

    @property
    def opened(self) -> bool:
        """Whether it can be used."""
        return self._watcher is not None

    def _connect(self, mode: str = "rw") -> Connection:
        name = f"file:{quote(str(self.path))}?mode={mode}"
        db = sqlite3.connect(name, uri=True, timeout=_BUSY, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA synchronous = NORMAL")
        return db

    def create(self, dry_run: bool) -> list[str]:
        """Make the file unless it is there, or say that it would be made."""
        try:
            if not dry_run or self.path.exists():
                with closing(self._connect("rw" if dry_run else "rwc")) as db:
                    db.execute("BEGIN")  # both are of the same moment, should another process be making it
                    (whose,) = db.execute("PRAGMA application_id").fetchone()
                    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
                    db.execute("COMMIT")
                    if whose == _OURS:
                        return []
                    if tables:
                        raise Misconfigured(f"{self.path} holds the tables of something else: name another file")
                    if not dry_run:
                        db.execute("PRAGMA journal_mode = WAL")
                        db.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise self._translated(error) from error
        return [f"create {self.path}"]

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Connect, see that the file is as needed, and watch it from here on."""
        if not self.path.exists():
            raise Misconfigured(f"there is no {self.path}: run `agentrun setup --url sqlite:///{self.path}`")
        try:
            self._writer, self._reader = self._connect(), self._connect()
            if self._writer.execute("PRAGMA application_id").fetchone() != (_OURS,):
                raise Misconfigured(f"{self.path} is no broker's: run `agentrun setup`, or name another file")
            if (version := self._writer.execute("PRAGMA user_version").fetchone()[0]) != _VERSION:
                raise Misconfigured(f"{self.path} has version {version} of the tables, this is version {_VERSION}")
            self._writer.execute(
                f"PRAGMA user_version = {_VERSION}"
            )  # a file that may not be written is opened as well
            (cursor,) = self._reader.execute("SELECT coalesce(max(cursor), 0) FROM record").fetchone()
            watching = self._connect()
        except sqlite3.DatabaseError as error:
            raise self._translated(error) from error
        arguments = (watching, cursor, loop)
        self._watcher = threading.Thread(target=self._watch, args=arguments, name="agentrun-sqlite", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """End the thread that watches, and disconnect."""
        self._closing.set()
        if self._watcher:
            self._watcher.join()
        for db in filter(None, (self._writer, self._reader)):
            db.close()
        self._writer = self._reader = None

    # ------------------------------------------------------------------------------------------------ use

    async def write(self, job: Job[T]) -> T:
        """Run this in a transaction of its own.

        Raises:
            Unavailable: The file is locked for long, or cannot be written. It may be done or not.
        """
        return await self._run(self._writer, self._writing, lambda db: _transact(db, job))

    async def read(self, job: Job[T]) -> T:
        """Run this one query."""
        return await self._run(self._reader, self._reading, job)

    def post(self, job: Job[object]) -> None:
        """Have this one statement run soon. Any thread, never blocks, best effort."""
        self._posted.append(job)

    async def _run(self, db: Connection | None, limiter: anyio.CapacityLimiter, job: Job[T]) -> T:
        if db is None:
            raise Unavailable(f"{self.path} is not open")
        try:
            return await anyio.to_thread.run_sync(job, db, limiter=limiter)
        except sqlite3.DatabaseError as error:
            raise self._translated(error) from error

    def _translated(self, error: sqlite3.DatabaseError) -> Exception:
        match getattr(error, "sqlite_errorcode", 0) & 0xFF:
            case sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_CORRUPT:
                return Misconfigured(f"{self.path}: {error}: name another file")
            case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
                return Misconfigured(f"{self.path}: {error}: file and directory must be there, and be writable")
            case _:
                return Unavailable(f"{self.path}: {error}") if isinstance(error, sqlite3.OperationalError) else error

    # ------------------------------------------------------------------------------------------------ watching

    def changed(self, session: str | None) -> anyio.Event:
        """What is set when the session has new records; None: when anything at all has changed."""
        event = self._changed.get(session)
        if event is None:
            event = self._changed[session] = anyio.Event()
        return event

    def ring(self, *sessions: str | None) -> None:
        """Wake those who wait for a change of these."""
        for session in sessions:
            if event := self._changed.pop(session, None):
                event.set()

    def _watch(self, db: Connection, cursor: int, loop: asyncio.AbstractEventLoop) -> None:
        version, lively_until, sweep_at = None, 0.0, 0.0
        with closing(db):
            while not self._closing.wait(_LIVELY if time.monotonic() < lively_until else _QUIET):
                with suppress(sqlite3.OperationalError):  # whoever uses the file is told of it
                    while self._posted:
                        self._posted.popleft()(db)
                    if time.monotonic() >= sweep_at:
                        _sweep(db)
                        sweep_at = time.monotonic() + self._sweep_every
                    (now,) = db.execute("PRAGMA data_version").fetchone()
                    if now != version:
                        names, cursor = _stored_since(db, cursor)
                        loop.call_soon_threadsafe(self.ring, None, *names)
                        version, lively_until = now, time.monotonic() + 1.0


def _stored_since(db: Connection, cursor: int) -> tuple[set[str], int]:
    """The sessions that records were stored in after this one, and the last record."""
    sql = "SELECT s.name, r.cursor FROM record r JOIN session s ON s.id = r.session WHERE r.cursor > ?"
    rows = db.execute(sql, (cursor,)).fetchall()
    return {name for name, _ in rows}, max((cursor, *(last for _, last in rows)))


def _sweep(db: Connection) -> None:
    expired = "SELECT cursor FROM record WHERE expires <= ? ORDER BY expires, cursor LIMIT ?"
    db.execute(f"DELETE FROM record WHERE cursor IN ({expired})", (time.time(), _SWEEP))  # noqa: S608 - a constant


def _transact(db: Connection, job: Job[T]) -> T:
    db.execute("BEGIN IMMEDIATE")
    try:
        result = job(db)
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    return result
