"""Worker processes for the time of a bench or a demonstration."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Self

import anyio
import anyio.to_thread
import msgspec

from agentrun.cli._place import Place
from agentrun.client import Client
from agentrun.errors import Misconfigured, Unavailable
from agentrun.worker import WORKERS, WorkerInfo

_START = 60.0
_END = 10.0


def command(*arguments: str) -> list[str]:
    """An agentrun command, as the arguments of a process."""
    return [sys.executable, "-m", "agentrun", *arguments]


class Fleet:
    """Worker processes of one agent, an async context manager; leaving it ends them.

    Args:
        place: Where they work.
        agent: The agent, as ``module:name``.
        lease: Their lease time, in seconds.
        concurrency: Turns each of them runs at once.
        env: Added to their environment.
    """

    def __init__(
        self,
        place: Place,
        agent: str,
        *,
        lease: float,
        concurrency: int = 50,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.place = place
        # With us, however we die, go the workers: --while-stdin.
        self._command = command(
            "--log-level", "warning", "worker", agent, "--while-stdin", "--drain", "0",
            "--lease", f"{lease:g}", "--concurrency", f"{concurrency}",
        )  # fmt: skip
        self._env = {**os.environ, **place.environment, **(env or {})}
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._log: IO[bytes] | None = None

    @property
    def pids(self) -> Sequence[int]:
        """The processes that were started and not killed."""
        return tuple(self._processes)

    async def __aenter__(self) -> Self:
        self._log = tempfile.TemporaryFile("a+b", prefix="agentrun-workers-")  # noqa: SIM115 - closed by __aexit__
        return self

    async def __aexit__(self, *exc: object) -> None:
        with anyio.CancelScope(shield=True):
            for process in self._processes.values():
                process.send_signal(signal.SIGTERM)
            for process in self._processes.values():
                await anyio.to_thread.run_sync(_wait, process)
        self._processes.clear()
        assert self._log is not None
        self._log.close()

    async def start(self, client: Client, count: int = 1) -> list[WorkerInfo]:
        """Start so many workers and return them when they work.

        Raises:
            Misconfigured: One ended instead; the message says what it said.
            Unavailable: They did not report within a minute.
        """
        new = {self._spawn() for _ in range(count)}
        with anyio.move_on_after(_START):
            while True:
                if ended := [pid for pid in new if self._processes[pid].poll() is not None]:
                    raise Misconfigured(f"worker {ended[0]} ended at once: {self.said()}")
                found = [worker for worker in await self.workers(client) if worker.pid in new]
                if len(found) == count:
                    return found
                await anyio.sleep(0.05)
        raise Unavailable(f"the workers did not start within {_START:g} s: {self.said()}")

    def _spawn(self) -> int:
        process = subprocess.Popen(  # noqa: S603 - our own arguments
            self._command,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            env=self._env,
            start_new_session=True,
        )
        self._processes[process.pid] = process
        return process.pid

    def kill(self, pid: int) -> None:
        """End a worker as a crash would."""
        process = self._processes.pop(pid)
        process.kill()
        process.wait()
        _close(process)

    async def workers(self, client: Client) -> list[WorkerInfo]:
        """What the workers say of themselves, those that answer."""
        replies = await client.broker.signals.gather(WORKERS, b"", wait=0.2)
        found = [msgspec.json.decode(reply, type=WorkerInfo) for reply in replies]
        return [worker for worker in found if worker.pid in self._processes]

    def said(self) -> str:
        """The last words of the workers."""
        assert self._log is not None
        self._log.seek(0)
        return self._log.read().decode(errors="replace").strip()[-1000:]


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _close(process)


def _close(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()


def cpu_seconds(pid: int | None) -> float | None:
    """The processor time a process has used so far; None where the system does not say."""
    if pid is None:
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
