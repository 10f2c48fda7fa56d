"""The native API: plain HTTP for every operation, events as SSE or as JSON with long-polling."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from agentrun.broker import BrokerAdmin
from agentrun.client import Turn
from agentrun.errors import AgentrunError
from agentrun.gateway import durable
from agentrun.gateway.hub import Closed, Item, Reading
from agentrun.gateway.operations import AnswerBody, CancelBody, Operations, SendBody, SteerBody, parse
from agentrun.gateway.problems import Problem, problem_of
from agentrun.gateway.rights import Principal
from agentrun.gateway.sse import EVENT_STREAM, Stream, Writer, deadline_of, pump, while_there
from agentrun.gateway.views import session_view, turn_view
from agentrun.reading import ends_of
from agentrun.wire import check_id

if TYPE_CHECKING:
    from agentrun.gateway.app import Gateway

__all__ = ["routes"]

Endpoint = Callable[[Request], Awaitable[Response | Stream]]

_MOST = 1000
"""Events in one JSON answer."""
_MOST_BYTES = 1 << 20
_LISTED = 100
_LOOKED_AT = 10
"""Sessions that are looked at for each one listed: the broker names them in no order."""


def routes(gateway: Gateway) -> list[BaseRoute]:
    """Return the routes of the native API."""
    api = _Api(gateway)
    session, turn = "/v1/sessions/{session}", "/v1/sessions/{session}/turns/{turn}"
    return [
        Route("/v1/sessions", api.sessions, methods=["GET"]),
        Route(session, api.state, methods=["GET"]),
        Route(session, api.delete, methods=["DELETE"]),
        Route(f"{session}/events", _patient(gateway, api.events), methods=["GET", "HEAD"]),
        Route(f"{session}/events", durable.read_only, methods=["PUT", "POST", "PATCH", "DELETE"]),
        Route(f"{session}/cancel", api.cancel, methods=["POST"]),
        Route(f"{session}/turns", api.send, methods=["POST"]),
        Route(turn, api.turn_state, methods=["GET"]),
        Route(f"{turn}/events", _patient(gateway, api.turn_events), methods=["GET"]),
        Route(f"{turn}/cancel", api.cancel, methods=["POST"]),
        Route(f"{turn}/steer", api.steer, methods=["POST"]),
        Route(f"{turn}/answer", api.answer, methods=["POST"]),
    ]


class _Api:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._do = Operations(gateway)

    # ------------------------------------------------------------------------------------------------ what changes

    async def send(self, request: Request) -> Response:
        principal = await self._authenticate(request)
        body = parse(await request.body(), SendBody)
        return _json(await self._do.send(principal, _session_of(request), body), 202)

    async def steer(self, request: Request) -> Response:
        principal = await self._authenticate(request)
        body = parse(await request.body(), SteerBody)
        return _json(await self._do.steer(principal, _session_of(request), _turn_of(request), body), 202)

    async def cancel(self, request: Request) -> Response:
        principal = await self._authenticate(request)
        body = parse(await request.body(), CancelBody, empty=True)
        turn = _turn_of(request) if "turn" in request.path_params else None
        return _json(await self._do.cancel(principal, _session_of(request), turn, body))

    async def answer(self, request: Request) -> Response:
        principal = await self._authenticate(request)
        body = parse(await request.body(), AnswerBody)
        return _json(await self._do.answer(principal, _session_of(request), _turn_of(request), body))

    async def delete(self, request: Request) -> Response:
        principal = await self._authenticate(request)
        await self._do.delete(principal, _session_of(request))
        return Response(status_code=204)

    # ------------------------------------------------------------------------------------------------ what is read

    async def sessions(self, request: Request) -> Response:
        principal = await self._authenticate(request)
        broker = self._gateway.client.broker
        if not self._gateway.settings.list_sessions or not isinstance(broker, BrokerAdmin):
            raise Problem(404, "not_listed", "this gateway lists no sessions")
        limit = _number(request, "limit", _LISTED, least=1, most=1000)
        names = [name for name in await broker.sessions(limit=_LOOKED_AT * limit) if principal.may("read", name)]
        ends = await ends_of(broker.log, names)
        newest = sorted(ends, key=lambda name: ends[name].time, reverse=True)[:limit]
        shown = [
            {"session": name, "offset": ends[name].offset, "time": ends[name].time, "busy": bool(ends[name].pending)}
            for name in newest
        ]
        return _json({"sessions": shown})

    async def state(self, request: Request) -> Response:
        principal = await self._authenticate(request)
        session = _session_of(request)
        principal.require("read", session)
        history = await self._do.session(session).history()
        return _json(session_view(session, history))

    async def turn_state(self, request: Request) -> Response:
        principal = await self._authenticate(request)
        session, turn = _session_of(request), _turn_of(request)
        principal.require("read", session)
        history = await self._do.session(session).history()
        if turn not in history.turns:
            raise Problem(404, "turn_not_found", f"session {session} has no turn {turn}")
        return _json({**turn_view(history.turns[turn]), "session": session, "through": history.offset})

    async def events(self, request: Request) -> Response | Stream:
        wants_stream = _wants_stream(request)
        principal = await self._authenticate(request, query=wants_stream)
        session = _session_of(request)
        principal.require("read", session)
        if durable.asked_for(request):
            return await durable.read(self._gateway, request, session, principal)
        after = _after(request)
        if wants_stream:
            return await self._stream(principal, session, after, resumed=after > 0)
        return await self._page(principal, request, session, after, resumed=after > 0)

    async def turn_events(self, request: Request) -> Response | Stream:
        wants_stream = _wants_stream(request)
        principal = await self._authenticate(request, query=wants_stream)
        session = _session_of(request)
        principal.require("read", session)
        turn = self._do.session(session).turn(_turn_of(request))
        view = await turn.view()
        seen = _after(request)
        after = max(seen, view.offset - 1)
        resumed = after == seen > 0
        if view.ended_at is not None and after >= view.ended_at:
            # An EventSource comes back when its stream ends, and stays away only after this.
            return Response(status_code=204) if wants_stream else _json({"offset": after, "events": [], "ended": True})
        if wants_stream:
            return await self._stream(principal, session, after, turn, resumed=resumed)
        return await self._page(principal, request, session, after, turn, resumed=resumed)

    async def _stream(
        self, principal: Principal, session: str, after: int, turn: Turn | None = None, *, resumed: bool
    ) -> Stream:
        settings = self._gateway.settings
        opened = AsyncExitStack()
        reading = await opened.enter_async_context(self._gateway.read(principal, session, after=after, resumed=resumed))
        picked = _Picked(turn)

        async def body(writer: Writer) -> None:
            await pump(
                writer,
                reading,
                settings=settings,
                deadline=deadline_of(principal, settings.stream_seconds),
                over=lambda: picked.ended,
                pick=None if turn is None else picked,
            )

        slow = self._gateway.hub.counts.slow
        return Stream(body, headers=EVENT_STREAM, settings=settings, slow=slow, opened=opened)

    async def _page(
        self,
        principal: Principal,
        request: Request,
        session: str,
        after: int,
        turn: Turn | None = None,
        *,
        resumed: bool,
    ) -> Response:
        wait = _number(request, "wait", 0, least=0, most=int(self._gateway.settings.long_poll))
        limit = _number(request, "limit", _MOST, least=1, most=_MOST)
        picked = _Picked(turn)
        found: list[bytes] = []
        async with self._gateway.read(principal, session, after=after, resumed=resumed) as reading:

            async def collect() -> int:
                return await _collect(reading, picked, found, wait=wait, limit=limit)

            offset = await while_there(request.receive, collect) or after
        ended = b',"ended":true' if picked.ended else b""
        return _json_bytes(b'{"offset":%d%s,"events":[%s]}' % (offset, ended, b",".join(found)))

    async def _authenticate(self, request: Request, *, query: bool = False) -> Principal:
        return await self._gateway.auth.authenticate(request, query=query)


class _Picked:
    """Picks the events of one turn, or all, and notices the turn's end."""

    def __init__(self, turn: Turn | None) -> None:
        self._turn = turn
        self.ended = False

    def __call__(self, item: Item) -> bool:
        if self._turn is None:
            return True
        if self.ended:
            return False
        self.ended = self._turn.ended_by(item.event)
        return self.ended or self._turn.concerns(item.event)


