from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio
import msgspec
import pytest
from scripted_owner import Owner, lag, make_broker, make_client

from agentrun import wire
from agentrun.broker import Kind
from agentrun.brokers.memory import MemoryBroker
from agentrun.client import Client, Receipt, Session
from agentrun.errors import Unavailable


@pytest.fixture
def broker() -> MemoryBroker:
    return make_broker()


@pytest.fixture
def client(broker: MemoryBroker) -> Client:
    return make_client(broker, cancel_live=0.05, cancel_wait=0.4)


@pytest.fixture
def session(client: Client) -> Session:
    return client.session("s")


@pytest.fixture
def owner(broker: MemoryBroker) -> Owner:
    return Owner(broker)


async def stops(broker: MemoryBroker) -> list[tuple[Kind, wire.TurnCancel]]:
    records = [(r.kind, wire.decode(r.body)) for r in await broker.log.read("s")]
    return [(kind, event) for kind, event in records if isinstance(event, wire.TurnCancel)]


def listening(
    broker: MemoryBroker, stop: Callable[[wire.TurnCancel], Awaitable[bytes | None]]
) -> AbstractAsyncContextManager[None]:
    async def handle(body: bytes) -> bytes | None:
        event = wire.decode(body)
        assert isinstance(event, wire.TurnCancel)
        return await stop(event)

    return broker.signals.listen("s.s", handle)


def reply(receipt: Any, offset: int) -> bytes:
    return msgspec.json.encode(wire.CancelReply(receipt, offset))


async def obey(owner: Owner) -> None:
    """End the running turn as soon as a stop for it is stored."""
    async with owner.broker.log.follow(owner.session) as batches:
        async for records in batches:
            for record in records:
                event = wire.decode(record.body)
                if isinstance(event, wire.TurnCancel):
                    await owner.end(wire.TurnCancelled, by=event.by)
                    return


async def test_a_running_worker_s_answer_is_the_receipt(session: Session, owner: Owner, broker: MemoryBroker) -> None:
    turn = await session.send("a", id="t1")
    await owner.start("t1", 1)

    async def stop(event: wire.TurnCancel) -> bytes:
        assert event == wire.TurnCancel(turn="t1", by="ann", reason="enough")
        return reply("cancelled", await owner.end(wire.TurnCancelled, by=event.by))

    async with listening(broker, stop):
        receipt = await turn.cancel(by="ann", reason="enough")
    assert (receipt.status, receipt.offset) == ("cancelled", 3)
    assert 0 < receipt.took < 0.4
    assert await stops(broker) == []


async def test_a_worker_may_say_that_the_turn_had_just_ended(
    session: Session, owner: Owner, broker: MemoryBroker
) -> None:
    turn = await session.send("a", id="t1")
    await owner.start("t1", 1)

    async def stop(event: wire.TurnCancel) -> bytes:
        return reply("already_ended", await owner.end())

    async with listening(broker, stop):
        receipt = await turn.cancel()
    assert (receipt.status, receipt.offset) == ("already_ended", 3)


async def test_a_stop_that_nobody_hears_is_stored_and_its_outcome_awaited(
    session: Session, owner: Owner, broker: MemoryBroker
) -> None:
    turn = await session.send("a", id="t1")
    await owner.start("t1", 1)
    async with anyio.create_task_group() as group:
        group.start_soon(obey, owner)
        receipt = await turn.cancel(by="ann")
    assert (receipt.status, receipt.offset) == ("cancelled", 4)
    assert await stops(broker) == [(Kind.CANCEL, wire.TurnCancel(turn="t1", by="ann"))]
    assert str((await broker.log.read("s"))[2].pending) == "1a"


async def test_a_stop_that_is_heard_but_not_answered_is_stored_as_well(
    session: Session, owner: Owner, broker: MemoryBroker
) -> None:
    turn = await session.send("a", id="t1")
    await owner.start("t1", 1)

    async def stop(event: wire.TurnCancel) -> None:
        return None

    async with listening(broker, stop), anyio.create_task_group() as group:
        group.start_soon(obey, owner)
        receipt = await turn.cancel()
    assert receipt.status == "cancelled"
    assert len(await stops(broker)) == 1


async def test_a_stop_obeyed_after_the_live_wait_counts_as_this_one(
    session: Session, owner: Owner, broker: MemoryBroker
) -> None:
    turn = await session.send("a", id="t1")
    await owner.start("t1", 1)

    async def stop(event: wire.TurnCancel) -> None:
        await owner.end(wire.TurnCancelled, by=event.by)
        return

    async with listening(broker, stop):
        receipt = await turn.cancel(by="ann")
        assert (receipt.status, receipt.offset) == ("cancelled", 3)
        assert await stops(broker) == []
        # Another's stop came too late for this turn.
        assert (await turn.cancel(by="bob")).status == "already_ended"


