"""One connection to NATS: the only place that calls nats-py.

Two rules stand behind it. Nothing is buffered while the connection is down (``pending_size=-1``), so that nothing is
sent late; and nothing that a caller may cancel is awaited inside nats-py: `publish`, `subscribe` and `unsubscribe` do
not suspend with that setting, and replies come through futures of our own.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import logging
import random
import ssl
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, cast
from urllib.parse import urlsplit

import anyio
import msgspec
from anyio.lowlevel import checkpoint
from msgspec import Struct
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport
from nats.errors import ConnectionClosedError, ConnectionDrainingError, OutboundBufferLimitError
from nats.errors import Error as NatsError
from nats.protocol.command import hpub_cmd  # pyright: ignore[reportUnknownVariableType]

from agentrun.brokers.nats_layout import parse_headers
from agentrun.errors import InvalidInput, Misconfigured, Unavailable

__all__ = ["ApiError", "Link", "LinkOptions", "Msg", "NobodyThere", "NotConnected", "status"]

log = logging.getLogger("agentrun.nats")

PATIENCE = 15.0
"""Seconds a read or an API request is tried for: more than the election of a new leader takes."""
_NO_LEADER = 10008
"""How JetStream says that too few of its servers are there."""


class NotConnected(Exception):
    """There is no connection at the moment; nothing was sent."""


class NobodyThere(Unavailable):
    """The server is there, but nobody listens to what it was asked."""


class LinkOptions(Struct, frozen=True, kw_only=True):
    """How to connect."""

    url: str
    user_credentials: str | None = None
    tls: ssl.SSLContext | None = None
    connect_timeout: float = 5.0

    def __post_init__(self) -> None:
        for server in self.servers or [""]:
            try:
                parts = urlsplit(server if "://" in server else f"nats://{server}")
                usable = bool(parts.hostname) and parts.port != 0
            except ValueError:
                usable = False
            if not usable:
                raise InvalidInput(f"not a server's URL such as nats://host:4222: {self.shown!r}")

    @property
    def servers(self) -> list[str]:
        """The servers named in the URL, which may list several with commas."""
        return [part.strip() for part in self.url.split(",") if part.strip()]

    @property
    def shown(self) -> str:
        """The URL without what is secret in it."""
        return ",".join(_redact(server) for server in self.servers)


def _redact(url: str) -> str:
    scheme, slashes, rest = url.rpartition("://")
    return f"{scheme}{slashes}{rest.rpartition('@')[2]}"


_NOBODY = "nobody answers there (is JetStream on, the stream there?)"
_REFUSED = ("authorization violation", "user authentication")
"""How a server says that it does not know who connects, or no longer: to try again is of no use."""
_SWITCHED_OFF = (10039, 10076)
"""JetStream is not enabled, or not for this account."""


class ApiError(Struct, frozen=True):
    """An error as JetStream answers it."""

    code: int = 0
    err_code: int = 0
    description: str = ""

    def about(self, what: str) -> Unavailable | Misconfigured:
        """What it means for ``what``. That a cluster has no leader passes, say; that there is no stream does not."""
        passes = self.code == 503 and self.err_code not in _SWITCHED_OFF
        return (Unavailable if passes else Misconfigured)(f"{what}: {self.description}")


class _ApiReply(Struct, frozen=True):
    error: ApiError | None = None


_api_reply = msgspec.json.Decoder(_ApiReply)


def status(msg: Msg) -> str:
    """The status of a message that carries no data (``404``, ``503``, ``100`` …), else an empty string."""
    headers = msg.headers
    return headers.get("Status", "") if headers and not msg.data else ""


async def _public_publish_block(client: Client, subject: str, reply: str, block: bytes, body: bytes) -> None:
    lines = block.decode("ascii").split("\r\n")[1:-2]
    await client.publish(subject, body, reply, dict(line.split(": ", 1) for line in lines))


async def _quick_publish_block(client: Any, subject: str, reply: str, block: bytes, body: bytes) -> None:
    # What Client.publish does with headers, without checking and encoding each: 2 µs instead of 10.
    await client._send_command(hpub_cmd(subject, reply, block, body))
    if client._flush_queue.empty():
        await client._flush_pending()


_publish_block = (
    _quick_publish_block
    if all(hasattr(Client, name) for name in ("_send_command", "_flush_pending"))
    else _public_publish_block
)


class _Transport(TcpTransport):
    """Writes to a connection that was lost just now come to nothing, and the reading side finds out.

    So it is with asyncio, and nats-py counts on it. uvloop raises RuntimeError, and nats-py's reconnecting ends for
    good.
    """

    def write(self, payload: bytes) -> None:
        with suppress(RuntimeError):
            super().write(payload)

    def writelines(self, payload: list[bytes]) -> None:
        with suppress(RuntimeError):
            super().writelines(payload)

    def __bool__(self) -> bool:
        return True  # or nats-py would put one of its own in its place


class _Client(Client):
    def __init__(self, *, websocket: bool) -> None:
        super().__init__()
        if not websocket:
            self._transport = _Transport()

    # nats-py looks at each character of each header's name: half of all that a token costs its readers.
    @staticmethod
    def _parse_header_lines(raw: bytes) -> dict[str, str]:
        return parse_headers(raw)


class _Heard:
    """What nats-py takes for a future; it gives each message to it."""

    __slots__ = ("_callback",)

    def __init__(self, callback: Callable[[Msg], None]) -> None:
        self._callback = callback

    def cancelled(self) -> bool:
        return False

    def set_result(self, msg: Msg) -> None:
        try:
            self._callback(msg)
        except Exception:
            # Raised, it would end the connection.
            log.warning("a message on %s cannot be used", msg.subject, exc_info=True)


class Link:
    """A connection with one reply inbox.

    Args:
        options: Where and how to connect.
        name: How the server lists this connection.
    """

    def __init__(self, options: LinkOptions, name: str) -> None:
        self.options = options
        self.name = name
        self.client: Client = _Client(websocket=options.url.startswith("ws"))
        self.on_reconnect: set[Callable[[], None]] = set()
        self.on_closed: Callable[[str], None] = lambda _reason: None
        self.on_nobody: Callable[[], None] = lambda: None
        """Called when a request that may be repeated finds nobody to answer it."""
        self.last_error = ""
        self._closing = False
        self._begun = False
        self._opened = False
        self._opening: anyio.CancelScope | None = None
        self._refused = 0
        self._slots: dict[str, Callable[[Msg | None], None]] = {}
        self._tokens = itertools.count()
        self._inbox = ""

    # ------------------------------------------------------------------------------------------------ life

    async def open(self) -> None:
        """Connect.

        Raises:
            Unavailable: It did not work within ``connect_timeout``; that all servers refuse who we are is told at once.
        """
        if importlib.util.find_spec("fast_mail_parser"):
            raise Misconfigured("fast-mail-parser changes how nats-py reads headers: uninstall it")
        done = False
        self._begun = True
        try:
            with anyio.move_on_after(self.options.connect_timeout) as self._opening:
                await self._connect()
                done = True
        except (NatsError, OSError, ValueError) as error:
            await self._on_error(error)
        finally:
            if not done:
                await self.close()
        if not done:
            if self._all_refuse:
                raise Unavailable(f"{self.options.shown} refuses this connection: {self.last_error}")
            raise Unavailable(
                f"cannot reach {self.options.shown}: {self.last_error or 'no answer'}; "
                "is the server running? `agentrun dev` starts one"
            )
        self._opened = True
        self._inbox = self.client.new_inbox()
        await self.listen(f"{self._inbox}.*", self._on_reply)

    async def _connect(self) -> None:
        await self.client.connect(
            servers=self.options.servers,
            name=f"agentrun {self.name}",
            tls=self.options.tls,
            user_credentials=self.options.user_credentials,
            connect_timeout=2,
            # Spread, so that a fleet does not come back in step. It is annotated as int, and slept for as it is.
            reconnect_time_wait=cast("int", random.uniform(0.15, 0.4)),  # noqa: S311
            max_reconnect_attempts=-1,
            ping_interval=2,
            max_outstanding_pings=2,
            pending_size=-1,
            skip_subject_validation=True,
            error_cb=self._on_error,
            disconnected_cb=self._on_disconnected,
            reconnected_cb=self._on_reconnected,
            closed_cb=self._on_closed,
        )

    @property
    def _all_refuse(self) -> bool:
        # They are asked by turns; one that cannot be reached may be away while another says what is wrong.
        return self._refused >= len(self.options.servers)

    async def close(self) -> None:
        """Close the connection; what was published is sent first."""
        self._closing = True
        if self._begun:
            # nats-py asserts that what is closed has got as far as connecting.
            with anyio.move_on_after(2, shield=True), suppress(AssertionError):
                await self.client.close()
        self._forget()

    @property
    def connected(self) -> bool:
        """Whether there is a connection now."""
        return self.client.is_connected

    async def _on_error(self, error: Exception) -> None:
        text = str(error) or type(error).__name__
        if not isinstance(error, OSError) or not self.last_error:
            # "Connection reset" must not hide the refusal that came before it.
            self.last_error = text
        if not self._opened and any(words in text.lower() for words in _REFUSED):
            self._refused += 1
            if self._all_refuse and self._opening is not None:
                self._opening.cancel()  # nats-py would try again until the time is up
        half_open = getattr(self.client, "_transport", None)
        if (self._opened or self._all_refuse) and not self.client.is_connected and half_open:
            # A connect that failed in its handshake leaves its socket to the garbage collector.
            half_open.close()
        if self._opened and not self._closing:
            # A server that is away is told once, by _on_disconnected.
            quiet = isinstance(error, OSError) or not self.client.is_connected
            log.log(logging.DEBUG if quiet else logging.WARNING, "connection %s: %s", self.name, text)

    async def _on_disconnected(self) -> None:
        if self._opened and not self._closing:
            log.warning("connection %s to %s lost, reconnecting", self.name, self.options.shown)
        self._forget()

    async def _on_reconnected(self) -> None:
        self.last_error = ""
        log.info("connection %s to %s is back", self.name, self.options.shown)
        for call in tuple(self.on_reconnect):
            call()

    async def _on_closed(self) -> None:
        if self._opened and not self._closing:
            reason = f"{self.options.shown} closed connection {self.name} for good: {self.last_error or 'no reason'}"
            log.error("%s", reason)
            self.on_closed(reason)

    def _forget(self) -> None:
        # Whoever waits for a reply learns at once that it will not come this way.
        for call in tuple(self._slots.values()):
            call(None)

    # ----------------------------------------------------------------------------------------- primitives

    async def publish(self, subject: str, body: bytes = b"", *, reply: str = "", block: bytes = b"") -> None:
        """Send a message; does not suspend. ``block`` is its header block, with the version line and the empty line.

        Raises:
            NotConnected: There is no connection now.
        """
        if block:
            if not self.client.is_connected:
                raise NotConnected(self.name)
            await _publish_block(self.client, subject, reply, block, body)
            return
        try:
            await self.client.publish(subject, body, reply)
        except (OutboundBufferLimitError, ConnectionClosedError, ConnectionDrainingError):
            raise NotConnected(self.name) from None

    async def subscribe(self, subject: str, callback: Callable[[Msg], Awaitable[None]]) -> Subscription:
        """Have ``callback`` called for messages on the subject, one after the other; it must not take long."""
        try:
            return await self.client.subscribe(subject, cb=callback)  # pyright: ignore[reportUnknownMemberType]
        except ConnectionClosedError:
            raise Unavailable(self.gone) from None

    async def listen(self, subject: str, callback: Callable[[Msg], None]) -> Subscription:
        """Have ``callback`` called for messages on the subject, where they are read from the connection: at once.

        It must not take long. `subscribe` has a queue and a task for each subscription, this has neither.
        """
        client = cast("Any", self.client)
        try:
            subscription = await client.subscribe(subject, future=_Heard(callback))
        except ConnectionClosedError:
            raise Unavailable(self.gone) from None
        subscription._pending_queue = None  # 3 kB that nobody uses
        return subscription

    async def unsubscribe(self, subscription: Subscription) -> None:
        """End a subscription; does not suspend."""
        try:
            await subscription.unsubscribe()
        except (ConnectionClosedError, ConnectionDrainingError):
            return

    async def drain(self, subscription: Subscription) -> None:
        """End a subscription once what the server was already sending has been handled; takes at most 2 s."""
        with anyio.move_on_after(2):
            if self.connected:
                with suppress(NatsError):
                    await subscription.drain()

    @property
    def gone(self) -> str:
        """What to say when there is no connection."""
        because = f" ({self.last_error})" if self.last_error else ""
        return f"no connection to {self.options.shown}{because}"

    # ------------------------------------------------------------------------------------- requests, replies

    def _on_reply(self, msg: Msg) -> None:
        slot = self._slots.get(msg.subject[len(self._inbox) + 1 :])
        if slot is not None:
            slot(msg)

    async def exchange(self, subject: str, body: bytes, *, timeout: float, block: bytes = b"") -> Msg | None:
        """Send a request and return its reply, or None when none came in time or the connection was lost.

        Raises:
            NotConnected: Nothing was sent.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Msg | None] = loop.create_future()

        def settle(msg: Msg | None) -> None:
            if not future.done():
                future.set_result(msg)

        token = f"{next(self._tokens):x}"
        self._slots[token] = settle
        timer = loop.call_later(timeout, settle, None)
        try:
            await self.publish(subject, body, reply=f"{self._inbox}.{token}", block=block)
            return await future
        finally:
            timer.cancel()
            del self._slots[token]

    async def collect(self, subject: str, body: bytes, *, timeout: float) -> tuple[list[Msg], Msg | None]:
        """Send a request and return all replies up to one with a status, and that one; None: it did not come.

        Raises:
            NotConnected: Nothing was sent.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Msg | None] = loop.create_future()
        replies: list[Msg] = []

        def add(msg: Msg | None) -> None:
            if msg is not None and not status(msg):
                replies.append(msg)
            elif not future.done():
                future.set_result(msg)

        token = f"{next(self._tokens):x}"
        self._slots[token] = add
        timer = loop.call_later(timeout, add, None)
        try:
            await self.publish(subject, body, reply=f"{self._inbox}.{token}")
            return replies, await future
        finally:
            timer.cancel()
            del self._slots[token]

    async def ask(self, subject: str, body: bytes, *, patience: float = PATIENCE) -> Msg:
        """Send a request that may be repeated and return its reply, trying for ``patience`` seconds.

        Raises:
            NobodyThere: Nobody listens.
            Unavailable: No answer came.
        """
        pause = 0.02
        why, error = "", Unavailable
        with anyio.move_on_after(patience):
            while True:
                try:
                    msg = await self.exchange(subject, body, timeout=min(2.0, patience))
                except NotConnected:
                    if self.client.is_closed:
                        break
                    msg, why, error = None, self.gone, Unavailable
                else:
                    why, error = "no answer", Unavailable
                if msg is not None and status(msg) != "503":
                    return msg
                if msg is not None:
                    why, error = _NOBODY, NobodyThere
                    self.on_nobody()
                await anyio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
                pause = min(pause * 2, 0.25)
        raise error(f"{subject} at {self.options.shown}: {why or self.gone}")

    async def api(self, call: str, request: object = None, *, patience: float = PATIENCE) -> bytes | ApiError:
        """Make a JetStream API request; returns the reply, or the error in it.

        Raises:
            NobodyThere: Nobody listens.
            Unavailable: No answer came, or the cluster had no leader for `PATIENCE` seconds.
        """
        body = b"" if request is None else msgspec.json.encode(request)
        until = time.monotonic() + PATIENCE
        while True:
            msg = await self.ask(f"$JS.API.{call}", body, patience=patience)
            error = _api_reply.decode(msg.data).error
            if error is None or error.err_code != _NO_LEADER:
                return error or msg.data
            if time.monotonic() > until:
                raise Unavailable(
                    f"JetStream at {self.options.shown} cannot work, {error.description}: do most of its servers run?"
                )
            await anyio.sleep(0.25)

    async def sync(self, *, timeout: float = 5.0) -> None:
        """Wait until the server has seen everything sent before on this connection.

        Raises:
            Unavailable: It did not within ``timeout``.
        """
        echo = f"{self._inbox}.sync{next(self._tokens):x}"
        seen = anyio.Event()
        token = echo[len(self._inbox) + 1 :]
        self._slots[token] = lambda _msg: seen.set()
        try:
            with anyio.move_on_after(timeout):
                try:
                    await self.publish(echo)
                except NotConnected:
                    raise Unavailable(self.gone) from None
                await seen.wait()
                if self.connected:
                    return
        finally:
            del self._slots[token]
        await checkpoint()
        raise Unavailable(self.gone)
