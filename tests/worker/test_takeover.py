"""P4 and P7: a worker disappears, or loses its lease and does not know."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import anyio

from agentrun import wire
from agentrun.agent import Context, agent
from agentrun.broker import Kind, Record
from agentrun.testing import Environments, Settings, memory_environments
from agentrun.testing.faults import Faults, FaultyBroker
from tests.worker.fleet import LEASE, Fleet, Part, Wrapped, check_session, eventually, fleet_on

WORDS = [f"w{n} " for n in range(12)]


class Script:
    """An agent that says its words, and stops for good in the middle of its first attempt."""

    def __init__(self, *, resume: bool, stuck_at: int = 5) -> None:
        self.contexts: list[Context] = []
        self.stuck_at = stuck_at
        self.agent = agent(name="script", resume=resume)(self.run)

    async def run(self, ctx: Context) -> AsyncIterator[str]:
        self.contexts.append(ctx)
        said = len(ctx.partial.text.split()) if ctx.partial is not None and ctx.resumes else 0
        for n, word in enumerate(WORDS[said:], said):
            if ctx.attempt == 1 and n == self.stuck_at:
                await anyio.sleep(60)
            yield word
            await anyio.sleep(0.003)


async def starts(fleet: Fleet, session: str = "s") -> list[wire.TurnStarted]:
    return [e for e in await fleet.events(session) if isinstance(e, wire.TurnStarted)]


async def until_said(fleet: Fleet, text: str, session: str = "s") -> int:
    """Wait until the session's deltas end in this text; return the offset of the last."""
    record = await fleet.until(lambda e: isinstance(e, wire.TextDelta) and e.text.endswith(text), session)
    return record.offset


async def test_another_worker_goes_on_exactly_where_a_dead_one_stopped(fleet: Fleet) -> None:
    script = Script(resume=True)
    first = await fleet.worker(script.agent)
    turn = await fleet.session(agent="script").send("go")
    said_at = await until_said(fleet, WORDS[4])
    await first.crash()
    before = time.monotonic()
    await fleet.worker(script.agent)
    result = await turn.result(10)
    assert time.monotonic() - before < LEASE + 3
    assert (result.text, result.attempt) == ("".join(WORDS), 2)
    one, two = await starts(fleet)
    assert one.resumes_from is None
    assert two.resumes_from == said_at
    assert two.message is not None
    assert two.message.text == "".join(WORDS[:5])
    assert script.contexts[1].partial is not None
    assert script.contexts[1].partial.text == "".join(WORDS[:5])
    assert script.contexts[1].resumes
    texts = [e.text for e in await fleet.events() if isinstance(e, wire.TextDelta)]
    assert "".join(texts) == "".join(WORDS)


async def test_an_agent_that_cannot_resume_starts_over_and_supersedes_with_its_first_word(fleet: Fleet) -> None:
    gate = anyio.Event()
    script = Script(resume=False)

    @agent(name="script")
    async def again(ctx: Context) -> AsyncIterator[str]:
        script.contexts.append(ctx)
        await gate.wait()
        for word in WORDS:
            yield word

    first = await fleet.worker(script.agent)
    session = fleet.session(agent="script")
    turn = await session.send("go")
    await until_said(fleet, WORDS[4])
    await first.crash()
    await fleet.worker(again)
    await fleet.until("turn.started", times=2)
    shown = (await session.history()).turns[turn.id].message
    assert shown.text == "".join(WORDS[:5])
    gate.set()
    result = await turn.result(10)
    assert result.text == "".join(WORDS)
    assert (await starts(fleet))[1].resumes_from is None
    partial = script.contexts[1].partial
    assert partial is not None
    assert partial.text == "".join(WORDS[:5])
    assert not script.contexts[1].resumes


async def test_an_empty_retry_blanks_nothing(memory_fleet: Fleet) -> None:
    script = Script(resume=False)

    @agent(name="script")
    async def fails(ctx: Context) -> None:
        raise ValueError("no")

    first = await memory_fleet.worker(script.agent)
    turn = await memory_fleet.session(agent="script").send("go")
    await until_said(memory_fleet, WORDS[4])
    await first.crash()
    await memory_fleet.worker(fails, max_attempts=2)
    await memory_fleet.until("turn.failed")
    end = (await memory_fleet.events())[-1]
    assert isinstance(end, wire.TurnFailed)
    assert end.message.text == "".join(WORDS[:5])
    assert turn.id == end.turn


