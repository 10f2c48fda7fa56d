"""``agentrun dev``: a server and a small fleet on this machine."""

from __future__ import annotations

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

from agentrun.brokers.nats_layout import Streams
from agentrun.brokers.server import NatsServer
from agentrun.cli.admin import set_up
from agentrun.cli.common import App, Fatal, command, option
from agentrun.cli.worker import agents_argument, worker_options
from agentrun.settings import WorkerSettings

_ECHO = "workers.echo:echo"
_PAUSE = 1.0
_MARGIN = 10.0
"""Seconds beyond its drain that a worker gets to end."""


@command("dev")
@agents_argument(required=False)
@option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Worker processes.")
@option("--port", type=click.IntRange(0, 65535), default=4222, show_default=True, help="The server's; 0: a free one.")
@option("--data", type=click.Path(path_type=Path), default=Path(".agentrun"), show_default=True, help="Kept here.")
@option("--ephemeral", is_flag=True, help="Keep nothing.")
@worker_options
async def dev(
    app: App,
    agents: tuple[str, ...],
    workers: int,
    port: int,
    data: Path,
    ephemeral: bool,
    settings: WorkerSettings,
) -> int:
    """Run a NATS server and worker processes on this machine, for development.

    AGENTS are written module:name; default is an agent that echoes. A worker that dies is started again. Ctrl-C lets
    running turns end and stops everything; once more hands them back at once.
    """
    app.log("warning")
    store = None if ephemeral else data / "nats"
    if store is not None:
        store.mkdir(parents=True, exist_ok=True)
    async with NatsServer(data=store, port=port) as server:
        await set_up(server.url, app.namespace, Streams())
        fleet = Fleet(app, server.url, agents or (_ECHO,), settings)
        _greet(app, server, workers, agents or (_ECHO,), store)
        return await fleet.run(workers)


def _greet(app: App, server: NatsServer, workers: int, agents: tuple[str, ...], store: Path | None) -> None:
    extra = "" if server.port == 4222 else f" --url {server.url}"
    extra += "" if app.namespace == "default" else f" --namespace {app.namespace}"
    agent = "" if len(agents) == 1 else " --agent NAME"
    click.echo(f"server   {server.url}, namespace {app.namespace}, data in {store or 'a temporary directory'}")
    click.echo(f"workers  {workers} x {', '.join(agents)}")
    click.echo(f"try      agentrun{extra} chat{agent}")
    click.echo(f"         agentrun{extra} send{agent} s1 'count 20 200'")
    click.echo(f"         agentrun{extra} status")
    click.echo("Ctrl-C stops everything.")


class Fleet:
    """Worker processes that are kept running."""

    def __init__(self, app: App, url: str, agents: tuple[str, ...], settings: WorkerSettings) -> None:
        self._arguments = [sys.executable, "-m", "agentrun", "worker", *agents, "--url", url, "--while-stdin"]
        self._arguments += ["--namespace", app.namespace, "--log-level", app.log_level or "info"]
        for name, value in msgspec.structs.asdict(settings).items():
            self._arguments += ["--" + name.replace("_", "-"), str(value)]
        self._patience = settings.drain + settings.cancel_grace + _MARGIN
        self._processes: dict[str, Process] = {}
        self._stop = anyio.Event()
        self._code = 0

    async def run(self, workers: int) -> int:
        """Keep so many workers until told to stop; return the exit code."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._obey_signals)
            async with anyio.create_task_group() as keepers:
                for number in range(1, workers + 1):
                    keepers.start_soon(self._keep, f"dev-{number}")
            group.cancel_scope.cancel()
        click.echo("stopped")
        return self._code

    async def _obey_signals(self) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                again = self._stop.is_set()
                click.echo("handing running turns back" if again else "stopping: running turns may end")
                self._stop.set()
                self._terminate()

    def _terminate(self) -> None:
        for process in self._processes.values():
            if process.returncode is None:
                process.terminate()

    async def _keep(self, name: str) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            code = await self._run_once(name)
            if self._stop.is_set():
                return
            if code == 2:
                # It could not load its agents; the others cannot either.
                self._code = code
                self._stop.set()
                self._terminate()
                return
            lived = time.monotonic() - began
            how = f"died of signal {-code}" if code < 0 else f"ended with code {code}"
            click.echo(f"{name} | {how} after {lived:.0f} s; it is started again")
            with anyio.move_on_after(_PAUSE if lived < 10 * _PAUSE else 0):
                await self._stop.wait()

    async def _run_once(self, name: str) -> int:
        # A session of its own: a Ctrl-C at the terminal is for us, who tell the worker once.
        process = await anyio.open_process(
            [*self._arguments, "--name", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._processes[name] = process
        try:
            if self._stop.is_set():
                process.terminate()
            async with anyio.create_task_group() as group:
                assert process.stdout is not None
                group.start_soon(self._lose_patience, process)
                # To its end, so that a worker's last words are not lost.
                await _print_lines(name, process.stdout)
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
