"""The native API as OpenAPI 3.1, made from the structs that parse and write it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from agentrun import wire
from agentrun.gateway.operations import AnswerBody, CancelBody, SendBody, SteerBody

if TYPE_CHECKING:
    from agentrun.gateway.app import Gateway

__all__ = ["document", "routes"]

_ID = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,128}$"}
_OFFSET = {"type": "integer", "minimum": 0, "maximum": 999_999_999_999_999}
_REF = "#/components/schemas/{name}"
_BODIES = (SendBody, SteerBody, CancelBody, AnswerBody)


def routes(gateway: Gateway) -> list[BaseRoute]:
    """Return the document's route."""

    async def spec(request: Request) -> Response:
        return Response(
            msgspec.json.encode(document()), media_type="application/json", headers={"cache-control": "max-age=300"}
        )

    return [Route("/v1/openapi.json", spec, methods=["GET"])]


@functools.cache
def document() -> dict[str, Any]:
    """Return the OpenAPI document."""
    session, turn = "/v1/sessions/{session}", "/v1/sessions/{session}/turns/{turn}"
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "agentrun gateway",
            "version": _version(),
            "description": "Send turns to sessions, read their events from any offset, live, and stop them.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "security": [{"token": []}],
        "paths": {
            "/v1/sessions": {
                "get": _operation(
                    "listSessions",
                    "The newest sessions the token may read, where the gateway lists them.",
                    {"200": _ok("SessionList")},
                    parameters=[_query("limit", {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100})],
                    fails="404",
                )
            },
            session: {
                "parameters": [_path("session")],
                "get": _operation("getSession", "The session, folded to its end.", {"200": _ok("Session")}),
                "delete": _operation(
                    "deleteSession", "Remove every record of the session.", {"204": {"description": "Gone."}}
                ),
            },
            f"{session}/events": {
                "parameters": [_path("session")],
                "get": _events("readEvents", "Events of the session behind an offset. With `offset`: Durable Streams."),
            },
            f"{session}/turns": {
                "parameters": [_path("session")],
                "post": _operation(
                    "sendTurn",
                    "Send a turn. Sending again under the same id changes nothing.",
                    {"202": _ok("Sent")},
                    body="SendBody",
                    fails="409 413 429",
                ),
            },
            f"{session}/cancel": {
                "parameters": [_path("session")],
                "post": _operation(
                    "cancelSession", "Stop every turn sent so far.", {"200": _ok("Receipt")}, body="CancelBody"
                ),
            },
            turn: {
                "parameters": [_path("session"), _path("turn")],
                "get": _operation("getTurn", "The turn, folded.", {"200": _ok("Turn")}, fails="404"),
            },
            f"{turn}/events": {
                "parameters": [_path("session"), _path("turn")],
                "get": _events(
                    "readTurn", "Events of the turn, to the one that ends it. Behind that: 204.", fails="404"
                ),
            },
            f"{turn}/cancel": {
                "parameters": [_path("session"), _path("turn")],
                "post": _operation("cancelTurn", "Stop the turn.", {"200": _ok("Receipt")}, body="CancelBody"),
            },
            f"{turn}/steer": {
                "parameters": [_path("session"), _path("turn")],
                "post": _operation(
                    "steerTurn",
                    "Offer input to the running turn.",
                    {"202": _ok("Sent")},
                    body="SteerBody",
                    fails="404 413 429",
                ),
            },
            f"{turn}/answer": {
                "parameters": [_path("session"), _path("turn")],
                "post": _operation(
                    "answerTurn",
                    "Answer a question of the turn; the first answer counts.",
                    {"200": _ok("Sent")},
                    body="AnswerBody",
                    fails="404 409 413",
                ),
            },
        },
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
            "schemas": _schemas(),
        },
    }


def _version() -> str:
    try:
        return version("agentrun")
    except PackageNotFoundError:
        return "0"


