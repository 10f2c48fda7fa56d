"""``agentrun top``: the fleet, live."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque

import anyio
import msgspec
from anyio.abc import TaskGroup
from rich.console import Console, RenderableType
from rich.live import Live

from agentrun.broker import BrokerAdmin, QueueStats
from agentrun.cli import stdin
from agentrun.cli._top_data import Fleet
from agentrun.cli._top_view import picture
from agentrun.cli.common import App, Fatal, command, duration, option
from agentrun.cli.lines import short
from agentrun.cli.prompt import raw_terminal
from agentrun.client import Client
from agentrun.errors import AgentrunError, BrokerError
from agentrun.worker import WORKERS, WorkerInfo

_KEPT = 20
"""Events of the selected session that are kept."""
_ANSWER = 0.4
"""Seconds workers get to answer."""
_FRAME = 0.25
"""Seconds between two frames while nothing happens: ages and silences grow."""
_UP, _DOWN = (b"\x1b[A", b"\x1bOA", b"k"), (b"\x1b[B", b"\x1bOB", b"j")
_LEAVE = (b"q", b"\x03", b"")


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
        self._fleet = Fleet()
        self._console = Console()
        self._selected: tuple[str, str] | None = None
        self._events: deque[str] = deque(maxlen=_KEPT)
        self._note = ""
        self._asked: tuple[str, str] | None = None
        """Whose stop waits for a yes."""
        self._changed = anyio.Event()
        self._follower = anyio.CancelScope()

    async def once(self) -> None:
        await self._look()
        if self._fleet.error is not None:
            raise Fatal(self._fleet.error)
        height = 1000  # nothing is left out
        self._console.print(picture(self._fleet, now=time.monotonic(), height=height, title=self._title, note=" "))

    async def run(self) -> None:
        with (
            raw_terminal(sys.stdin.fileno(), sys.stdout),
            Live(console=self._console, screen=True, auto_refresh=False) as live,
        ):
            async with anyio.create_task_group() as group:
                group.start_soon(self._sample)
                group.start_soon(self._keys, group)
                group.start_soon(self._end_with_signals, group)
                while True:
                    self._changed = anyio.Event()
                    live.update(self._picture(), refresh=True)
                    with anyio.move_on_after(_FRAME):
                        await self._changed.wait()

    def _picture(self) -> RenderableType:
        return picture(
            self._fleet,
            now=time.monotonic(),
            height=self._console.height,
            selected=self._selected,
            events=tuple(self._events),
            note=self._note,
            title=self._title,
        )

    async def _end_with_signals(self, group: TaskGroup) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async for _ in signals:
                group.cancel_scope.cancel()

    # -------------------------------------------------------------------------------------------------- what is known

    async def _sample(self) -> None:
        while True:
            await self._look()
            self._changed.set()
            await anyio.sleep(max(self._every - _ANSWER, 0.0))

    async def _look(self) -> None:
        broker = self._client.broker
        try:
            queues: list[QueueStats] = await broker.stats() if isinstance(broker, BrokerAdmin) else []
            replies = await broker.signals.gather(WORKERS, b"", wait=_ANSWER)
        except BrokerError as error:
            self._fleet.failed(str(error))
            return
        self._fleet.sample(time.monotonic(), [msgspec.json.decode(r, type=WorkerInfo) for r in replies], queues)

    async def _follow(self, session: str) -> None:
        with self._follower:
            try:
                end = await self._client.broker.log.last(session)
                async with self._client.session(session).follow(max(end.offset - _KEPT, 0)) as events:
                    async for event in events:
                        said = short(event.raw.decode(errors="replace")) if self._content else event.turn or ""
                        self._events.append(f"{event.offset:>8}  {event.type:<16} {said}")
                        self._changed.set()
            except AgentrunError as error:
                self._events.append(str(error))
                self._changed.set()

    # ---------------------------------------------------------------------------------------------------- the person

    async def _keys(self, group: TaskGroup) -> None:
        async for typed in stdin.chunks():
            if typed in _LEAVE:
                break
            if self._asked is not None:
                asked, self._asked = self._asked, None
                self._note = ""
                if typed in (b"y", b"Y"):
                    group.start_soon(self._stop, asked)
            elif typed in _UP or typed in _DOWN:
                self._note = ""
                self._select(-1 if typed in _UP else 1, group)
            elif typed == b"s" and self._selected is not None:
                self._asked = self._selected
                self._note = (
                    f"stop turn {self._selected[1][:12]} of session {self._selected[0]}? y: yes, any other key: no"
                )
            self._changed.set()
        group.cancel_scope.cancel()

    def _select(self, step: int, group: TaskGroup) -> None:
        keys = [run.key for run in self._fleet.runs]
        if not keys:
            return
        at = keys.index(self._selected) + step if self._selected in keys else 0
        before, self._selected = self._selected, keys[min(max(at, 0), len(keys) - 1)]
        if before is None or before[0] != self._selected[0]:
            self._follower.cancel()
            self._follower = anyio.CancelScope()
            self._events.clear()
            group.start_soon(self._follow, self._selected[0])

    async def _stop(self, which: tuple[str, str]) -> None:
        try:
            receipt = await self._client.turn(*which).cancel(by=self._by)
            at = f" at offset {receipt.offset}" if receipt.offset else ""
            self._note = f"receipt: {receipt.status}{at}, {receipt.took * 1000:.1f} ms"
        except AgentrunError as error:
            self._note = f"cannot stop it: {error}"
        self._changed.set()
