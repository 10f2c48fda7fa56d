"""``agentrun chat``: a conversation in the terminal. All it shows has come from the log."""

from __future__ import annotations

import secrets
import shutil
import signal
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack

import anyio
import click
from anyio.abc import TaskGroup
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from agentrun.cli.common import App, agent_option, command, option, pick_agent
from agentrun.cli.prompt import Editor, cooked_lines, keys, raw_terminal
from agentrun.cli.render import Renderer, Screen
from agentrun.cli.talk import PATIENCE, parse_answer
from agentrun.client import Event, Session
from agentrun.errors import AgentrunError, NotWaiting
from agentrun.history import History

_PARTING = 2.0
"""Seconds that what was written last gets to be sent when the person leaves."""


@command("chat")
@click.argument("session", required=False, envvar="AGENTRUN_SESSION")
@agent_option
@option("--user", help="Who you are, as other readers see it.")
async def chat(app: App, session: str | None, agent: str | None, user: str | None) -> None:
    """Talk in SESSION (default: a new one), together with whoever else is in it.

    Ctrl-C stops the turn that runs; where none runs, Ctrl-C or Ctrl-D leaves. What you type while an answer streams
    is kept; with Enter it waits in line. Questions of the agent are asked here and answered here. Where stdin is no
    terminal its lines are sent one after the other, each when the one before has ended.
    """
    async with app.client() as client:
        target = client.session(session or f"chat-{secrets.token_hex(4)}")
        history = await target.history()
        known = next((view.agent for view in reversed(history.turns.values()) if view.agent), None)
        name = agent or known or await pick_agent(client, None)
        target.agent = name
        click.echo(f"session {target.id}, agent {name} (Ctrl-C stops a turn, Ctrl-D leaves)", err=True)
        await Chat(target, history, user).run()


class Chat:
    """One person in one session."""

    def __init__(self, session: Session, history: History, user: str | None) -> None:
        self._session = session
        self._user = user
        self._own: set[str] = set()
        self._screen = Screen(sys.stdout, sys.stdout)
        self._renderer = Renderer(self._screen, history=history, own=self._own)
        self._terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._editor = Editor(sys.stdout)
        self._changed = anyio.Event()
        self._sent = anyio.Event()
        self._sending = 0
        self._stopping = False
        self._waits: tuple[str, float] = ("", 0.0)
        self._tasks: TaskGroup

    async def run(self) -> None:
        """Until the person leaves, or the session is deleted."""
        self._renderer.recap()
        lines, sender = anyio.create_memory_object_stream[str](1000)
        with ExitStack() as stack:
            if self._terminal:
                stack.enter_context(raw_terminal(sys.stdin.fileno(), sys.stdout))
            async with (
                self._session.follow(self._renderer.history.offset) as events,
                anyio.create_task_group() as self._tasks,
            ):
                self._tasks.start_soon(self._watch, events)
                self._tasks.start_soon(self._send_all, sender)
                self._tasks.start_soon(self._obey_signals)
                self._tasks.start_soon(self._tell_if_nobody_comes)
                self._draw()
                await self._read(lines)
                self._tasks.cancel_scope.cancel()
            self._editor.hide()
            self._screen.end_line()

    # --------------------------------------------------------------------------------------------------- the screen

    def _draw(self) -> None:
        """Show the prompt if it is the person's turn to say something."""
        if not self._terminal:
            return
        self._editor.width = shutil.get_terminal_size().columns
        if self._renderer.question is not None:
            self._screen.end_line()
            self._editor.draw("answer› ")
        elif self._renderer.active is None and not self._sending:
            self._screen.end_line()
            self._editor.draw("› ")
        else:
            self._editor.hide()

    def _say(self, text: str, style: str = "dim") -> None:
        self._editor.hide()
        self._screen.line(text, style)
        self._draw()

    async def _watch(self, events: AsyncGenerator[Event]) -> None:
        async for event in events:
            self._editor.hide()
            self._renderer.show(event)
            self._draw()
            changed, self._changed = self._changed, anyio.Event()
            changed.set()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    async def _tell_if_nobody_comes(self) -> None:
        while True:
            await anyio.sleep(0.5)
            view = self._renderer.active
            if view is None or view.attempt:
                continue
            turn, since = self._waits
            if turn != view.id:
                self._waits = (view.id, time.monotonic())
            elif since and time.monotonic() - since > PATIENCE:
                self._waits = (view.id, 0.0)
                self._say(f"no worker for {view.agent} has taken the turn yet; it waits (agentrun status)")

    # --------------------------------------------------------------------------------------------------- the person

    async def _read(self, lines: MemoryObjectSendStream[str]) -> None:
        source = keys(self._editor) if self._terminal else cooked_lines()
        async for key in source:
            if key.kind == "leave":
                break
            if key.kind == "stop":
                if not self._stop():
                    return
            elif key.text.strip():
                self._editor.hide()
                self._sending += 1
                await lines.send(key.text)
            self._draw()
        lines.close()
        with anyio.move_on_after(_PARTING if self._terminal else None):
            await self._sent.wait()

    async def _obey_signals(self) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for number in signals:
                if number != signal.SIGINT or not self._stop():
                    self._tasks.cancel_scope.cancel()

    def _stop(self) -> bool:
        """Stop the turn that runs. False: there is none, or it is being stopped already: the person wants to leave."""
        if self._renderer.active is not None and not self._stopping:
            self._stopping = True
            self._tasks.start_soon(self._cancel, self._renderer.active.id)
            return True
        if self._editor.text:
            self._editor.text = ""
            return True
        return False

    async def _cancel(self, turn: str) -> None:
        try:
            receipt = await self._session.turn(turn).cancel(by=self._user)
        except AgentrunError as error:
            self._say(f"cannot stop it: {error}", "red")
        else:
            at = f" at offset {receipt.offset}" if receipt.offset else ""
            self._say(f"receipt: {receipt.status}{at}, {receipt.took * 1000:.1f} ms")
        finally:
            self._stopping = False

    # --------------------------------------------------------------------------------------------------- what is sent

    async def _send_all(self, lines: MemoryObjectReceiveStream[str]) -> None:
        async for text in lines:
            try:
                await self._send(text)
            except NotWaiting as error:
                self._say(str(error))
            except AgentrunError as error:
                # What was written is not lost.
                self._editor.text = self._editor.text or text
                self._say(str(error), "red")
            finally:
                self._sending -= 1
                self._draw()
        self._sent.set()

    async def _send(self, text: str) -> None:
        if (asked := self._renderer.question) is not None:
            view, question = asked
            value = parse_answer(question.event, text)
            offset = await self._session.turn(view.id).answer(question.event.request, value, user=self._user)
            await self._until(lambda: self._renderer.history.offset >= offset)
        else:
            # Known before the log shows it, so that it is recognised as our own.
            turn = secrets.token_hex(16)
            self._own.add(turn)
            await self._session.send(text, id=turn, user=self._user)
            await self._until(lambda: turn in self._renderer.history.turns)
        if not self._terminal:
            await self._until(lambda: self._renderer.active is None or self._renderer.question is not None)