async def test_a_turn_that_completes_under_the_stop_had_already_ended(
    session: Session, owner: Owner, broker: MemoryBroker
) -> None:
    turn = await session.send("a", id="t1")
    await owner.start("t1", 1)

    async def complete() -> None:
        async with broker.log.follow("s", after=2) as batches:
            await anext(aiter(batches))
        await owner.end()

    async with anyio.create_task_group() as group:
        group.start_soon(complete)
        receipt = await turn.cancel()
    assert (receipt.status, receipt.offset) == ("already_ended", 4)


async def test_an_ended_turn_and_an_unknown_one_get_their_receipts_at_once(
    client: Client, session: Session, owner: Owner, broker: MemoryBroker
) -> None:
    turn = await session.send("a", id="t1")
    end = await owner.run("t1", 1)
    receipt = await turn.cancel()
    assert (receipt.status, receipt.offset) == ("already_ended", end)
    receipt = await client.turn("s", "t9").cancel()
    assert (receipt.status, receipt.offset) == ("not_found", 0)
    assert receipt.took < 0.2
    assert await stops(broker) == []


async def test_a_turn_that_a_lagging_server_does_not_know_is_stopped_all_the_same(
    session: Session, owner: Owner, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await session.send("a", id="t1")
    await owner.run("t1", 1, "one")
    turn = await session.send("b", id="t2")
    await owner.start("t2", turn.offset)
    lag(broker, monkeypatch, through=turn.offset - 1)
    async with anyio.create_task_group() as group:
        group.start_soon(obey, owner)
        receipt = await turn.cancel(by="me")
    assert (receipt.status, [event.turn for _, event in await stops(broker)]) == ("cancelled", ["t2"])


async def test_all_turns_of_a_session_that_a_lagging_server_knows_are_not_all(
    session: Session, owner: Owner, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await session.send("a", id="t1")
    await owner.run("t1", 1, "one")
    await session.send("b", id="t2")
    lag(broker, monkeypatch, through=4)
    assert (await session.cancel()).status == "pending"
    assert len(await stops(broker)) == 1


async def test_a_cancelled_turn_had_already_ended_for_the_next_stop(session: Session, owner: Owner) -> None:
    turn = await session.send("a", id="t1")
    await owner.start("t1", 1)
    end = await owner.end(wire.TurnCancelled)
    receipt = await turn.cancel()
    assert (receipt.status, receipt.offset) == ("already_ended", end)


async def test_a_stop_without_an_outcome_is_pending_and_stored_once(
    session: Session, owner: Owner, broker: MemoryBroker
) -> None:
    turn = await session.send("a", id="t1")
    receipt = await turn.cancel(by="ann")
    assert (receipt.status, receipt.offset) == ("pending", 2)
    assert 0.35 < receipt.took < 2
    assert (await turn.cancel(by="bob")).status == "pending"
    assert [event.by for _, event in await stops(broker)] == ["ann"]
    receipts: list[Receipt] = []

    async def stop() -> None:
        receipts.append(await turn.cancel(by="bob"))

    async with anyio.create_task_group() as group:
        group.start_soon(stop)
        await anyio.sleep(0.05)
        owner.turn, owner.at = "t1", 1
        end = await owner.end(wire.TurnCancelled, by="ann")
    assert [(r.status, r.offset) for r in receipts] == [("cancelled", end)]


async def test_stops_at_once_store_one(session: Session, owner: Owner, broker: MemoryBroker) -> None:
    turn = await session.send("a", id="t1")
    await owner.start("t1", 1)
    receipts: list[Receipt] = []

    async def stop() -> None:
        receipts.append(await turn.cancel())

    async with anyio.create_task_group() as group:
        group.start_soon(obey, owner)
        for _ in range(10):
            group.start_soon(stop)
    assert [r.status for r in receipts] == ["cancelled"] * 10
    assert len(await stops(broker)) == 1


async def test_a_parked_turn_s_stop_wakes_its_agent(session: Session, owner: Owner, broker: MemoryBroker) -> None:
    turn = await session.send("a", id="t1", agent="admin")
    await owner.start("t1", 1)
    await owner.ask("q1")
    await owner.suspend("q1")
    assert (await turn.cancel()).status == "pending"
    record = (await broker.log.read("s"))[-1]
    assert (record.kind, record.agent, str(record.pending)) == (Kind.TURN, "admin", "1p,5w")
    assert (await turn.cancel()).status == "pending"
    assert len(await stops(broker)) == 1


async def test_a_turn_behind_a_parked_one_is_stopped_by_waking_that_one_s_agent(
    session: Session, owner: Owner, broker: MemoryBroker
) -> None:
    await session.send("a", id="t1", agent="admin")
    second = await session.send("b", id="t2", agent="other")
    await owner.start("t1", 1)
    await owner.ask("q1")
    await owner.suspend("q1")
    assert (await second.cancel()).status == "pending"
    record = (await broker.log.read("s"))[-1]
    assert (record.kind, record.agent, str(record.pending)) == (Kind.TURN, "admin", "1p,2,6w")


async def test_a_turn_parked_again_under_an_answer_is_found(
    session: Session, owner: Owner, broker: MemoryBroker
) -> None:
    turn = await session.send("a", id="t1", agent="admin")
    await owner.start("t1", 1)
    await owner.ask("q1")
    await owner.suspend("q1")
    answer = await turn.answer("q1", True)
    await owner.start("t1", answer, attempt=2)
    await owner.ask("q2")
    await owner.suspend("q2")
    await turn.cancel()
    record = (await broker.log.read("s"))[-1]
    assert (record.kind, record.agent, str(record.pending)) == (Kind.TURN, "admin", f"{answer}p,9w")


async def test_a_stop_meets_a_turn_that_parks_meanwhile(
    session: Session, owner: Owner, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = await session.send("a", id="t1", agent="admin")
    await owner.start("t1", 1)
    await owner.ask("q1")
    append = broker.log.append

    async def park_first(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(broker.log, "append", append)
        await owner.suspend("q1")
        return await append(*args, **options)

    monkeypatch.setattr(broker.log, "append", park_first)
    await turn.cancel()
    assert [kind for kind, _ in await stops(broker)] == [Kind.TURN]


async def test_a_stop_that_was_slept_through_is_repeated_to_wake(
    session: Session, owner: Owner, broker: MemoryBroker
) -> None:
    turn = await session.send("a", id="t1", agent="admin")
    await owner.start("t1", 1)
    assert (await turn.cancel()).status == "pending"
    await owner.ask("q1")
    await owner.suspend("q1")
    assert (await turn.cancel()).status == "pending"
    assert [kind for kind, _ in await stops(broker)] == [Kind.CANCEL, Kind.TURN]


async def test_a_turn_that_ends_meanwhile_gets_no_stop(
    session: Session, owner: Owner, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = await session.send("a", id="t1")
    await owner.start("t1", 1)
    append = broker.log.append

    async def end_first(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(broker.log, "append", append)
        await owner.end()
        return await append(*args, **options)

    monkeypatch.setattr(broker.log, "append", end_first)
    receipt = await turn.cancel()
    assert (receipt.status, receipt.offset) == ("already_ended", 3)
    assert await stops(broker) == []


async def test_stopping_a_session_stops_all_that_was_sent_before(
    session: Session, owner: Owner, broker: MemoryBroker
) -> None:
    await session.send("a", id="t1")
    await session.send("b", id="t2")
    await owner.start("t1", 1)

    async def stop_both() -> None:
        await obey(owner)
        owner.turn, owner.at = "t2", 2
        await owner.end(wire.TurnCancelled)

    async with anyio.create_task_group() as group:
        group.start_soon(stop_both)
        receipt = await session.cancel(by="ann")
    assert (receipt.status, receipt.offset) == ("cancelled", 6)
    assert await stops(broker) == [(Kind.CANCEL, wire.TurnCancel(all=True, by="ann"))]
    again = await session.cancel()
    assert (again.status, again.offset) == ("already_ended", 0)


async def test_what_the_running_worker_leaves_waiting_is_stopped_by_the_log(
    session: Session, owner: Owner, broker: MemoryBroker
) -> None:
    await session.send("a", id="t1")
    await session.send("b", id="t2")
    await owner.start("t1", 1)

    async def stop(event: wire.TurnCancel) -> bytes:
        return reply("cancelled", await owner.end(wire.TurnCancelled))

    async with listening(broker, stop):
        receipt = await session.cancel()
    assert (receipt.status, receipt.offset) == ("pending", 5)
    assert len(await stops(broker)) == 1


async def test_a_worker_that_stops_everything_leaves_nothing_to_store(
    session: Session, owner: Owner, broker: MemoryBroker
) -> None:
    await session.send("a", id="t1")
    await owner.start("t1", 1)

    async def stop(event: wire.TurnCancel) -> bytes:
        assert event.all
        return reply("cancelled", await owner.end(wire.TurnCancelled))

    async with listening(broker, stop):
        receipt = await session.cancel()
    assert (receipt.status, receipt.offset) == ("cancelled", 3)
    assert await stops(broker) == []


async def test_an_empty_session_has_nothing_to_stop(session: Session) -> None:
    assert (await session.cancel()).status == "not_found"


async def test_a_stop_that_cannot_be_stored_is_no_receipt(
    session: Session, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = await session.send("a", id="t1")

    async def away(*args: Any, **options: Any) -> Any:
        raise Unavailable("the broker is away")

    monkeypatch.setattr(broker.log, "append", away)
    with pytest.raises(Unavailable, match="away"):
        await turn.cancel()
