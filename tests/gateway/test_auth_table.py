"""Who may do what: each principal with each operation, against the real routes; each cell is a test.

Ann has sent a turn, which runs and asks for an approval. A cell is one operation on it, or on its session, with one
token. What is refused changes nothing; and no token is ever logged.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import anyio
import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from agentrun.brokers.memory import MemoryBroker
from agentrun.gateway import revoked
from agentrun.gateway.auth import Auth
from agentrun.gateway.keys import Keys
from tests.gateway import tokens
from tests.gateway.conftest import Served, Site
from tests.gateway.tokens import ALL, OTHER_PRIVATE, PRIVATE, PUBLIC, SECRET, signed, until
from workers.echo import echo

# ---------------------------------------------------------------------------------------------------------- the table

RIGHTS = """
                read send replace interrupt offer cancel steer answer stop delete chat chat-interrupt chat-answer
owner           yes  yes  yes     -         -     yes    yes   yes    -    yes    yes  yes            yes
another-user    yes  yes  -       -         -     -      -     -      -    yes    yes  -              -
no-user         yes  yes  -       -         -     -      -     -      -    yes    yes  -              -
other-session   -    -    -       -         -     -      -     -      -    -      -    -              -
no-rights       -    -    -       -         -     -      -     -      -    -      -    -              -
reader          yes  -    -       -         -     -      -     -      -    -      -    -              -
sender          -    yes  yes     -         -     -      -     -      -    -      -    -              -
canceller       -    -    -       -         -     yes    -     -      -    -      -    -              -
steerer         -    -    -       -         -     -      yes   -      -    -      -    -              -
answerer        -    -    -       -         -     -      -     yes    -    -      -    -              -
deleter         -    -    -       -         -     -      -     -      -    yes    -    -              -
any             yes  yes  yes     yes       yes   yes    yes   yes    yes  -      yes  yes            yes
cancel-any      -    -    -       -         -     yes    -     -      yes  -      -    -              -
other-agent     yes  -    -       -         -     yes    -     yes    -    yes    -    -              yes
operator        yes  yes  yes     yes       yes   yes    yes   yes    yes  yes    yes  yes            yes
"""

ANY = ["cancel:any", "steer:any", "answer:any"]
PRINCIPALS: dict[str, dict[str, Any]] = {
    "owner": {},
    "another-user": {"sub": "carl"},
    "no-user": {"sub": None},
    "other-session": {"sessions": ["t-*", "s", "S-*", "*-t"], "rights": ALL + ANY},
    "no-rights": {"rights": []},
    "reader": {"rights": ["read"]},
    "sender": {"rights": ["send"]},
    "canceller": {"rights": ["cancel"]},
    "steerer": {"rights": ["steer"]},
    "answerer": {"rights": ["answer"]},
    "deleter": {"rights": ["delete"]},
    "any": {"sub": "carl", "rights": ["read", "send", *ANY]},
    "cancel-any": {"sub": None, "rights": ["cancel:any"]},
    "other-agent": {"agents": ["support", "ech", "echo-*"]},
    "operator": {"sub": "ops", "sessions": ["*"], "rights": ALL + ANY},
}


def _now(seconds: float) -> int:
    return int(time.time() + seconds)


BAD: dict[str, Callable[[], str | None]] = {
    "no-token": lambda: None,
    "malformed": lambda: "these-words-are-no-token",
    "expired": lambda: signed(iat=_now(-900), exp=_now(-300)),
    "not-yet-valid": lambda: signed(nbf=_now(300)),
    "from-the-future": lambda: signed(iat=_now(300), exp=_now(900)),
    "wrong-audience": lambda: signed(aud="another-service"),
    "wrong-issuer": lambda: signed(iss="somebody"),
    "wrong-secret": lambda: signed(tokens.OTHER_SECRET),
    "wrong-key": lambda: signed(OTHER_PRIVATE, "EdDSA"),
    "alg-none": lambda: tokens.forged({"alg": "none", "typ": "JWT"}, tokens.claims()),
    "public-key-as-secret": lambda: tokens.hs256_with(PUBLIC),
    "tampered": lambda: tokens.tampered(signed(rights=["read"], sub="carl"), sub="ann", rights=ALL + ANY),
    "signature-cut": lambda: signed()[:-4],
    "no-exp": lambda: signed(exp=None),
    "good-for-too-long": lambda: signed(exp=_now(86500)),
    "revoked": lambda: signed(PRIVATE, "EdDSA", jti="revoked", sub="ann", agents=[uuid.uuid4().hex]),
}


# ------------------------------------------------------------------------------------------------------- operations


class Cell:
    """One operation's means: the gateway, the session, the token."""

    def __init__(self, served: Served, session: str, token: str | None, *, in_query: bool = False) -> None:
        self.served = served
        self.path = f"/v1/sessions/{session}"
        self.session = session
        self.token = token
        self.in_query = in_query

    async def http(
        self, method: str, path: str, body: Any = None, accept: str = "application/json", **query: Any
    ) -> int:
        headers = {"accept": accept}
        if self.token is not None:
            if self.in_query:
                query["access_token"] = self.token
            else:
                headers["authorization"] = f"Bearer {self.token}"
        request = self.served.http.build_request(
            method,
            path if path.startswith("/api") else self.path + path,
            headers=headers,
            params=query,
            json=body if method == "POST" else None,
        )
        response = await self.served.http.send(request, stream=True)
        try:
            if response.status_code == 200 and accept == SSE:
                if method == "GET":  # what a POST sent may have to wait in line; the status says that it was taken
                    await _first_event(response)
            elif response.status_code != 204:
                await _check(response, self.token)
            return response.status_code
        finally:
            await response.aclose()

    async def chat(self, *parts: dict[str, Any], role: str = "user", **members: Any) -> int:
        message = {"id": uuid.uuid4().hex, "role": role, "parts": parts}
        body = {"id": self.session, "messages": [message], "trigger": "submit-message", **members}
        return await self.http("POST", "/api/chat", body, accept=SSE)

    async def socket(self, op: str, **members: Any) -> int:
        url = self.served.url.replace("http", "ws", 1) + self.path + "/socket"
        try:
            async with connect(url + (f"?access_token={self.token}" if self.in_query else "")) as socket:
                if self.token is not None and not self.in_query:
                    await socket.send(json.dumps({"op": "auth", "token": self.token}))
                    assert "user" in json.loads(await socket.recv())["result"]
                await socket.send(json.dumps({"op": op, "ref": 1, **members}))
                while (reply := json.loads(await socket.recv())).get("ref") != 1:
                    pass
                if op == "read" and "result" in reply:
                    assert json.loads(await socket.recv())["offset"] == 1
                return 200 if "result" in reply else reply["error"]["status"]
        except ConnectionClosed as closed:
            return _said(closed, self.token) - 4000


