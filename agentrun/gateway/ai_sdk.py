"""The endpoints that the Vercel AI SDK's ``useChat`` expects, for its unmodified transports.

::

    POST {prefix}                a message, an answer, an edit or a regeneration; the response is the UI message stream
    GET  {prefix}/{id}/stream    the same for whoever comes later: 204 if nothing is being said
    POST {prefix}/{id}/stop      stop it, from any device
    GET  {prefix}/{id}           the conversation, for ``messages`` when a page is loaded
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from agentrun.broker import Tail
from agentrun.errors import NotWaiting, SessionBusy
from agentrun.gateway import ai_input
from agentrun.gateway.ai_chunks import Chunker
from agentrun.gateway.ai_input import Post, Run, run_id
from agentrun.gateway.ai_message import Chunk, Options
from agentrun.gateway.ai_stream import DONE, OPEN, Answer, frame
from agentrun.gateway.hub import Closed
from agentrun.gateway.problems import Problem
from agentrun.gateway.rights import Principal
from agentrun.gateway.sse import EVENT_STREAM, Stream
from agentrun.history import History, TurnView
from agentrun.inputs import Receipt
from agentrun.reading import Fold
from agentrun.wire import OnBusy

if TYPE_CHECKING:
    from agentrun.gateway.app import Gateway

__all__ = ["routes"]

_HEADERS = {**EVENT_STREAM, "x-vercel-ai-ui-message-stream": "v1"}
_RECENT = 10.0
"""Seconds after its end for which an answer is still replayed: a page that loads the conversation while it is being
answered asks for the stream a moment later, and would otherwise get neither."""


def routes(gateway: Gateway, prefix: str = "/api/chat") -> list[BaseRoute]:
    """Return the routes of the AI SDK's endpoints, below ``prefix``."""
    chat = _Chat(gateway, prefix)
    return [
        Route(prefix, chat.post, methods=["POST"]),
        Route(prefix + "/{id:path}/stream", chat.stream, methods=["GET"]),
        Route(prefix + "/{id:path}/stop", chat.stop, methods=["POST"]),
        Route(prefix + "/{id:path}", chat.history, methods=["GET"]),
    ]


