"""One WebSocket for everything: read, send, stop, steer, answer; resumed by offset.

A client's messages have an ``op`` and may have a ``ref``, which the reply repeats::

    {"op": "auth", "token": "…"}                first, unless the handshake had an Authorization header
    {"op": "read", "after": 17}                 events from there on; again: from there instead
    {"op": "send", "ref": 1, "input": "hello"}  the members of the HTTP bodies; "turn" where the address has it
    {"op": "cancel", "ref": 2, "turn": "t-81"}

Replies are ``{"ref": 1, "result": {…}}`` or ``{"ref": 1, "error": {…}}``; events are items, which have no ``ref``.
"""

from __future__ import annotations

import functools
import time
from contextlib import AbstractAsyncContextManager, suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import anyio
import msgspec
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint
from msgspec import Struct
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from agentrun.errors import AgentrunError, SessionGone
from agentrun.gateway.hub import Closed, Reading
from agentrun.gateway.operations import AnswerBody, CancelBody, Operations, SendBody, SteerBody, parse
from agentrun.gateway.problems import Problem, problem_of
from agentrun.gateway.rights import Principal
from agentrun.gateway.sse import deadline_of
from agentrun.wire import check_id

if TYPE_CHECKING:
    from agentrun.gateway.app import Gateway

__all__ = ["routes"]

_AUTH_WAIT = 10.0
_AT_ONCE = 16
"""Operations of one socket that may be under way."""

_LOOK = 60.0
_LONGEST_REASON = 120
_EXPIRED = 4401
# Close codes: those of the protocol where one fits, else 4000 + the HTTP status that says it.
_CODES = {"drain": 1012, "slow": 1013, "revoked": _EXPIRED}


_OF_SOCKET = ("op", "ref", "token", "turn", "after")


class _Op(Struct):
    op: Literal["auth", "read", "send", "cancel", "steer", "answer"]
    ref: str | int | None = None
    token: str = ""
    after: int = 0
    turn: str | None = None


def routes(gateway: Gateway) -> list[BaseRoute]:
    """Return the WebSocket's route."""

    async def endpoint(socket: WebSocket) -> None:
        await _Socket(gateway, socket).run()

    return [WebSocketRoute("/v1/sessions/{session}/socket", endpoint)]


class _Closing(NamedTuple):
    code: int
    reason: str


