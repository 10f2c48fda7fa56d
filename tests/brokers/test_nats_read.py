"""Reading from a stream that many sessions share: what is asked of the server, and that nothing is missing."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import msgspec
import pytest

from agentrun.broker import Kind, Pending, Record, Tail
from agentrun.brokers import nats_read
from agentrun.brokers.nats import NatsBroker
from agentrun.brokers.nats_link import Link
from agentrun.testing import Settings
from tests.brokers.nats_environment import NatsEnvironment, NatsEnvironments

_KINDS = (Kind.DELTA, Kind.DELTA, Kind.DELTA, Kind.EVENT, Kind.CANCEL, Kind.TURN)


@pytest.fixture
async def broker(nats_environments: NatsEnvironments) -> AsyncGenerator[NatsBroker]:
    async with nats_environments(Settings()) as environment:
        assert isinstance(environment, NatsEnvironment)
        async with environment.broker() as broker:
            yield broker


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Mapping[str, Any], int]]:
    """The batches that are asked for, and how many records came."""
    seen: list[tuple[Mapping[str, Any], int]] = []
    collect = Link.collect

    async def watched(self: Link, subject: str, body: bytes, *, timeout: float) -> Any:
        replies, end = await collect(self, subject, body, timeout=timeout)
        seen.append((msgspec.json.decode(body), len(replies)))
        return replies, end

    monkeypatch.setattr(Link, "collect", watched)
    return seen


async def append(broker: NatsBroker, session: str, kind: Kind, tail: Tail, agent: str = "a") -> Tail:
    return await broker.log.append(
        session, b"%d" % tail.next, kind=kind, after=tail, pending=Pending(), agent=agent if kind is Kind.TURN else None
    )


async def mixed(broker: NatsBroker, dice: random.Random, sessions: int, records: int) -> dict[str, list[Kind]]:
    """Sessions among each other, of records of all kinds; some have long pauses, in which others are stored."""
    written: dict[str, list[Kind]] = {f"s{n}": [] for n in range(sessions)}
    tails = dict.fromkeys(written, Tail())
    name = "s0"
    for _ in range(records):
        if dice.random() < 0.1:
            name = dice.choice(sorted(written))
        kind = dice.choice(_KINDS)
        tails[name] = await append(broker, name, kind, tails[name], dice.choice("abc"))
        written[name].append(kind)
    return written


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("batch", [7, 500])
async def test_any_part_of_any_session(
    broker: NatsBroker, monkeypatch: pytest.MonkeyPatch, seed: int, batch: int
) -> None:
    monkeypatch.setattr(nats_read, "BATCH", batch)
    # Both ways to read with the deltas are taken: over one filter, and over each subject.
    monkeypatch.setattr(nats_read, "SPARSE", 3)
    dice = random.Random(seed)
    written = await mixed(broker, dice, 5, 600)
    for _ in range(60):
        name = dice.choice(sorted(written))
        deltas = dice.random() < 0.5
        after, limit = dice.randrange(len(written[name]) + 3), dice.choice([1, 5, 40, 1000])
        found = await broker.log.read(name, after=after, deltas=deltas, limit=limit)
        expected = [
            (n, kind) for n, kind in enumerate(written[name], 1) if n > after and (deltas or kind is not Kind.DELTA)
        ]
        assert [(r.offset, r.kind) for r in found] == expected[:limit]
        assert all(r.body == b"%d" % r.offset for r in found)


async def test_the_server_is_never_asked_for_more_than_there_is(
    broker: NatsBroker, asked: list[tuple[Mapping[str, Any], int]]
) -> None:
    await mixed(broker, random.Random(4), 5, 300)
    for deltas in (True, False):
        for after in (0, 1, 20):
            await broker.log.read("s0", after=after, deltas=deltas)
    batches = [(query, came) for query, came in asked if "batch" in query]
    assert batches
    # Of a single subject the server knows the last record; with a wildcard it looks for more at all others that follow.
    for query, came in batches:
        assert not query["next_by_subj"].endswith(">") or came == query["batch"]


async def test_a_session_that_has_said_nothing_else_costs_one_request(
    broker: NatsBroker, asked: list[tuple[Mapping[str, Any], int]]
) -> None:
    tail = await append(broker, "s", Kind.TURN, Tail())
    assert [r.offset for r in await broker.log.read("s")] == [1]
    assert [r.offset for r in await broker.log.read("s", deltas=False)] == [1]
    assert [sorted(query) for query, _ in asked] == [["multi_last"]] * 2
    for kind in (Kind.EVENT, Kind.DELTA, Kind.EVENT, Kind.TURN):
        tail = await append(broker, "s", kind, tail)
    asked.clear()
    found: list[Record] = list(await broker.log.read("s", after=3, deltas=False))
    assert [r.offset for r in found] == [4, 5]
    assert [sorted(query) for query, _ in asked] == [["multi_last"]]
