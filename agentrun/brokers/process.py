"""A server as a child process that ends with this one: what the servers for development and tests have in common."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import anyio
import anyio.to_thread

from agentrun.errors import Misconfigured, Unavailable

__all__ = ["ServerProcess"]

_START = 10.0
_STOP = 5.0

# Reads until the parent is gone (its end of the pipe closes, whatever way it died), then ends the server.
_WATCH = """
read -r _
kill -TERM "$1" 2>/dev/null
i=0
while kill -0 "$1" 2>/dev/null && [ $i -lt 50 ]; do sleep 0.1; i=$((i+1)); done
kill -KILL "$1" 2>/dev/null
[ -z "$2" ] || rm -rf -- "$2"
"""


class ServerProcess(ABC):
    """One server on 127.0.0.1, that ends with this process.

    An async context manager; `start` and `stop` do the same for code that is not async.

    Args:
        data: Where it keeps its data; None: a temporary directory, removed by `stop`.
        port: The port; 0: a free one, kept over `restart`.
        binary: The server to run; None: the installed one.
        settings: More lines for the server's configuration file.
    """

    kind: ClassVar[str]
    """What the server is: its scheme in URLs, and its name in messages."""

    def __init__(
        self, *, data: Path | None = None, port: int = 0, binary: str | None = None, settings: str = ""
    ) -> None:
        self._data = data
        self._port = port
        self._binary = binary
        self._settings = settings
        self._temporary: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self, run: Path, data: Path) -> list[str]:
        """The command that starts the server; ``run`` is a directory of its own, ``data`` is for its data."""

    @abstractmethod
    def ready(self, run: Path) -> bool:
        """Whether the server that was started answers now. Sets ``_port`` if it was 0.

        Raises:
            Misconfigured: What answers is another server.
        """

    @property
    def url(self) -> str:
        """Where it listens, as ``<kind>://127.0.0.1:<port>``."""
        return f"{self.kind}://127.0.0.1:{self._port}"

    @property
    def port(self) -> int:
        """The port it listens on; 0 before the first start."""
        return self._port

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start the server and wait until it answers; nothing happens if it runs.

        Raises:
            Misconfigured: There is no binary, or the server does not start (the message ends with its last words).
            Unavailable: It did not answer in time.
        """
        if self._process is not None:
            return
        fresh = self._temporary is None
        if self._temporary is None:
            self._temporary = Path(tempfile.mkdtemp(prefix=f"agentrun-{self.kind}-"))
        run = self._temporary
        try:
            command = self.command(run, self._data or run / "data")
            with (run / "server.log").open("wb") as output:
                self._process = subprocess.Popen(  # noqa: S603 - our own arguments
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
                )
            if sys.platform != "win32":
                self._watch = subprocess.Popen(  # noqa: S603 - our own arguments
                    ["/bin/sh", "-c", _WATCH, "watch", str(self._process.pid), str(run)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            self._await_start(run)
        except BaseException:
            self.kill()
            if fresh:
                self.stop()
            raise

    def _await_start(self, run: Path) -> None:
        assert self._process is not None
        until = time.monotonic() + _START
        while time.monotonic() < until:
            if self._process.poll() is not None:
                words = (run / "server.log").read_text(errors="replace").strip().splitlines()[-3:]
                raise Misconfigured(f"{self.kind}-server ended at once: {' | '.join(words)}")
            if self.ready(run):
                return
            time.sleep(0.01)
        raise Unavailable(f"{self.kind}-server did not answer within {_START:g} s")

    def stop(self) -> None:
        """Stop the server in good order and remove what is temporary."""
        self._end(signal.SIGTERM)
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None

    def kill(self) -> None:
        """End the server as a crash would; its data stays for `start`."""
        self._end(signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)

    def restart(self) -> None:
        """Stop the server in good order and start it on the same port and data."""
        self._end(signal.SIGTERM)
        self.start()

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        watch, self._watch = self._watch, None
        if watch is not None:
            # First, so that it cannot end a stranger that got the server's process id.
            watch.kill()
            watch.wait()
            if watch.stdin is not None:
                watch.stdin.close()
        if process is None:
            return
        process.send_signal(how)
        try:
            process.wait(_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def suspend(self) -> None:
        """Stop the server's process without ending it, as a hung host would look. Not on Windows."""
        if self._process is not None:
            os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a suspended server go on."""
        if self._process is not None:
            os.kill(self._process.pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        await anyio.to_thread.run_sync(self.start)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self.stop)