def _operation(
    id: str,
    summary: str,
    responses: Mapping[str, Any],
    *,
    body: str | None = None,
    parameters: list[dict[str, Any]] | None = None,
    fails: str = "",
) -> dict[str, Any]:
    codes = {*fails.split(), "400", "401", "403", "422", "429", "503", *(("413",) if body else ())}
    operation: dict[str, Any] = {
        "operationId": id,
        "summary": summary,
        "responses": {**responses, **{code: _problem() for code in sorted(codes)}},
    }
    if parameters:
        operation["parameters"] = parameters
    if body is not None:
        schema = _ref(body)
        operation["requestBody"] = {
            "required": body != "CancelBody",
            "content": {"application/json": {"schema": schema}},
        }
    return operation


def _events(id: str, summary: str, *, fails: str = "") -> dict[str, Any]:
    stream = {"schema": {"type": "string"}, "description": "id: the offset; data: an Item"}
    page = {"schema": _ref("Events")}
    responses = {
        "200": {
            "description": "As JSON, or with Accept: text/event-stream as a stream.",
            "content": {"application/json": page, "text/event-stream": {"schema": stream["schema"]}},
        },
        "204": {"description": "There is no more of this turn."},
    }
    wait = {"type": "integer", "minimum": 0, "maximum": 60, "default": 0}
    parameters = [
        _query("after", {**_OFFSET, "default": 0}, "The offset of the last event seen."),
        _query("wait", wait, "Seconds to wait for the first event, as JSON."),
        _query(
            "limit", {"type": "integer", "minimum": 1, "maximum": 1000, "default": 1000}, "Events at most, as JSON."
        ),
        {"name": "Last-Event-ID", "in": "header", "schema": {"type": "string", "pattern": "^[0-9]{1,15}$"}},
    ]
    return _operation(id, summary, responses, parameters=parameters, fails=f"410 {fails}")


def _path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": _ID}


def _query(name: str, schema: Mapping[str, Any], description: str = "") -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": schema, "description": description}


def _ok(schema: str) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref(schema)}}
    return {"description": schema, "content": content}


def _problem() -> dict[str, Any]:
    content = {"application/problem+json": {"schema": _ref("Problem")}}
    return {"description": "What was expected, what came, what to do next.", "content": content}


def _schemas() -> dict[str, Any]:
    _, parts = msgspec.json.schema_components(
        (*_BODIES, wire.KnownEvent, wire.Message, wire.Usage, wire.ErrorInfo), ref_template=_REF
    )
    for name in ("id", "agent", "parent", "replaces"):
        parts["SendBody"]["properties"][name] = {"anyOf": [_ID, {"type": "null"}], "default": None}
    parts["SteerBody"]["properties"]["id"] = {"anyOf": [_ID, {"type": "null"}], "default": None}
    text = {"type": "string"}
    event = {
        "description": "As docs/protocol.md has it; types not known here may come.",
        "type": "object",
        "properties": {"type": text},
        "required": ["type"],
    }
    return parts | {
        "Event": event,
        "Item": _object(offset=_OFFSET, time={"type": "number"}, event=_ref("Event")),
        "Events": _object(offset=_OFFSET, events={"type": "array", "items": _ref("Item")}),
        "Sent": _object(session=_ID, turn=_ID, offset=_OFFSET),
        "Receipt": _object(
            status={"enum": ["cancelled", "already_ended", "not_found", "pending"]},
            offset=_OFFSET,
            took={"type": "number"},
        ),
        "Problem": _object(code=text, status={"type": "integer"}, detail=text),
        "Turn": _object(id=_ID, offset=_OFFSET, state=text, attempt={"type": "integer"}, message=_ref("Message")),
        "Session": _object(
            session=_ID, offset=_OFFSET, busy={"type": "boolean"}, turns={"type": "array", "items": _ref("Turn")}
        ),
        "SessionList": _object(
            sessions={
                "type": "array",
                "items": _object(session=_ID, offset=_OFFSET, time={"type": "number"}, busy={"type": "boolean"}),
            }
        ),
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(name=name)}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}
