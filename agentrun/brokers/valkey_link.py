"""Connections to Valkey or Redis: the only place that calls valkey-py.

A connection is shared by all callers: commands are written in the order they come in, many at once where there are
many, and replies are given to the callers in that order. So a caller may be cancelled at any time: its reply is
dropped. Nothing is kept while there is no connection, so that nothing is sent late.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import anyio
from anyio.abc import TaskStatus
from msgspec import Struct
from valkey.asyncio.connection import AbstractConnection, Connection, SSLConnection
from valkey.exceptions import AuthenticationError, NoPermissionError, ResponseError, ValkeyError
from valkey.exceptions import ReadOnlyError as NotPrimary

from agentrun.brokers.clock import ServerClock
from agentrun.brokers.valkey_scripts import Script
from agentrun.errors import InvalidInput, Misconfigured, Unavailable

__all__ = ["Link", "LinkOptions", "NotConnected", "NotSent", "Wire"]

log = logging.getLogger("agentrun.valkey")

PING = 2.0
"""Seconds between two signs of life."""
SILENCE = 5.0
"""Seconds after which a server that owes an answer is taken for gone."""
BACKOFF = 2.0
"""Seconds between two tries to connect, at most."""
_CHUNK = 1 << 16

_TRANSIENT = ("BUSY", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "MISCONF", "NOREPLICAS", "UNBLOCKED")
_Reply = Any


class NotConnected(Exception):
    """The connection was lost before the answer came; whether the command was carried out is not known."""


class NotSent(NotConnected):
    """There is no connection at the moment, or the server takes no commands; nothing was done."""


class LinkOptions(Struct, frozen=True, kw_only=True):
    """How to connect. A database number may be the URL's path: ``valkey://host:6379/2``."""

    url: str
    tls: ssl.SSLContext | None = None
    connect_timeout: float = 5.0

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            usable = bool(parts.hostname) and parts.port != 0 and (parts.path.strip("/") or "0").isdecimal()
            usable = usable and not parts.query and not parts.fragment
        except ValueError:
            usable = False
        if not usable:
            raise InvalidInput(f"not a server's URL such as valkey://host:6379 or valkey://host:6379/0: {self.shown!r}")

    @property
    def shown(self) -> str:
        """The URL without what is secret in it."""
        scheme, slashes, rest = self.url.partition("://")
        return f"{scheme}{slashes}{rest.rpartition('@')[2]}"

    @property
    def database(self) -> int:
        """The number of the database."""
        return int(urlsplit(self.url).path.strip("/") or "0")

    def connection(self, name: str) -> AbstractConnection:
        """A connection, not made yet."""
        parts = urlsplit(self.url)
        options: dict[str, Any] = {
            "host": parts.hostname,
            "port": parts.port or 6379,
            "db": self.database,
            "username": unquote(parts.username) if parts.username else None,
            "password": unquote(parts.password) if parts.password else None,
            "client_name": f"agentrun-{name}",
            "socket_timeout": None,
            "socket_connect_timeout": self.connect_timeout,
            "socket_keepalive": True,
        }
        if parts.scheme not in ("valkeys", "rediss"):
            return Connection(**options)
        connection = SSLConnection(**options, ssl_check_hostname=True)
        if self.tls is not None:
            connection.ssl_context.context = self.tls
        return connection


