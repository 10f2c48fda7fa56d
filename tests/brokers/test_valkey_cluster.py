"""On a cluster's node: every step stays within one slot, and is whole or not at all, also while the slot is moved."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest
from valkey.asyncio import Valkey
from valkey.crc import key_slot

from agentrun.broker import Kind, Pending, Tail
from agentrun.brokers.valkey import ValkeyBroker
from agentrun.brokers.valkey_server import ValkeyServer
from agentrun.errors import Misconfigured, Unavailable
from agentrun.testing import CHECKS, Settings, run_contract
from tests.brokers.valkey_environment import ValkeyEnvironment, ValkeyEnvironments, client


class Node:
    """One server of a cluster."""

    def __init__(self, server: ValkeyServer, bus: int, valkey: Valkey) -> None:
        self.server = server
        self.bus = bus
        self.valkey = valkey

    async def cluster(self, *words: Any) -> Any:
        return await self.valkey.execute_command("CLUSTER", *words)

    async def id(self) -> str:
        return (await self.cluster("MYID")).decode()

    async def keys(self) -> dict[bytes, bytes | None]:
        """All there is, to be compared."""
        return {key: await self.valkey.dump(key) for key in await self.valkey.keys("*")}


@asynccontextmanager
async def cluster_of(*slots: tuple[int, int] | None) -> AsyncGenerator[list[Node]]:
    """A cluster with a node for each range of slots; None: the node has none."""
    async with AsyncExitStack() as stack:
        nodes: list[Node] = []
        for own in slots:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                bus = free.getsockname()[1]
            server = ValkeyServer(settings=f"cluster-enabled yes\ncluster-port {bus}")
            await stack.enter_async_context(server)
            node = Node(server, bus, await stack.enter_async_context(client(server)))
            nodes.append(node)
            if own is not None:
                await node.cluster("ADDSLOTSRANGE", *own)
            await nodes[0].cluster("MEET", "127.0.0.1", server.port, bus)
        with anyio.fail_after(30):
            for node in nodes:
                while True:
                    info = (await node.cluster("INFO")).decode()
                    if "cluster_state:ok" in info and f"cluster_known_nodes:{len(nodes)}\r" in info:
                        break
                    await anyio.sleep(0.05)
        yield nodes


async def test_the_contract_holds_on_a_node_of_a_cluster() -> None:
    # A restart would disturb the checks beside it.
    checks = [check for check in CHECKS if "restart" not in check.name]
    async with cluster_of((0, 16383)) as (node,):
        outcomes = await run_contract(ValkeyEnvironments(node.server, 4), checks, at_once=3)
    assert len(outcomes) == len(checks) > 50
    assert [outcome for outcome in outcomes if outcome.error] == []


@asynccontextmanager
async def moving(source: Node, target: Node, environment: ValkeyEnvironment) -> AsyncGenerator[None]:
    """While the slot of the environment's partition is moved key by key; in the end it stays where it was."""
    slot = key_slot(environment.prefix("s").encode())
    await target.cluster("SETSLOT", slot, "IMPORTING", await source.id())
    await source.cluster("SETSLOT", slot, "MIGRATING", await target.id())
    yield
    await source.cluster("SETSLOT", slot, "STABLE")
    await target.cluster("SETSLOT", slot, "STABLE")


async def refused(node: Node, step: Callable[[], Awaitable[object]]) -> None:
    """See that a step is not done at all."""
    before = await node.keys()
    with pytest.raises(Unavailable, match="moved to another node"):
        await step()
    assert await node.keys() == before


async def test_while_a_slot_is_moved_key_by_key_no_step_is_left_half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentrun.brokers.valkey_queue.SETTLE", 0.5)
    async with cluster_of((0, 16383), None) as (source, target):
        environment = ValkeyEnvironment(source.server, Settings(lease_ttl=30.0), "n")
        async with environment.broker(check=False) as broker:
            await broker.setup()
            await broker.turns.open("agent")
            log = broker.log
            asked = await log.append(
                "s", b"1", kind=Kind.TURN, after=Tail(), pending=Pending().add(1), agent="agent", dedupe="t1"
            )
            lease = await broker.turns.lease("agent", wait=5)
            assert lease is not None
            begun = await log.append("s", b"2", kind=Kind.EVENT, after=asked, pending=asked.pending.claim(1))

            async def answer() -> Tail:
                more = begun.pending.add(3)
                return await log.append(
                    "s", b"3", kind=Kind.TURN, after=begun, pending=more, agent="agent", timeout=0.5
                )

            async def settle() -> Tail:
                return await log.append("s", b"3", kind=Kind.EVENT, after=begun, pending=Pending(), timeout=0.5)

            async def begin() -> Tail:
                return await log.append("new", b"", kind=Kind.CANCEL, after=Tail(), pending=Pending(), timeout=0.5)

            async with moving(source, target, environment):
                for step in (answer, settle, begin, lease.ack, lease.nack):
                    await refused(source, step)
                before = await source.keys()
                assert await broker.turns.lease("agent", wait=0.5) is None
                assert await source.keys() == before
                # What touches nothing that is not there goes on.
                assert (await log.last("s")).offset == 2
                said = await log.append("s", b"3", kind=Kind.EVENT, after=begun, pending=begun.pending)
            ended = await log.append("s", b"4", kind=Kind.EVENT, after=said, pending=Pending())
            await lease.ack()
            assert [record.body for record in await log.read("s")] == [b"1", b"2", b"3", b"4"]
            assert ended.offset == 4
            (stats,) = await broker.stats()
            assert (stats.waiting, stats.leased) == (0, 0)


async def test_a_partition_at_another_node_is_an_error_that_says_so() -> None:
    async with cluster_of((0, 8191), (8192, 16383)) as (first, _second):
        name = next(
            name
            for name in map(str, range(1000))
            if key_slot(f"ar:{name}:meta".encode()) < 8192 <= key_slot(f"{{ar:{name}:0}}".encode())
        )
        async with ValkeyBroker(first.server.url, namespace=name, check=False) as broker:
            await broker.setup()
            with pytest.raises(Misconfigured, match="one node of a cluster with several: MOVED"):
                await broker.log.last("s")
