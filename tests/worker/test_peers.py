"""P7: a dead worker's turns move in seconds, although their leases are long."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
import pytest

from agentrun import wire
from agentrun.agent import Context, agent
from agentrun.broker import Broker, Hold, Kind
from agentrun.client import Session
from agentrun.errors import Retry, Unavailable
from agentrun.peers import PEERS, Announcement, Peers, Presence, is_lease, new_lease
from agentrun.testing import Environments, Settings
from agentrun.testing.faults import Faults, FaultyBroker
from tests.worker.fleet import Fleet, Running, eventually, fleet_on

LEASE = 30.0
LOST_AFTER = 1.0
GOES_ON = 25
"""Words of an answer that is not stopped."""


@agent(name="words", resume=True)
async def words(ctx: Context) -> AsyncIterator[str]:
    said = len(ctx.partial.text.split()) if ctx.partial is not None else 0
    for n in range(said, GOES_ON):
        yield f"w{n} "
        if n == 5 and ctx.attempt == 1 and ctx.text == "wait":
            await anyio.sleep_forever()
        await anyio.sleep(0.005)


@agent(name="clumsy")
async def clumsy(ctx: Context) -> AsyncIterator[str]:
    if ctx.attempt == 1:
        raise Retry
    yield "done"


@agent(name="idle")
async def idle(_ctx: Context) -> AsyncIterator[str]:
    yield "done"


WHOLE = "".join(f"w{n} " for n in range(GOES_ON))


@pytest.fixture
async def fleet(environments: Environments) -> AsyncGenerator[Fleet]:
    async with environments(Settings(lease_ttl=LEASE)) as environment, fleet_on(environment) as fleet:
        yield fleet


async def start(fleet: Fleet, name: str, **settings: float) -> Running:
    return await fleet.worker(
        words, wrap=FaultyBroker, name=name, **{"lease": LEASE, "lost_after": LOST_AFTER, **settings}
    )


def listen_in(running: Running, told: Callable[[set[str]], None]) -> None:
    """Be told each time of which sessions a worker finds inputs given out."""
    turns: Any = running.worker._broker.turns
    inner = turns.given_out

    async def given_out(agent: str) -> Sequence[Hold]:
        holds = await inner(agent)
        told({hold.session for hold in holds})
        return holds

    turns.given_out = given_out


def line(running: Running) -> FaultyBroker:
    assert isinstance(running.broker, FaultyBroker)
    return running.broker


async def until_all_are_seen(fleet: Fleet, count: int) -> None:
    """Wait until so many workers have announced themselves, so that they know of each other."""
    seen: set[str] = set()

    async def hear(body: bytes) -> None:
        seen.add(msgspec.json.decode(body, type=Announcement).id)

    async with fleet.broker.signals.listen(PEERS, hear):
        await eventually(lambda: len(seen) == count, 20)
    await anyio.sleep(LOST_AFTER / 2)


async def lost(fleet: Fleet, session: str = "s") -> list[wire.TurnLost]:
    return [event for event in await fleet.events(session) if isinstance(event, wire.TurnLost)]


async def test_a_silent_worker_is_taken_over_long_before_its_lease_ends(fleet: Fleet) -> None:
    first = await start(fleet, "first")
    session = fleet.session(agent="words")
    turn = await session.send("wait")
    waiting = await session.send("next")  # kept by the first worker until its turn comes
    await fleet.until(lambda e: isinstance(e, wire.TextDelta) and e.text.endswith("w5 "))
    for name in ("second", "third", "fourth"):
        await start(fleet, name)
    await until_all_are_seen(fleet, 4)
    before = time.monotonic()
    line(first).disconnect()
    for sent in (turn, waiting):
        assert (await sent.result(20)).text == WHOLE
    assert time.monotonic() - before < LEASE * 0.7
    [said] = await lost(fleet)
    assert (said.turn, said.attempt, said.worker) == (turn.id, 1, "first")
    two = next(e for e in await fleet.events() if isinstance(e, wire.TurnStarted) and e.attempt == 2)
    assert two.worker != "first"
    assert said.by != "first"
    # It comes back, finds its turn gone, and takes none of the others for dead, whom it has not heard for so long.
    line(first).reconnect()
    await eventually(lambda: not first.worker.info.running)
    await anyio.sleep(2 * LOST_AFTER)
    assert len(await lost(fleet)) == 1


async def test_a_worker_that_leaves_is_not_taken_for_dead(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    first, _second = await start(fleet, "first"), await start(fleet, "second")
    await until_all_are_seen(fleet, 2)
    turn = await fleet.session(agent="words").send("go")
    await turn.result(10)
    with caplog.at_level(logging.WARNING, "agentrun.worker"):
        await first.drain()
        await anyio.sleep(2 * LOST_AFTER)
    assert "silent" not in caplog.text


async def test_without_it_only_the_lease_counts(fleet: Fleet) -> None:
    heard: list[bytes] = []

    async def hear(body: bytes) -> None:
        heard.append(body)

    async with fleet.broker.signals.listen(PEERS, hear):
        first, _second = (
            await start(fleet, "first", lost_after=0, lease=2.0),
            await start(fleet, "second", lost_after=0, lease=2.0),
        )
        turn = await fleet.session(agent="words").send("wait")
        await fleet.until(lambda e: isinstance(e, wire.TextDelta) and e.text.endswith("w5 "))
        running = next(r for r in (first, _second) if r.worker.info.running)
        line(running).disconnect()
        assert (await turn.result(20)).attempt == 2
    assert await lost(fleet) == []
    assert heard == []


# ------------------------------------------------------------------------------------------ what one peer does, alone


class Witness:
    """A worker's peers, and a dead worker of whom only announcements are left."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.handed_back: list[Hold] = []
        self.given: list[Hold] = []
        self.held: list[Hold] = []
        self.takes = False
        """Whether the witness is given what it hands back."""
        self.looks = 0
        self.away = False
        inner = fleet.broker

        class Turns:
            async def hand_back(turns, hold: Hold) -> None:  # noqa: N805
                if self.away:
                    raise Unavailable("there is no connection, as planned")
                self.handed_back.append(hold)
                if self.takes:
                    self.held.append(hold._replace(token="another"))

            async def given_out(turns, _agent: str) -> Sequence[Hold]:  # noqa: N805
                self.looks += 1
                return self.given

        class Seen:
            turns, log, signals = Turns(), inner.log, inner.signals

        self.peers = Peers(
            Seen(),
            "witness",
            lost_after=0.3,
            agents=["words"],
            holds=lambda: self.held,
            alive=lambda: True,
        )

    @asynccontextmanager
    async def watching(self) -> AsyncGenerator[None]:
        await self.fleet.broker.turns.open("words")
        async with anyio.create_task_group() as group:
            group.start_soon(self.peers.run)
            await anyio.sleep(0.4)
            yield
            group.cancel_scope.cancel()

    async def hears(self, said: Announcement) -> None:
        await self.peers._hear(msgspec.json.encode(said))

    async def sees_die(self, *holds: Hold, others: int = 0) -> None:
        """Let the worker announce that it holds these, and nothing more; so many others die a moment later."""
        async with self.watching():
            await self.hears(Announcement("dead-id", "dead", new=list(holds), whole=True))
            await anyio.sleep(0.15)
            for other in range(others):
                await self.hears(Announcement(f"other-{other}", "other"))
            await anyio.sleep(1.5)


