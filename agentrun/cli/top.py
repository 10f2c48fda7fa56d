"""``agentrun top``: the fleet, live."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

import anyio
from anyio.abc import TaskGroup
from rich.console import Console, RenderableType
from rich.live import Live

from agentrun import dead
from agentrun.broker import BrokerAdmin, QueueStats
from agentrun.cli._top_data import Fleet
from agentrun.cli._top_events import Recently
from agentrun.cli._top_keys import keys
from agentrun.cli._top_view import picture
from agentrun.cli._workers import UNREADABLE, ask_workers
from agentrun.cli.common import App, Fatal, command, duration, option
from agentrun.cli.prompt import raw_terminal
from agentrun.client import Client
from agentrun.errors import AgentrunError, BrokerError

_BACK = 1000
"""Records of the selected session that are read back; tokens in a row become one line."""
_ANSWER = 0.4
"""Seconds workers get to answer."""
_DEAD = 10.0
"""Seconds between two looks at the list of turns that gave up."""
_FRAME = 0.25
"""Seconds between two frames, unless a key or a sample asks for one. Tokens do not: a frame costs some 15 ms of CPU."""
_REST = 0.2
"""Seconds for which a row is selected before its session is read: who scrolls passes many."""
_WIDTH = 160
"""Columns, where there is no terminal."""


@command("top")
@option("--every", type=duration, default="1s", show_default=True, help="How often the fleet is asked.")
@option("--content", is_flag=True, help="Show what events say, not only what they are.")
@option("--once", is_flag=True, help="Show it once, as it is without a terminal.")
@option("--by", help="Who stops, as readers of a stopped turn see it. Default: the user's name.")
async def top(app: App, every: float, content: bool, once: bool, by: str | None) -> None:
    """Watch the fleet: workers, slots, what waits, running turns and their tokens a second.

    Arrow keys (or j and k) select a turn, whose session's last events are shown; s stops it after a question, and shows
    the receipt; q leaves. Workers that do not answer are shown as silent, and left out after a while.
    """
    async with app.client() as client:
        shown = _Top(client, app.namespace, every=every, content=content, by=by or os.environ.get("USER"))
        if once or not (sys.stdin.isatty() and sys.stdout.isatty()):
            await shown.once()
        else:
            await shown.run()


class _Top:
    def __init__(self, client: Client, title: str, *, every: float, content: bool, by: str | None) -> None:
        self._client = client
        self._title = title
        self._every = every
        self._content = content
        self._by = by
        self._fleet = Fleet(every)
        self._dead_at = -_DEAD
        self._console = Console()
        self._selected: tuple[str, str] | None = None
        self._row = 0
        self._recently = Recently(content=content)
        self._note = ""
        self._asked: tuple[str, str] | None = None
        """Whose stop waits for a yes."""
        self._changed = anyio.Event()
        self._moved = anyio.Event()

    async def once(self) -> None:
        """Show it, and that is all."""
        await self._look()
        if not self._fleet.known:
            raise Fatal(str(self._fleet.error))
        width = None if self._console.is_terminal else shutil.get_terminal_size((_WIDTH, 0)).columns
        self._console.print(picture(self._fleet, width=width, title=self._title), width=width)

    async def run(self) -> None:
        """Show it until somebody leaves. However it ends, the terminal is as it was."""
        with (
            raw_terminal(sys.stdin.fileno(), sys.stdout),
            Live(console=self._console, screen=True, auto_refresh=False) as live,
            _logged(self._log),
        ):
            async with anyio.create_task_group() as group:
                group.start_soon(self._sample)
                group.start_soon(self._follow)
                group.start_soon(self._keys, group)
                group.start_soon(self._end_with_signals, group)
                while True:
                    self._changed = anyio.Event()
                    live.update(self._picture(), refresh=True)
                    with anyio.move_on_after(_FRAME):
                        await self._changed.wait()

    def _picture(self) -> RenderableType:
        question = ""
        if self._asked is not None:
            session, turn = self._asked
            question = f"stop turn {turn} of session {session}? y: yes, any other key: no"
        return picture(
            self._fleet,
            height=self._console.height,
            width=self._console.width,
            selected=self._selected,
            events=tuple(self._recently.lines),
            note=self._note,
            question=question,
            title=self._title,
        )

    def _log(self, text: str) -> None:
        self._note = text  # shown with the next frame: other threads must not wake this one

    def _say(self, note: str) -> None:
        self._note = note
        self._changed.set()

    async def _end_with_signals(self, group: TaskGroup) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async for _ in signals:
                group.cancel_scope.cancel()

    # -------------------------------------------------------------------------------------------------- what is known

    async def _sample(self) -> None:
        while True:
            began = time.monotonic()
            await self._look()
            self._changed.set()
            await anyio.sleep(max(began + self._every - time.monotonic(), 0.0))

    async def _look(self) -> None:
        broker = self._client.broker
        try:
            queues: list[QueueStats] = await broker.stats() if isinstance(broker, BrokerAdmin) else []
            if time.monotonic() - self._dead_at >= _DEAD:
                self._fleet.dead = await dead.count(broker.log)
                self._dead_at = time.monotonic()
            answers = await ask_workers(broker.signals, wait=_ANSWER)
        except BrokerError as error:
            self._fleet.failed(time.monotonic(), str(error))
        else:
            error = UNREADABLE.format(answers.unreadable) if answers.unreadable else None
            self._fleet.sample(time.monotonic(), answers.workers, queues, error)

    async def _follow(self) -> None:
        """Follow the session of the selected turn, whichever that is."""
        while True:
            self._moved = anyio.Event()
            async with anyio.create_task_group() as group:
                if self._selected is not None:
                    self._recently = Recently(content=self._content)
                    group.start_soon(self._read, self._selected[0], self._recently)
                await self._moved.wait()
                group.cancel_scope.cancel()

    async def _read(self, session: str, into: Recently) -> None:
        await anyio.sleep(_REST)
        try:
            end = await self._client.broker.log.last(session)
            async with self._client.session(session).follow(max(end.offset - _BACK, 0)) as events:
                async for event in events:
                    into.add(event)
        except AgentrunError as error:
            into.say(str(error))

    # ---------------------------------------------------------------------------------------------------- the person

    async def _keys(self, group: TaskGroup) -> None:
        async for key in keys():
            if key == "leave":
                break
            self._note = ""
            if self._asked is not None:
                asked, self._asked = self._asked, None
                if key in ("y", "Y"):
                    group.start_soon(self._stop, asked)
            elif key in ("up", "down"):
                self._select(-1 if key == "up" else 1)
            elif key == "s" and self._selected is not None:
                self._asked = self._selected
            elif key == "s":
                self._note = "select a turn first: ↑ ↓"
            self._changed.set()
        group.cancel_scope.cancel()

    def _select(self, step: int) -> None:
        rows = [run.key for run in self._fleet.runs]
        if not rows:
            return
        if self._selected in rows:
            self._row = rows.index(self._selected) + step
        self._row = min(max(self._row, 0), len(rows) - 1)
        before, self._selected = self._selected, rows[self._row]
        if before is None or before[0] != self._selected[0]:
            self._moved.set()

    async def _stop(self, which: tuple[str, str]) -> None:
        self._say(f"stopping turn {which[1]} of session {which[0]} …")
        try:
            receipt = await self._client.turn(*which).cancel(by=self._by)
            at = f" at offset {receipt.offset}" if receipt.offset else ""
            self._say(f"turn {which[1]}: {receipt.status}{at}, {receipt.took * 1000:.1f} ms")
        except AgentrunError as error:
            self._say(f"cannot stop it: {error}")


class _Handler(logging.Handler):
    """Has said what is logged, by whatever thread."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.getMessage())


@contextmanager
def _logged(say: Callable[[str], None]) -> Generator[None]:
    """Have said what is logged, which would be written across the screen."""
    root = logging.getLogger()
    before = root.handlers
    root.handlers = list[logging.Handler]([_Handler(say)])
    try:
        yield
    finally:
        root.handlers = before