class Wire(ABC):
    """One connection that comes back by itself: what `Link` and the subscriptions have in common.

    Args:
        options: Where and how to connect.
        name: How the server lists this connection.
    """

    def __init__(self, options: LinkOptions, name: str) -> None:
        self.options = options
        self.name = name
        self.last_error = ""
        self.connected = False
        self._out: list[bytes] = []
        self._filled = asyncio.Event()
        self._up = asyncio.Event()
        self._heard = 0.0
        self._refusal: Misconfigured | None = None

    # ------------------------------------------------------------------------------------------------ life

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Connect, and stay connected until cancelled.

        Raises:
            Unavailable: The first connection does not come about within ``connect_timeout``.
            Misconfigured: The server does not let us in.
        """
        started = False
        until = anyio.current_time() + self.options.connect_timeout
        delay = 0.05
        while True:
            connection = self.options.connection(self.name)
            try:
                with anyio.fail_after(self.options.connect_timeout):
                    await connection.connect()
            except (ValkeyError, OSError, TimeoutError) as error:
                with anyio.CancelScope(shield=True):
                    await _disconnect(connection)
                self._say(error, started)
                if not started and (_final(error) or anyio.current_time() + delay > until):
                    raise self._refused(error) from None
            else:
                await self._serve(connection, None if started else task_status)
                started, delay = True, 0.05
            # Spread, so that a fleet does not come back in step.
            await anyio.sleep(delay * random.uniform(0.6, 1.4))  # noqa: S311
            delay = min(delay * 2, BACKOFF)

    def _refused(self, error: Exception) -> Exception:
        if _final(error):
            return Misconfigured(f"{self.options.shown} does not let us in: {self.last_error}")
        return Unavailable(f"cannot reach {self.options.shown}: {self.last_error}; is the server running?")

    def _say(self, error: BaseException, started: bool) -> None:
        self.last_error = str(error) or type(error).__name__
        if started:
            log.log(logging.ERROR if _final(error) else logging.DEBUG, "connection %s: %s", self.name, self.last_error)

    async def _serve(self, connection: AbstractConnection, task_status: TaskStatus[None] | None) -> None:
        self._out.clear()
        self.last_error = ""
        self._heard = anyio.current_time()
        self.connected = True
        self._on_connected()
        self._up.set()
        if task_status is not None:
            task_status.started()
        try:
            async with anyio.create_task_group() as tasks:
                for part in (self._read, self._write, self._watch):
                    tasks.start_soon(self._until_lost, part, connection, tasks.cancel_scope)
        finally:
            self.connected = False
            self._up.clear()
            self._on_lost()
            with anyio.CancelScope(shield=True):
                await _disconnect(connection)
        if self._refusal is not None:
            raise self._refusal
        log.warning("connection %s to %s lost (%s), reconnecting", self.name, self.options.shown, self.last_error)

    async def _until_lost(
        self, part: Callable[[AbstractConnection], Awaitable[None]], connection: AbstractConnection, scope: Any
    ) -> None:
        try:
            await part(connection)
        except (ValkeyError, OSError) as error:
            self._say(error, started=True)
            scope.cancel()
        except Misconfigured as error:
            self._refusal = error
            scope.cancel()

    async def _read(self, connection: AbstractConnection) -> None:
        read = cast("Callable[..., Awaitable[_Reply]]", connection.read_response)
        while True:
            try:
                reply = await read(disable_decoding=True, disconnect_on_error=False)
            except ResponseError as error:
                reply = error
            self._heard = anyio.current_time()
            self._on_reply(reply)

    async def _write(self, connection: AbstractConnection) -> None:
        while True:
            await self._filled.wait()
            self._filled.clear()
            out, self._out = self._out, []
            if out:
                try:
                    await connection.send_packed_command(out, check_health=False)
                except RuntimeError as error:  # uvloop's, for a connection that was lost just now
                    raise OSError(str(error)) from None

    async def _watch(self, connection: AbstractConnection) -> None:
        while True:
            await anyio.sleep(PING / 2)
            now = anyio.current_time()
            since = self._owed_since()
            if since is not None and now - max(since, self._heard) > SILENCE:
                raise OSError(f"no answer for {SILENCE:g} s")
            if since is None and now - self._heard > PING / 2:
                self._ping()

    async def wait_connected(self) -> None:
        """Return once there is a connection."""
        await self._up.wait()

    @property
    def gone(self) -> str:
        """What to say when there is no connection."""
        because = f" ({self.last_error})" if self.last_error else ""
        return f"no connection to {self.options.shown}{because}"

    def _put(self, *words: str | bytes) -> None:
        self._out.append(_packed(words))
        self._filled.set()

    # ------------------------------------------------------------------------------- what the two do differently

    @abstractmethod
    def _on_connected(self) -> None: ...

    @abstractmethod
    def _on_lost(self) -> None: ...

    @abstractmethod
    def _on_reply(self, reply: _Reply) -> None: ...

    @abstractmethod
    def _owed_since(self) -> float | None:
        """Since when the server owes an answer."""

    @abstractmethod
    def _ping(self) -> None: ...


class Link(Wire):
    """A connection for commands.

    Args:
        options: Where and how to connect.
        name: How the server lists this connection.
        clock: Learns the server's time; None: nobody asks.
    """

    def __init__(self, options: LinkOptions, name: str, clock: ServerClock | None = None) -> None:
        super().__init__(options, name)
        self._clock = clock
        self._owed: deque[tuple[float, asyncio.Future[_Reply]]] = deque()
        self.on_connected: Callable[[], None] = lambda: None

    def _on_connected(self) -> None:
        self.on_connected()

    def _on_lost(self) -> None:
        owed, self._owed = self._owed, deque()
        for _, future in owed:
            if not future.done():
                future.set_exception(NotConnected(self.name))

    def _on_reply(self, reply: _Reply) -> None:
        _, future = self._owed.popleft()
        if isinstance(reply, NotPrimary):
            # A failover left this connection with what is a replica now.
            future.set_exception(NotSent(self.name)) if not future.done() else None
            raise reply
        if future.done():
            return
        if isinstance(reply, ResponseError):
            future.set_exception(reply)
        else:
            future.set_result(reply)

    def _owed_since(self) -> float | None:
        return self._owed[0][0] if self._owed else None

    def _ping(self) -> None:
        asked = anyio.current_time()

        def answered(future: asyncio.Future[_Reply]) -> None:
            if not future.cancelled() and future.exception() is None and self._clock is not None:
                seconds, micros = future.result()
                half = (anyio.current_time() - asked) / 2
                self._clock.set(int(seconds) + int(micros) / 1e6 + half)

        self.send("TIME").add_done_callback(answered)

    def send(self, *words: str | bytes) -> asyncio.Future[_Reply]:
        """Send a command; the future gets its reply, or `NotConnected`, or a ``ResponseError``.

        Raises:
            NotSent: There is no connection now.
        """
        if not self.connected:
            raise NotSent(self.name)
        loop = asyncio.get_running_loop()  # not anyio's: the caller may be a callback of another thread
        future: asyncio.Future[_Reply] = loop.create_future()
        self._owed.append((loop.time(), future))
        self._put(*words)
        return future

    async def call(self, *words: str | bytes) -> _Reply:
        """Send a command and return its reply.

        Raises:
            NotConnected: The connection was lost; `NotSent`: nothing was done.
            Misconfigured: The server refuses.
        """
        try:
            return await self.send(*words)
        except ResponseError as error:
            raise self.meaning(error) from None

    def evaluate(self, script: Script, key: str, args: Sequence[str | bytes]) -> asyncio.Future[_Reply]:
        """Send a script; as `send`. ``key`` is one of those it uses, all of which are in one slot."""
        return self.send("EVALSHA", script.sha, "1", key, *args)

    def meaning(self, error: ResponseError) -> Exception:
        """What an error that the server answered means to a caller."""
        text = str(error)
        if text.startswith(_TRANSIENT):
            self.last_error = text
            return NotSent(text)
        if text.startswith(("ASK", "TRYAGAIN")) or "non local key" in text:
            # A script that is broken off for that has not changed anything (see `foresee` there).
            self.last_error = "the partition is being moved to another node of the cluster"
            return NotSent(text)
        if text.startswith(("MOVED", "CROSSSLOT")):
            return Misconfigured(f"{self.options.shown} is one node of a cluster with several: {text}")
        if "OOM" in text or "maxmemory" in text:
            self.last_error = "the server is out of memory"
            return NotSent(text)
        return Misconfigured(f"{self.options.shown} refuses a command: {text}")


def _packed(words: Sequence[str | bytes]) -> bytes:
    """A command as it is sent; valkey-py's own takes ten times as long for one of many words."""
    out = [b"*%d\r\n" % len(words)]
    for word in words:
        data = word.encode() if isinstance(word, str) else word
        out.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(out)


def _final(error: BaseException) -> bool:
    """Whether trying again is of no use: wrong password, no such database, no rights, another protocol."""
    if isinstance(error, AuthenticationError | NoPermissionError):
        return True
    return isinstance(error, ResponseError) or "certificate" in str(error).lower()


async def _disconnect(connection: AbstractConnection) -> None:
    with anyio.move_on_after(1), suppress(ValkeyError, OSError, AttributeError):
        await connection.disconnect(nowait=True)