async def begin(fleet: Fleet, session: Session, token: str, attempt: int = 1) -> Hold:
    """Claim a turn as the dead worker had."""
    tail = await fleet.broker.log.last(session.id)
    started = wire.TurnStarted(turn="t", attempt=attempt, worker="dead", lease=new_lease(token))
    await fleet.broker.log.append(
        session.id, wire.encode(started), kind=Kind.EVENT, after=tail, pending=tail.pending.claim(1)
    )
    return Hold("words", session.id, 1, token)


async def test_what_it_ran_is_said_to_be_lost_and_handed_back(fleet: Fleet) -> None:
    session = fleet.session(agent="words")
    await session.send("x", id="t")
    hold = await begin(fleet, session, "token")
    witness = Witness(fleet)
    await witness.sees_die(hold)
    assert set(witness.handed_back) == {hold}
    assert await lost(fleet) == [wire.TurnLost(turn="t", attempt=1, worker="dead", by="witness")]
    assert not (await fleet.broker.log.last("s")).pending.running


async def test_those_whose_turn_it_was_may_be_dead_as_well(fleet: Fleet) -> None:
    session = fleet.session(agent="words")
    await session.send("x", id="t")
    hold = await begin(fleet, session, "token")
    witness = Witness(fleet)
    await witness.sees_die(hold, others=40)
    assert set(witness.handed_back) == {hold}
    assert len(await lost(fleet)) == 1


