"""A worker that has run a session's last turn reads only what is new, and sees what any other worker would."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio

from agentrun.agent import Context, agent
from agentrun.broker import Broker, Record
from agentrun.testing.faults import Faults, FaultyBroker
from tests.worker.fleet import Fleet


class Counting:
    """Counts the records that are read through it."""

    def __init__(self) -> None:
        self.records = 0

    def __call__(self, broker: Broker) -> Broker:
        wrapped = FaultyBroker(broker, Faults())
        read = wrapped.log.read

        async def counted(*args: Any, **kwargs: Any) -> Sequence[Record]:
            found = await read(*args, **kwargs)
            self.records += len(found)
            return found

        wrapped.log.read = counted
        return wrapped


class Seen:
    """An agent that notes the conversation it is given, and then spoils it."""

    def __init__(self) -> None:
        self.conversations: list[list[str]] = []

        @agent(name="a", resume=True)
        async def remembers(ctx: Context) -> AsyncIterator[str]:
            self.conversations.append([str(message["content"]) for message in ctx.messages])
            for message in ctx.messages:
                message["content"] = "spoilt"
            ctx.request.input = "spoilt"
            ctx.messages.clear()
            yield f"reply to {ctx.turn}"

        self.agent = remembers


async def test_a_turn_reads_what_is_new(fleet: Fleet) -> None:
    counting, seen = Counting(), Seen()
    await fleet.worker(seen.agent, wrap=counting)
    session = fleet.session(agent="a")
    said: list[str] = []
    for number in range(12):
        counting.records = 0
        await (await session.send(f"input {number}", id=f"t{number}")).result(5)
        said.append(f"input {number}")
        assert seen.conversations[-1] == said
        said.append(f"reply to t{number}")
        # The last record of the turn before, which shows that the session is the same, and the request.
        assert counting.records == (2 if number else 1)


async def test_what_another_worker_did_meanwhile_is_seen(fleet: Fleet) -> None:
    seen, other = Seen(), Seen()
    session = fleet.session(agent="a")
    first = await fleet.worker(seen.agent, name="first")
    await (await session.send("one", id="t1")).result(5)
    first.worker.drain()
    await first.ended.wait()
    second = await fleet.worker(other.agent, name="second")
    await (await session.send("two", id="t2")).result(5)
    third = await fleet.worker(seen.agent, name="third")
    await second.drain()
    await (await session.send("three", id="t3")).result(5)
    assert seen.conversations[-1] == ["one", "reply to t1", "two", "reply to t2", "three"]
    await third.drain()


async def test_a_session_that_was_deleted_begins_anew(fleet: Fleet) -> None:
    seen = Seen()
    await fleet.worker(seen.agent)
    session = fleet.session(agent="a")
    for life in ("one", "two", "three"):
        # The same offsets in each life.
        for number in range(2):
            await (await session.send(f"{life} {number}", id=f"{life}-{number}")).result(5)
        assert seen.conversations[-1] == [f"{life} 0", f"reply to {life}-0", f"{life} 1"]
        await session.delete()


async def test_turns_that_wait_meanwhile(fleet: Fleet) -> None:
    counting, seen = Counting(), Seen()
    session = fleet.session(agent="a")
    turns = [await session.send(f"input {number}", id=f"t{number}") for number in range(6)]
    await fleet.worker(seen.agent, wrap=counting)
    for turn in turns:
        await turn.result(5)
    said = [text for number in range(6) for text in (f"input {number}", f"reply to t{number}")]
    assert seen.conversations == [said[: 2 * number + 1] for number in range(6)]
    # All six requests, and then each time the end of the turn before; of the one before that, where the next turn was
    # quicker than what is done at an end. Without what is known it would be 66.
    assert 6 + 5 <= counting.records <= 6 + 4 * 5


async def test_a_turn_is_taken_over_by_one_who_knows_what_was_before(fleet: Fleet) -> None:
    partials: list[str] = []
    held = anyio.Event()

    @agent(name="a", resume=True)
    async def stalls(ctx: Context) -> AsyncIterator[str]:
        if ctx.partial is not None:
            partials.append(ctx.partial.text)
        elif ctx.text == "stall":
            yield "some "
            held.set()
            await anyio.sleep_forever()
        yield "done"

    session = fleet.session(agent="a")
    knows = await fleet.worker(stalls, name="knows", concurrency=1)
    await (await session.send("x")).result(5)
    await (await session.send("x")).result(5)
    turn = await session.send("stall")
    with anyio.fail_after(20):
        await held.wait()
    await fleet.until("text.delta", times=3)
    await knows.crash()
    await fleet.worker(stalls, name="takes over")
    assert (await turn.result(10)).text == "some done"
    assert partials == ["some "]
