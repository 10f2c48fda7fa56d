"""Turns that gave up: the list finds them, all of them and nothing else; they are sent again, or dropped."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from agentrun import dead, wire
from agentrun.agent import Context, agent
from agentrun.broker import Kind, Tail
from agentrun.client import Client, DeadTurn
from agentrun.errors import Fail, InvalidInput, TurnFailed, Unavailable
from agentrun.testing.faults import FaultyBroker
from tests.worker.fleet import Fleet, eventually


class Moody:
    """Fails while it is told to, and notes the messages of the attempts that do not."""

    def __init__(self) -> None:
        self.fails = True
        self.saw: list[list[Any]] = []
        self.agent = agent(name="moody")(self.run)

    async def run(self, ctx: Context) -> AsyncIterator[str]:
        if ctx.text == "on purpose":
            raise Fail("no such order")
        if self.fails and "fine" not in ctx.text:
            yield "half "
            raise ConnectionError("the provider is down")
        self.saw.append([message["content"] for message in ctx.messages])
        yield f"<{ctx.text}>"


async def listed(client: Client, **which: Any) -> list[DeadTurn]:
    return [entry async for entry in client.dead(**which)]


async def fail(fleet: Fleet, session: str, turn: str, text: str = "x", **more: Any) -> None:
    with pytest.raises(TurnFailed):
        await (await fleet.session(session, "moody").send(text, id=turn, **more)).result(20)


async def test_a_turn_that_gave_up_is_listed_with_its_reason(fleet: Fleet) -> None:
    await fleet.worker(Moody().agent, max_attempts=2)
    await fail(fleet, "a", "t1")
    await fail(fleet, "b", "t1", "on purpose")
    await (await fleet.session("c", "moody").send("fine")).result(10)
    (entry,) = await listed(fleet.client)
    assert (entry.session, entry.turn, entry.agent, entry.offset) == ("a", "t1", "moody", 1)
    assert (entry.code, entry.attempts) == ("agent_error", 2)
    assert entry.message == "gave up after 2 attempts: ConnectionError: the provider is down"
    end = [record for record, event in await fleet.records("a") if isinstance(event, wire.TurnFailed)]
    assert abs(entry.time - end[0].time) < 5
    assert await listed(fleet.client, agent="other") == []


async def test_a_turn_whose_workers_died_is_listed(fleet: Fleet) -> None:
    runs: list[int] = []

    @agent
    async def poison(ctx: Context) -> None:
        runs.append(ctx.attempt)
        await anyio.sleep(60)

    turn = await fleet.session(agent="poison").send("x", id="t1")
    worker = await fleet.worker(poison, max_attempts=1)
    await eventually(lambda: len(runs) == 1)
    await worker.crash()
    assert await listed(fleet.client) == []
    await fleet.worker(poison, max_attempts=1)
    with pytest.raises(TurnFailed):
        await turn.result(10)
    (entry,) = await listed(fleet.client)
    assert (entry.turn, entry.code, entry.attempts) == ("t1", "max_attempts", 1)


async def test_an_input_that_is_no_turn_is_listed_and_can_only_be_dropped(fleet: Fleet) -> None:
    offset = await fleet.append(b"\xff no json", agent="moody")
    await fleet.worker(Moody().agent)
    await fleet.until("input.rejected")
    (entry,) = await listed(fleet.client)
    assert (entry.session, entry.turn, entry.code, entry.agent) == ("s", f"@{offset}", "not_an_input", "moody")
    with pytest.raises(InvalidInput, match="is no turn"):
        await fleet.client.retry_dead(entry)
    assert await listed(fleet.client) == [entry]
    await fleet.client.drop_dead(entry)
    assert await listed(fleet.client) == []


async def test_retry_sends_it_again_in_its_place_and_only_once(fleet: Fleet) -> None:
    moody = Moody()
    await fleet.worker(moody.agent, max_attempts=1)
    session = fleet.session("a", "moody")
    await (await session.send("fine", id="t0")).result(10)
    await fail(fleet, "a", "t1", "hello", user="ann", metadata={"k": 1}, deadline=60)
    (entry,) = await listed(fleet.client)
    moody.fails = False
    (turn,) = await fleet.client.retry_dead(entry)
    assert turn.id == "t1-retry1"
    assert (await turn.result(10)).text == "<hello>"
    assert await listed(fleet.client) == []
    (again,) = await fleet.client.retry_dead(entry)
    assert (again.id, again.offset) == (turn.id, turn.offset)
    requests = [e for _, e in await fleet.records("a") if isinstance(e, wire.TurnRequested)]
    assert [r.turn for r in requests] == ["t0", "t1", "t1-retry1"]
    sent = requests[-1]
    assert (sent.input, sent.agent, sent.user, sent.metadata) == ("hello", "moody", "ann", {"k": 1})
    assert (sent.replaces, sent.deadline) == ("t1", None)
    assert moody.saw[-1] == ["fine", "<fine>", "hello"]


async def test_a_retry_that_gives_up_is_listed_and_retried_as_well(fleet: Fleet) -> None:
    moody = Moody()
    await fleet.worker(moody.agent, max_attempts=1)
    await fail(fleet, "a", "t1")
    (first,) = await listed(fleet.client)
    (turn,) = await fleet.client.retry_dead(first)
    with pytest.raises(TurnFailed):
        await turn.result(10)
    (second,) = await listed(fleet.client)
    assert second.turn == "t1-retry1"
    moody.fails = False
    (turn,) = await fleet.client.retry_dead(second)
    assert turn.id == "t1-retry2"
    await turn.result(10)
    assert moody.saw == [["x"]]


async def test_retry_takes_nothing_that_was_said_since_out_of_the_conversation(fleet: Fleet) -> None:
    moody = Moody()
    await fleet.worker(moody.agent, max_attempts=1)
    await fail(fleet, "a", "t1", "first")
    await (await fleet.session("a", "moody").send("fine", id="t2")).result(10)
    moody.fails = False
    (turn,) = await fleet.client.retry_dead(*await listed(fleet.client))
    await turn.result(10)
    history = await fleet.session("a").history()
    assert history.turns["t2"].replaced_by is None
    assert "<fine>" in moody.saw[-1]


async def test_two_dead_turns_of_a_session_are_both_answered(fleet: Fleet) -> None:
    moody = Moody()
    await fleet.worker(moody.agent, max_attempts=1)
    await fail(fleet, "a", "t1", "one")
    await fail(fleet, "a", "t2", "two")
    entries = await listed(fleet.client)
    moody.fails = False
    turns = await fleet.client.retry_dead(entries[0])
    assert [entry.turn for entry in await listed(fleet.client)] == ["t2"], "replaced with t1, but not retried"
    turns += await fleet.client.retry_dead(entries[1])
    assert [(await turn.result(10)).text for turn in turns] == ["<one>", "<two>"]
    assert moody.saw[-1] == ["one", "<one>", "two"]


async def test_a_turn_that_was_replaced_by_its_sender_is_nobodys_concern(fleet: Fleet) -> None:
    await fleet.worker(Moody().agent, max_attempts=1)
    await fail(fleet, "a", "t1")
    (entry,) = await listed(fleet.client)
    await (await fleet.session("a", "moody").send("fine", replaces="t1", id="t2")).result(10)
    assert await listed(fleet.client) == []
    with pytest.raises(InvalidInput, match="replaced by turn t2"):
        await fleet.client.retry_dead(entry)


class CrashesBeforeTheEnd(FaultyBroker):
    """Goes away for good once the list has the entry, before the turn has its end."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        append = self.log.append

        async def watched(session: str, body: bytes, **more: Any) -> Tail:
            if b'"turn.failed"' in body or b'"input.rejected"' in body:
                self.disconnect()
            return await append(session, body, **more)

        self.log.append = watched


