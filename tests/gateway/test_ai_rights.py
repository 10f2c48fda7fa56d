"""Who may do what at the AI SDK's endpoints."""

from __future__ import annotations

from typing import Any

import pytest

from agentrun.gateway import Auth, Keys
from tests.gateway.ai_http import Chat, user
from tests.gateway.conftest import Served, Site
from tests.gateway.tokens import SECRET, signed

EVERYTHING = ["read", "send", "cancel", "answer"]


@pytest.fixture
async def guarded(site: Site) -> Served:
    return await site.gateway(auth=Auth(Keys.secret(SECRET), issuer="tests"))


def bearer(rights: list[str] = EVERYTHING, **claims: Any) -> dict[str, str]:
    return {"authorization": f"Bearer {signed(rights=rights, **claims)}"}


async def say(served: Served, headers: dict[str, str], text: str = "hi", id: str = "u-1", **body: Any) -> int:
    sent = {"id": "s-1", "messages": [user(text, id)], **body}
    return (await served.http.post("/api/chat", json=sent, headers=headers)).status_code


async def test_without_a_token_nothing(guarded: Served) -> None:
    assert await say(guarded, {}) == 401
    for path in ("/api/chat/s-1", "/api/chat/s-1/stream"):
        assert (await guarded.http.get(path)).status_code == 401
    assert (await guarded.http.post("/api/chat/s-1/stop")).status_code == 401


@pytest.mark.parametrize(
    ("rights", "statuses"),
    [
        ([], (403, 403, 403, 403)),
        (["read"], (403, 200, 204, 403)),
        (["send"], (403, 403, 403, 403)),
        (["cancel"], (403, 403, 403, 200)),
        (["read", "send"], (200, 200, 200, 403)),
        (EVERYTHING, (200, 200, 200, 200)),
    ],
)
async def test_rights(guarded: Served, rights: list[str], statuses: tuple[int, int, int, int]) -> None:
    headers = bearer(rights)
    post = await say(guarded, headers)
    load = (await guarded.http.get("/api/chat/s-1", headers=headers)).status_code
    stream = (await guarded.http.get("/api/chat/s-1/stream", headers=headers)).status_code
    stop = (await guarded.http.post("/api/chat/s-1/stop", headers=headers)).status_code
    assert (post, load, stream, stop) == statuses


async def test_other_sessions_are_closed_however_they_are_named(guarded: Served) -> None:
    headers = bearer(sessions=["s-2"])
    assert await say(guarded, bearer()) == 200
    assert await say(guarded, headers) == 403
    for path in ("/api/chat/s-1", "/api/chat/s-1/stream", "/api/chat/s-1~u-1/stream", "/api/chat/%73-1/stream"):
        assert (await guarded.http.get(path, headers=headers)).status_code == 403
    assert (await guarded.http.post("/api/chat/s-1/stop", headers=headers)).status_code == 403


async def test_the_user_is_the_tokens(guarded: Served) -> None:
    assert await say(guarded, bearer(), user="mallory") == 200
    request = (await guarded.gateway.client.session("s-1").history()).turns["u-1"].request
    assert request is not None
    assert request.user == "ann"


async def test_agents_that_a_token_does_not_name(guarded: Served) -> None:
    headers = bearer(agents=["echo"])
    assert await say(guarded, headers, agent="other") == 403
    assert await say(guarded, headers, agent="echo") == 200


async def test_anothers_turn_is_not_stopped_interrupted_or_answered(guarded: Served) -> None:
    ann, bob = bearer(), bearer(sub="bob")
    async with guarded.http.stream(
        "POST", "/api/chat", json={"id": "s-1", "messages": [user("count 1000 10", "u-1")]}, headers=ann
    ) as response:
        assert response.status_code == 200
        assert (await guarded.http.post("/api/chat/s-1/stop", headers=bob)).status_code == 403
        assert await say(guarded, bob, "x", "u-2", on_busy="interrupt") == 403
        assert await say(guarded, bob, "x", "u-2", on_busy="rollback") == 403
        assert await say(guarded, bob, "x", "u-2", on_busy="steer") == 403
        assert await say(guarded, bob, "new", "u-1", messageId="u-1") == 403
        assert await say(guarded, bob, "count 1000 10", "u-1", trigger="regenerate-message") == 403
        stopped = await guarded.http.post("/api/chat/s-1/stop", headers=bearer([*EVERYTHING, "cancel:any"], sub="eve"))
        assert stopped.json()["status"] == "cancelled"
    assert await say(guarded, bob, "count 1000 10", "u-1", trigger="regenerate-message") == 403
    history = await guarded.gateway.client.session("s-1").history()
    assert (list(history.turns), history.turns["u-1"].by) == (["u-1"], "eve")


async def test_answers(guarded: Served) -> None:
    chat = Chat(guarded, "s-1")
    chat.headers |= bearer()
    await chat.say("approve 3 1", "u-1")
    chat.answer("deploy", approved=True)
    sent = {"id": "s-1", "messages": chat.messages}
    for headers in (bearer(sub="bob"), bearer(["read", "send"])):
        assert (await guarded.http.post("/api/chat", json=sent, headers=headers)).status_code == 403
    assert (await chat.post()).finish == "stop"


async def test_own_turns_are_stopped_and_regenerated(guarded: Served) -> None:
    headers = bearer()
    async with guarded.http.stream(
        "POST", "/api/chat", json={"id": "s-1", "messages": [user("count 1000 10", "u-1")]}, headers=headers
    ):
        stopped = (await guarded.http.post("/api/chat/s-1/stop", headers=headers)).json()
    assert (stopped["status"], stopped["receipts"][0]["turn"]) == ("cancelled", "u-1")
    assert await say(guarded, bearer(["read", "send"]), "count 3 1", "u-1", messageId="u-1") == 200
