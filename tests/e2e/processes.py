"""Real processes of the command line against a real broker. Whatever a test starts is ended with it."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import anyio
import pytest
from click.testing import CliRunner

import agentrun
from agentrun import brokers
from agentrun.brokers.streams import Streams
from agentrun.cli import main
from agentrun.client import Client, Event

ROOT = Path(__file__).parents[2]
PATIENCE = 20.0
T = TypeVar("T")
_COLOUR = re.compile(r"\x1b\[([0-9;]*m|\?2004[hl])")


def environment(url: str, namespace: str, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a command is started with; nothing of what the tests themselves were started with matters to it.

    Without a URL it is left to the command where its broker is. COLUMNS and LINES come from readline, which pytest
    imports, also where there is no terminal.
    """
    meant = ("NO_COLOR", "FORCE_COLOR", "PYTHONDONTWRITEBYTECODE", "COLUMNS", "LINES")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("AGENTRUN_") and key not in meant}
    ours = {"AGENTRUN_NAMESPACE": namespace, "PYTHONUNBUFFERED": "1", "TERM": "xterm"}
    where = {"AGENTRUN_URL": url} if url else {}
    return {**kept, **ours, **where, **(more or {})}


class Result:
    """What a command that has ended left."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def events(self) -> list[dict[str, Any]]:
        """The lines of ``--json``."""
        return [json.loads(line) for line in self.out.splitlines()]

    def __repr__(self) -> str:
        return f"exit code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


def one_line(text: str) -> str:
    """What is on stderr of a command that could not do it: one line."""
    assert text.startswith("agentrun: "), text
    assert text.count("\n") == 1, text
    return text


def within(*arguments: object, code: int = 0, env: Mapping[str, str] | None = None) -> Result:
    """Run a command within this process, at a tenth of the cost: one that neither streams to stdout nor serves."""
    result = CliRunner(env={"AGENTRUN_URL": None, **(env or {})}).invoke(main, [str(word) for word in arguments])
    assert result.exit_code == code, result.output
    return Result(result.exit_code, result.stdout, result.stderr)


class Running:
    """A process that runs, and what it has printed so far."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.out = bytearray()
        self.err = bytearray()
        self._moved = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=(stream, into))
            for stream, into in ((process.stdout, self.out), (process.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: Any, into: bytearray) -> None:
        while chunk := os.read(stream.fileno(), 65536):
            with self._moved:
                into += chunk
                self._moved.notify_all()

    def until(self, pattern: str, *, err: bool = False, timeout: float = PATIENCE) -> re.Match[str]:
        """Wait for a pattern on stdout (or stderr)."""
        end = time.monotonic() + timeout
        with self._moved:
            while True:
                text = bytes(self.err if err else self.out).decode()
                if match := re.search(pattern, text):
                    return match
                left = end - time.monotonic()
                ended = self.process.poll() is not None and not any(r.is_alive() for r in self._readers)
                if left <= 0 or ended:
                    raise AssertionError(f"{pattern!r} was not printed; {self.result_so_far()}")
                self._moved.wait(min(left, 0.1))

    def result_so_far(self) -> Result:
        code = self.process.poll()
        return Result(-999 if code is None else code, bytes(self.out).decode(), bytes(self.err).decode())

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = PATIENCE) -> Result:
        """Wait for its end."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end; {self.result_so_far()}") from None
        for reader in self._readers:
            reader.join(timeout)
        return self.result_so_far()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


class Terminal:
    """A process with a terminal of its own, as a person has it."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (40, 100))
        self._before = termios.tcgetattr(slave)
        self._slave = slave
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=env, cwd=ROOT, start_new_session=True
        )
        self._raw = ""
        self._at = 0

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def resize(self, rows: int, columns: int) -> None:
        termios.tcsetwinsize(self._slave, (rows, columns))

    def until(self, pattern: str, timeout: float = PATIENCE) -> re.Match[str]:
        """Wait for a pattern behind the one that was waited for last."""
        end = time.monotonic() + timeout
        while True:
            if match := re.compile(pattern).search(self.text, self._at):
                self._at = match.end()
                return match
            left = end - time.monotonic()
            assert left > 0, f"{pattern!r} does not show behind {self.text[: self._at]!r}: {self.text[self._at :]!r}"
            self._take(min(left, 0.2))

    def next_frame(self, end: float) -> bool:
        """Wait for a frame that was not there yet, of a program that draws the screen again and again; False: too long.

        What was printed meanwhile is taken first: who looks at each frame in turn falls behind on a slow machine.
        """
        before = self.frames
        while self.frames == before:
            if (left := end - time.monotonic()) <= 0:
                return False
            self._take(min(left, 0.2))
        return True

    def _take(self, timeout: float) -> None:
        while select.select([self._master], [], [], timeout)[0]:
            self._raw += os.read(self._master, 65536).decode(errors="replace")
            timeout = 0.0

    @property
    def frames(self) -> int:
        """How many frames have begun."""
        return self._raw.count("\x1b[H")

    @property
    def text(self) -> str:
        """All that was printed, without colours."""
        return _COLOUR.sub("", self._raw)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for its end."""
        end = time.monotonic() + timeout
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it does not end: {self.text!r}"
            self._take(0.05)
        self._take(0.05)
        return self.process.returncode

    @property
    def restored(self) -> bool:
        """Whether the terminal is again as it was: its mode, its own screen, and the cursor."""
        switches = (("\x1b[?1049l", "\x1b[?1049h"), ("\x1b[?25h", "\x1b[?25l"), ("\x1b[?2004l", "\x1b[?2004h"))
        undone = all(self._raw.rfind(off) >= self._raw.rfind(on) for off, on in switches)
        return undone and termios.tcgetattr(self._slave) == self._before

    @property
    def screen(self) -> list[str]:
        """The lines of the last whole frame of a program that draws the screen again and again."""
        return _COLOUR.sub("", ["", *self._raw.rsplit("\x1b[H", 2)][-2]).splitlines()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._slave)
        os.close(self._master)


class Cli:
    """The command line in one namespace of one broker."""

    def __init__(self, url: str, namespace: str) -> None:
        self.url = url
        self.namespace = namespace
        self._started: list[Running | Terminal] = []

    def _command(self, arguments: tuple[object, ...]) -> list[str]:
        return [sys.executable, "-m", "agentrun", *map(str, arguments)]

    def start(self, *arguments: object, env: dict[str, str] | None = None, stdin: int = subprocess.DEVNULL) -> Running:
        """Start a command."""
        running = Running(
            subprocess.Popen(
                self._command(arguments),
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment(self.url, self.namespace, env),
                cwd=ROOT,
            )
        )
        self._started.append(running)
        return running

    def terminal(self, *arguments: object, env: dict[str, str] | None = None) -> Terminal:
        """Start a command in a terminal."""
        terminal = Terminal(self._command(arguments), environment(self.url, self.namespace, env))
        self._started.append(terminal)
        return terminal

    def run(
        self, *arguments: object, code: int | None = 0, env: dict[str, str] | None = None, stdin: str | None = None
    ) -> Result:
        """Run a command to its end, and see that it ends with ``code``."""
        running = self.start(*arguments, env=env, stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE)
        if stdin is not None:
            assert running.process.stdin is not None
            running.process.stdin.write(stdin.encode())
            running.process.stdin.close()
        result = running.wait()
        assert code is None or result.code == code, result
        return result

    def within(self, *arguments: object, code: int = 0, env: Mapping[str, str] | None = None) -> Result:
        """Run a command to its end within this process."""
        where = {"AGENTRUN_URL": self.url, "AGENTRUN_NAMESPACE": self.namespace}
        return within(*arguments, code=code, env={**where, **(env or {})})

    def worker(
        self, name: str, *flags: object, agent: str = "workers.echo:echo", env: dict[str, str] | None = None
    ) -> Running:
        """Start a worker, and wait until it works."""
        running = self.start("worker", agent, "--name", name, "--lease", "2", *flags, env=env)
        running.until(f"worker {name} runs", err=True)
        return running

    def ask(self, what: Callable[[Client], Awaitable[T]]) -> T:
        """Do something with the library's client."""

        async def main() -> T:
            async with agentrun.connect(self.url, namespace=self.namespace) as client:
                return await what(client)

        return anyio.run(main)

    def send(self, session: str, text: str, id: str, **more: Any) -> None:
        """Send a turn with the library's client: what a test needs before it begins."""
        self.ask(lambda client: client.session(session, agent="echo").send(text, id=id, **more))

    def ended(self, session: str, text: str, id: str, **more: Any) -> None:
        """Send a turn, and wait for its end, whichever that is."""

        async def run(client: Client) -> None:
            turn = await client.session(session, agent="echo").send(text, id=id, **more)
            with suppress(agentrun.TurnFailed):
                await turn.result(PATIENCE)

        self.ask(run)

    def log(self, session: str, after: int = 0) -> list[Event]:
        """The session's events as they are stored now."""

        async def read(client: Client) -> list[Event]:
            return [event async for event in client.session(session).events(after, follow=False)]

        return self.ask(read)

    def result(self, session: str, turn: str, timeout: float = PATIENCE) -> agentrun.Result:
        """The turn's answer, waited for."""
        return self.ask(lambda client: client.turn(session, turn).result(timeout))

    def events_until(self, session: str, type: str, count: int = 1, timeout: float = PATIENCE) -> list[Event]:
        """The session's events up to the ``count``-th of a type, waited for."""

        async def read(client: Client) -> list[Event]:
            found: list[Event] = []
            with anyio.fail_after(timeout):
                async with client.session(session).follow() as events:
                    async for event in events:
                        found.append(event)
                        if sum(e.type == type for e in found) == count:
                            break
            return found

        return self.ask(read)

    def end(self) -> None:
        for process in reversed(self._started):
            process.end()


def on(*brokers: str) -> pytest.MarkDecorator:
    """Run a test on each of these brokers; see conftest.py for which run where."""
    return pytest.mark.parametrize("broker", brokers, indirect=True)


def new_cli(url: str, streams: Streams | None = None) -> Cli:
    """A namespace that is set up; ``streams`` is for servers."""
    cli = Cli(url, f"e{uuid.uuid4().hex[:10]}")
    options = {} if streams is None else {"streams": streams}

    async def set_up() -> None:
        async with brokers.connect(cli.url, namespace=cli.namespace, check=False, **options) as broker:
            await broker.setup()

    anyio.run(set_up)
    return cli