async def test_a_crash_between_the_entry_and_the_end_leaves_one_entry(fleet: Fleet) -> None:
    moody = Moody()
    cut: list[CrashesBeforeTheEnd] = []

    def wrap(broker: Any) -> Any:
        cut.append(CrashesBeforeTheEnd(broker))
        return cut[-1]

    worker = await fleet.worker(moody.agent, wrap=wrap, max_attempts=1)
    turn = await fleet.session("a", "moody").send("x", id="t1")
    await fleet.until(lambda event: True, dead.SESSION)
    await eventually(lambda: not cut[0].connected)
    assert "turn.failed" not in await fleet.types("a")
    assert await listed(fleet.client) == [], "the turn has not ended: the entry is one too many"
    await worker.crash()
    await fleet.worker(moody.agent, max_attempts=1)
    with pytest.raises(TurnFailed):
        await turn.result(10)
    assert len(await fleet.broker.log.read(dead.SESSION)) == 2
    assert [entry.turn for entry in await listed(fleet.client)] == ["t1"]
    await fleet.client.drop_dead(*await listed(fleet.client))
    assert await listed(fleet.client) == []


async def test_an_entry_whose_turn_was_then_completed_is_never_shown(fleet: Fleet) -> None:
    moody = Moody()
    worker = await fleet.worker(moody.agent, wrap=CrashesBeforeTheEnd, max_attempts=1)
    turn = await fleet.session("a", "moody").send("x", id="t1")
    await fleet.until(lambda event: True, dead.SESSION)
    await worker.crash()
    moody.fails = False
    await fleet.worker(moody.agent, max_attempts=2)
    await turn.result(10)
    assert await listed(fleet.client) == []


