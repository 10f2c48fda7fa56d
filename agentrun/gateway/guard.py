"""What stands before every route: whose pages may ask, how much they may send, and what browsers are told."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentrun.errors import InvalidInput
from agentrun.gateway.auth import Auth, take_query_token
from agentrun.gateway.jwks import is_loopback
from agentrun.gateway.problems import Problem
from agentrun.settings import GatewaySettings

__all__ = ["guarded"]

_EXPOSED = (
    "ETag",
    "Retry-After",
    "Stream-Closed",
    "Stream-Cursor",
    "Stream-Next-Offset",
    "Stream-Up-To-Date",
    "WWW-Authenticate",
    "x-vercel-ai-ui-message-stream",
    "x-workflow-run-id",
    "x-workflow-stream-tail-index",
)
_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "POST")
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
)
"""Of every response that does not say otherwise. The third keeps other sites' pages from embedding what they cannot
read; it does not concern the origins that are allowed, which ask by CORS."""
_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}
_TOO_BIG = 1009


def guarded(app: ASGIApp, settings: GatewaySettings, auth: Auth) -> ASGIApp:
    """Put the guard before an application, and hold ``auth`` to the limits of the settings.

    Refused, before a route is looked for: headers of more than ``max_header`` bytes (431); an ``Origin`` that is
    neither the gateway's own nor in ``origins`` (403), for WebSockets as well; without tokens, a ``Host`` that is not
    loopback (403), so that no web site gets in by pointing its name there. While the body is read: more than
    ``max_body`` bytes (413; a WebSocket is closed with 1009).

    Raises:
        InvalidInput: An origin is none; or all origins are allowed where no token is needed.
    """
    for origin in settings.origins:
        _check_origin(origin, auth)
    auth.limit(settings)
    inner: ASGIApp = _Limits(app, settings.max_body)
    if settings.origins:
        inner = CORSMiddleware(
            inner,
            allow_origins=settings.origins,
            allow_methods=_METHODS,
            allow_headers=("*",),  # tokens are never sent by a browser by itself, so headers give nothing away
            expose_headers=_EXPOSED,
        )
    return _Guard(inner, settings, auth)


def _check_origin(origin: str, auth: Auth) -> None:
    if origin == "*":
        if not auth.needs_token:
            raise InvalidInput("without tokens not every origin can be allowed: any web site could use this gateway")
        return
    parts = urlsplit(origin)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or origin != f"{parts.scheme}://{parts.netloc}".lower()
    ):
        raise InvalidInput(
            f"an origin is scheme://host or scheme://host:port, such as https://app.example; not {origin!r}"
        )


class _Guard:
    def __init__(self, app: ASGIApp, settings: GatewaySettings, auth: Auth) -> None:
        self._app = app
        self._max_header = settings.max_header
        self._origins = frozenset(settings.origins)
        self._auth = auth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except Problem as problem:
            await _refuse(problem, scope, receive, send)
            return
        take_query_token(scope)
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        size += len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
        if size > self._max_header:
            raise Problem(
                431, "headers_too_large", f"address and headers have {size} bytes, at most {self._max_header}"
            )
        headers = Headers(scope=scope)
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if not self._auth.needs_token and not (len(hosts) == 1 and is_loopback(_split(hosts[0])[0])):
            raise Problem(
                403,
                "host_refused",
                "without tokens this gateway answers on this machine alone, as localhost or 127.0.0.1",
            )
        for origin in origins:
            if "*" not in self._origins and origin not in self._origins and not _is_own(origin, hosts):
                raise Problem(
                    403,
                    "origin_refused",
                    "pages of this origin may not use the gateway, unless it is named with --origin",
                )


def _is_own(origin: str, hosts: Iterable[str]) -> bool:
    """Whether a page of this origin came from here. A proxy may have taken TLS away: the scheme only says the port."""
    try:
        parts = urlsplit(origin)
        own = parts.hostname, parts.port or _PORTS.get(parts.scheme)
        return any((name, port or _PORTS.get(parts.scheme)) == own for name, port in map(_split, hosts))
    except ValueError:
        return False


def _split(host: str) -> tuple[str, int | None]:
    parts = urlsplit(f"//{host}")
    try:
        return parts.hostname or "", parts.port
    except ValueError:
        return "", None


class _Limits:
    """Counts what is received, and completes what is sent."""

    def __init__(self, app: ASGIApp, max_body: int) -> None:
        self._app = app
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._app(scope, self._messages(receive, send), send)
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        size = 0
        started = False

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size <= self._max_body:
                return message
            if started:
                return {"type": "http.disconnect"}
            raise self._too_large()

        async def complete(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = headers = list(message.get("headers", ()))
                present = {bytes(name).lower() for name, _ in headers}
                headers += [header for header in _HEADERS if header[0] not in present]
            await send(message)

        try:
            length = Headers(scope=scope).get("content-length", "")
            if length.isascii() and length.isdigit() and int(length[:20]) > self._max_body:
                raise self._too_large()
            await self._app(scope, counted, complete)
        except Problem as problem:
            if started:
                raise
            await _refuse(problem, scope, receive, complete)

    def _messages(self, receive: Receive, send: Send) -> Receive:
        async def checked() -> Message:
            message = await receive()
            text: str | None = message.get("text")
            size = len(message.get("bytes") or b"") if text is None else len(text.encode())
            if size <= self._max_body:
                return message
            await send({"type": "websocket.close", "code": _TOO_BIG, "reason": f"at most {self._max_body} bytes"})
            return {"type": "websocket.disconnect", "code": _TOO_BIG}

        return checked

    def _too_large(self) -> Problem:
        # The rest of the body is not read, so the connection cannot be used again.
        detail = f"the body may have {self._max_body} bytes at most"
        return Problem(413, "too_large", detail, headers={"Connection": "close"})


async def _refuse(problem: Problem, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http" or "websocket.http.response" in scope.get("extensions", {}):
        await problem.response()(scope, receive, send)
    else:
        await send({"type": "websocket.close", "code": 4000 + problem.status, "reason": problem.detail[:120]})
