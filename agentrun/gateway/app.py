"""The gateway: an ASGI application on the client library."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Self

import anyio
import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from agentrun.broker import Broker, BrokerAdmin
from agentrun.client import Client, connect
from agentrun.errors import AgentrunError, BrokerError
from agentrun.gateway import ai_sdk, native, openapi, page, socket
from agentrun.gateway.auth import Auth
from agentrun.gateway.guard import guarded
from agentrun.gateway.hub import Hub, Reading
from agentrun.gateway.problems import Problem, problem_of
from agentrun.gateway.rights import Principal
from agentrun.gateway.telemetry import Observed
from agentrun.settings import GatewaySettings
from agentrun.telemetry import Telemetry, default
from agentrun.telemetry.names import Attr

__all__ = ["Gateway"]

_AGENT_KNOWN = 5.0
"""Seconds for which the broker's only agent is remembered."""


class Gateway:
    """Sessions of one broker, for any HTTP client. An ASGI application.

    By itself: ``uvicorn module:gateway``, or ``agentrun gateway``. Mounted in another application, which does not tell
    it when to begin and to end, it is opened by that one's lifespan::

        gateway = Gateway("nats://localhost:4222", auth=Auth(Keys.secret(…)), agent="support")
        app = FastAPI(lifespan=gateway.lifespan)
        app.mount("/agents", gateway)

    Args:
        broker: The broker's URL, or a connected client (closing it is up to whoever opened it).
        auth: Who may do what; ``Auth.insecure()`` for development on one machine.
        namespace: Which of the broker's agentrun installations.
        agent: To whom turns go whose sender names no agent; the same as ``settings.agent``. Default: the only one the
            broker has a queue for.
        settings: Times and limits.
        telemetry: Where it is told what this gateway does; default is the client's, or what is set for the process.

    Attributes:
        client: The client, once it is open.
        hub: The sessions that are watched.
    """

    def __init__(
        self,
        broker: str | Client,
        *,
        auth: Auth,
        namespace: str = "default",
        agent: str | None = None,
        settings: GatewaySettings | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        settings = settings or GatewaySettings()
        if agent is not None:
            settings = msgspec.structs.replace(settings, agent=agent)
        self.settings = settings
        self.auth = auth
        self._broker = broker
        self._telemetry = telemetry or (broker.telemetry if isinstance(broker, Client) else default())
        self._namespace = namespace
        self._client: Client | None = None
        self._hub: Hub | None = None
        self._opened: AsyncExitStack | None = None
        self._agent: str | None = None
        self._agent_until = 0.0
        self._app = self._build()

    # --------------------------------------------------------------------------------------------------- open, close

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            client = self._broker
            if not isinstance(client, Client):
                client = await stack.enter_async_context(
                    connect(client, namespace=self._namespace, telemetry=self._telemetry)
                )
            hub = Hub(client, self.settings, self._telemetry)
            stack.enter_context(self._telemetry.instruments.observing(hub.levels))
            group = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(group.cancel_scope.cancel)
            await group.start(hub.run)
            group.start_soon(self._expect_turns, client)
            await group.start(self.auth.run, client, hub.wake)
            stack.enter_context(_Signals(self.drain))
            stack.callback(hub.close)
            self._client, self._hub = client, hub
            self._opened = stack.pop_all()
        return self

    async def _expect_turns(self, client: Client) -> None:
        """Let the turns it will send be counted from 0 on, while anybody collects."""
        instruments = self._telemetry.instruments
        if not instruments.enabled:
            return
        named = self.settings.agent
        for agent in await _agents(client.broker) if named is None else [named]:
            instruments.expect("sends", {Attr.AGENT: agent})

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._opened is not None
        opened, self._opened = self._opened, None
        try:
            await opened.__aexit__(kind, error, trace)
        finally:
            self._hub = self._client = None

    @asynccontextmanager
    async def lifespan(self, app: Any = None) -> AsyncGenerator[None]:
        """Keep the gateway open; to be given to the application it is mounted in."""
        async with self:
            yield

    def drain(self) -> None:
        """End every stream cleanly; their clients resume, at another gateway or at this one's successor."""
        if self._hub is not None:
            self._hub.close()

    @asynccontextmanager
    async def read(
        self, principal: Principal, session: str, *, after: int = 0, resumed: bool = False
    ) -> AsyncGenerator[Reading]:
        """`Hub.read` for a principal: counted among its streams, and ended when its token is revoked."""

        def valid() -> bool:
            return self.auth.holds(principal)

        with self.auth.stream(principal):
            async with self.hub.read(session, after=after, resumed=resumed, valid=valid) as reading:
                yield reading

    @property
    def client(self) -> Client:
        """The client."""
        if self._client is None:
            raise self._not_open()
        return self._client

    @property
    def hub(self) -> Hub:
        """The sessions that are watched."""
        if self._hub is None:
            raise self._not_open()
        return self._hub

    async def default_agent(self) -> str | None:
        """To whom turns go whose sender names no agent: ``settings.agent``, else the broker's only one."""
        if self.settings.agent is not None:
            return self.settings.agent
        if time.monotonic() > self._agent_until:
            agents = await _agents(self.client.broker)
            self._agent = agents[0] if len(agents) == 1 else None
            self._agent_until = time.monotonic() + _AGENT_KNOWN
        return self._agent

    def _not_open(self) -> Problem:
        return Problem(503, "not_open", "the gateway is not open: mounted, it needs FastAPI(lifespan=gateway.lifespan)")

    @asynccontextmanager
    async def _open_for(self, app: Starlette) -> AsyncGenerator[None]:
        if self._opened is not None:
            yield
            return
        async with self:
            yield

    # ----------------------------------------------------------------------------------------------------- the app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, as ASGI has it."""
        await self._app(scope, receive, send)

    def _build(self) -> ASGIApp:
        routes: list[BaseRoute] = [
            Route("/healthz", self._health),
            Route("/readyz", self._ready),
            *openapi.routes(self),
            *native.routes(self),
            *socket.routes(self),
            *ai_sdk.routes(self),
        ]
        if self.settings.page:
            routes += page.routes(self)
        handlers: dict[Any, Callable[[Request, Exception], Response]] = {
            Problem: _on_error,
            AgentrunError: _on_error,
            HTTPException: _on_http,
            Exception: _on_error,  # which the server is told of as well, for its log
        }
        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._open_for)
        app.router.redirect_slashes = False
        return Observed(guarded(app, self.settings, self.auth), routes, self._telemetry)

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        hub = self.hub
        if hub.closing or hub.lost:
            raise Problem(503, "not_ready", "shutting down" if hub.closing else "the broker is away")
        return JSONResponse({"status": "ready", "watched": hub.watched})


async def _agents(broker: Broker) -> list[str]:
    """Return the agents that the broker has queues for; none if it is away, or this gateway may not look."""
    if isinstance(broker, BrokerAdmin):
        with suppress(BrokerError):
            return [queue.agent for queue in await broker.stats()]
    return []


def _on_error(request: Request, error: Exception) -> Response:
    return problem_of(error).response()


def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    codes = {404: "no_such_path", 405: "method_not_allowed"}
    code = codes.get(error.status_code, "http_error")
    return Problem(error.status_code, code, error.detail, headers=error.headers).response()


class _Signals:
    """While it is entered, SIGTERM and SIGINT also drain: a server stops only when all its responses have ended."""

    def __init__(self, drain: Callable[[], None]) -> None:
        self._drain = drain
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.getsignal(number)
            if not callable(before):
                continue  # nobody stops for it, so nobody waits for us

            def handle(
                received: int, frame: FrameType | None, before: Callable[[int, FrameType | None], Any] = before
            ) -> None:
                loop.call_soon_threadsafe(self._drain)
                before(received, frame)

            self._before[number] = before
            signal.signal(number, handle)

    def __exit__(self, *exc: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