class _Socket:
    def __init__(self, gateway: Gateway, socket: WebSocket) -> None:
        self._gateway = gateway
        self._socket = socket
        self._do = Operations(gateway)
        self._session = ""
        self._principal: Principal | None = None
        self._scope = anyio.CancelScope()
        self._reading = anyio.CancelScope()
        self._sending = anyio.Lock()
        self._slots = anyio.Semaphore(_AT_ONCE)
        self._closing: _Closing | None = None

    async def run(self) -> None:
        await self._socket.accept()
        with self._scope:
            try:
                await self._serve()
            except (Problem, AgentrunError) as error:
                self._refuse(error)
        if self._closing is not None:
            reason = self._closing.reason.encode()[:_LONGEST_REASON].decode(errors="ignore")
            with anyio.move_on_after(self._gateway.settings.send_timeout), suppress(WebSocketDisconnect):
                await self._socket.close(self._closing.code, reason)

    async def _serve(self) -> None:
        self._session = check_id("a session's id", self._socket.path_params["session"])
        self._principal = principal = await self._authenticate()
        with self._gateway.auth.stream(principal):
            async with anyio.create_task_group() as group:
                group.start_soon(self._until_deadline, principal)
                await self._listen(group)

    def _end(self, closing: _Closing | None = None) -> None:
        """End everything, and close the socket if there is something to say."""
        self._closing = self._closing or closing
        self._scope.cancel()

    def _refuse(self, error: Exception) -> None:
        problem = problem_of(error)
        self._end(_Closing(4000 + problem.status, problem.detail))

    async def _authenticate(self) -> Principal:
        auth = self._gateway.auth
        if "authorization" in self._socket.headers or not auth.needs_token:
            return await auth.authenticate(self._socket)
        body = b""
        with anyio.move_on_after(_AUTH_WAIT):
            body = await self._receive()
        message = _parse(body)[0] if body else None
        if message is None or message.op != "auth":
            raise Problem(401, "no_token", 'send {"op": "auth", "token": …} first')
        address = self._socket.client.host if self._socket.client is not None else None
        principal = await auth.verify(message.token, address=address)
        await self._send({"ref": message.ref, "result": {"user": principal.user}})
        return principal

    async def _listen(self, group: TaskGroup) -> None:
        while True:
            body = await self._receive()
            try:
                message, rest = _parse(body)
            except Problem as problem:
                await self._send({"ref": None, "error": problem.body})
                continue
            if message.op == "read":
                self._reading.cancel()
                self._reading = anyio.CancelScope()
                group.start_soon(self._read, message, self._reading)
                continue
            await self._slots.acquire()
            group.start_soon(self._obey, message, rest)

    async def _receive(self) -> bytes:
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            self._end()
            await checkpoint()
        text = message.get("text")
        return text.encode() if text is not None else message.get("bytes") or b""

    # ------------------------------------------------------------------------------------------------ operations

    async def _obey(self, message: _Op, rest: bytes) -> None:
        try:
            try:
                reply = {"ref": message.ref, "result": await self._operate(message, rest)}
            except (Problem, AgentrunError) as error:
                reply = {"ref": message.ref, "error": problem_of(error).body}
            await self._send(reply)
        finally:
            self._slots.release()

    async def _operate(self, message: _Op, rest: bytes) -> dict[str, Any]:
        assert self._principal is not None
        self._gateway.auth.admit(self._principal)
        turn = message.turn
        if message.op == "send":
            return await self._do.send(self._principal, self._session, parse(rest, SendBody))
        if message.op == "cancel":
            return await self._do.cancel(self._principal, self._session, turn, parse(rest, CancelBody))
        if message.op == "auth":
            if not self._gateway.auth.needs_token:
                return {"user": None}  # so that a client need not know
            raise Problem(409, "authenticated", "this socket has its token; open another for another")
        if turn is None:
            raise Problem(422, "invalid_body", f'{message.op} needs "turn": the id of the turn')
        if message.op == "steer":
            return await self._do.steer(self._principal, self._session, turn, parse(rest, SteerBody))
        return await self._do.answer(self._principal, self._session, turn, parse(rest, AnswerBody))

    # ---------------------------------------------------------------------------------------------------- events

    async def _read(self, message: _Op, scope: anyio.CancelScope) -> None:
        assert self._principal is not None
        with scope:
            try:
                self._gateway.auth.admit(self._principal)
                self._principal.require("read", self._session)
                async with self._watch(self._principal, message.after) as reading:
                    if message.ref is not None:
                        await self._send({"ref": message.ref, "result": {"after": message.after}})
                    await self._pump(reading)
            except (Problem, AgentrunError) as error:
                if isinstance(error, SessionGone) or message.ref is None:
                    self._refuse(error)
                else:
                    await self._send({"ref": message.ref, "error": problem_of(error).body})

    def _watch(self, principal: Principal, after: int) -> AbstractAsyncContextManager[Reading]:
        # The socket itself is counted as a stream.
        valid = functools.partial(self._gateway.auth.holds, principal)
        return self._gateway.hub.read(self._session, after=after, resumed=after > 0, valid=valid)

    async def _pump(self, reading: Reading) -> None:
        while True:
            try:
                items = await reading.next(_LOOK)
            except Closed as closed:
                self._end(_Closing(_CODES[closed.reason], f"{closed.reason}, after={reading.offset}"))
                return
            for item in items:
                await self._write(item.json.decode())
            items = ()  # or a client that waits would hold on to them

    # -------------------------------------------------------------------------------------------------- the socket

    async def _until_deadline(self, principal: Principal) -> None:
        await anyio.sleep(max(0.0, deadline_of(principal, 0) - time.monotonic()))
        self._end(_Closing(_EXPIRED, "the token has expired"))

    async def _send(self, value: dict[str, Any]) -> None:
        await self._write(msgspec.json.encode(value).decode())

    async def _write(self, text: str) -> None:
        async with self._sending:
            with anyio.move_on_after(self._gateway.settings.send_timeout) as scope:
                try:
                    await self._socket.send_text(text)
                except WebSocketDisconnect:
                    self._end()
            if scope.cancelled_caught:
                self._gateway.hub.counts.slow.value += 1
                self._end()
                await checkpoint()  # or it would be found to have fallen behind as well


def _parse(body: bytes) -> tuple[_Op, bytes]:
    """Return a message, and what of it would be the body of a request, as it came."""
    try:
        message = msgspec.json.decode(body, type=_Op)
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        return message, msgspec.json.encode({n: value for n, value in fields.items() if n not in _OF_SOCKET})
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(422, "invalid_message", f'a message is {{"op": "read" | "send" | …}}: {error}') from error