async def _first_event(response: httpx.Response) -> None:
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            return
    raise AssertionError("the stream ended without an event")


def _said(closed: ConnectionClosed, token: str | None) -> int:
    """The code a socket was closed with."""
    assert closed.rcvd is not None, "broken off"
    assert token is None or token not in closed.rcvd.reason
    return closed.rcvd.code


async def _check(response: httpx.Response, token: str | None) -> None:
    text = (await response.aread()).decode()
    assert token is None or token not in text
    if response.status_code >= 400:
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["status"] == response.status_code
    if response.status_code == 401:
        challenge = response.headers["www-authenticate"]
        assert challenge.startswith('Bearer realm="agentrun"')
        assert ("error=" in challenge) == (token is not None)
        assert token is None or token not in challenge


Operation = Callable[[Cell], Awaitable[int]]
SSE = "text/event-stream"
INPUT = {"input": "more"}
YES = {"request": "", "value": True}
TEXT = {"type": "text", "text": "more"}


async def _approve(cell: Cell) -> int:
    approval = {"id": YES["request"], "approved": True}
    part = {"type": "tool-deploy", "toolCallId": "deploy", "state": "approval-responded", "input": {}}
    return await cell.chat(part | {"approval": approval}, role="assistant")


OPERATIONS: dict[str, tuple[str, int, Operation]] = {
    "state": ("read", 200, lambda c: c.http("GET", "")),
    "events": ("read", 200, lambda c: c.http("GET", "/events")),
    "events-long-poll": ("read", 200, lambda c: c.http("GET", "/events", wait=1, after=1)),
    "events-stream": ("read", 200, lambda c: c.http("GET", "/events", accept=SSE)),
    "durable": ("read", 200, lambda c: c.http("GET", "/events", offset="-1")),
    "durable-stream": ("read", 200, lambda c: c.http("GET", "/events", accept=SSE, offset="-1", live="sse")),
    "turn": ("read", 200, lambda c: c.http("GET", "/turns/t1")),
    "turn-events": ("read", 200, lambda c: c.http("GET", "/turns/t1/events")),
    "turn-stream": ("read", 200, lambda c: c.http("GET", "/turns/t1/events", accept=SSE)),
    "send": ("send", 202, lambda c: c.http("POST", "/turns", INPUT)),
    "send-reject": ("send", 409, lambda c: c.http("POST", "/turns", INPUT | {"on_busy": "reject"})),
    "send-replace": ("replace", 202, lambda c: c.http("POST", "/turns", INPUT | {"replaces": "t1"})),
    "send-interrupt": ("interrupt", 202, lambda c: c.http("POST", "/turns", INPUT | {"on_busy": "interrupt"})),
    "send-rollback": ("interrupt", 202, lambda c: c.http("POST", "/turns", INPUT | {"on_busy": "rollback"})),
    "send-steer": ("offer", 202, lambda c: c.http("POST", "/turns", INPUT | {"on_busy": "steer"})),
    "cancel": ("cancel", 200, lambda c: c.http("POST", "/turns/t1/cancel")),
    "steer": ("steer", 202, lambda c: c.http("POST", "/turns/t1/steer", INPUT)),
    "answer": ("answer", 200, lambda c: c.http("POST", "/turns/t1/answer", YES)),
    "cancel-session": ("stop", 200, lambda c: c.http("POST", "/cancel", {"reason": "enough"})),
    "delete": ("delete", 204, lambda c: c.http("DELETE", "")),
    "chat-history": ("read", 200, lambda c: c.http("GET", f"/api/chat/{c.session}")),
    "chat-stream": ("read", 200, lambda c: c.http("GET", f"/api/chat/{c.session}/stream", accept=SSE)),
    "chat-send": ("chat", 200, lambda c: c.chat(TEXT)),
    "chat-interrupt": ("chat-interrupt", 200, lambda c: c.chat(TEXT, on_busy="interrupt")),
    "chat-answer": ("chat-answer", 200, _approve),
    "chat-stop": ("cancel", 200, lambda c: c.http("POST", f"/api/chat/{c.session}/stop")),
    "socket-read": ("read", 200, lambda c: c.socket("read", after=0)),
    "socket-send": ("send", 200, lambda c: c.socket("send", input="more")),
    "socket-replace": ("replace", 200, lambda c: c.socket("send", input="more", replaces="t1")),
    "socket-interrupt": ("interrupt", 200, lambda c: c.socket("send", input="more", on_busy="interrupt")),
    "socket-cancel": ("cancel", 200, lambda c: c.socket("cancel", turn="t1")),
    "socket-steer": ("steer", 200, lambda c: c.socket("steer", turn="t1", input="more")),
    "socket-answer": ("answer", 200, lambda c: c.socket("answer", turn="t1", **YES)),
    "socket-cancel-session": ("stop", 200, lambda c: c.socket("cancel")),
}
STREAMS = ("events-stream", "durable-stream", "turn-stream")


