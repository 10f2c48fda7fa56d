"""SQLite as an environment of the conformance suite."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from pathlib import Path

import anyio

from agentrun.broker import Broker, Tail
from agentrun.brokers.sqlite import Append, SqliteBroker, SqliteLog
from agentrun.testing import Environment, Settings


class LossyLog(SqliteLog):
    """A log that can lose an answer."""

    losing = 0

    async def exchange(self, wanted: Append) -> Tail:
        answer = await super().exchange(wanted)
        if self.losing:
            self.losing -= 1
            await anyio.sleep(0.05)
            raise TimeoutError
        return answer


class SqliteEnvironment(Environment):
    """An empty file."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self.settings = settings

    def broker(self, *, check: bool = True) -> SqliteBroker:
        """A broker of this environment, not yet entered."""
        settings = self.settings
        broker = SqliteBroker(self.path, lease_ttl=settings.lease_ttl, delta_ttl=settings.delta_ttl, check=check)
        broker.log = LossyLog(broker.log.file, settings.delta_ttl)
        return broker

    def open(self) -> AbstractAsyncContextManager[Broker]:
        return self.broker()

    async def drop_next_ack(self, broker: Broker) -> None:
        assert isinstance(broker.log, LossyLog)
        broker.log.losing += 1

    async def cut(self, broker: Broker) -> None:
        """There is no connection to break."""

    async def trim(self, session: str, through: int) -> None:
        with closing(sqlite3.connect(self.path)) as db, db:
            for table in ("record", "input"):
                db.execute(
                    f"DELETE FROM {table} WHERE offset <= ? AND session = (SELECT id FROM session WHERE name = ?)",
                    (through, session),
                )

    async def restart(self) -> None:
        """There is no server to restart."""


@asynccontextmanager
async def sqlite_environments(settings: Settings) -> AsyncGenerator[SqliteEnvironment]:
    """`agentrun.testing.Environments`: each is a file of its own."""
    with tempfile.TemporaryDirectory() as folder:
        environment = SqliteEnvironment(Path(folder) / "broker.db", settings)
        async with environment.broker(check=False) as broker:
            await broker.setup()
        yield environment
