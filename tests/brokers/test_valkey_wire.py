"""What docs/protocol.md says of Valkey is enough for a client in another language: one that knows nothing else."""

from __future__ import annotations

import json
import secrets
from typing import Any
from zlib import crc32

import anyio
from valkey.asyncio import Valkey

from agentrun import Client, Context, agent
from agentrun.brokers import valkey_scripts
from agentrun.brokers.valkey import ValkeyBroker
from agentrun.brokers.valkey_scripts import Script
from agentrun.brokers.valkey_server import ValkeyServer
from agentrun.testing import Settings
from agentrun.worker import Worker
from tests.brokers.valkey_environment import ValkeyEnvironments, client


class Stranger:
    """A client by the document alone."""

    def __init__(self, valkey: Valkey, namespace: str, partitions: int) -> None:
        self.valkey = valkey
        self.channels = f"ar:{namespace}:0:"
        self._namespace = namespace
        self._partitions = partitions

    def prefix(self, session: str) -> str:
        return f"{{ar:{self._namespace}:{crc32(session.encode()) % self._partitions}}}:"

    async def run(self, script: Script, session: str, *args: Any) -> Any:
        await self.valkey.script_load(script.text)
        prefix = self.prefix(session)
        return await self.valkey.evalsha(script.sha, 1, f"{prefix}t:{session}", prefix, session, *args)

    async def send(self, session: str, turn: str, input: str) -> int:
        event = json.dumps({"type": "turn.requested", "turn": turn, "agent": "greeter", "input": input})
        offset, given, cursor, _, pending, _ = await self.run(valkey_scripts.TAIL, session)
        mine = str(int(given) + 1)
        waiting = ",".join(filter(None, [pending.decode(), mine]))
        args = (offset, given, cursor, "t", waiting, "greeter", turn, 7_200_000, 3_600_000, secrets.token_hex(6), event)
        reply = await self.run(valkey_scripts.APPEND, session, self.channels, *args)
        return int(reply[1].split(b" ")[0])

    async def read(self, session: str) -> dict[int, dict[str, Any]]:
        """All events, by their offsets."""
        records: list[bytes] = []
        for stream in "ed":
            entries = await self.valkey.xrange(f"{self.prefix(session)}{stream}:{session}")
            records += [fields[b"r"] for _, fields in entries]
        found = {int(r.split(b" ")[0]): json.loads(r.partition(b"\n")[2]) for r in records}
        return dict(sorted(found.items()))


@agent
async def greeter(ctx: Context):
    yield "Hello, "
    yield str(ctx.input)


async def test_a_stranger_sends_a_turn_reads_the_session_and_listens(
    valkey_environments: ValkeyEnvironments, valkey_server: ValkeyServer
) -> None:
    async with (
        valkey_environments(Settings()) as environment,
        client(valkey_server) as valkey,
        environment.broker() as served,
        environment.broker() as broker,
        anyio.create_task_group() as group,
    ):
        stranger = Stranger(valkey, environment.namespace, environment.partitions)
        async with valkey.pubsub() as live:
            await live.subscribe(f"{stranger.channels}events:s", f"{stranger.channels}deltas:s")
            assert await stranger.send("s", "t-1", "Ann") == 1
            worker = Worker(served, [greeter])
            await group.start(worker.run)
            with anyio.fail_after(30):
                turn = await Client(broker).session("s").turn("t-1").result()
            assert turn.message.text == "Hello, Ann"
            events = await stranger.read("s")
            assert list(events) == list(range(1, len(events) + 1))
            assert [event["type"] for event in events.values()][:2] == ["turn.requested", "turn.started"]
            assert events[len(events)]["type"] == "turn.completed"
            heard: list[int] = []
            with anyio.fail_after(30):
                while len(heard) < len(events):
                    message = await live.get_message(ignore_subscribe_messages=True, timeout=1)
                    heard += [int(message["data"].split(b" ")[0])] if message else []
            assert heard == list(events)
        await stop_by_signal(stranger, broker)
        group.cancel_scope.cancel()


async def stop_by_signal(stranger: Stranger, broker: ValkeyBroker) -> None:
    """Ask as the document says, and be answered."""

    async def handler(body: bytes) -> bytes:
        return b"heard " + body

    inbox = f"{stranger.channels}reply:stranger"
    async with stranger.valkey.pubsub() as live, broker.signals.listen("s.other", handler):
        await live.subscribe(inbox)
        told = await stranger.valkey.publish(f"{stranger.channels}sig:s.other", f"{inbox} 7\nstop")
        assert told == 1
        with anyio.fail_after(30):
            while (message := await live.get_message(ignore_subscribe_messages=True, timeout=1)) is None:
                pass
        assert message["data"] == b"7\nheard stop"
    assert await stranger.valkey.publish(f"{stranger.channels}sig:s.other", "- -\n") == 0