async def _collect(reading: Reading, picked: _Picked, found: list[bytes], *, wait: float, limit: int) -> int:
    """Add what there is, or the first that comes, to ``found``; return the offset to go on after."""
    end = time.monotonic() + wait
    size = 0
    offset = reading.offset
    while not picked.ended and len(found) < limit:
        left = end - time.monotonic() if not found else 0.0
        try:
            items = await reading.next(max(left, 0.0))
        except Closed:
            break
        for item in items:
            if picked.ended or len(found) >= limit or size > _MOST_BYTES:
                return offset
            offset = item.offset
            if picked(item):
                found.append(item.json)
                size += len(item.json)
        if not items and (found or left <= 0):
            break
    return offset


def _patient(gateway: Gateway, endpoint: Endpoint) -> Endpoint:
    """Let a stream that cannot be given now end instead: after an error status an EventSource never comes back."""

    async def patient(request: Request) -> Response | Stream:
        try:
            return await endpoint(request)
        except (Problem, AgentrunError) as error:
            problem = problem_of(error)
            heals = problem.status == 503 and problem.code not in ("not_open", "misconfigured")
            if not heals or not _wants_stream(request) or durable.asked_for(request):
                raise
            wait = max(round(gateway.settings.retry * 1000), 1000)
            said = f"retry: {wait}\n: {' '.join(problem.detail.split())}\n\n".encode()
            slow = gateway.hub.counts.slow
            return Stream(lambda writer: writer.write(said), headers=EVENT_STREAM, settings=gateway.settings, slow=slow)

    return patient


def _session_of(request: Request) -> str:
    return check_id("a session's id", request.path_params["session"])


def _turn_of(request: Request) -> str:
    return check_id("a turn's id", request.path_params["turn"])


def _wants_stream(request: Request) -> bool:
    return "text/event-stream" in request.headers.get("accept", "")


def _after(request: Request) -> int:
    """The offset to read behind: what an EventSource has seen wins over what its address says."""
    seen = request.headers.get("last-event-id")
    if seen:
        return _offset("Last-Event-ID", seen)
    return _offset("after", request.query_params.get("after", "0"))


def _offset(name: str, text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 15:
        return int(text)
    raise Problem(400, "bad_offset", f"{name} is the offset of the last event seen, 0 for none; not {text[:40]!r}")


def _number(request: Request, name: str, default: int, *, least: int, most: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if text.isascii() and text.isdigit() and len(text) <= 9 and least <= int(text) <= most:
        return int(text)
    raise Problem(400, "bad_parameter", f"{name} is a number from {least} to {most}, not {text[:40]!r}")


def _json(value: Any, status: int = 200) -> Response:
    return _json_bytes(msgspec.json.encode(value), status)


def _json_bytes(body: bytes, status: int = 200) -> Response:
    return Response(body, status, headers={"cache-control": "no-store"}, media_type="application/json")