async def test_a_fleet_that_died_as_a_whole_is_taken_over_by_the_next(fleet: Fleet) -> None:
    session = fleet.session(agent="words")
    running = [await start(fleet, name) for name in ("first", "second")]
    turns = [
        await session.send("wait"),
        await session.send("next"),
        await fleet.session("other", agent="words").send("wait"),
    ]
    for name in ("s", "other"):
        await fleet.until(lambda e: isinstance(e, wire.TextDelta) and e.text.endswith("w5 "), name)
    for each in running:
        await each.crash()
    before = time.monotonic()
    await start(fleet, "first")  # a name is no reason to think that one is alive
    for turn in turns:
        assert (await turn.result(20)).text == WHOLE
    assert time.monotonic() - before < LEASE * 0.7
    for name in ("s", "other"):
        [said] = await lost(fleet, name)
        assert (said.attempt, said.by) == (1, "first")


async def test_what_was_handed_back_in_vain_is_found_at_any_time(fleet: Fleet) -> None:
    running = await fleet.worker(
        clumsy,
        wrap=lambda broker: FaultyBroker(broker, Faults(lose_settle={1})),
        name="first",
        lease=LEASE,
        lost_after=LOST_AFTER,
    )
    looked: list[set[str]] = []
    listen_in(running, looked.append)
    await eventually(lambda: len(looked) >= 3)
    turn = await fleet.session(agent="clumsy").send("x")
    await fleet.until("turn.retrying")
    before = time.monotonic()
    assert (await turn.result(20)).text == "done"
    assert time.monotonic() - before < LEASE * 0.7
    assert line(running).injected["lose_settle"] == 1


async def test_what_is_given_to_one_that_is_cut_off_is_found(fleet: Fleet) -> None:
    first = await start(fleet, "first")
    await start(fleet, "second")
    await until_all_are_seen(fleet, 2)
    line(first).disconnect()
    # Some of them are given to the first: it was waiting for turns when its connection broke.
    turns = [await fleet.session(f"s{n}", agent="words").send("go") for n in range(8)]
    before = time.monotonic()
    for turn in turns:
        assert (await turn.result(20)).text == WHOLE
    assert time.monotonic() - before < LEASE * 0.7
    for n in range(8):
        assert await lost(fleet, f"s{n}") == [], "it was not begun"


async def test_the_oldest_leaves_alone_what_the_living_hold(fleet: Fleet) -> None:
    oldest = await fleet.worker(idle, name="oldest", lease=LEASE, lost_after=LOST_AFTER)
    running = [await start(fleet, name, concurrency=1) for name in ("first", "second")]
    asked: list[set[str]] = []
    for each in running:
        listen_in(each, asked.append)
    for name in ("s", "other"):
        await fleet.session(name, agent="words").send("wait")
    await eventually(lambda: sum(len(each.worker.info.running) for each in running) == 2)
    await until_all_are_seen(fleet, 3)
    await oldest.drain()
    asked.clear()
    await eventually(lambda: len(asked) >= 4 * len(running), 30)
    assert all({"s", "other"} <= sessions for sessions in asked)
    for name in ("s", "other"):
        assert await lost(fleet, name) == []
    assert [turn.attempt for each in running for turn in each.worker.info.running] == [1, 1]
    for name in ("s", "other"):
        await fleet.session(name).cancel()