class _Chat:
    def __init__(self, gateway: Gateway, prefix: str) -> None:
        self._gateway = gateway
        self._prefix = prefix
        self._options, self._counting = (
            Options(
                version=gateway.settings.ai_version,
                static_tools=frozenset(gateway.settings.ai_static_tools),
                metadata=gateway.settings.ai_metadata,
                interrupted=interrupted,
            )
            for interrupted in (True, False)
        )

    # ---------------------------------------------------------------------------------------------------------- POST

    async def post(self, request: Request) -> Response | Stream:
        """Send what the last message asks for, and answer with the stream."""
        principal = await self._gateway.auth.authenticate(request)
        post = ai_input.parse_post(await request.body())
        session = ai_input.chat_of(post)
        principal.require("read", session)
        if post.last.role == "assistant":
            return await self._continue(principal, session, post, self._options_of(request))
        principal.require("send", session)
        look = ai_input.replaces(post) or self._on_busy(post) == "interrupt"
        history = (await self._fold(session))[0] if look else None
        send = ai_input.send_of(post, session, history)
        agent = post.agent or request.query_params.get("agent") or send.agent or await self._gateway.default_agent()
        if agent is None:
            raise Problem(422, "no_agent", 'to which agent? Send "agent" in the body, or ?agent=')
        principal.require_agent(agent)
        on_busy = self._allowed(principal, session, post, history, send.replaces)
        try:
            turn = await self._gateway.client.session(session).send(
                send.input,
                agent=agent,
                id=send.turn,
                on_busy=on_busy,
                deadline=post.deadline,
                user=principal.user,
                device=post.device,
                replaces=send.replaces,
                metadata=ai_input.metadata_of(post),
            )
        except SessionBusy as error:
            raise Problem(409, "session_busy", f"the chat is still answering an earlier message: {error}") from error
        at = turn.offset or 1
        return await self._respond(principal, Run(session, turn.id), at=at, upto=at, options=self._options_of(request))

    def _on_busy(self, post: Post) -> OnBusy:
        return post.on_busy or self._gateway.settings.ai_on_busy

    def _allowed(
        self, principal: Principal, session: str, post: Post, history: History | None, replaces: str | None
    ) -> OnBusy:
        """Return how the turn is sent to a busy session, if the principal may do so."""
        on_busy = self._on_busy(post)
        if on_busy == "steer":
            principal.require_any("steer", session)
        if on_busy == "rollback":
            principal.require_any("cancel", session)
        views = list(history.turns.values()) if history is not None else []
        if replaces is not None:
            ids = [view.id for view in views]
            for view in views[ids.index(replaces) :]:
                if view.ended and not _is_own(principal, view):
                    principal.require_turn("cancel", session, _owner(view))
        if replaces is None and on_busy != "interrupt":
            return on_busy
        unended = [view for view in views if not view.ended]
        for view in unended:
            principal.require_turn("cancel", session, _owner(view))
        return "interrupt" if unended else "enqueue"

    async def _continue(self, principal: Principal, session: str, post: Post, options: Options) -> Response | Stream:
        """Give the answers that the assistant's message holds, and go on with that message."""
        history, _ = await self._fold(session)
        answers = ai_input.answers_of(post, history)
        if answers is None:
            # Nothing was asked. An empty step, so that the client does not send the same again by itself.
            nothing: list[Chunk] = [{"type": "start-step"}, {"type": "start", "messageId": post.last.id}]
            if not post.last.id:
                del nothing[1]["messageId"]
            return _whole([*nothing, {"type": "finish-step"}, {"type": "finish", "finishReason": "other"}])
        view = answers.turn
        if answers.values:
            principal.require_turn("answer", session, _owner(view))
        turn = self._gateway.client.session(session).turn(view.id)
        for question, value in answers.values:
            try:
                await turn.answer(question, value, user=principal.user)
            except NotWaiting:
                continue  # somebody else answered first: the stream tells what counts
        tail = await self._gateway.hub.tail(session)
        run = Run(session, view.id, answers.after)
        return await self._respond(principal, run, at=view.offset, upto=tail.offset, options=options)

    # ----------------------------------------------------------------------------------------------------------- GET

    async def stream(self, request: Request) -> Response | Stream:
        """Replay what is being said, and follow it."""
        principal = await self._gateway.auth.authenticate(request)
        name = self._id(request, "/stream")
        start = _start_of(request)
        run = ai_input.run_of(name)
        session = run.session if run is not None else ai_input.session_of(name)
        principal.require("read", session)
        history, tail = await self._fold(session)
        view = history.turns.get(run.turn) if run is not None else None
        if run is not None and view is None:
            session, run = ai_input.session_of(name), None
            principal.require("read", session)
            history, tail = await self._fold(session)
        if run is None:
            recent = time.time() - tail.time < _RECENT
            view = _shown(history, ended=recent if start is None or start <= 0 else True)
        if view is None:
            # A client that counts takes a 204 for an error, and goes on asking until there is a finish.
            return Response(status_code=204) if start is None else _whole([{"type": "finish"}], tail=-1)
        return await self._respond(
            principal,
            run or Run(session, view.id),
            at=view.offset,
            upto=tail.offset,
            options=self._options_of(request),
            start=start or 0,
            exact=run is not None or start is not None,
        )

    async def history(self, request: Request) -> Response:
        """The conversation as UI messages; what is being said is left to the stream, unless it waits for an answer."""
        principal = await self._gateway.auth.authenticate(request)
        session = ai_input.session_of(self._id(request, ""))
        principal.require("read", session)
        history = await self._gateway.client.session(session).history()
        messages: list[dict[str, Any]] = []
        for view in history.turns.values():
            if view.replaced_by is not None or view.rolled_back or view.state == "rejected":
                continue
            messages += [m for m in (ai_input.user_message(view), await self._said(principal, session, view)) if m]
        active = any(not view.ended for view in history.turns.values())
        body = msgspec.json.encode(
            {"id": unquote(self._id(request, "")), "messages": messages, "active": active, "offset": history.offset}
        )
        return Response(body, headers={"cache-control": "no-store"}, media_type="application/json")

    async def _said(self, principal: Principal, session: str, view: TurnView) -> dict[str, Any] | None:
        if view.ended:
            return Chunker.of(view, self._options).message()
        if not any(question.answer is None for question in view.questions.values()):
            return None
        run = Run(session, view.id)
        async with self._gateway.read(principal, session, after=max(view.offset - 1, 0)) as reading:
            answer = Answer(self._gateway, principal, reading, run, self._options, exact=False)
            await answer.catch_up(view.last_out)
        return answer.chunker.message()

    # ---------------------------------------------------------------------------------------------------------- stop

    async def stop(self, request: Request) -> Response:
        """Stop what has not ended, as far as the principal may."""
        principal = await self._gateway.auth.authenticate(request)
        name = self._id(request, "/stop")
        run = ai_input.run_of(name)
        session = run.session if run is not None else ai_input.session_of(name)
        principal.require("cancel", session)
        reason = _reason(await request.body())
        handle = self._gateway.client.session(session)
        receipts: list[tuple[str | None, Receipt]] = []
        if "cancel:any" in principal.rights:
            receipts = [(None, await handle.cancel(by=principal.user, reason=reason))]
        else:
            history, _ = await self._fold(session)
            unended = [view for view in history.turns.values() if not view.ended]
            own = [view for view in unended if _is_own(principal, view)]
            if unended and not own:
                principal.require_any("cancel", session)
            for view in reversed(own):
                receipt = await handle.turn(view.id).cancel(by=principal.user, reason=reason)
                receipts.append((view.id, receipt))
            if not own:
                receipts = [(None, Receipt("already_ended" if history.turns else "not_found", 0, 0.0))]
        told = [_receipt(turn, receipt) for turn, receipt in receipts]
        return Response(
            msgspec.json.encode({"session": session, "status": told[-1]["status"], "receipts": told}),
            headers={"cache-control": "no-store"},
            media_type="application/json",
        )

    # -------------------------------------------------------------------------------------------------------- helpers

    async def _respond(
        self,
        principal: Principal,
        run: Run,
        *,
        at: int,
        upto: int,
        options: Options,
        start: int = 0,
        exact: bool = True,
    ) -> Stream:
        """Answer with a run. ``at`` is where its turn begins; ``upto`` is known to be stored, and is to be told."""
        opened = AsyncExitStack()
        try:
            reading = await opened.enter_async_context(
                self._gateway.read(principal, run.session, after=max(at - 1, 0), resumed=start > 0)
            )
            answer = Answer(self._gateway, principal, reading, run, options, start=start, exact=exact)
            await answer.catch_up(upto)
        except Closed as closed:
            await opened.aclose()
            raise Problem(503, closed.reason, "this gateway is shutting down: ask again") from closed
        except BaseException:
            await opened.aclose()
            raise
        headers = {**_HEADERS, "x-workflow-run-id": run_id(run)}
        if start < 0:
            headers["x-workflow-stream-tail-index"] = str(answer.total - 1)
        slow = self._gateway.hub.counts.slow
        return Stream(answer.body, headers=headers, settings=self._gateway.settings, slow=slow, opened=opened)

    async def _fold(self, session: str) -> tuple[History, Tail]:
        """The session without what the tokens in flight add, and its end."""
        log = self._gateway.client.broker.log
        tail = await log.last(session)
        return await Fold(log, session).update(tail), tail

    def _options_of(self, request: Request) -> Options:
        # The transport that counts posts without saying that it is JSON.
        json = request.method == "POST" and "json" in request.headers.get("content-type", "")
        plain = request.method == "GET" and "startIndex" not in request.query_params
        return self._options if json or plain else self._counting

    def _id(self, request: Request, suffix: str) -> str:
        """The id in the address. It may hold an encoded slash, so it is taken from the address as it was sent."""
        scope = request.scope
        raw = scope.get("raw_path")
        path = raw.decode("ascii", "replace").split("?")[0] if raw else request.url.path
        at = path.find(f"{self._prefix}/", len(scope.get("root_path", "")))
        at = path.find(f"{self._prefix}/") if at < 0 else at
        return unquote(path[at + len(self._prefix) + 1 :].removesuffix(suffix))


