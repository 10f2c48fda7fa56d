"""The web page: files without a build step, served with what keeps a page's scripts its own."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from contextlib import suppress
from importlib import resources
from typing import TYPE_CHECKING

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from agentrun.broker import BrokerAdmin
from agentrun.errors import BrokerError

if TYPE_CHECKING:
    from agentrun.gateway.app import Gateway

__all__ = ["routes"]

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": _CSP,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    # Asked again each time, and answered with 304: after an update no old module meets a new one.
    "cache-control": "no-cache",
}


def routes(gateway: Gateway) -> list[BaseRoute]:
    """Return the page's routes: ``/``, and its files below ``/page``."""
    files = {file.name: file.read_bytes() for file in (resources.files("agentrun.gateway") / "static").iterdir()}

    async def config(request: Request) -> Response:
        body = msgspec.json.encode(await _config(gateway))
        return Response(body, headers=_HEADERS | {"cache-control": "no-store"}, media_type="application/json")

    return [
        Route("/", _serve("index.html", files.pop("index.html")), methods=["GET"]),
        Route("/page/config.json", config, methods=["GET"]),
        *(Route(f"/page/{name}", _serve(name, body), methods=["GET"]) for name, body in files.items()),
    ]


def _serve(name: str, body: bytes) -> Callable[[Request], Awaitable[Response]]:
    """Serve a file from memory."""
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = _HEADERS | {"content-type": _TYPES[name[name.rindex(".") :]], "etag": etag}

    async def serve(request: Request) -> Response:
        if etag in request.headers.get("if-none-match", ""):
            # With all headers: a browser takes those of a 304 for the ones it kept.
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers)

    return serve


async def _config(gateway: Gateway) -> dict[str, object]:
    """What the page is to know before anybody has shown a token."""
    needs_token = gateway.auth.needs_token
    agents: list[str] = []
    broker = gateway.client.broker
    if not needs_token and isinstance(broker, BrokerAdmin):
        with suppress(BrokerError):  # it is away, or this gateway may not look
            agents = sorted(queue.agent for queue in await broker.stats())
    agent = gateway.settings.agent if needs_token else await gateway.default_agent()
    return {"agent": agent, "agents": agents, "token": needs_token}