async def test_what_it_had_not_begun_is_handed_back_and_nothing_is_said(fleet: Fleet) -> None:
    await fleet.session(agent="words").send("x", id="t")
    witness = Witness(fleet)
    hold = Hold("words", "s", 1, "token")
    await witness.sees_die(hold)
    assert set(witness.handed_back) == {hold}
    assert await lost(fleet) == []


async def test_what_another_has_taken_over_is_left_alone(fleet: Fleet) -> None:
    session = fleet.session(agent="words")
    await session.send("x", id="t")
    hold = await begin(fleet, session, "token")
    await begin(fleet, session, "another", attempt=2)
    witness = Witness(fleet)
    await witness.sees_die(hold)
    assert witness.handed_back == []
    assert await lost(fleet) == []


async def test_what_was_settled_is_left_alone(fleet: Fleet) -> None:
    session = fleet.session(agent="words")
    await session.send("x", id="t")
    hold = await begin(fleet, session, "token")
    tail = await fleet.broker.log.last("s")
    end = wire.TurnCompleted(turn="t", attempt=1, turn_offset=1)
    await fleet.broker.log.append("s", wire.encode(end), kind=Kind.EVENT, after=tail, pending=tail.pending.settle(1))
    witness = Witness(fleet)
    await witness.sees_die(hold)
    assert witness.handed_back == []
    assert await lost(fleet) == []


@pytest.mark.parametrize("takes", [False, True])
async def test_it_is_handed_back_again_until_somebody_alive_holds_it(fleet: Fleet, takes: bool) -> None:
    await fleet.session(agent="words").send("x", id="t")
    witness = Witness(fleet)
    witness.takes = takes
    hold = Hold("words", "s", 1, "token")
    await witness.sees_die(hold)
    assert (len(witness.handed_back) == 1) is takes
    assert set(witness.handed_back) == {hold}


async def test_what_somebody_alive_has_been_given_since_is_left_to_it(fleet: Fleet) -> None:
    session = fleet.session(agent="words")
    await session.send("x", id="t")
    hold = await begin(fleet, session, "token")
    witness = Witness(fleet)
    witness.held = [hold._replace(token="another")]
    await witness.sees_die(hold)
    assert witness.handed_back == []
    assert await lost(fleet) == []


