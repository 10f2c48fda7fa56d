"""Reading a session by the Durable Streams protocol: a stream is a URL, read from an offset on.

A session is a JSON stream of the items that the native API gives. It is never closed, and one that has not begun is an
empty stream, so that a reader may come before the first turn. Streams are written only by sending turns: PUT, POST and
DELETE on the stream are refused.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Literal

from starlette.requests import Request
from starlette.responses import Response

from agentrun.errors import AgentrunError
from agentrun.gateway.hub import Closed, Item, Reading
from agentrun.gateway.problems import Problem
from agentrun.gateway.rights import Principal
from agentrun.gateway.sse import EVENT_STREAM, KEEP_ALIVE, Broken, Stream, Writer, deadline_of, while_there
from agentrun.wire import Gap, Snapshot

if TYPE_CHECKING:
    from agentrun.gateway.app import Gateway

__all__ = ["asked_for", "read", "read_only"]

_START, _NOW = "-1", "now"
_EPOCH = 1728432000  # 2024-10-09T00:00:00Z, from which the protocol counts its intervals
_INTERVAL = 20
_JITTER = 3600 // _INTERVAL
_WAIT = 25.0
"""Seconds a long poll waits: under the 30 after which the strictest proxies give up."""
_MOST = 1000
_MOST_BYTES = 1 << 20
"""Up to here an answer is put together in memory; beyond, it is written as it is read."""
_NO_STORE = {"cache-control": "no-store"}
_CACHED = {"cache-control": "private, max-age=60", "vary": "Authorization"}

Live = Literal["long-poll", "sse"]


def asked_for(request: Request) -> bool:
    """Return whether a request to a session's events speaks this protocol."""
    return request.method == "HEAD" or not request.query_params.keys().isdisjoint(("offset", "live"))


async def read_only(request: Request) -> Response:
    """Refuse to write the stream."""
    raise Problem(
        405,
        "read_only",
        f"{request.method} is not for a session's events: send a turn to …/turns, delete the session itself",
        headers={"Allow": "GET, HEAD"},
    )


async def read(gateway: Gateway, request: Request, session: str, principal: Principal) -> Response | Stream:
    """Answer a read; that ``principal`` may read ``session`` is up to the caller.

    Raises:
        Problem: 400 for parameters that cannot be used, 503 while the gateway shuts down.
        SessionGone: The offset lies beyond the session's end: it was deleted since.
        Unavailable: The broker is away.
    """
    if request.method == "HEAD":
        tail = await gateway.hub.tail(session)
        response = Response(headers={**_headers(tail.offset), **_NO_STORE}, media_type="application/json")
        del response.headers["content-length"]  # that of a GET is another
        return response
    live = _live(request)
    cursor = _Cursor(_parameter(request, "cursor"))
    text = _start(request, live)
    after = (await gateway.hub.tail(session)).offset if text == _NOW else 0 if text == _START else int(text)
    resumed = after > 0 and text != _NOW
    if live == "sse":
        return await _sse(gateway, session, principal, after, cursor, resumed=resumed)
    if live == "long-poll":
        return await _long_poll(gateway, request, session, principal, after, cursor, resumed=resumed)
    if text == _NOW:
        return Response(b"[]", headers={**_headers(after), **_NO_STORE}, media_type="application/json")
    return await _catch_up(gateway, request, session, principal, after, resumed=resumed)


# ------------------------------------------------------------------------------------------------- what a request says


def _parameter(request: Request, name: str) -> str | None:
    values = request.query_params.getlist(name)
    if len(values) > 1:
        raise Problem(400, "bad_parameter", f"{name} is given {len(values)} times")
    return values[0] if values else None


def _live(request: Request) -> Live | None:
    live = _parameter(request, "live")
    if live is None or live == "long-poll" or live == "sse":
        return live
    raise Problem(400, "bad_parameter", f"live is long-poll or sse, not {live[:40]!r}")