def _allowed() -> set[tuple[str, str]]:
    header, *rows = [line.split() for line in RIGHTS.strip().splitlines()]
    assert [row[0] for row in rows] == list(PRINCIPALS)
    return {(row[0], action) for row in rows for action, mark in zip(header, row[1:], strict=True) if mark == "yes"}


ALLOWED = _allowed()


# ------------------------------------------------------------------------------------------------------- the gateway


class World:
    def __init__(self, site: Site, served: Served, logged: list[str]) -> None:
        self.site = site
        self.served = served
        self.logged = logged
        self.logged_lines = 0
        self.refused = ""
        """A session for cells in which everything is refused, so that they can share it."""
        self._count = itertools.count()

    async def session(self) -> str:
        """A session in which ann's turn t1 runs and asks."""
        session = self.site.client.session(f"s-{next(self._count)}-s")
        turn = await session.send("approve 1 1", user="ann", id="t1")
        with anyio.fail_after(10):
            async for event in turn.events():
                if event.type == "input.required":
                    YES["request"] = event.data.request
                    break
        return session.id

    async def end(self, session: str) -> int:
        return (await self.site.client.broker.log.last(session)).offset

    def check_logs(self, token: str | None) -> None:
        """No token in what was logged since, by this cell or by what an earlier one left."""
        for line in self.logged:
            assert not _JWT.search(line), line
            assert token is None or token not in line
            assert token is None or len(token.rpartition(".")[2]) < 10 or token.rpartition(".")[2] not in line
        self.logged_lines += len(self.logged)
        self.logged.clear()