async def test_death_before_the_first_word(fleet: Fleet) -> None:
    script = Script(resume=True, stuck_at=0)
    first = await fleet.worker(script.agent)
    turn = await fleet.session(agent="script").send("go")
    await fleet.until("turn.started")
    await first.crash()
    await fleet.worker(script.agent)
    assert (await turn.result(10)).text == "".join(WORDS)
    assert (await starts(fleet))[1].resumes_from is None
    assert script.contexts[-1].attempt == 2  # the first may have died before its agent began
    assert script.contexts[-1].partial is None


async def test_what_waits_behind_a_dead_workers_turn_keeps_its_place(fleet: Fleet) -> None:
    script = Script(resume=True)
    first = await fleet.worker(script.agent)
    session = fleet.session(agent="script")
    turns = [await session.send("go", id=f"t{n}") for n in range(3)]
    await until_said(fleet, WORDS[4])
    await first.crash()
    script.stuck_at = -1
    await fleet.worker(script.agent)
    for turn in turns:
        await turn.result(10)
    ends = [e.turn for e in await fleet.events() if isinstance(e, wire.TurnCompleted)]
    assert ends == ["t0", "t1", "t2"]


def cut_off(faulty: list[FaultyBroker]) -> Any:
    def wrap(broker: Any) -> Any:
        faulty.append(FaultyBroker(broker, Faults()))
        return faulty[-1]

    return wrap


async def test_a_zombie_that_speaks_is_refused_and_stopped(fleet: Fleet) -> None:
    faulty: list[FaultyBroker] = []
    stopped_at: list[float] = []

    @agent(name="script", resume=True)
    async def script(ctx: Context) -> AsyncIterator[str]:
        try:
            for n in range(len(ctx.partial.text.split()) if ctx.partial else 0, 40):
                yield f"{ctx.attempt}.{n} "
                await anyio.sleep(0.05)
        except BaseException:
            stopped_at.append(time.monotonic())
            raise

    await fleet.worker(script, wrap=cut_off(faulty))
    turn = await fleet.session(agent="script").send("go")
    await until_said(fleet, "1.5 ")
    faulty[0].disconnect()
    await fleet.worker(script)
    await fleet.until("turn.started", times=2)
    await anyio.sleep(0.1)
    revived = time.monotonic()
    faulty[0].reconnect()
    await eventually(lambda: bool(stopped_at), 2.0)
    assert stopped_at[0] - revived < 1.5
    result = await turn.result(10)
    assert result.attempt == 2
    numbers = [word.split(".")[1] for word in result.text.split()]
    assert numbers == [str(n) for n in range(40)]


async def test_a_silent_zombie_is_stopped_as_well(fleet: Fleet) -> None:
    faulty: list[FaultyBroker] = []
    attempts: list[int] = []
    stopped: list[int] = []

    @agent(name="script")
    async def script(ctx: Context) -> AsyncIterator[str]:
        attempts.append(ctx.attempt)
        yield "a"
        if ctx.attempt == 1:
            try:
                await anyio.sleep(60)
            finally:
                stopped.append(ctx.attempt)

    zombie = await fleet.worker(script, wrap=cut_off(faulty))
    turn = await fleet.session(agent="script").send("go")
    await until_said(fleet, "a")
    faulty[0].disconnect()
    await fleet.worker(script)
    assert (await turn.result(10)).attempt == 2
    assert stopped == []
    faulty[0].reconnect()
    await eventually(lambda: stopped == [1], 3.0)
    await eventually(lambda: not zombie.worker.info.running)
    assert attempts == [1, 2]


async def test_a_lease_given_out_twice_runs_the_turn_once_at_a_time(memory_fleet: Fleet) -> None:
    faulty: list[FaultyBroker] = []

    def wrap(broker: Any) -> Any:
        faulty.append(FaultyBroker(broker, Faults(repeat_lease={1})))
        return faulty[-1]

    script = Script(resume=True)
    await memory_fleet.worker(script.agent, wrap=wrap)
    turn = await memory_fleet.session(agent="script").send("go")
    assert (await turn.result(10)).text == "".join(WORDS)
    assert faulty[0].injected["repeat_lease"] == 1