async def test_200_turns_of_several_workers_that_give_up_at_once_are_all_listed(fleet: Fleet) -> None:
    gate = anyio.Event()

    @agent(name="moody")
    async def doomed(ctx: Context) -> None:
        await gate.wait()
        raise ConnectionError("the provider is down")

    workers = [await fleet.worker(doomed, max_attempts=1, concurrency=50, lease=30.0) for _ in range(4)]
    turns = [await fleet.session(f"s{n}", "moody").send("x", id=f"t{n}") for n in range(200)]
    await eventually(lambda: sum(len(w.worker.info.running) for w in workers) == 200, 20)
    gate.set()
    for turn in turns:
        with pytest.raises(TurnFailed):
            await turn.result(30)
    assert {entry.key for entry in await listed(fleet.client)} == {(f"s{n}", f"t{n}") for n in range(200)}
    assert await dead.count(fleet.broker.log) == 200
    # Batched: 200 appends of their own would have met at one session.
    assert len(await fleet.broker.log.read(dead.SESSION)) < 200


class NoList(FaultyBroker):
    """Cannot store dead turns while ``refusing``."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.refusing = True
        append = self.log.append

        async def watched(session: str, body: bytes, **more: Any) -> Tail:
            if session == dead.SESSION and self.refusing:
                raise Unavailable("not now")
            return await append(session, body, **more)

        self.log.append = watched


async def test_a_list_that_cannot_be_written_holds_up_no_end_and_is_said(
    memory_fleet: Fleet, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead, "PATIENCE", 0.2)
    monkeypatch.setattr(dead, "_APPEND", 0.2)
    brokers: list[NoList] = []

    def wrap(broker: Any) -> Any:
        brokers.append(NoList(broker))
        return brokers[-1]

    with caplog.at_level(logging.WARNING, "agentrun.dead"):
        worker = await memory_fleet.worker(Moody().agent, wrap=wrap, max_attempts=1)
        await fail(memory_fleet, "a", "t1")
        assert "turn t1 of session a gave up, and is not on the list of dead turns after 0.2 s" in caplog.text
        assert await listed(memory_fleet.client) == []
        brokers[0].refusing = False
        with anyio.fail_after(10):
            while not (found := await listed(memory_fleet.client)):  # noqa: ASYNC110 - nothing rings for it
                await anyio.sleep(0.05)
        assert [entry.turn for entry in found] == ["t1"]
        brokers[0].refusing = True
        await fail(memory_fleet, "b", "t2")
        await worker.drain()
    assert "turn t2 of session b gave up, and is missing from the list of dead turns: the worker ends" in caplog.text


# --------------------------------------------------------------------------------------------------- the list itself


async def put(fleet: Fleet, count: int, begin: int = 0) -> list[DeadTurn]:
    """Dead turns, with what their sessions would hold of them, and their entries, a record each."""
    entries: list[DeadTurn] = []
    log = fleet.broker.log
    letters = dead.DeadLetters(log)
    async with anyio.create_task_group() as group:
        group.start_soon(letters.run)
        for n in range(begin, begin + count):
            name = f"d{n}"
            await fleet.append(wire.TurnRequested(turn="t", agent="moody", input="x"), agent="moody", session=name)
            end = await log.last(name)
            error = wire.ErrorInfo("agent_error", "gave up")
            event = wire.TurnFailed(turn="t", attempt=0, turn_offset=1, error=error)
            entry = DeadTurn(session=name, turn="t", agent="moody", offset=1, after=1, time=float(n))
            await letters.report(entry)
            await log.append(name, wire.encode(event), kind=Kind.EVENT, after=end, pending=end.pending.settle(1))
            entries.append(entry)
        group.cancel_scope.cancel()
    return entries


async def behind(fleet: Fleet) -> int:
    """Records a reader of the list has to read."""
    tail = await fleet.broker.log.last(dead.SESSION)
    return tail.offset - tail.pending[0].offset + 1 if tail.pending else 0


async def test_a_repeated_entry_is_one_and_is_settled_as_one(memory_fleet: Fleet) -> None:
    (entry,) = await put(memory_fleet, 1)
    letters = dead.DeadLetters(memory_fleet.broker.log)
    async with anyio.create_task_group() as group:
        group.start_soon(letters.run)
        await letters.report(entry)
        group.cancel_scope.cancel()
    assert await listed(memory_fleet.client) == [entry]
    await memory_fleet.client.drop_dead(entry)
    assert await listed(memory_fleet.client) == []


async def test_what_was_settled_costs_a_reader_nothing_for_ever(
    memory_fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead, "LONGEST", 20)
    (old,) = await put(memory_fleet, 1)
    for n in range(1, 60):
        (entry,) = await put(memory_fleet, 1, begin=n)
        await memory_fleet.client.drop_dead(entry)
        assert await behind(memory_fleet) <= 24
    # The old one is still there, though reading no longer begins at it.
    assert await listed(memory_fleet.client) == [old]
    tail = await memory_fleet.broker.log.last(dead.SESSION)
    assert tail.pending[0].offset > 80
    for _ in range(60):
        await memory_fleet.client.drop_dead(old)
        assert await behind(memory_fleet) <= 24
    assert await listed(memory_fleet.client) == []


async def test_many_open_entries_are_copied_whole(memory_fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead, "LONGEST", 20)
    monkeypatch.setattr(dead, "_BATCH", 7)
    entries = await put(memory_fleet, 40)
    await memory_fleet.client.drop_dead(entries[3])
    assert await behind(memory_fleet) == 6
    assert await listed(memory_fleet.client) == entries[:3] + entries[4:]


async def test_two_who_settle_at_once_open_nothing_again(memory_fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead, "LONGEST", 3)
    entries = await put(memory_fleet, 60)
    async with anyio.create_task_group() as group:
        for begin in range(6):
            group.start_soon(drop_each, memory_fleet.client, entries[begin:54:6])
    assert await listed(memory_fleet.client) == entries[54:]


async def drop_each(client: Client, entries: list[DeadTurn]) -> None:
    for entry in entries:
        await client.drop_dead(entry)


async def test_a_deleted_sessions_entry_is_taken_off(memory_fleet: Fleet) -> None:
    entries = await put(memory_fleet, 3)
    await memory_fleet.session("d1").delete()
    assert await listed(memory_fleet.client) == [entries[0], entries[2]]
    records = await memory_fleet.broker.log.read(dead.SESSION)
    assert b'"settled":[["d1","t"]]' in records[-1].body
    memory_fleet.sessions.discard("d1")


async def test_junk_on_the_list_is_stepped_over(memory_fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    entries = await put(memory_fleet, 1)
    offset = await memory_fleet.append(b"\xff", kind=Kind.CANCEL, session=dead.SESSION)
    memory_fleet.sessions.discard(dead.SESSION)
    with caplog.at_level(logging.WARNING):
        assert await listed(memory_fleet.client) == entries
    assert f"offset {offset} of session agentrun--dead is not about dead turns" in caplog.text


def test_the_id_of_a_retry_is_an_id_however_long_the_first_was() -> None:
    ids = ["a" * 128, "b" * 128]
    for _ in range(12):
        ids = [dead._id_of_retry(id) for id in ids]
        assert all(wire.check_id("a turn's id", id) == id for id in ids)
        assert len(set(ids)) == 2
    assert ids[0].endswith("-retry12")