_JWT = re.compile(r"eyJ[\w-]+\.")


@pytest.fixture(scope="module")
def logged() -> Iterator[list[str]]:
    """Everything any logger says, from DEBUG on; but for this test's own clients, who may know their tokens."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not record.name.startswith(("httpx", "httpcore", "websockets.client")):
                lines.append(f"{record.name} {self.format(record)} {record.args}")

    handler, root = Handler(), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield lines
    root.setLevel(level)
    root.removeHandler(handler)


@pytest.fixture(scope="module")
async def world(logged: list[str]) -> AsyncIterator[World]:
    name = uuid.uuid4().hex
    async with AsyncExitStack() as stack:
        site = Site(name, await stack.enter_async_context(MemoryBroker(name)), stack)
        await site.worker(echo, concurrency=1000, ask_hold=600.0)
        auth = Auth(Keys.secret(SECRET), Keys.public(PUBLIC), issuer="tests")
        served = await site.gateway(auth=auth, max_failures=0)
        await revoked.revoke(site.client, "revoked")
        await until(lambda: "revoked" in auth._revoked)
        world = World(site, served, logged)
        world.refused = await world.session()
        yield world
        world.check_logs(None)
        assert world.logged_lines > 0, "nothing was logged: no token would have been noticed"


# --------------------------------------------------------------------------------------------------------- the cells


async def _status(act: Operation, cell: Cell) -> int:
    with anyio.fail_after(20):  # or the test runner would end it, and with it the gateway of all other cells
        return await act(cell)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("who", PRINCIPALS)
async def test_good_token(world: World, who: str, operation: str) -> None:
    action, success, act = OPERATIONS[operation]
    session = await world.session()
    before = await world.end(session)
    token = signed(**PRINCIPALS[who])
    status = await _status(act, Cell(world.served, session, token))
    if (who, action) in ALLOWED:
        assert status == success
    else:
        assert status == 403
        assert await world.end(session) == before
    world.check_logs(token)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("how", BAD)
async def test_bad_token(world: World, how: str, operation: str) -> None:
    act = OPERATIONS[operation][2]
    session = world.refused
    before = await world.end(session)
    token = BAD[how]()
    assert await _status(act, Cell(world.served, session, token)) == 401
    assert await world.end(session) == before
    world.check_logs(token)


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_good_token_in_the_query(world: World, operation: str) -> None:
    act = OPERATIONS[operation][2]
    session = world.refused
    before = await world.end(session)
    token = signed()
    status = await _status(act, Cell(world.served, session, token, in_query=True))
    assert status == (200 if operation in STREAMS else 401)
    assert await world.end(session) == before
    world.check_logs(token)


@pytest.mark.parametrize("how", [how for how in BAD if how != "no-token"])
@pytest.mark.parametrize("operation", STREAMS)
async def test_bad_token_in_the_query(world: World, how: str, operation: str) -> None:
    token = BAD[how]()
    assert await _status(OPERATIONS[operation][2], Cell(world.served, world.refused, token, in_query=True)) == 401
    world.check_logs(token)


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_reserved_sessions_are_not_there(world: World, operation: str) -> None:
    token = signed(sessions=["*", "agentrun--*"], rights=ALL + ANY)
    before = await world.end(revoked.SESSION)
    assert await _status(OPERATIONS[operation][2], Cell(world.served, revoked.SESSION, token)) == 404
    assert await world.end(revoked.SESSION) == before


@pytest.mark.parametrize(
    ("user", "rights", "status"), [("ann", [], 403), ("ann", ["cancel:any"], 202), ("carl", [], 202)]
)
async def test_a_turn_replaces_all_that_were_sent_after_the_one_it_names(
    world: World, user: str, rights: list[str], status: int
) -> None:
    session = await world.session()
    handle = world.site.client.session(session)
    await handle.send("hello", user="ann", id="t2")
    await handle.send("hello", user="carl", id="t3")
    headers = {"authorization": f"Bearer {signed(sub=user, rights=['send', *rights])}"}
    body = {"input": "again", "replaces": "t3" if user == "carl" else "t2", "id": "t4"}
    url = f"/v1/sessions/{session}/turns"
    assert (await world.served.http.post(url, json=body, headers=headers)).status_code == status
    if status == 202:  # sent again, it is the same whatever came after it
        await handle.send("hello", user="ann", id="t5")
        await handle.send("hello", user="carl", id="t6")
        assert (await world.served.http.post(url, json=body, headers=headers)).status_code == 202


# ------------------------------------------------------------------------------------------------------ what is told


async def test_whether_a_session_exists_is_not_told_to_who_may_not_read_it(world: World) -> None:
    there, headers = await world.session(), {"authorization": f"Bearer {signed(sessions=['t-*'])}"}
    for path in ("", "/events", "/turns/t1", "/turns/t1/events"):
        answers = [
            await world.served.http.get(f"/v1/sessions/{session}{path}", headers=headers)
            for session in (there, "s-nothing")
        ]
        assert [a.status_code for a in answers] == [403, 403]
        assert answers[0].content == answers[1].content


async def test_the_list_of_sessions_has_those_it_may_read(world: World) -> None:
    there = await world.session()
    for sessions, rights, found in (
        (["s-*"], ["read"], True),
        ([there], ["read"], True),
        (["t-*"], ["read"], False),
        (["*"], ["send", "cancel:any"], False),
    ):
        headers = {"authorization": f"Bearer {signed(sessions=sessions, rights=rights)}"}
        listed = (await world.served.http.get("/v1/sessions", params={"limit": 1000}, headers=headers)).json()[
            "sessions"
        ]
        assert (there in [entry["session"] for entry in listed]) == found
        assert not [entry for entry in listed if entry["session"].startswith("agentrun--")]


async def test_the_verified_user_is_who_sent_stopped_and_answered(world: World) -> None:
    session = await world.session()
    carl = signed(sub="carl", rights=["send", *ANY])
    headers = {"authorization": f"Bearer {carl}"}
    http = world.served.http
    body = {"input": "approve 1 1", "id": "t2", "user": "ann", "by": "ann"}
    sent = await http.post(f"/v1/sessions/{session}/turns", json=body, headers=headers)
    if sent.status_code == 422:  # members it does not know may be refused, but never believed
        body = {"input": "approve 1 1", "id": "t2"}
        sent = await http.post(f"/v1/sessions/{session}/turns", json=body, headers=headers)
    assert sent.status_code == 202
    await http.post(f"/v1/sessions/{session}/turns/t1/steer", json={"input": "x", "id": "t3"}, headers=headers)
    await http.post(f"/v1/sessions/{session}/turns/t1/answer", json=YES, headers=headers)
    stopped = await http.post(f"/v1/sessions/{session}/turns/t2/cancel", json={}, headers=headers)
    assert stopped.json()["status"] == "cancelled"
    history = await world.site.client.session(session).history()
    assert [history.turns[turn].request.user for turn in ("t1", "t2", "t3")] == ["ann", "carl", "carl"]
    (question,) = history.turns["t1"].questions.values()
    assert question.answer is not None
    assert question.answer.user == "carl"
    assert history.turns["t2"].by == "carl"


# -------------------------------------------------------------------------------------------------- while it is open


async def _frames(response: httpx.Response, seen: anyio.Event) -> None:
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            seen.set()


async def _drain(socket: ClientConnection) -> None:
    while True:
        await socket.recv()


async def test_streams_of_a_revoked_token_end_at_once(world: World) -> None:
    session = await world.session()
    other = await world.session()
    token, kept = signed(jti="to-revoke", agents=["a"]), signed(jti="kept", agents=["b"])

    async def read(token: str, session: str, opened: anyio.Event, ended: anyio.Event) -> None:
        headers = {"authorization": f"Bearer {token}", "accept": SSE}
        async with world.served.http.stream("GET", f"/v1/sessions/{session}/events", headers=headers) as response:
            assert response.status_code == 200
            await _frames(response, opened)
        ended.set()

    streams = [(token, session), (token, other), (kept, session)]
    opened, ended = [anyio.Event() for _ in streams], [anyio.Event() for _ in streams]
    async with anyio.create_task_group() as group:
        for (one, where), begun, over in zip(streams, opened, ended, strict=True):
            group.start_soon(read, one, where, begun, over)
        url = world.served.url.replace("http", "ws", 1) + f"/v1/sessions/{session}/socket"
        async with connect(url, additional_headers={"authorization": f"Bearer {token}"}) as socket:
            await socket.send(json.dumps({"op": "read", "ref": 1, "after": 0}))
            with anyio.fail_after(20):
                await socket.recv()
                for begun in opened:
                    await begun.wait()
                began = time.monotonic()
                await revoked.revoke(world.site.client, "to-revoke")
                await ended[0].wait()
                await ended[1].wait()
                with pytest.raises(ConnectionClosed) as closed:
                    await _drain(socket)
        assert time.monotonic() - began < 2
        assert _said(closed.value, token) == 4401
        await anyio.sleep(0.1)
        assert not ended[2].is_set()
        group.cancel_scope.cancel()


async def test_a_socket_open_since_before_can_do_nothing_with_a_revoked_token(world: World) -> None:
    session = await world.session()
    token = signed(jti="idle", agents=["c"], rights=ALL)
    url = world.served.url.replace("http", "ws", 1) + f"/v1/sessions/{session}/socket"
    async with connect(url, additional_headers={"authorization": f"Bearer {token}"}) as socket:
        await socket.send(json.dumps({"op": "cancel", "ref": 1, "turn": "nothing"}))
        assert json.loads(await socket.recv())["result"]["status"] == "not_found"
        await revoked.revoke(world.site.client, "idle")
        await anyio.sleep(0.05)
        before = await world.end(session)
        await socket.send(json.dumps({"op": "cancel", "ref": 2, "turn": "t1"}))
        try:
            status = json.loads(await socket.recv())["error"]["status"]
        except ConnectionClosed as closed:
            status = _said(closed, token) - 4000
        assert status == 401
        assert await world.end(session) == before


async def test_a_stream_ends_when_its_token_expires(world: World) -> None:
    session = await world.session()
    soon = int(time.time()) + 1 - 30  # less the leeway
    token = signed(iat=soon - 60, exp=soon)
    headers = {"authorization": f"Bearer {token}", "accept": SSE}
    with anyio.fail_after(10):
        async with world.served.http.stream("GET", f"/v1/sessions/{session}/events", headers=headers) as response:
            assert response.status_code == 200
            await _frames(response, anyio.Event())
    again = await world.served.http.get(f"/v1/sessions/{session}/events", headers=headers)
    assert again.status_code == 401
    assert again.json()["code"] == "token_expired"


# ------------------------------------------------------------------------------------------------------------- limits


async def test_streams_and_requests_of_one_token_are_limited(site: Site) -> None:
    served = await site.gateway(auth=Auth(Keys.secret(SECRET)), max_streams=2, rate=0.1, burst=6)
    await site.client.session("s-1").send("hello")
    headers = {"authorization": f"Bearer {signed()}", "accept": SSE}
    url = "/v1/sessions/s-1/events"
    async with AsyncExitStack() as stack:
        for status in (200, 200, 429):
            response = await stack.enter_async_context(served.http.stream("GET", url, headers=headers))
            assert response.status_code == status
        assert response.headers["retry-after"] == "5"
        assert json.loads(await response.aread())["code"] == "too_many_streams"
        another = {"authorization": f"Bearer {signed(jti='another')}", "accept": SSE}
        response = await stack.enter_async_context(served.http.stream("GET", url, headers=another))
        assert response.status_code == 200
    statuses: list[int] = []
    with anyio.fail_after(20):
        while 429 not in statuses:
            statuses.append((await served.http.get("/v1/sessions/s-1", headers=headers)).status_code)
    assert set(statuses[:-1]) <= {200}
    assert len(statuses) <= 4


async def test_who_fails_too_often_is_told_to_wait(site: Site) -> None:
    served = await site.gateway(auth=Auth(Keys.secret(SECRET)), max_failures=3)
    statuses = [(await served.http.get("/v1/sessions/s-1")).status_code for _ in range(5)]
    assert statuses == [401, 401, 401, 429, 429]
    good = await served.http.get("/v1/sessions/s-1", headers={"authorization": f"Bearer {signed()}"})
    assert good.status_code == 200


async def test_health_needs_no_token(world: World) -> None:
    for path in ("/healthz", "/readyz"):
        assert (await world.served.http.get(path)).status_code == 200


async def test_insecure_lets_everybody_do_everything_on_this_machine(site: Site) -> None:
    served = await site.gateway()
    assert (await served.http.get("/v1/sessions/s-1")).status_code == 200
    refused = await served.http.get("/v1/sessions/s-1", headers={"host": "evil.example"})
    assert (refused.status_code, refused.json()["code"]) == (403, "host_refused")
    refused = await served.http.post("/v1/sessions/s-1/turns", json=INPUT, headers={"origin": "https://evil.example"})
    assert (refused.status_code, refused.json()["code"]) == (403, "origin_refused")
