"""Who sends, stops, steers and answers: through the library or through a gateway, until it is known what came of it."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio
import msgspec
from msgspec import Struct

from agentrun import Client, NotWaiting, QueueFull, SessionBusy, Steer, Unavailable
from agentrun.wire import OnBusy
from tests.chaos.agents import words_of
from tests.chaos.evidence import Deleted, Notebook, Sent, Steered, Stopped
from tests.chaos.http import Away, request
from tests.chaos.place import Place

T = TypeVar("T")

_ANSWER = 20.0
"""Seconds after which a gateway that says nothing is taken for dead: more than it may take to send or to stop."""
_PATIENCE = 240.0
"""Seconds after which it ends the run that something has no outcome: faults are over long before."""
_REFUSALS = {"session_busy", "queue_full", "not_waiting"}


class Refused(Exception):
    """It was refused, as it may be; nothing is stored."""


class Order(Struct, frozen=True, kw_only=True):
    """A turn to be sent, as often as one likes."""

    turn: str
    agent: str
    text: str
    on_busy: OnBusy = "enqueue"
    deadline: float | None = None
    steers: str | None = None
    """The turn it is to steer."""


class _Sent(Struct):
    offset: int


class _Receipt(Struct):
    status: str
    offset: int


class _Problem(Struct):
    code: str = ""


class Clients:
    """Does things for a run's users and notes what they are told.

    What has no outcome is tried again, by whichever way, until it has one. A refusal that a good client has to expect
    is `Refused`; whatever else goes wrong ends the run.

    Args:
        place: Where the gateways are.
        client: The library's.
        book: For notes.
        dice: Which way to take.
    """

    def __init__(self, place: Place, client: Client, book: Notebook, dice: random.Random) -> None:
        self._place = place
        self._client = client
        self._book = book
        self._dice = dice

    async def send(self, session: str, order: Order) -> int:
        """Send a turn and return its offset.

        Raises:
            Refused: The session was busy, or its queue full.
        """
        handle = self._client.session(session, agent=order.agent)

        async def by_library() -> int | None:
            if order.steers is not None:
                return (await handle.turn(order.steers).steer(order.text, id=order.turn)).offset
            turn = await handle.send(order.text, id=order.turn, on_busy=order.on_busy, deadline=order.deadline)
            return turn.offset

        async def by_http(gateway: str) -> int:
            body: dict[str, Any] = {"input": order.text, "id": order.turn}
            path = f"/v1/sessions/{session}/turns"
            if order.steers is not None:
                path += f"/{order.steers}/steer"
            else:
                body |= {"agent": order.agent, "on_busy": order.on_busy, "deadline": order.deadline}
            return msgspec.json.decode(await _ask(gateway, "POST", path, body), type=_Sent).offset

        offset = await self._outcome(by_library, by_http)
        assert offset is not None
        self._book.note(
            Sent(
                session=session,
                turn=order.turn,
                offset=offset,
                on_busy=order.on_busy,
                text=order.text,
                words=words_of(order.text),
                deadline=order.deadline is not None,
            )
        )
        return offset

    async def await_steering(self, session: str, order: Order, offset: int) -> None:
        """Wait for what becomes of a turn that steers."""
        steer = Steer(self._client.session(session), order.turn, offset)
        while True:
            try:
                consumed_by = await steer.consumed_by()
            except Unavailable:
                await anyio.sleep(0.5)
                continue
            self._book.note(Steered(session=session, turn=order.turn, consumed_by=consumed_by))
            return

    async def stop(self, session: str, turn: str | None = None) -> None:
        """Stop a turn, or all of the session: the note of that names no turn."""
        began = time.monotonic()
        handle = self._client.session(session)

        async def by_library() -> tuple[str, int]:
            receipt = await (handle if turn is None else handle.turn(turn)).cancel(reason="chaos")
            return receipt.status, receipt.offset

        async def by_http(gateway: str) -> tuple[str, int]:
            path = f"/v1/sessions/{session}" + ("/cancel" if turn is None else f"/turns/{turn}/cancel")
            receipt = msgspec.json.decode(await _ask(gateway, "POST", path, {}), type=_Receipt)
            return receipt.status, receipt.offset

        status, offset = await self._outcome(by_library, by_http)
        took = time.monotonic() - began
        self._book.note(Stopped(session=session, turn=turn or "", status=status, offset=offset, took=took))

    async def answer(self, session: str, turn: str, question: str, value: Any) -> None:
        """Answer a question. That it is not open, or not any more, is fine."""
        handle = self._client.session(session).turn(turn)

        async def by_library() -> None:
            await handle.answer(question, value)

        async def by_http(gateway: str) -> None:
            path = f"/v1/sessions/{session}/turns/{turn}/answer"
            await _ask(gateway, "POST", path, {"request": question, "value": value})

        try:
            await self._outcome(by_library, by_http)
        except Refused:
            return

    async def delete(self, session: str) -> None:
        """Delete a session."""
        # Before it is done: readers may be told of it before we are.
        self._book.note(Deleted(session=session))

        async def by_http(gateway: str) -> None:
            await _ask(gateway, "DELETE", f"/v1/sessions/{session}")

        await self._outcome(self._client.session(session).delete, by_http)

    async def _outcome(self, library: Callable[[], Awaitable[T]], http: Callable[[str], Awaitable[T]]) -> T:
        end = time.monotonic() + _PATIENCE
        pause = 0.05
        while True:
            try:
                if self._dice.random() < 0.5:
                    return await library()
                return await http(self._dice.choice(self._place.gateways))
            except (SessionBusy, QueueFull, NotWaiting) as error:
                raise Refused(str(error)) from error
            except (Unavailable, Away) as error:
                if time.monotonic() > end:
                    raise AssertionError(f"no outcome for {_PATIENCE} s") from error
            await anyio.sleep(pause * self._dice.random())
            pause = min(2 * pause, 2.0)


async def _ask(gateway: str, method: str, path: str, body: Any = None) -> bytes:
    try:
        with anyio.fail_after(_ANSWER):
            sent = b"" if body is None else msgspec.json.encode(body)
            async with request(gateway, method, path, body=sent) as response:
                said = await response.body()
    except TimeoutError as error:
        raise Away(f"{gateway} says nothing") from error
    if response.status < 300:
        return said
    code = msgspec.json.decode(said, type=_Problem).code if said.startswith(b"{") else ""
    if code in _REFUSALS:
        raise Refused(code)
    if response.status in (429, 503) and code != "misconfigured":
        raise Away(code)
    raise AssertionError(f"{method} {path} was answered {response.status}: {said.decode(errors='replace')}")
