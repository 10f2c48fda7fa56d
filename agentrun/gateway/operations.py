"""What a client may ask for, whatever it speaks: checked against its token, done, and told as JSON."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from msgspec import Struct

from agentrun.client import Session, Turn
from agentrun.errors import InvalidInput, TurnNotFound
from agentrun.gateway.problems import Problem
from agentrun.gateway.rights import Principal, Right
from agentrun.inputs import Receipt
from agentrun.reading import Fold
from agentrun.wire import OnBusy

if TYPE_CHECKING:
    from agentrun.gateway.app import Gateway

T = TypeVar("T", bound=Struct)

__all__ = ["AnswerBody", "CancelBody", "Operations", "SendBody", "SteerBody", "parse"]


class SendBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """A turn to be sent. ``deadline`` is in seconds from now."""

    input: Any
    id: str | None = None
    agent: str | None = None
    on_busy: OnBusy = "enqueue"
    deadline: float | None = None
    device: str | None = None
    parent: str | None = None
    replaces: str | None = None
    metadata: dict[str, Any] = {}


class SteerBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """Input for a running turn."""

    input: Any
    id: str | None = None


class CancelBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """A stop."""

    reason: str | None = None


class AnswerBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """The answer to a question."""

    request: str
    value: Any


def parse(body: bytes, kind: type[T], *, empty: bool = False) -> T:
    """Return the body as what it should be.

    Raises:
        Problem: It is not; ``detail`` says what is wrong where.
    """
    if empty and not body.strip():
        body = b"{}"
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise Problem(422, "invalid_body", f"{error}; expected {_shape(kind)}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, "not_json", f"the body must be a JSON object: {error}") from error


def _shape(kind: type[Struct]) -> str:
    fields = (f.name if f.required else f"{f.name}?" for f in msgspec.structs.fields(kind))
    return "{" + ", ".join(fields) + "}"


class Operations:
    """The operations of a gateway, each for a principal.

    All raise `Problem` for what the principal may not do, and what `agentrun.client` raises.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def session(self, id: str, *, agent: str | None = None) -> Session:
        """Return the session, if its id can be one."""
        return self._gateway.client.session(id, agent=agent)

    async def send(self, principal: Principal, session: str, body: SendBody) -> dict[str, Any]:
        """Send a turn."""
        handle = self.session(session)
        principal.require("send", session)
        if body.on_busy in ("interrupt", "rollback"):
            principal.require_any("cancel", session)
        elif body.on_busy == "steer":
            principal.require_any("steer", session)
        agent = body.agent or await self._gateway.default_agent()
        if agent is None:
            raise Problem(422, "no_agent", 'to which agent? Send {"agent": …}; this gateway has no default')
        principal.require_agent(agent)
        if body.replaces is not None:
            await self._require_replace(principal, handle, body.replaces, body.id)
        turn = await handle.send(
            body.input,
            agent=agent,
            id=body.id,
            on_busy=body.on_busy,
            deadline=body.deadline,
            user=principal.user,
            device=body.device,
            parent=body.parent,
            replaces=body.replaces,
            metadata=body.metadata,
        )
        return _sent(turn)

    async def steer(self, principal: Principal, session: str, turn: str, body: SteerBody) -> dict[str, Any]:
        """Offer input to a running turn."""
        handle = await self._turn(principal, "steer", session, turn)
        if principal.agents is not None:
            principal.require_agent((await handle.view()).agent)
        return _sent(await handle.steer(body.input, id=body.id, user=principal.user))

    async def cancel(self, principal: Principal, session: str, turn: str | None, body: CancelBody) -> dict[str, Any]:
        """Stop a turn, or all of a session."""
        if turn is None:
            handle = self.session(session)
            principal.require_any("cancel", session)
            return _receipt(await handle.cancel(by=principal.user, reason=body.reason))
        try:
            handle = await self._turn(principal, "cancel", session, turn)
        except TurnNotFound:
            return _receipt(Receipt("not_found", 0, 0.0))
        return _receipt(await handle.cancel(by=principal.user, reason=body.reason))

    async def answer(self, principal: Principal, session: str, turn: str, body: AnswerBody) -> dict[str, Any]:
        """Answer a question."""
        handle = await self._turn(principal, "answer", session, turn)
        offset = await handle.answer(body.request, body.value, user=principal.user)
        return {"session": session, "turn": turn, "offset": offset}

    async def delete(self, principal: Principal, session: str) -> None:
        """Delete a session."""
        handle = self.session(session)
        principal.require("delete", session)
        await handle.delete()
        self._gateway.hub.gone(session)

    async def _turn(self, principal: Principal, right: Right, session: str, turn: str) -> Turn:
        """Return the turn, if the principal has this right to it."""
        handle = self.session(session).turn(turn)
        principal.require(right, session)
        if f"{right}:any" not in principal.rights:
            principal.require_turn(right, session, await self._owner(handle))
        return handle

    async def _require_replace(self, principal: Principal, session: Session, replaced: str, turn: str | None) -> None:
        """Refuse a turn that would take others' turns out of the history: all from the replaced one to this one are."""
        log = self._gateway.client.broker.log
        history = await Fold(log, session.id).update(await log.last(session.id))
        sent_before = itertools.takewhile(lambda view: view.id != turn, history.turns.values())
        for view in itertools.dropwhile(lambda view: view.id != replaced, sent_before):
            principal.require_replace(session.id, view.request.user if view.request is not None else None)

    async def _owner(self, turn: Turn) -> str | None:
        view = await turn.view()
        if view.request is None:
            raise InvalidInput(f"the request of turn {turn.id} was trimmed: whose it was is not known any more")
        return view.request.user


def _sent(turn: Turn) -> dict[str, Any]:
    return {"session": turn.session.id, "turn": turn.id, "offset": turn.offset}


def _receipt(receipt: Receipt) -> dict[str, Any]:
    return {"status": receipt.status, "offset": receipt.offset, "took": round(receipt.took, 6)}
