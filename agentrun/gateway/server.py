"""A gateway as a process: uvicorn, set up for streams."""

from __future__ import annotations

import errno
import logging
import signal
import socket
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import uvicorn
from anyio.abc import TaskStatus
from opentelemetry import context
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentrun.gateway.telemetry import context_of

__all__ = ["bind", "serve", "serving"]

log = logging.getLogger("agentrun.access")

_GRACE = 10
"""Seconds responses get to end after SIGTERM; streams need none of them."""
_LAST_WORD = 1.0
"""Seconds WebSockets get to say where they stopped, before the server closes them without a word."""
_BACKLOG = 2048
_MESSAGE = 16 << 20
_PING = 20.0


def bind(host: str, port: int, *, send_timeout: float) -> list[socket.socket]:
    """Return listening sockets for a host and port; port 0 is a free one.

    The system is told to give up on a client that takes nothing for ``send_timeout`` seconds: without that, what was
    written for it would be kept for as long as it cares to hold the connection.

    Raises:
        OSError: The address cannot be used.
    """
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    try:
        for family, kind, proto, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            if sockets and port == 0:
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            try:
                sockets.append(_listener(family, kind, proto, address, send_timeout))
            except OSError as error:
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
                absent = error  # such as ::1, one of two addresses of localhost, where there is no IPv6
        if absent is not None and not sockets:
            raise absent
    except BaseException:
        for listener in sockets:
            listener.close()
        raise
    return sockets


def _listener(family: int, kind: int, proto: int, address: tuple[Any, ...], send_timeout: float) -> socket.socket:
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(send_timeout * 1000))
        listener.bind(address)
        listener.listen(_BACKLOG)  # whoever is told the address may connect at once
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


async def serve(
    app: ASGIApp, sockets: list[socket.socket], *, drain: Callable[[], None], max_message: int = _MESSAGE
) -> None:
    """Serve until SIGTERM or SIGINT: then ``drain`` is called, and what is under way may end.

    A second signal breaks off what has not. A WebSocket's message has ``max_message`` bytes at most.
    """
    websockets = _WebSockets(app)
    server = _server(websockets, max_message)

    async def stop(*, task_status: TaskStatus[None]) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
            task_status.started()
            async for _ in received:
                server.force_exit = server.should_exit
                drain()
                await websockets.ended()
                server.should_exit = True

    async with anyio.create_task_group() as group:
        await group.start(stop)
        await _run(server, sockets)
        group.cancel_scope.cancel()


async def _run(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
    # Without its signal handlers: they end no streams, and when all is done they let the signal kill the process.
    await server._serve(sockets)  # pyright: ignore[reportPrivateUsage]


@asynccontextmanager
async def serving(
    app: ASGIApp, *, host: str = "127.0.0.1", port: int = 0, drain: Callable[[], None] | None = None
) -> AsyncGenerator[str]:
    """Serve while the context is open, and give the address; for tests and notebooks. ``drain``: see `serve`."""
    sockets = bind(host, port, send_timeout=30.0)
    port = sockets[0].getsockname()[1]
    websockets = _WebSockets(app)
    server = _server(websockets)
    async with anyio.create_task_group() as group:
        group.start_soon(_run, server, sockets)
        with anyio.fail_after(30):
            while not server.started and not server.should_exit:  # noqa: ASYNC110 - it has no event
                await anyio.sleep(0.005)
        try:
            yield f"http://{host}:{port}"
        finally:
            if drain is not None:
                drain()
                with anyio.CancelScope(shield=True):
                    await websockets.ended()
            server.should_exit = True


class _WebSockets:
    """Counts the WebSockets that are open."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "websocket":
            await self._app(scope, receive, send)
            return
        self._open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= 1

    async def ended(self) -> None:
        """Wait until none is open, but not for long: one that reads nothing is not told by itself."""
        with anyio.move_on_after(_LAST_WORD):
            while self._open:  # noqa: ASYNC110 - for a moment, when all ends
                await anyio.sleep(0.01)


class _OnPurpose(logging.Filter):
    """Keeps quiet about responses without an end: that is how a stream is broken off (see `sse.Stream`)."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.msg != "ASGI callable returned without completing response."


_on_purpose = _OnPurpose()


def _server(app: ASGIApp, max_message: int = _MESSAGE) -> uvicorn.Server:
    logging.getLogger("uvicorn.error").addFilter(_on_purpose)
    return uvicorn.Server(
        uvicorn.Config(
            _logged(app),
            log_config=None,
            # At DEBUG it would log what comes over WebSockets, tokens above all.
            log_level=max(logging.INFO, logging.getLogger("uvicorn.error").getEffectiveLevel()),
            access_log=False,  # it would log tokens in addresses
            server_header=False,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=_GRACE,
            ws="websockets-sansio",
            ws_max_size=max_message,
            ws_ping_interval=_PING,
            ws_ping_timeout=_PING,
            lifespan="on",
        )
    )


def _logged(app: ASGIApp) -> ASGIApp:
    """Log each request when it has ended: the path without its query, which may hold a token."""

    async def logged(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not log.isEnabledFor(logging.INFO):
            await app(scope, receive, send)
            return
        began = time.monotonic()
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await app(scope, receive, noting)
        finally:
            took = time.monotonic() - began
            token = context.attach(context_of(scope))
            log.info("%s %r %d %.3f s", scope["method"], scope["path"], status, took)
            context.detach(token)

    return logged