async def test_what_could_not_be_handed_back_is_later(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    session = fleet.session(agent="words")
    await session.send("x", id="t")
    hold = await begin(fleet, session, "token")
    witness = Witness(fleet)
    witness.given = [hold]
    witness.away = True
    async with witness.watching():
        await witness.hears(Announcement("dead-id", "dead", new=[hold], whole=True))
        await eventually(lambda: "there is no connection, as planned" in caplog.text)
        witness.away = False
        await eventually(lambda: hold in witness.handed_back)
    assert await lost(fleet) == [wire.TurnLost(turn="t", attempt=1, worker="dead", by="witness")]


async def test_who_may_have_missed_what_others_hold_asks_and_takes_nothing(fleet: Fleet) -> None:
    session = fleet.session(agent="words")
    await session.send("x", id="t")
    hold = await begin(fleet, session, "token")
    witness = Witness(fleet)
    asks: list[bool] = []

    async def hear(body: bytes) -> None:
        asks.append(msgspec.json.decode(body, type=Announcement).asks)

    other = itertools.count()

    async def says(**what: Any) -> None:
        await witness.hears(Announcement("other-id", "other", number=next(other), **what))

    async with fleet.broker.signals.listen(PEERS, hear), witness.watching():
        await says(whole=True)
        next(other)  # that it has been given the turn was lost on the way
        await says()
        witness.given = [hold]
        witness.looks = 0
        asks.clear()
        for _ in range(30):
            await anyio.sleep(0.05)
            await says()
        assert any(asks)
        assert witness.looks == 0
        await says(new=[hold], whole=True)
        for _ in range(30):
            await anyio.sleep(0.05)
            await says()
        assert not asks[-1]
        assert witness.looks > 0
    assert witness.handed_back == []
    assert await lost(fleet) == []


async def test_the_three_that_have_run_an_agent_for_longest_look_for_its_inputs(fleet: Fleet) -> None:
    peers = Witness(fleet).peers

    async def hears(id: str, *agents: str, age: float = 60.0) -> None:
        said = Announcement(id, id, whole=True, agents=list(agents), age=age)
        await peers._hear(msgspec.json.encode(said))

    assert peers._places() == {}, "it has not heard itself yet"
    await hears(peers._me, "words")
    assert peers._places() == {"words": 0}
    await hears("younger", "words", age=-60.0)
    await hears("of another agent", "idle")
    assert peers._places() == {"words": 0}
    await hears("second", "words", "idle")
    await hears("third", "words")
    assert peers._places() == {"words": 2}
    await hears("fourth", "words")
    assert peers._places() == {}


async def test_who_writes_in_that_moment_is_alive(fleet: Fleet) -> None:
    session = fleet.session(agent="words")
    await session.send("x", id="t")
    hold = await begin(fleet, session, "token")
    witness = Witness(fleet)
    inner: Broker = witness.peers._broker
    last = inner.log.last

    async def overtaken(session: str):
        tail = await last(session)
        delta = wire.TextDelta(turn="t", attempt=1, text="still here")
        await inner.log.append(session, wire.encode(delta), kind=Kind.DELTA, after=tail, pending=tail.pending)
        return tail

    class Log:
        last, append, read = staticmethod(overtaken), inner.log.append, inner.log.read

    inner.log = Log()
    await witness.sees_die(hold)
    assert witness.handed_back == []
    assert await lost(fleet) == []


async def test_announcements_say_what_has_changed() -> None:
    said: list[Announcement] = []
    held = {Hold("a", "s", 1, "one")}
    alive = True

    def hear(body: bytes) -> None:
        said.append(msgspec.json.decode(body, type=Announcement))

    with Presence(hear, "me", agents=["a"], every=60, holds=lambda: held, alive=lambda: alive) as presence:
        await eventually(lambda: len(said) == 1)
        held = {Hold("a", "s", 1, "one"), Hold("a", "s", 2, "two")}
        presence.poke()
        await eventually(lambda: len(said) == 2)
        held = {Hold("a", "s", 2, "two")}
        presence.poke()
        await eventually(lambda: len(said) == 3)
        alive = False
        presence.poke()
        time.sleep(0.2)  # noqa: ASYNC251 - the thread does not need the loop
    changes = [(each.whole, [hold.token for hold in each.new], each.done) for each in said]
    assert changes == [(True, ["one"], []), (False, ["two"], []), (False, [], ["one"]), (False, [], [])]
    assert [each.leaves for each in said] == [False, False, False, True]
    assert [each.number for each in said] == [0, 1, 2, 3]
    assert [each.agents for each in said] == [["a"], [], [], []]


async def test_a_blocked_loop_does_not_keep_a_worker_silent() -> None:
    said: list[bytes] = []
    with Presence(said.append, "me", agents=["a"], every=0.05, holds=list, alive=lambda: True):
        time.sleep(0.5)  # noqa: ASYNC251 - what an agent may do to its worker
        assert len(said) >= 3


def test_a_lease_is_told_from_its_token_and_does_not_give_it_away() -> None:
    lease = new_lease("$JS.ACK.token")
    assert is_lease(lease, "$JS.ACK.token")
    assert not is_lease(lease, "$JS.ACK.other")
    assert "token" not in lease
    assert lease != new_lease("$JS.ACK.token")