async def test_a_turn_much_longer_than_its_lease_runs_once(fleet: Fleet) -> None:
    runs: list[int] = []

    @agent
    async def long(ctx: Context) -> AsyncIterator[str]:
        runs.append(ctx.attempt)
        yield "a"
        await anyio.sleep(6 * LEASE)
        yield "b"

    await fleet.worker(long)
    await fleet.worker(long)
    result = await (await fleet.session(agent="long").send("x")).result(10)
    assert (result.text, result.attempt, runs) == ("ab", 1, [1])


async def test_a_stop_stored_while_the_owner_is_dead_is_obeyed_by_the_next(fleet: Fleet) -> None:
    script = Script(resume=True)
    first = await fleet.worker(script.agent)
    turn = await fleet.session(agent="script").send("go")
    await until_said(fleet, WORDS[4])
    await first.crash()
    await fleet.append(wire.TurnCancel(turn=turn.id, by="me"), kind=Kind.CANCEL)
    await fleet.worker(script.agent)
    record = await fleet.until("turn.cancelled")
    end = wire.decode(record.body)
    assert isinstance(end, wire.TurnCancelled)
    assert (end.by, end.message.text) == ("me", "".join(WORDS[:5]))
    assert len(script.contexts) == 1
    assert record.pending == ()


async def test_offsets_of_deltas_that_expired_unseen_are_not_given_out_again(environments: Environments) -> None:
    script = Script(resume=True)
    settings = Settings(lease_ttl=LEASE, delta_ttl=2.0)
    async with environments(settings) as environment, fleet_on(environment) as fleet:
        fleet.sessions = set()  # its offsets are not dense, and that is the point
        first = await fleet.worker(script.agent, checkpoint=100.0)
        turn = await fleet.client.session("s", agent="script").send("go")
        said_at = await until_said(fleet, WORDS[4])
        await first.crash()
        with anyio.fail_after(10):
            while any(r.kind is Kind.DELTA for r, _ in await fleet.records()):  # noqa: ASYNC110 - time must pass
                await anyio.sleep(0.2)
        await fleet.worker(script.agent, checkpoint=100.0)
        result = await turn.result(10)
        assert result.text == "".join(WORDS)
        records = await fleet.records()
        check_session(records, dense=False)
        second = [r for r, e in records if isinstance(e, wire.TurnStarted)][1]
        assert second.offset > said_at
        assert script.contexts[1].partial is None


async def test_a_long_turn_keeps_what_it_said_past_the_expiry_of_its_deltas() -> None:
    script = Script(resume=True)
    settings = Settings(lease_ttl=LEASE, delta_ttl=0.8)
    async with memory_environments(settings) as environment, fleet_on(environment) as fleet:
        fleet.sessions = set()
        first = await fleet.worker(script.agent)
        turn = await fleet.client.session("s", agent="script").send("go")
        await until_said(fleet, WORDS[4])
        # Also while it is silent: the end of its session never is old.
        checkpoint = wire.decode((await fleet.until("turn.checkpoint", times=3)).body)
        assert isinstance(checkpoint, wire.TurnCheckpoint)
        assert checkpoint.message.text == "".join(WORDS[:5])
        await first.crash()
        await anyio.sleep(1.0)
        await fleet.worker(script.agent)
        assert (await turn.result(10)).text == "".join(WORDS)
        second = [e for e in await fleet.events() if isinstance(e, wire.TurnStarted)][-1]
        assert second.message is not None
        assert second.message.text == "".join(WORDS[:5])
        assert script.contexts[1].resumes


async def test_an_input_that_is_not_seen_yet_is_not_taken_for_settled(memory_fleet: Fleet) -> None:
    behind = 3  # what goes on from what is known, all that lasts, and the deltas of what seems to be running

    class Log(Part):
        async def read(self, session: str, **args: Any) -> list[Record]:
            nonlocal behind
            records = await self.inner.read(session, **args)
            if behind and records and records[-1].offset > first.offset + 2:
                behind -= 1
                return [record for record in records if record.offset <= first.offset + 2]
            return records

    script = Script(resume=False, stuck_at=100)
    await memory_fleet.worker(script.agent, wrap=lambda broker: Wrapped(broker, log=Log(broker.log)))
    session = memory_fleet.session(agent="script")
    first = await session.send("go")
    await first.result(10)
    second = await session.send("go")
    assert (await second.result(20)).text == "".join(WORDS)
    assert behind == 0
