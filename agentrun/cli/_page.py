"""The gateway with the web page, as a process beside others."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Mapping

import click

from agentrun.cli.common import Fatal, option

__all__ = ["HOST", "gateway_command", "gateway_environment", "http_port_option", "missing", "pick_port"]

HOST = "127.0.0.1"
_PORT = 8080
_KEYS = ("AGENTRUN_GATEWAY_SECRET", "AGENTRUN_GATEWAY_SECRET_FILE", "AGENTRUN_PUBLIC_KEY", "AGENTRUN_JWKS")
_NEEDED = ("httptools", "jwt", "starlette", "uvicorn", "websockets")

http_port_option = option(
    "--http-port",
    type=click.IntRange(0, 65535),
    help=f"The web page's. Default: {_PORT}, or a free one if that is taken; 0: a free one.",
)


def missing() -> str | None:
    """The package that the gateway lacks here, if it lacks one: it is an extra."""
    return next((name for name in _NEEDED if importlib.util.find_spec(name) is None), None)


def pick_port(asked: int | None) -> int:
    """Return the port to serve at; it stays the same when the gateway is started again.

    Raises:
        Fatal: The one asked for is taken.
    """
    if asked:
        if not _free(asked):
            raise Fatal(f"port {asked} is taken: give another --http-port, or 0 for a free one")
        return asked
    if asked is None:
        if _free(_PORT):
            return _PORT
        click.echo(f"port {_PORT} is taken, so the web page gets another one")
    with socket.create_server((HOST, 0)) as server:
        return server.getsockname()[1]


def _free(port: int) -> bool:
    try:
        with socket.create_server((HOST, port)):
            return True
    except OSError:
        return False


def gateway_environment(place: Mapping[str, str]) -> dict[str, str]:
    """The environment of such a gateway: ours without the keys, as everybody on this machine may use it.

    Args:
        place: The variables that say where the broker is.
    """
    return {name: value for name, value in os.environ.items() if name not in _KEYS} | dict(place)


def gateway_command(port: int, *, agent: str | None, log_level: str = "warning") -> list[str]:
    """A gateway for this machine alone, with the page, that ends when its stdin does.

    Args:
        port: Where to serve.
        agent: To whom turns go whose sender names no agent.
        log_level: What it logs.
    """
    command = [sys.executable, "-m", "agentrun", "--log-level", log_level, "gateway"]
    command += ["--host", HOST, "--port", str(port), "--insecure", "--page", "--list-sessions", "--while-stdin"]
    return command if agent is None else [*command, "--agent", agent]
