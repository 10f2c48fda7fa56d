"""A process of its own on a file, for the tests of the broker in SQLite: ``python -m tests.brokers.sqlite_process``."""

from __future__ import annotations

import os
import signal
import sys
from sqlite3 import Connection

import anyio

from agentrun.broker import Kind, Tail
from agentrun.brokers.sqlite import Append, SqliteBroker
from agentrun.testing.contract_players import must_take, own, send


async def work(path: str) -> None:
    """Run one turn of session s, and answer on channel c until killed."""

    async def answer(body: bytes) -> bytes:
        return body.upper()

    async with SqliteBroker(path) as broker, broker.signals.listen("c", answer):
        await broker.turns.open("agent")
        print("ready", flush=True)
        owner = await own(broker, "s", 1)
        await owner.deltas(20)
        await owner.finish()
        await anyio.sleep_forever()


async def die_in_an_append(path: str) -> None:
    """Lease and claim session s, and be killed when the next record is stored but not yet committed."""
    store = Append.store

    def store_and_die(self: Append, db: Connection) -> Tail:
        tail = store(self, db)
        if self.body == b"last":
            os.kill(os.getpid(), signal.SIGKILL)
        return tail

    Append.store = store_and_die
    async with SqliteBroker(path) as broker:
        owner = await own(broker, "s", 1)
        await owner.append(b"last", kind=Kind.DELTA)


async def send_many(path: str) -> None:
    """Send 50 turns to session s, whoever else sends."""
    async with SqliteBroker(path) as broker:
        for _ in range(50):
            await send(broker, "s")


async def hold(path: str) -> None:
    """Lease the turn of session s, and do nothing more."""
    async with SqliteBroker(path) as broker:
        lease = await must_take(broker, "s", 1)
        print(lease.token, flush=True)
        await anyio.sleep_forever()


if __name__ == "__main__":
    anyio.run({f.__name__: f for f in (work, die_in_an_append, send_many, hold)}[sys.argv[1]], sys.argv[2])
