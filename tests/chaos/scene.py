"""A stage on which nothing breaks by itself, for tests that break one thing and look closely."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import agentrun
from agentrun import Client, ClientSettings, Turn
from agentrun.wire import TurnStarted
from tests.chaos.evidence import Began, Notebook, Sent
from tests.chaos.stage import Setup, Stage, open_stage


class Scene:
    """A stage, and a client on it that notes what it sends."""

    def __init__(self, stage: Stage, client: Client, book: Notebook) -> None:
        self.stage = stage
        self.client = client
        self.book = book

    async def send(self, session: str, id: str, text: str) -> Turn:
        """Send a turn, and note it."""
        turn = await self.client.session(session, agent="chaos").send(text, id=id)
        self.book.note(Sent(session=session, turn=id, offset=turn.offset, on_busy="enqueue", text=text))
        return turn

    async def attempt(self, turn: Turn, number: int) -> int:
        """Wait until such an attempt at a turn has begun; return the offset at which it has."""
        async with turn.session.follow() as events:
            async for event in events:
                if event.turn == turn.id and isinstance(event.data, TurnStarted) and event.data.attempt >= number:
                    return event.offset
        raise AssertionError("a follow never ends by itself")


@asynccontextmanager
async def open_scene(
    folder: Path, *, workers: int, broker: str = "nats", mutant: str | None = None
) -> AsyncGenerator[Scene]:
    """Have workers, and a gateway. What is stored in the end is noted, so that all of it can be checked.

    Args:
        folder: For the notes.
        workers: How many.
        broker: See `Setup`.
        mutant: The promise that workers and gateway break.
    """
    book = Notebook(folder, "stage")
    setup = Setup(
        folder=folder, broker=broker, workers=workers, gateways=1, lease=2.0, mutant=mutant, points={}, small_faults=0.0
    )
    settings = ClientSettings(cancel_wait=1.0)
    try:
        async with (
            open_stage(setup, book) as stage,
            agentrun.connect(stage.place.broker, namespace=stage.place.namespace, settings=settings) as client,
        ):
            book.note(Began(seed=0))
            yield Scene(stage, client, book)
            await stage.dump()
    finally:
        book.close()