def _start(request: Request, live: Live | None) -> str:
    """The offset asked for; for SSE, what an EventSource has seen wins over what its address says."""
    text = _parameter(request, "offset")
    if text is None:
        raise Problem(400, "bad_offset", f"live={live} needs an offset: -1 for the start, now for the end")
    if live == "sse":
        text = request.headers.get("last-event-id") or text
    if text in (_START, _NOW) or (text.isascii() and text.isdigit() and len(text) <= 16):
        return text
    raise Problem(400, "bad_offset", f"offset is a Stream-Next-Offset, -1 for the start or now, not {text[:40]!r}")


class _Cursor:
    """Tells one interval of reading from the next, so that a cache between does not answer a client from its past."""

    def __init__(self, sent: str | None) -> None:
        if sent is not None and not (sent.isascii() and sent.isdigit() and len(sent) <= 15):
            raise Problem(400, "bad_parameter", f"cursor is a Stream-Cursor, not {sent[:40]!r}")
        self._least = 0
        if sent is not None and int(sent) >= self.value:
            self._least = int(sent) + random.randint(1, _JITTER)  # noqa: S311

    @property
    def value(self) -> int:
        return max(self._least, int(time.time() - _EPOCH) // _INTERVAL)


# ------------------------------------------------------------------------------------------------------ what is written


def _wire(offset: int) -> str:
    return f"{offset:016}"


def _headers(offset: int, *, up_to_date: bool = True) -> dict[str, str]:
    headers = {"stream-next-offset": _wire(offset)}
    if up_to_date:
        headers["stream-up-to-date"] = "true"
    return headers


def _joined(items: Sequence[Item]) -> bytes:
    return b",".join([item.json for item in items])


def _closing() -> Problem:
    return Problem(503, "closing", "the gateway is shutting down or too busy: ask again")


async def _gather(reading: Reading, wait: float) -> tuple[list[Item], bool]:
    """Return what is stored, or the first that comes within ``wait`` seconds, and whether that is all there is."""
    found: list[Item] = []
    size = 0
    while len(found) < _MOST and size < _MOST_BYTES:
        try:
            items = await reading.next(0.0 if found else wait)
        except Closed as closed:
            if found:
                return found, False
            if closed.reason == "revoked":
                challenge = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
                raise Problem(
                    401, "invalid_token", "the token has expired or been revoked", headers=challenge
                ) from None
            raise _closing() from None
        if not items:
            return found, True
        found += items
        size += sum(len(item.json) for item in items)
    return found, reading.at_end


async def _long_poll(
    gateway: Gateway,
    request: Request,
    session: str,
    principal: Principal,
    after: int,
    cursor: _Cursor,
    *,
    resumed: bool,
) -> Response:
    wait = min(_WAIT, gateway.settings.long_poll)
    if principal.expires is not None:
        wait = min(wait, max(principal.expires - time.time(), 0.0))
    async with gateway.read(principal, session, after=after, resumed=resumed) as reading:
        gathered = await while_there(request.receive, functools.partial(_gather, reading, wait))
    found, up_to_date = gathered or ([], False)  # nobody is there for it
    headers = _headers(found[-1].offset if found else after, up_to_date=up_to_date)
    headers["stream-cursor"] = str(cursor.value)
    if not found:
        return Response(status_code=204, headers={**headers, **_NO_STORE})
    return Response(b"[%s]" % _joined(found), headers={**headers, **_CACHED}, media_type="application/json")


async def _catch_up(
    gateway: Gateway, request: Request, session: str, principal: Principal, after: int, *, resumed: bool
) -> Response | Stream:
    async with gateway.read(principal, session, after=after, resumed=resumed) as reading:
        found, complete = await _gather(reading, 0.0)
    if not found:
        return Response(b"[]", headers={**_headers(after), **_NO_STORE}, media_type="application/json")
    end = offset = found[-1].offset
    if not complete:
        # A client that is not live takes one answer for all there is, however much that be.
        end = max(end, (await gateway.hub.tail(session)).offset)
    etag = f'W/"{after}-{end}-{found[0].event.time:.3f}"'
    headers = {**_headers(end), **_CACHED, "etag": etag}
    if _matches(request.headers.get("if-none-match", ""), etag):
        return Response(status_code=304, headers=headers)
    if end == offset:
        return Response(b"[%s]" % _joined(found), headers=headers, media_type="application/json")

    async def body(writer: Writer) -> None:
        await writer.write(b"[" + _joined(found))
        found.clear()
        await _write_through(gateway, session, principal, writer, after=offset, end=end)
        await writer.write(b"]")

    headers["content-type"] = "application/json"
    return Stream(body, headers=headers, settings=gateway.settings, slow=gateway.hub.counts.slow)


def _matches(header: str, etag: str) -> bool:
    known = {text.strip().removeprefix("W/") for text in header.split(",")}
    return "*" in known or etag.removeprefix("W/") in known


async def _write_through(
    gateway: Gateway, session: str, principal: Principal, writer: Writer, *, after: int, end: int
) -> None:
    """Write the items behind ``after`` up to ``end``, which the headers have promised."""
    try:
        while after < end:
            async with gateway.read(principal, session, after=after) as reading:
                try:
                    while after < end:
                        items = await reading.next(gateway.settings.keep_alive)
                        if promised := [item for item in items if _begins_by(item, end)]:
                            await writer.write(b"," + _joined(promised))
                        after = reading.offset
                except Closed as closed:
                    if closed.reason != "slow":
                        raise Broken(closed.reason) from None
    except (AgentrunError, Problem) as error:
        raise Broken(str(error)) from error


def _begins_by(item: Item, end: int) -> bool:
    """Whether the item concerns an offset up to ``end``: what stands for a hole may reach beyond."""
    if item.offset <= end:
        return True
    return isinstance(item.event.data, (Snapshot, Gap)) and item.event.data.from_ <= end


async def _sse(
    gateway: Gateway, session: str, principal: Principal, after: int, cursor: _Cursor, *, resumed: bool
) -> Stream:
    if gateway.hub.closing:
        # A stream that ends as soon as it begins is worse than none: the protocol's client leaves off, without a word,
        # after three that were shorter than a second.
        raise _closing()
    settings = gateway.settings
    opened = AsyncExitStack()
    reading = await opened.enter_async_context(gateway.read(principal, session, after=after, resumed=resumed))

    async def body(writer: Writer) -> None:
        deadline = deadline_of(principal, settings.durable_seconds)
        async with opened:
            try:
                await _follow(reading, writer, cursor, deadline=deadline, keep_alive=settings.keep_alive)
            except (Closed, AgentrunError):
                return  # a clean end: the client comes back with its offset, and is then told by the status

    headers = {**EVENT_STREAM, "content-type": "text/event-stream"}
    return Stream(body, headers=headers, settings=settings, slow=gateway.hub.counts.slow)


async def _follow(reading: Reading, writer: Writer, cursor: _Cursor, *, deadline: float, keep_alive: float) -> None:
    told = False
    while (now := time.monotonic()) < deadline:
        # A client that has all there is must be told so at once.
        wait = max(min(deadline, writer.last + keep_alive) - now, 0.01) if told else 0.0
        items = await reading.next(wait)
        if items or not told:
            told = reading.at_end or not items
            await writer.write(_frames(items, reading.offset, cursor.value, up_to_date=told))
            items = ()  # or a client that waits would hold on to them
        elif time.monotonic() - writer.last >= keep_alive:
            await writer.write(KEEP_ALIVE)


def _frames(items: Sequence[Item], offset: int, cursor: int, *, up_to_date: bool) -> bytes:
    """Data and then control, each with the id that an EventSource comes back with."""
    at = _wire(offset).encode()
    control = b'{"streamNextOffset":"%s","streamCursor":"%d"%s}' % (at, cursor, b',"upToDate":true' * up_to_date)
    frames = b"id:%s\nevent: control\ndata:%s\n\n" % (at, control)
    if items:
        # A line break can stand only between the tokens of JSON; within its strings it is escaped.
        data = _joined(items).replace(b"\r", b" ").replace(b"\n", b" ")
        frames = b"id:%s\nevent: data\ndata:[%s]\n\n" % (at, data) + frames
    return frames
