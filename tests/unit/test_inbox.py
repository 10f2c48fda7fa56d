"""Moments between two awaits that no test of a whole worker can be sure to meet."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import pytest

from agentrun import wire
from agentrun.broker import Kind, Record
from agentrun.cancel import Cause, Stop, StopSwitch
from agentrun.errors import Fenced
from agentrun.history import History
from agentrun.inbox import Inbox
from agentrun.publish import Publisher


class Put:
    """Stores what is put at once."""

    error = None

    def __init__(self, history: History) -> None:
        self.history = history
        self.events: list[wire.OutputEvent] = []

    def put(self, event: wire.OutputEvent, change: Any = None) -> None:
        event.turn, event.attempt = event.turn or "t1", event.attempt or 1
        self.events.append(event)
        self.history.apply(self.history.offset + 1, event)

    async def flush(self) -> None: ...


class Setting:
    def __init__(self, switch: StopSwitch | None = None) -> None:
        self.history = History()
        self.switch = switch or StopSwitch()
        self.input(wire.TurnRequested(turn="t1", agent="a", input="x"))
        self.history.apply(2, wire.TurnStarted(turn="t1", attempt=1, worker="w", lease="l"))
        self.inbox = Inbox(self.history, self.history.turns["t1"], 1, self.switch, time.time)
        self.put = Put(self.history)

    def open(self) -> None:
        self.inbox.open(cast("Publisher", self.put))

    def input(self, event: wire.InputEvent, kind: Kind = Kind.TURN) -> None:
        record = Record(self.history.offset + 1, kind, wire.encode(event), agent="a")
        if hasattr(self, "inbox"):
            self.inbox.on_input(record)
        else:
            self.history.apply(record.offset, event)


async def test_an_answer_in_the_moment_of_suspending_is_left_to_wake_the_turn() -> None:
    class Switch(StopSwitch):
        def pull(self, stop: Stop) -> None:
            # After the agent has begun to wait again, and before it meets its cancellation.
            answer = wire.TurnAnswer(turn="t1", request="q", value=True)
            asyncio.get_running_loop().call_soon(s.input, answer)
            super().pull(stop)

    s = Setting(Switch())
    s.open()
    returned: list[Any] = []
    with s.switch.scope as scope:
        returned.append(await s.inbox.ask(wire.InputRequired(request="q", kind="approval"), 0.0))
    assert scope.cancelled_caught
    assert returned == []
    assert s.switch.stop is not None
    assert s.switch.stop.cause is Cause.SUSPEND
    assert [e.type for e in s.put.events] == ["input.required"]


async def test_a_stop_of_a_waiting_turn_that_came_before_the_claim_is_carried_out_after_it() -> None:
    s = Setting()
    s.history.apply(3, wire.TurnRequested(turn="t2", agent="a", input="y"))
    s.history.turns["t2"].stop = wire.TurnCancel(all=True)
    s.open()
    assert [(e.type, e.turn) for e in s.put.events] == [("turn.cancelled", "t2")]


async def test_a_steering_turn_that_is_being_taken_is_not_stopped_as_well() -> None:
    s = Setting()
    s.open()
    s.input(wire.TurnRequested(turn="t2", agent="a", input="y", on_busy="steer"))

    class Slow(Put):
        def put(self, event: wire.OutputEvent, change: Any = None) -> None:
            event.turn = event.turn or "t1"
            self.events.append(event)  # and not yet stored

        async def flush(self) -> None:
            s.input(wire.TurnCancel(turn="t2"), Kind.CANCEL)

    s.put = Slow(s.history)
    s.open()
    (taken,) = await s.inbox.take_steering()
    assert taken.turn == "t2"
    assert [e.type for e in s.put.events] == ["steer.consumed"]


async def test_after_the_close_nothing_is_asked_or_taken() -> None:
    s = Setting()
    s.open()
    s.inbox.close()
    with pytest.raises(Fenced):
        await s.inbox.ask(wire.InputRequired(request="q", kind="approval"), 1.0)
    with pytest.raises(Fenced):
        await s.inbox.take_steering()
    s.input(wire.TurnAnswer(turn="t1", request="q", value=True))
    assert s.put.events == []
