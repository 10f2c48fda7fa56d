"""The native API over real HTTP: every route, every status."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx
import pytest

from agentrun.agent import Context, agent
from agentrun.gateway import Auth, Keys, mint
from agentrun.settings import ClientSettings
from tests.gateway.conftest import Frame, Served, Site
from tests.gateway.event_source import EventSource, GaveUp
from tests.worker.fleet import eventually

SESSION = "/v1/sessions/s"
TURNS = f"{SESSION}/turns"
EVENTS = f"{SESSION}/events"
LONG = "count 1000 20"
SSE = {"accept": "text/event-stream"}


@agent(name="asker", resume=True)
async def asker(ctx: Context) -> AsyncIterator[str]:
    choice = await ctx.ask("Which?", kind="choice", choices=["red", "blue"], id="q1")
    yield f"You said {choice}."


@pytest.fixture
async def asking(site: Site, served: Served) -> Served:
    """With an agent that asks, and soon lets go of its turn."""
    await site.worker(asker, ask_hold=0.05)
    return served


async def stored(site: Site, session: str = "s", after: int = 0) -> list[tuple[int, Any]]:
    events = site.client.session(session).events(after, follow=False)
    return [(event.offset, json.loads(event.raw)) async for event in events]


async def answered(served: Served, site: Site, input: Any = "one two three", **more: Any) -> dict[str, Any]:
    sent = await served.send("s", input, **more)
    await site.client.turn("s", sent["turn"]).result(timeout=20)
    return sent


async def in_state(served: Served, turn: str, *states: str) -> dict[str, Any]:
    with anyio.fail_after(10):
        while True:
            view = (await served.http.get(f"{TURNS}/{turn}")).json()
            if view.get("state") in states:
                return view
            await anyio.sleep(0.01)


async def saying(served: Served, turn: str) -> None:
    """Wait until the turn has said something."""
    async with served.sse(f"{TURNS}/{turn}/events") as frames:
        async for frame in frames:
            if '"text.delta"' in frame.get("data", ""):
                return


def pairs(frames: list[Frame]) -> list[tuple[int, Any]]:
    items = [json.loads(frame["data"]) for frame in frames if "data" in frame]
    assert [frame["id"] for frame in frames if "data" in frame] == [str(item["offset"]) for item in items]
    return [(item["offset"], item["event"]) for item in items]


def is_problem(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert (body["status"], body["code"]) == (status, code)
    assert body["detail"]


# ------------------------------------------------------------------------------------------------------------- send


async def test_a_turn_is_sent_and_answered(served: Served, site: Site) -> None:
    response = await served.http.post(
        TURNS,
        json={
            "id": "t-1",
            "agent": "echo",
            "input": {"role": "user", "content": "hallo"},
            "on_busy": "enqueue",
            "deadline": 60,
            "device": "phone",
            "parent": "p-1",
            "metadata": {"a": [1, None, {"b": "é"}]},
        },
    )
    assert (response.status_code, response.json()) == (202, {"session": "s", "turn": "t-1", "offset": 1})
    ((_, request),) = (await stored(site))[:1]
    assert 50 < request.pop("deadline") - time.time() < 61
    assert request == {
        "type": "turn.requested",
        "turn": "t-1",
        "agent": "echo",
        "input": {"role": "user", "content": "hallo"},
        "device": "phone",
        "parent": "p-1",
        "metadata": {"a": [1, None, {"b": "é"}]},
    }
    assert (await site.client.turn("s", "t-1").result(20)).text == "hallo"


async def test_sending_again_changes_nothing(served: Served, site: Site) -> None:
    first = await answered(served, site, "hello", id="t-1")
    assert await served.send("s", "hello", id="t-1") == first
    assert [event["type"] for _, event in await stored(site)].count("turn.requested") == 1


@pytest.mark.parametrize("other", [{"input": "another"}, {"input": "hello", "agent": "another"}])
async def test_an_id_names_one_request(served: Served, other: dict[str, str]) -> None:
    await served.send("s", "hello", id="t-1")
    is_problem(await served.http.post(TURNS, json={"id": "t-1", **other}), 409, "id_taken")


async def test_ids_are_minted_where_none_is_given(served: Served) -> None:
    first, second = [await served.send("s", "hello") for _ in range(2)]
    assert first["turn"] != second["turn"]


async def test_a_busy_session_can_refuse(served: Served) -> None:
    sent = await served.send("s", LONG)
    refused = await served.http.post(TURNS, json={"input": "now", "on_busy": "reject"})
    is_problem(refused, 409, "session_busy")
    await served.http.post(f"{TURNS}/{sent['turn']}/cancel")
    await served.send("s", "now", on_busy="reject")


async def test_a_full_session_says_so_and_when_to_try_again(site: Site) -> None:
    site.client.settings = ClientSettings(max_queued=2)
    served = await site.gateway(client=site.client)
    await served.send("s", LONG, id="t-1")
    await served.send("s", "next")
    refused = await served.http.post(TURNS, json={"input": "more"})
    is_problem(refused, 429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1
    assert (await served.send("s", LONG, id="t-1"))["offset"] == 1, "what was sent before is not refused"


@pytest.mark.parametrize("policy", ["interrupt", "rollback"])
async def test_a_turn_can_interrupt(served: Served, site: Site, policy: str) -> None:
    sent = await served.send("s", LONG)
    await saying(served, sent["turn"])
    await answered(served, site, "hello", on_busy=policy)
    view = (await served.http.get(f"{TURNS}/{sent['turn']}")).json()
    assert view["state"] == "cancelled"
    assert view.get("rolled_back", False) == (policy == "rollback")


async def test_the_deadline_is_in_seconds_from_now(served: Served) -> None:
    sent = await served.send("s", LONG, deadline=0.3)
    view = await in_state(served, sent["turn"], "expired")
    assert view["deadline"] < time.time()


BODIES: list[tuple[bytes, int, str]] = [
    (b"", 400, "not_json"),
    (b"   ", 400, "not_json"),
    (b"hello", 400, "not_json"),
    (b'{"input":"x"', 400, "not_json"),
    (b'{"input":"x"} {}', 400, "not_json"),
    (b'{"input":"\xff"}', 400, "not_json"),
    (b'{"input":"\\ud800"}', 400, "not_json"),
    (b'{"input":NaN}', 400, "not_json"),
    (b'{"input":' + b"[" * 5000 + b"]" * 5000 + b"}", 400, "not_json"),
    (b'{"input":1e999}', 422, "invalid_body"),
    (b'{"input":' + b"9" * 5000 + b"}", 422, "invalid_body"),
    (b"null", 422, "invalid_body"),
    (b"[]", 422, "invalid_body"),
    (b'"hello"', 422, "invalid_body"),
    (b"{}", 422, "invalid_body"),
    (b'{"input":"x","inputs":1}', 422, "invalid_body"),
    (b'{"input":"x","user":"mallory"}', 422, "invalid_body"),
    (b'{"input":"x","trace":{}}', 422, "invalid_body"),
    (b'{"input":"x","id":1}', 422, "invalid_body"),
    (b'{"input":"x","id":""}', 422, "invalid_input"),
    (b'{"input":"x","id":"a b"}', 422, "invalid_input"),
    (b'{"input":"x","id":"' + b"a" * 129 + b'"}', 422, "invalid_input"),
    (b'{"input":"x","id":"a.>"}', 422, "invalid_input"),
    (b'{"input":"x","id":"a\\u0000"}', 422, "invalid_input"),
    (b'{"input":"x","agent":"a*"}', 422, "invalid_input"),
    (b'{"input":"x","on_busy":"explode"}', 422, "invalid_body"),
    (b'{"input":"x","on_busy":"steer","replaces":"t"}', 422, "invalid_input"),
    (b'{"input":"x","deadline":-1}', 422, "invalid_input"),
    (b'{"input":"x","deadline":0}', 422, "invalid_input"),
    (b'{"input":"x","deadline":"soon"}', 422, "invalid_body"),
    (b'{"input":"x","deadline":true}', 422, "invalid_body"),
    (b'{"input":"x","deadline":1e400}', 422, "invalid_body"),
    (b'{"input":"x","metadata":[]}', 422, "invalid_body"),
    (b'{"input":"x","metadata":null}', 422, "invalid_body"),
    (b'{"input":"x","replaces":"a b"}', 422, "invalid_input"),
    (b'{"input":"x","parent":5}', 422, "invalid_body"),
]


@pytest.mark.parametrize(("body", "status", "code"), BODIES, ids=[body[:40] for body, _, _ in BODIES])
async def test_a_body_that_cannot_be_used_is_refused(
    served: Served, site: Site, body: bytes, status: int, code: str
) -> None:
    is_problem(await served.http.post(TURNS, content=body), status, code)
    assert await stored(site) == []


@pytest.mark.parametrize(
    "input", ["", None, 0, 10**30, 1.5, [], {}, [{"type": "text", "text": "x"}], "\u0000", "😀" * 1000]
)
async def test_any_json_is_an_input(served: Served, site: Site, input: Any) -> None:
    await served.send("s", input)
    assert (await stored(site))[0][1]["input"] == input


async def test_an_input_may_be_as_deep_as_a_worker_can_read(served: Served, site: Site) -> None:
    """What is taken is answered, by an answer or by a refusal; it stops no reader."""
    taken = 0
    for depth in (50, 200, 400, 600, 800, 850, 900, 925, 950, 960, 970, 980, 990, 1100):
        body = b'{"input":' + b"[" * depth + b"]" * depth + b"}"
        response = await served.http.post(TURNS, content=body)
        assert response.status_code in (202, 400, 422), response.text
        taken += response.status_code == 202
    assert taken >= 3
    await served.http.post(TURNS, json={"id": "last", "input": "hello"})
    assert (await site.client.turn("s", "last").result(20)).text == "hello"
    assert len((await served.http.get(EVENTS)).json()["events"]) == len(await stored(site))


async def test_where_no_agent_is_named_one_is_asked_for(site: Site) -> None:
    served = await site.gateway(agent=None)
    await served.send("s", "x")  # there is only one
    other = await site.gateway(agent=None)
    await site.client.broker.turns.open("another")
    is_problem(await other.http.post(TURNS, json={"input": "x"}), 422, "no_agent")
    await other.send("s", "x", agent="echo")


async def test_an_input_too_large_for_the_broker_is_refused(site: Site) -> None:
    served = await site.gateway(max_body=8 << 20)
    is_problem(await served.http.post(TURNS, json={"input": "x" * 2_000_000}), 413, "too_large")


async def test_a_body_too_large_for_the_gateway_is_refused(served: Served) -> None:
    is_problem(await served.http.post(TURNS, json={"input": "x" * 2_000_000}), 413, "too_large")


# ----------------------------------------------------------------------------------------------------------- events


async def test_server_sent_events_are_the_log(served: Served, site: Site) -> None:
    await answered(served, site)
    events = await stored(site)
    async with served.http.stream("GET", EVENTS, headers=SSE) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache, no-transform"
        assert response.headers["x-accel-buffering"] == "no"
        assert "content-length" not in response.headers
    async with served.sse(EVENTS) as frames:
        found = [await anext(frames)]
        assert found[0].keys() == {"retry"}
        assert 500 <= int(found[0]["retry"]) <= 1000, "clients that lost a gateway come back by and by"
        while len(found) <= len(events):
            found.append(await anext(frames))
    assert pairs(found) == events
    assert set(json.loads(found[1]["data"])) == {"offset", "time", "event"}
    assert abs(json.loads(found[1]["data"])["time"] - time.time()) < 60


@pytest.mark.parametrize("how", ["query", "header", "both"])
async def test_a_stream_goes_on_behind_any_offset(served: Served, site: Site, how: str) -> None:
    await answered(served, site, "a b c d")
    events = await stored(site)
    for after in range(len(events) + 1):
        headers = {} if how == "query" else {"last-event-id": str(after)}
        query = {"query": f"?after={after}", "header": "", "both": "?after=1"}[how]
        async with served.sse(EVENTS + query, headers=headers) as frames:
            found: list[Frame] = []
            with anyio.move_on_after(0.3 if after == len(events) else 10):
                async for frame in frames:
                    found.append(frame)
                    if frame.get("id") == str(len(events)):
                        break
        assert pairs(found) == events[after:]


@pytest.mark.parametrize("bad", ["-1", "x", "1.5", "", " 1", "٣", "1e3", "0x1", "9" * 16, "9" * 5000])
async def test_an_offset_that_is_none_is_refused(served: Served, bad: str) -> None:
    is_problem(await served.http.get(EVENTS, params={"after": bad}), 400, "bad_offset")
    is_problem(await served.http.get(EVENTS, params={"after": bad}, headers=SSE), 400, "bad_offset")
    if bad.isascii() and bad.strip() == bad != "":
        is_problem(await served.http.get(EVENTS, headers={"last-event-id": bad}), 400, "bad_offset")


async def test_an_offset_beyond_the_end_is_gone(served: Served, site: Site) -> None:
    await answered(served, site)
    end = len(await stored(site))
    for headers in ({}, SSE):
        is_problem(await served.http.get(f"{EVENTS}?after={end + 1}", headers=headers), 410, "session_gone")
        is_problem(await served.http.get("/v1/sessions/none/events?after=1", headers=headers), 410, "session_gone")


async def test_silence_is_filled_with_comments(site: Site) -> None:
    served = await site.gateway(keep_alive=0.1)
    began = time.monotonic()
    async with served.sse(EVENTS) as frames:
        comments = [frame async for frame in _first(frames, 6)][1:]
    assert comments == [{"": "keep-alive"}] * 5
    assert 0.4 < time.monotonic() - began < 3


async def test_a_stream_of_one_turn_is_kept_alive_while_others_talk(site: Site) -> None:
    served = await site.gateway(keep_alive=0.1)
    await served.send("s", "count 100 10")
    waiting = await served.send("s", "hello")
    async with served.sse(f"{TURNS}/{waiting['turn']}/events") as frames:
        found = [frame async for frame in frames]
    assert found.count(Frame({"": "keep-alive"})) >= 5
    assert pairs(found)[-1][1]["type"] == "turn.completed"


async def _first(frames: AsyncIterator[Frame], count: int) -> AsyncIterator[Frame]:
    for _ in range(count):
        yield await anext(frames)


async def test_a_stream_ends_cleanly_in_time_and_is_resumed(site: Site) -> None:
    served = await site.gateway(stream_seconds=0.3, retry=0.01)
    sent = await served.send("s", "count 60 20")
    source = EventSource(served.http, EVENTS)
    found = await source.until("turn.completed")
    assert [(item["offset"], item["event"]) for item in found] == await stored(site)
    assert source.connections >= 4
    assert source.broken == 0
    view = (await served.http.get(f"{TURNS}/{sent['turn']}")).json()
    assert view["message"]["parts"][0]["text"].split()[-1] == "w59"


async def test_a_gateway_that_ends_ends_its_streams_cleanly_and_its_successor_goes_on(site: Site) -> None:
    found: list[dict[str, Any]] = []

    async def read() -> None:
        found.extend(await source.until("turn.completed"))

    async with httpx.AsyncClient() as http, anyio.create_task_group() as group:
        async with site.serving(retry=0.01) as first:
            source = EventSource(http, first.url + EVENTS)
            group.start_soon(read)
            sent = await first.send("s", "count 80 20")
            await saying(first, sent["turn"])
            first.gateway.drain()
            is_problem(await first.http.get("/readyz"), 503, "not_ready")
            began = time.monotonic()
        assert time.monotonic() - began < 3, "its streams held it up"
        assert source.broken == 0
        async with site.serving(port=int(first.url.rpartition(":")[2])):
            with anyio.fail_after(20):
                while not found:  # noqa: ASYNC110 - it has no event
                    await anyio.sleep(0.01)
    assert [(item["offset"], item["event"]) for item in found] == await stored(site)
    assert source.broken == 0


async def test_a_turns_stream_ends_behind_its_last_event_and_stays_ended(served: Served, site: Site) -> None:
    first = await served.send("s", "count 5 5")
    second = await served.send("s", "hello")
    for turn in (first["turn"], second["turn"]):
        source = EventSource(served.http, f"{TURNS}/{turn}/events")
        found = [item async for item in source.items()]
        assert found[0]["event"]["type"] == "turn.requested"
        assert {item["event"]["turn"] for item in found} == {turn}
        assert found[-1]["event"]["type"] == "turn.completed"
        assert source.connections == 2
        assert source.broken == 0
    events = await stored(site)
    assert len(events) == (await site.client.session("s").history()).offset
    end = next(offset for offset, event in events if event["type"] == "turn.completed")
    path = f"{TURNS}/{first['turn']}/events"
    assert (await served.http.get(f"{path}?after={end}", headers=SSE)).status_code == 204
    assert (await served.http.get(path, headers=SSE | {"last-event-id": str(end + 1)})).status_code == 204
    page = (await served.http.get(f"{path}?after={end}")).json()
    assert page == {"offset": end, "events": [], "ended": True}


async def test_a_turns_events_from_any_offset(served: Served, site: Site) -> None:
    sent = await answered(served, site, "a b c")
    await answered(served, site, "other")
    mine = [(offset, event) for offset, event in await stored(site) if event["turn"] == sent["turn"]]
    for after in range(mine[-1][0]):
        body = (await served.http.get(f"{TURNS}/{sent['turn']}/events", params={"after": after})).json()
        found = [(item["offset"], item["event"]) for item in body["events"]]
        assert found == [(offset, event) for offset, event in mine if offset > after]
        assert (body["offset"], body["ended"]) == (mine[-1][0], True)


async def test_a_stopped_session_is_among_a_turns_events(served: Served) -> None:
    sent = await served.send("s", LONG)
    waiting = await served.send("s", "next")
    await saying(served, sent["turn"])
    await served.http.post(f"{SESSION}/cancel", json={"reason": "enough"})
    body = (await served.http.get(f"{TURNS}/{waiting['turn']}/events?wait=10")).json()
    types = [item["event"]["type"] for item in body["events"]]
    assert types[0] == "turn.requested"
    assert "turn.cancelled" in types


async def test_a_turn_that_was_taken_in_ends_with_that(served: Served) -> None:
    running = await served.send("s", "steer 200 10")
    await saying(served, running["turn"])
    steer = (await served.http.post(f"{TURNS}/{running['turn']}/steer", json={"input": "left"})).json()
    source = EventSource(served.http, f"{TURNS}/{steer['turn']}/events")
    with anyio.fail_after(10):
        found = [item["event"] async for item in source.items()]
    assert [event["type"] for event in found] == ["turn.requested", "steer.consumed"]
    assert found[-1]["turn"] == running["turn"]
    view = await in_state(served, steer["turn"], "consumed")
    assert view["consumed_by"] == running["turn"]


async def test_a_page_of_events(served: Served, site: Site) -> None:
    await answered(served, site, "a b c d e")
    events = await stored(site)
    body = (await served.http.get(EVENTS)).json()
    assert [(item["offset"], item["event"]) for item in body["events"]] == events
    assert body["offset"] == events[-1][0]
    after, found = 0, []
    while after < events[-1][0]:
        body = (await served.http.get(EVENTS, params={"after": after, "limit": 3})).json()
        assert 1 <= len(body["events"]) <= 3
        found += [(item["offset"], item["event"]) for item in body["events"]]
        after = body["offset"]
    assert found == events
    assert (await served.http.get(EVENTS, params={"after": after})).json() == {"offset": after, "events": []}


async def test_a_large_history_comes_in_pages(served: Served, site: Site) -> None:
    await answered(served, site, "count 3000 0")
    after, found, pages = 0, 0, 0
    while True:
        body = (await served.http.get(EVENTS, params={"after": after})).json()
        if not body["events"]:
            break
        assert [item["offset"] for item in body["events"]] == list(range(after + 1, body["offset"] + 1))
        found += len(body["events"])
        pages += 1
        after = body["offset"]
    assert found == (await stored(site))[-1][0]
    assert pages == -(-found // 1000)


async def test_a_long_poll_waits_for_the_first_event(served: Served, site: Site) -> None:
    responses: list[httpx.Response] = []

    async def poll() -> None:
        responses.append(await served.http.get(EVENTS, params={"wait": 20}))

    async with anyio.create_task_group() as group:
        group.start_soon(poll)
        await anyio.sleep(0.3)
        assert responses == []
        await served.send("s", "hello")
    body = responses[0].json()
    assert body["events"][0]["offset"] == 1
    began = time.monotonic()
    await answered(served, site)
    end = (await stored(site))[-1][0]
    empty = await served.http.get(EVENTS, params={"wait": 1, "after": end})
    assert empty.json() == {"offset": end, "events": []}
    assert time.monotonic() - began > 0.9


async def test_polling_reads_a_whole_answer(served: Served, site: Site) -> None:
    sent = await served.send("s", "count 50 10")
    after, found = 0, []
    with anyio.fail_after(20):
        while True:
            path = f"{TURNS}/{sent['turn']}/events"
            body = (await served.http.get(path, params={"wait": 20, "after": after})).json()
            found += [(item["offset"], item["event"]) for item in body["events"]]
            after = body["offset"]
            if body.get("ended"):
                break
    assert found == await stored(site)


@pytest.mark.parametrize("query", ["wait=-1", "wait=61", "wait=x", "wait=1.5", "wait=", "limit=0", "limit=1001"])
async def test_what_is_asked_for_has_bounds(served: Served, query: str) -> None:
    is_problem(await served.http.get(f"{EVENTS}?{query}"), 400, "bad_parameter")


@pytest.mark.parametrize("path", [EVENTS, f"{TURNS}/t-1/events"])
async def test_who_goes_away_while_it_waits_is_forgotten(site: Site, path: str) -> None:
    served = await site.gateway(max_streams=2, linger=0.1, auth=Auth(Keys.secret(SECRET)))
    token = mint(SECRET, user="u", sessions=["s"], rights=["read", "send"], ttl=60)
    headers = {"authorization": f"Bearer {token}"}
    await served.http.post(TURNS, json={"input": LONG, "id": "t-1"}, headers=headers)
    for accept in ("application/json", "text/event-stream"):
        for _ in range(4):
            with anyio.move_on_after(0.2):
                await served.http.get(f"{path}?wait=20&after=3", headers=headers | {"accept": accept})
            await anyio.sleep(0.1)
    await served.http.post(f"{TURNS}/t-1/cancel", headers=headers)
    await eventually(lambda: served.gateway.hub.watched <= 1)  # one watches what is revoked


SECRET = "0123456789abcdef" * 2


# ------------------------------------------------------------------------------------------------------------- state


async def test_a_session_that_has_not_begun_is_empty(served: Served) -> None:
    assert (await served.http.get(SESSION)).json() == {"session": "s", "offset": 0, "busy": False, "turns": []}
    assert (await served.http.get(EVENTS)).json() == {"offset": 0, "events": []}


async def test_folded_and_followed_nothing_is_missed_and_nothing_comes_twice(served: Served, site: Site) -> None:
    sent = await served.send("s", "count 40 20")
    await saying(served, sent["turn"])
    folded = (await served.http.get(SESSION)).json()
    assert folded["busy"] is True
    (turn,) = folded["turns"]
    text = turn["message"]["parts"][0]["text"]
    async with served.sse(f"{EVENTS}?after={folded['offset']}") as frames:
        async for frame in frames:
            event = json.loads(frame["data"])["event"] if "data" in frame else {"type": ""}
            text += event.get("text", "")
            if event["type"] == "turn.completed":
                break
    assert text == "".join(f"w{i} " for i in range(40))
    folded = (await served.http.get(SESSION)).json()
    assert (folded["busy"], folded["offset"]) == (False, (await stored(site))[-1][0])


async def test_a_turn_queued_running_and_ended_in_every_way(served: Served, site: Site) -> None:
    first = await served.send("s", LONG, metadata={"a": 1}, device="d")
    queued = await served.send("s", "queued")
    await saying(served, first["turn"])
    view = await in_state(served, first["turn"], "running")
    assert (view["attempt"], view["agent"], view["input"]) == (1, "echo", LONG)
    assert (view["metadata"], view["device"], view["session"]) == ({"a": 1}, "d", "s")
    assert view["worker"]
    assert view["through"] >= view["offset"]
    assert view["message"]["parts"][0]["text"].startswith("w0 ")
    waits = await in_state(served, queued["turn"], "queued")
    assert waits["attempt"] == 0
    await served.http.post(f"{TURNS}/{first['turn']}/cancel", json={"reason": "enough"})
    view = await in_state(served, first["turn"], "cancelled")
    assert view["reason"] == "enough"
    assert view["ended_at"] > view["offset"]
    done = await in_state(served, queued["turn"], "completed")
    assert done["message"]["parts"] == [{"type": "text", "text": "queued"}]
    assert done["finish_reason"] == "stop"
    failed = await in_state(served, (await served.send("s", "fail"))["turn"], "failed")
    assert failed["error"] == {"code": "asked_for", "message": "as you asked"}
    expired = await in_state(served, (await served.send("s", LONG, deadline=0.2))["turn"], "expired")
    assert expired["deadline"]


async def test_a_turn_that_was_replaced(served: Served, site: Site) -> None:
    first = await answered(served, site, "one")
    second = await answered(served, site, "two")
    third = await answered(served, site, "other", replaces=first["turn"])
    turns = {turn["id"]: turn for turn in (await served.http.get(SESSION)).json()["turns"]}
    assert turns[first["turn"]]["replaced_by"] == turns[second["turn"]]["replaced_by"] == third["turn"]
    assert turns[third["turn"]]["replaces"] == first["turn"]
    assert "replaced_by" not in turns[third["turn"]]


async def test_a_question_and_its_answer(asking: Served, site: Site) -> None:
    sent = await asking.send("s", "go", agent="asker")
    view = await in_state(asking, sent["turn"], "suspended")
    (question,) = view["questions"]
    assert (question["request"], question["kind"], question["choices"]) == ("q1", "choice", ["red", "blue"])
    path = f"{TURNS}/{sent['turn']}/answer"
    is_problem(await asking.http.post(path, json={"request": "q1", "value": "green"}), 422, "invalid_input")
    is_problem(await asking.http.post(path, json={"request": "q2", "value": "red"}), 409, "not_waiting")
    is_problem(await asking.http.post(path, json={"request": "q1"}), 422, "invalid_body")
    is_problem(
        await asking.http.post(f"{TURNS}/none/answer", json={"request": "q1", "value": 1}), 404, "turn_not_found"
    )
    response = await asking.http.post(path, json={"request": "q1", "value": "red"})
    assert response.status_code == 200
    said = response.json()
    assert (said["session"], said["turn"]) == ("s", sent["turn"])
    again = await asking.http.post(path, json={"request": "q1", "value": "red"})
    assert (again.status_code, again.json()) == (200, said)
    is_problem(await asking.http.post(path, json={"request": "q1", "value": "blue"}), 409, "not_waiting")
    assert (await site.client.turn("s", sent["turn"]).result(20)).text == "You said red."
    (question,) = (await asking.http.get(f"{TURNS}/{sent['turn']}")).json()["questions"]
    assert (question["answer"], question["answered_at"]) == ("red", said["offset"])


async def test_of_answers_at_once_one_counts(asking: Served, site: Site) -> None:
    sent = await asking.send("s", "go", agent="asker")
    await in_state(asking, sent["turn"], "suspended")
    statuses: list[int] = []

    async def answer(value: str) -> None:
        response = await asking.http.post(f"{TURNS}/{sent['turn']}/answer", json={"request": "q1", "value": value})
        statuses.append(response.status_code)

    async with anyio.create_task_group() as group:
        group.start_soon(answer, "red")
        group.start_soon(answer, "blue")
    assert sorted(statuses) == [200, 409]


# -------------------------------------------------------------------------------------------------------------- stop


async def test_a_stop_has_a_receipt(site: Site, served: Served) -> None:
    site.client.settings = ClientSettings(cancel_wait=0.3)
    mine = await site.gateway(client=site.client)
    sent = await served.send("s", LONG)
    await saying(served, sent["turn"])
    path = f"{TURNS}/{sent['turn']}/cancel"
    receipt = (await served.http.post(path, json={"reason": "enough"})).json()
    assert receipt["status"] == "cancelled"
    assert 0 <= receipt["took"] < 5
    events = dict(await stored(site))
    assert events[receipt["offset"]]["type"] == "turn.cancelled"
    assert events[receipt["offset"]]["reason"] == "enough"
    again = (await served.http.post(path)).json()
    assert (again["status"], again["offset"]) == ("already_ended", receipt["offset"])
    none = await served.http.post(f"{TURNS}/none/cancel")
    assert (none.status_code, none.json()["status"]) == (200, "not_found")
    waits = await mine.send("s", "hello", agent="nobody")
    pending = (await mine.http.post(f"{TURNS}/{waits['turn']}/cancel", content=b"")).json()
    assert pending["status"] == "pending"
    assert dict(await stored(site))[pending["offset"]]["type"] == "turn.cancel"


@pytest.mark.parametrize("body", [b"", b"  ", b"{}", b'{"reason":null}', b'{"reason":"x"}'])
async def test_a_stop_needs_no_body(served: Served, body: bytes) -> None:
    assert (await served.http.post(f"{SESSION}/cancel", content=body)).json()["status"] == "not_found"


@pytest.mark.parametrize(("body", "status"), [(b"x", 400), (b"[]", 422), (b'{"reason":1}', 422), (b'{"by":"x"}', 422)])
async def test_a_stop_with_a_body_that_is_none_is_refused(served: Served, body: bytes, status: int) -> None:
    assert (await served.http.post(f"{SESSION}/cancel", content=body)).status_code == status


async def test_a_whole_session_is_stopped(served: Served) -> None:
    sent = [await served.send("s", LONG) for _ in range(3)]
    await saying(served, sent[0]["turn"])
    assert (await served.http.post(f"{SESSION}/cancel")).json()["status"] == "cancelled"
    for turn in sent:
        await in_state(served, turn["turn"], "cancelled")
    assert (await served.http.post(f"{SESSION}/cancel")).json()["status"] == "already_ended"


# ------------------------------------------------------------------------------------------------------------- steer


async def test_steering(served: Served, site: Site) -> None:
    sent = await served.send("s", "steer 100 10")
    await saying(served, sent["turn"])
    path = f"{TURNS}/{sent['turn']}/steer"
    response = await served.http.post(path, json={"input": "left", "id": "st-1"})
    assert response.status_code == 202
    assert response.json()["turn"] == "st-1"
    assert (await served.http.post(path, json={"input": "left", "id": "st-1"})).json() == response.json()
    is_problem(await served.http.post(path, json={"input": "right", "id": "st-1"}), 409, "id_taken")
    is_problem(await served.http.post(path, json={}), 422, "invalid_body")
    is_problem(await served.http.post(f"{TURNS}/none/steer", json={"input": "x"}), 404, "turn_not_found")
    text = (await site.client.turn("s", sent["turn"]).result(20)).text
    assert text.count("[steered: left]") == 1


# ------------------------------------------------------------------------------------------------------------ delete


async def test_a_session_is_deleted_under_its_readers(served: Served, site: Site) -> None:
    await answered(served, site)
    end = (await stored(site))[-1][0]
    ended: list[str] = []

    async def read() -> None:
        source = EventSource(served.http, EVENTS)
        try:
            async for item in source.items():
                if item["offset"] == end:
                    ready.set()
        except GaveUp as gave_up:
            ended.append(str(gave_up))

    ready = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await ready.wait()
        response = await served.http.delete(SESSION)
        assert (response.status_code, response.content) == (204, b"")
    assert ended[0].startswith("410")
    assert (await served.http.get(EVENTS)).json() == {"offset": 0, "events": []}
    assert (await served.http.get(SESSION)).json()["turns"] == []
    assert (await served.http.delete(SESSION)).status_code == 204
    assert (await served.send("s", "anew"))["offset"] == 1


# ------------------------------------------------------------------------------------------------------ the listing


async def test_sessions_are_listed_newest_first(served: Served, site: Site) -> None:
    for name in ("a", "b", "c"):
        sent = await served.send(name, "hello")
        await site.client.turn(name, sent["turn"]).result(20)
    await served.send("b", LONG)
    listed = (await served.http.get("/v1/sessions")).json()["sessions"]
    assert [entry["session"] for entry in listed] == ["b", "c", "a"]
    assert [entry["busy"] for entry in listed] == [True, False, False]
    assert listed[1]["offset"] == (await stored(site, "c"))[-1][0]
    assert [e["session"] for e in (await served.http.get("/v1/sessions?limit=1")).json()["sessions"]] == ["b"]
    for bad in ("0", "1001", "x", ""):
        is_problem(await served.http.get(f"/v1/sessions?limit={bad}"), 400, "bad_parameter")


async def test_sessions_are_listed_only_where_that_is_wanted(site: Site) -> None:
    served = await site.gateway(list_sessions=False)
    is_problem(await served.http.get("/v1/sessions"), 404, "not_listed")


# ------------------------------------------------------------------------------------------- paths, methods, errors


@pytest.mark.parametrize("name", ["a.b", "a%20b", "a*", "%3E", "a" * 129, "%00", "%C3%A9", "a%2Fb%2Fc", "..%2F"])
async def test_an_id_that_is_none_is_refused(served: Served, name: str) -> None:
    for path in ("", "/events", "/turns/t/events", "/turns/t"):
        response = await served.http.get(f"/v1/sessions/{name}{path}")
        assert response.status_code in (404, 422), response.text
        assert response.headers["content-type"] == "application/problem+json"
    response = await served.http.get(f"{TURNS}/{name}")
    assert response.status_code in (404, 422)
    for method, path in (("POST", "/turns"), ("POST", "/cancel"), ("DELETE", "")):
        response = await served.http.request(method, f"/v1/sessions/{name}{path}", json={"input": "x"})
        assert response.status_code in (404, 405, 422), response.text


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/sessions/", f"{SESSION}/", f"{TURNS}/", "/v2/sessions", "/x"])
async def test_a_path_that_is_none_is_a_problem(served: Served, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        is_problem(await served.http.request(method, path), 404, "no_such_path")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/v1/sessions", "GET"),
        ("PUT", SESSION, "GET"),
        ("POST", SESSION, "GET"),
        ("GET", TURNS, "POST"),
        ("GET", f"{SESSION}/cancel", "POST"),
        ("POST", f"{TURNS}/t", "GET"),
        ("DELETE", f"{TURNS}/t", "GET"),
        ("POST", f"{TURNS}/t/events", "GET"),
        ("GET", f"{TURNS}/t/steer", "POST"),
        ("POST", "/healthz", "GET"),
        ("POST", "/v1/openapi.json", "GET"),
    ],
)
async def test_a_method_that_is_none_is_a_problem(served: Served, method: str, path: str, allowed: str) -> None:
    response = await served.http.request(method, path)
    is_problem(response, 405, "method_not_allowed")
    assert allowed in response.headers["allow"]


@pytest.mark.parametrize("path", [SESSION, EVENTS, f"{TURNS}/t-1", f"{TURNS}/t-1/events", "/healthz", "/v1/sessions"])
@pytest.mark.parametrize("headers", [{}, SSE])
async def test_head_answers_at_once_and_without_a_body(served: Served, path: str, headers: dict[str, str]) -> None:
    await served.send("s", LONG, id="t-1")
    with anyio.fail_after(20):
        response = await served.http.head(path, headers=headers)
    assert (response.status_code, response.content) == (200, b"")


async def test_a_turn_that_is_none_is_a_problem(served: Served) -> None:
    for path in ("", "/events"):
        is_problem(await served.http.get(f"{TURNS}/none{path}"), 404, "turn_not_found")
    is_problem(await served.http.get(f"{TURNS}/none/events", headers=SSE), 404, "turn_not_found")


@pytest.mark.parametrize("name", ["agentrun--revoked", "agentrun--probe", "agentrun--"])
async def test_the_gateways_own_sessions_are_not_there(served: Served, name: str) -> None:
    for path in ("", "/events", "/turns/t", "/turns/t/events"):
        assert (await served.http.get(f"/v1/sessions/{name}{path}")).status_code == 404
        assert (await served.http.get(f"/v1/sessions/{name}{path}", headers=SSE)).status_code == 404
    for path, body in (
        ("/turns", {"input": "x"}),
        ("/cancel", {}),
        ("/turns/t/cancel", {}),
        ("/turns/t/steer", {"input": "x"}),
        ("/turns/t/answer", {"request": "q", "value": 1}),
    ):
        assert (await served.http.post(f"/v1/sessions/{name}{path}", json=body)).status_code == 404
    assert (await served.http.delete(f"/v1/sessions/{name}")).status_code == 404


async def test_an_error_nobody_expected_is_a_problem_that_says_nothing(
    served: Served, site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the password is swordfish")

    monkeypatch.setattr(type(served.gateway.client.broker.log), "last", broken)
    response = await served.http.post(TURNS, json={"input": "x"})
    is_problem(response, 500, "internal")
    assert "swordfish" not in response.text
    assert "swordfish" in caplog.text


async def test_health_and_readiness(served: Served) -> None:
    assert (await served.http.get("/healthz")).json() == {"status": "ok"}
    assert (await served.http.get("/readyz")).json() == {"status": "ready", "watched": 0}
    async with served.sse(EVENTS) as frames:
        await anext(frames)
        assert (await served.http.get("/readyz")).json()["watched"] == 1


# --------------------------------------------------------------------------------------------------- broker is away


async def test_while_the_broker_is_away(site: Site) -> None:
    client, broker = site.faulty(send_timeout=0.5)
    line: Any = broker._line
    served = await site.gateway(client=client, outage=0.3, retry=0.05)
    sent = await served.send("s", "count 100 10")
    source = EventSource(served.http, EVENTS)
    found: list[dict[str, Any]] = []

    async def read() -> None:
        found.extend(await source.until("turn.completed"))

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await saying(served, sent["turn"])
        line.cut(60)
        await eventually(lambda: served.gateway.hub.lost)
        is_problem(await served.http.get("/readyz"), 503, "not_ready")
        refused = await served.http.get(SESSION)
        is_problem(refused, 503, "unavailable")
        assert refused.headers["retry-after"]
        is_problem(await served.http.get("/v1/sessions/other/events"), 503, "unavailable")
        # A plain EventSource never comes back after an error, so it is given none.
        for path in ("/v1/sessions/other/events", f"{TURNS}/{sent['turn']}/events"):
            response = await served.http.get(path, headers=SSE)
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            assert response.text.startswith("retry: ")
            assert "data:" not in response.text
        assert (await served.http.get("/healthz")).status_code == 200
        line.mend()
    assert [(item["offset"], item["event"]) for item in found] == await stored(site)
    assert source.connections == 1
    await eventually(lambda: not served.gateway.hub.lost)
    assert (await served.http.get("/readyz")).status_code == 200


async def test_junk_in_a_log_reaches_no_client_as_it_is(served: Served, site: Site) -> None:
    from agentrun.broker import Kind, Pending

    log = site.client.broker.log
    bodies = (b"junk", b'{"type":"x.y"},{"a":1', b"\xff", b'{"type":"turn.completed","turn":"t","attempt":1}')
    for body in bodies:
        await log.append("s", body, kind=Kind.CANCEL, after=await log.last("s"), pending=Pending())
    page = (await served.http.get(EVENTS)).json()
    assert [item["event"] for item in page["events"]] == [{"type": "unusable"}] * len(bodies)
    async with served.sse(EVENTS) as frames:
        found = [frame async for frame in _first(frames, 1 + len(bodies))]
    assert [event for _, event in pairs(found)] == [{"type": "unusable"}] * len(bodies)
    assert (await served.http.get(SESSION)).json()["turns"] == []
