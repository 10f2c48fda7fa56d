"""``agentrun dev``: a server, a small fleet and a web page on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import anyio
import click
import msgspec
from anyio.abc import ByteReceiveStream, Process
from anyio.streams.buffered import BufferedByteReceiveStream

from agentrun.cli._page import HOST, gateway_command, gateway_environment, http_port_option, missing, pick_port
from agentrun.cli._place import PORTS, Place, broker_option, chosen_url, is_given, open_place, shown
from agentrun.cli.common import App, Fatal, command, option
from agentrun.cli.worker import agents_argument, worker_options
from agentrun.settings import WorkerSettings

_ECHO = "workers.echo:echo"
_PAUSE = 1.0
_MARGIN = 10.0
"""Seconds beyond its drain that a process gets to end."""
_CANNOT = 2
"""The exit code of a process that cannot be started as written: to try again is no use."""


@command("dev")
@agents_argument(required=False)
@option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Worker processes.")
@broker_option
@option("--port", type=click.IntRange(0, 65535), help="The server's; 0: a free one. Default: 4222, of Valkey 6379.")
@http_port_option
@option("--data", type=click.Path(path_type=Path), default=Path(".agentrun"), show_default=True, help="Kept here.")
@option("--ephemeral", is_flag=True, help="Keep nothing.")
@worker_options
async def dev(
    app: App,
    agents: tuple[str, ...],
    workers: int,
    kind: str | None,
    port: int | None,
    http_port: int | None,
    data: Path,
    ephemeral: bool,
    settings: WorkerSettings,
) -> int:
    """Run a broker, worker processes and a web page on this machine, for development.

    The broker is started for it (--broker: a NATS server, a Valkey server or an SQLite file), unless --url or
    AGENTRUN_URL names one that runs: that one is set up and used, and goes on running.

    AGENTS are written module:name; default is an agent that echoes. A process that dies is started again. Ctrl-C lets
    running turns end and stops everything; once more hands them back at once.
    """
    app.log("warning")
    url = chosen_url(app)
    if url is not None:
        _only_ours(url)
    if port is None:
        port = PORTS.get(kind or "nats", 0)
    elif kind == "sqlite":
        raise Fatal("a file has no --port", 2)
    async with open_place(url, app.namespace, kind, data=None if ephemeral else data, port=port) as place:
        page = pick_port(http_port) if missing() is None else None
        fleet = _fleet(app, place, agents or (_ECHO,), workers, settings, page)
        kept = "" if url is not None else f", data in {'a temporary directory' if ephemeral else data}"
        _greet(place, kept, workers, agents or (_ECHO,), page)
        return await fleet.run()


def _only_ours(url: str) -> None:
    for name in ("port", "data", "ephemeral"):
        if is_given(name):
            raise Fatal(f"--{name} is for a broker that is started here (--broker), not for {shown(url)}", 2)


def _greet(place: Place, kept: str, workers: int, agents: tuple[str, ...], page: int | None) -> None:
    agent = "" if len(agents) == 1 else " --agent NAME"
    click.echo(f"server   {shown(place.url)}, namespace {place.namespace}{kept}")
    click.echo(f"workers  {workers} x {', '.join(agents)}")
    if page is not None:
        click.echo(f"page     http://{HOST}:{page}/")
    else:
        click.echo(f"page     none without {missing()}: pip install 'agentrun[gateway]'")
    click.echo(f"try      agentrun{place.options} chat{agent}")
    click.echo(f"         agentrun{place.options} send{agent} s1 'count 20 200'")
    click.echo(f"         agentrun{place.options} status")
    click.echo("Ctrl-C stops everything.")


def _fleet(
    app: App, place: Place, agents: tuple[str, ...], workers: int, settings: WorkerSettings, page: int | None
) -> Fleet:
    arguments = [sys.executable, "-m", "agentrun", "worker", *agents, "--while-stdin"]
    arguments += ["--log-level", app.log_level or "info"]
    for name, value in msgspec.structs.asdict(settings).items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        else:
            arguments += [f"--{option}", str(value)]
    patience = settings.drain + settings.cancel_grace + _MARGIN
    names = [f"dev-{number}" for number in range(1, workers + 1)]
    env = {**os.environ, **place.environment}
    first = [Kept(name, [*arguments, "--name", name], patience, env=env) for name in names]
    if page is None:
        return Fleet(first, [])
    agent = "echo" if agents == (_ECHO,) else None
    command = gateway_command(page, agent=agent, log_level=app.log_level or "warning")
    return Fleet(first, [Kept("gateway", command, _MARGIN, env=gateway_environment(place.environment))])


class Fleet:
    """Processes that are kept running until told to stop.

    Args:
        first: Stopped first.
        last: Stopped when those have ended, so that what they still say is seen.
    """

    def __init__(self, first: list[Kept], last: list[Kept]) -> None:
        self._first = first
        self._last = last
        self._stopping = False

    async def run(self) -> int:
        """Keep them running until told to stop; return the exit code."""
        codes: list[int] = []

        async def keep(kept: Kept) -> None:
            code = await kept.run()
            if code == _CANNOT:
                # The others cannot either, or are no use without it.
                codes.append(code)
                self._stop()

        async with anyio.create_task_group() as group:
            group.start_soon(self._obey_signals)
            async with anyio.create_task_group() as keepers:
                for kept in self._last:
                    keepers.start_soon(keep, kept)
                async with anyio.create_task_group() as first:
                    for kept in self._first:
                        first.start_soon(keep, kept)
                for kept in self._last:
                    kept.stop()
            group.cancel_scope.cancel()
        click.echo("stopped")
        return max(codes, default=0)

    async def _obey_signals(self) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                click.echo("handing running turns back" if self._stopping else "stopping: running turns may end")
                self._stop()

    def _stop(self) -> None:
        self._stopping = True
        for kept in self._first:
            kept.stop()


class Kept:
    """A process that is started again when it dies.

    Args:
        name: Stands before each line it prints.
        command: The process.
        patience: Seconds it gets to end when it is told to stop.
        env: Its environment.
    """

    def __init__(self, name: str, command: list[str], patience: float, *, env: dict[str, str]) -> None:
        self._env = env
        self._name = name
        self._command = command
        self._patience = patience
        self._process: Process | None = None
        self._stop = anyio.Event()

    def stop(self) -> None:
        """Tell it to stop; more than once, if there is a hurry."""
        self._stop.set()
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()

    async def run(self) -> int:
        """Keep it running until told to stop, or until it says that it cannot run; return its exit code."""
        while True:
            began = time.monotonic()
            code = await self._run_once()
            if self._stop.is_set() or code == _CANNOT:
                return code
            lived = time.monotonic() - began
            how = f"died of signal {-code}" if code < 0 else f"ended with code {code}"
            click.echo(f"{self._name} | {how} after {lived:.0f} s; it is started again")
            with anyio.move_on_after(_PAUSE if lived < 10 * _PAUSE else 0):
                await self._stop.wait()
            if self._stop.is_set():
                return 0

    async def _run_once(self) -> int:
        # A session of its own: a Ctrl-C at the terminal is for us, who tell the process once.
        self._process = process = await anyio.open_process(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._env,
            start_new_session=True,
        )
        try:
            if self._stop.is_set():
                process.terminate()
            async with anyio.create_task_group() as group:
                assert process.stdout is not None
                group.start_soon(self._lose_patience, process)
                # To its end, so that its last words are not lost.
                await _print_lines(self._name, process.stdout)
                await process.wait()
                group.cancel_scope.cancel()
            assert process.returncode is not None
            return process.returncode
        finally:
            if process.returncode is None:
                process.kill()
            with anyio.CancelScope(shield=True):
                await process.aclose()

    async def _lose_patience(self, process: Process) -> None:
        await self._stop.wait()
        await anyio.sleep(self._patience)
        process.kill()


async def _print_lines(name: str, stream: ByteReceiveStream) -> None:
    lines = BufferedByteReceiveStream(stream)
    try:
        while True:
            line = await lines.receive_until(b"\n", 1 << 20)
            click.echo(f"{name} | {line.decode(errors='replace')}")
    except (anyio.EndOfStream, anyio.IncompleteRead):
        pass
    except anyio.DelimiterNotFound as error:
        raise Fatal(f"{name} writes lines that are too long") from error