def _shown(history: History, *, ended: bool) -> TurnView | None:
    """The turn that is being answered; else, if wanted, the last one that was."""
    views = [v for v in history.turns.values() if v.replaced_by is None and v.state not in ("rejected", "consumed")]
    unended = [view for view in views if not view.ended]
    if unended:
        return unended[0]
    return views[-1] if views and ended else None


def _is_own(principal: Principal, view: TurnView) -> bool:
    return principal.user is not None and _owner(view) == principal.user


def _owner(view: TurnView) -> str | None:
    return view.request.user if view.request is not None else None


def _start_of(request: Request) -> int | None:
    text = request.query_params.get("startIndex")
    if text is None:
        return None
    digits = text.removeprefix("-")
    if digits.isascii() and digits.isdigit() and len(digits) <= 12:
        return int(text)
    raise Problem(400, "bad_parameter", f"startIndex is the number of chunks seen, not {text[:40]!r}")


def _reason(body: bytes) -> str | None:
    try:
        reason = msgspec.json.decode(body, type=dict[str, Any]).get("reason") if body.strip() else None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, "not_json", f"the body must be empty or a JSON object: {error}") from error
    if reason is not None and not isinstance(reason, str):
        raise Problem(422, "invalid_body", "reason is text")
    return reason


def _receipt(turn: str | None, receipt: Receipt) -> dict[str, Any]:
    named = {"turn": turn} if turn is not None else {}
    return {**named, "status": receipt.status, "offset": receipt.offset, "took": round(receipt.took, 6)}


def _whole(chunks: Sequence[Chunk], *, tail: int | None = None) -> Response:
    headers = dict(_HEADERS) if tail is None else {**_HEADERS, "x-workflow-stream-tail-index": str(tail)}
    return Response(OPEN + frame(chunks) + DONE, headers=headers)
