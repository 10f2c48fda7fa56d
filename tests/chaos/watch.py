"""How a session stands, so that its users stop, steer and answer at the moments that matter."""

from __future__ import annotations

from collections.abc import Callable

import anyio

from agentrun import Client, Event, History, SessionGone, Unavailable, reading
from agentrun.wire import InputRequired, ToolCall


class Watch:
    """Follows a session without its tokens.

    Args:
        client: The library's.
        session: Which.
        mortal: Whether the session may be deleted.

    Attributes:
        history: The fold of what came.
        called: The turns that have called a tool.
    """

    def __init__(self, client: Client, session: str, *, mortal: bool = False) -> None:
        self.history = History()
        self.called: set[str] = set()
        self._log = client.broker.log
        self._session = session
        self._mortal = mortal
        self._offset = 0
        self._asked: list[tuple[str, str]] = []
        self._scope = anyio.CancelScope()
        self._news = anyio.Event()

    async def run(self) -> None:
        """Follow until `close`."""
        with self._scope:
            while True:
                try:
                    async with reading.follow(self._log, self._session, after=self._offset, deltas=False) as events:
                        async for event in events:
                            self._take(event)
                except Unavailable:
                    await anyio.sleep(0.5)
                except SessionGone:
                    if not self._mortal:
                        raise
                    return

    def close(self) -> None:
        """Follow no more."""
        self._scope.cancel()

    def _take(self, event: Event) -> None:
        self._offset = event.offset
        self.history.apply(event.offset, event.data, time=event.time)
        match event.data:
            case ToolCall() as data:
                self.called.add(data.turn)
            case InputRequired() as data:
                self._asked.append((data.turn, data.request))
            case _:
                pass
        self._news.set()
        self._news = anyio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something holds."""
        while not condition():
            await self._news.wait()

    def attempt(self, turn: str) -> int:
        """The attempt that was started last; 0 before the first."""
        view = self.history.turns.get(turn)
        return 0 if view is None else view.attempt

    def ended(self, turn: str) -> bool:
        """Whether the turn has ended."""
        view = self.history.turns.get(turn)
        return view is not None and view.ended

    def questions(self) -> list[tuple[str, str]]:
        """The open questions, each with its turn before it."""
        self._asked = [(turn, request) for turn, request in self._asked if self._open(turn, request)]
        return self._asked

    def _open(self, turn: str, request: str) -> bool:
        view = self.history.turns[turn]
        return not view.ended and view.questions[request].answer is None
