from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import anyio
import httpx
import pytest

from agentrun.gateway import Auth, Keys, durable, hub, mint
from tests.gateway.conftest import Frame, Served, Site

EVENTS = "/v1/sessions/s/events"
ALL = f"{EVENTS}?offset=-1"
SECRET = "0123456789abcdef" * 2


async def answered(served: Served, site: Site, input: str = "one two three", session: str = "s") -> None:
    sent = await served.send(session, input)
    await site.client.turn(session, sent["turn"]).result(timeout=20)


async def stored(site: Site, session: str = "s", after: int = 0) -> list[tuple[int, Any]]:
    events = site.client.session(session).events(after, follow=False)
    return [(event.offset, json.loads(event.raw)) async for event in events]


def pairs(items: list[dict[str, Any]]) -> list[tuple[int, Any]]:
    return [(item["offset"], item["event"]) for item in items]


def token(*, sessions: Sequence[str] = ("s",), rights: Sequence[str] = ("read",), ttl: float = 60.0) -> str:
    return mint(SECRET, user="u", sessions=sessions, rights=rights, ttl=ttl)


async def served_directly(site: Site) -> None:
    turn = await site.client.session("s").send("one two three")
    await turn.result(timeout=20)


def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an answer be large from ten items on."""
    monkeypatch.setattr(durable, "_MOST", 10)
    monkeypatch.setattr(hub, "_TAKE", 10)


def wire(offset: int) -> str:
    return f"{offset:016}"


async def read_frames(frames: Any, until: int) -> list[Frame]:
    """The data and control frames up to the one whose offset is ``until`` and says so."""
    found: list[Frame] = []
    with anyio.fail_after(20):
        async for frame in frames:
            if "event" not in frame:
                continue
            found.append(frame)
            if frame["event"] == "control" and json.loads(frame["data"])["streamNextOffset"] == wire(until):
                break
    return found


async def test_catching_up_gives_all_there_is_and_where_to_go_on(served: Served, site: Site) -> None:
    await answered(served, site)
    response = await served.http.get(ALL)
    events = await stored(site)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert pairs(response.json()) == events
    assert response.headers["stream-next-offset"] == wire(events[-1][0])
    assert response.headers["stream-up-to-date"] == "true"
    assert response.headers["cache-control"] == "private, max-age=60"
    assert "authorization" in response.headers["vary"].lower()
    assert response.headers["etag"]
    assert "stream-closed" not in response.headers


async def test_items_are_those_of_the_native_api(served: Served, site: Site) -> None:
    await answered(served, site)
    native = (await served.http.get(EVENTS, params={"after": 0})).json()
    assert (await served.http.get(ALL)).json() == native["events"]


async def test_a_session_that_has_not_begun_is_an_empty_stream(served: Served) -> None:
    for offset in ("-1", "now", wire(0)):
        response = await served.http.get(EVENTS, params={"offset": offset})
        assert (response.status_code, response.json()) == (200, [])
        assert response.headers["stream-next-offset"] == wire(0)
        assert response.headers["stream-up-to-date"] == "true"
        assert response.headers["cache-control"] == "no-store"


async def test_reading_goes_on_behind_any_offset(served: Served, site: Site) -> None:
    await answered(served, site)
    events = await stored(site)
    for index, (offset, _) in enumerate(events):
        response = await served.http.get(EVENTS, params={"offset": wire(offset)})
        assert pairs(response.json()) == events[index + 1 :]
        assert response.headers["stream-next-offset"] == wire(events[-1][0])
    assert response.headers["cache-control"] == "no-store"


async def test_now_is_the_end_and_gives_nothing_stored(served: Served, site: Site) -> None:
    await answered(served, site)
    end = (await stored(site))[-1][0]
    response = await served.http.get(EVENTS, params={"offset": "now"})
    assert (response.status_code, response.json()) == (200, [])
    assert response.headers["stream-next-offset"] == wire(end)
    assert response.headers["stream-up-to-date"] == "true"
    assert response.headers["cache-control"] == "no-store"


async def test_head_tells_the_end(served: Served, site: Site) -> None:
    await answered(served, site)
    for path in (EVENTS, ALL):
        response = await served.http.head(path)
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/json"
        assert response.headers["stream-next-offset"] == wire((await stored(site))[-1][0])
        assert response.headers["cache-control"] == "no-store"
        assert "content-length" not in response.headers


async def test_what_is_unchanged_is_not_sent_again(served: Served, site: Site) -> None:
    await answered(served, site)
    etag = (await served.http.get(ALL)).headers["etag"]
    for sent in (etag, f'"other", {etag}', etag.removeprefix("W/"), "*"):
        response = await served.http.get(ALL, headers={"if-none-match": sent})
        assert (response.status_code, response.content) == (304, b"")
        assert response.headers["etag"] == etag
        assert response.headers["stream-next-offset"] == wire((await stored(site))[-1][0])
    assert (await served.http.get(ALL, headers={"if-none-match": '"other"'})).status_code == 200
    await answered(served, site, "more")
    response = await served.http.get(ALL, headers={"if-none-match": etag})
    assert response.status_code == 200
    assert response.headers["etag"] != etag


async def test_another_session_under_the_same_name_has_other_tags(served: Served, site: Site) -> None:
    await answered(served, site)
    etag = (await served.http.get(ALL)).headers["etag"]
    await site.client.session("s").delete()
    await answered(served, site)
    assert (await served.http.get(ALL, headers={"if-none-match": etag})).status_code == 200


async def test_a_history_that_is_large_is_one_answer_still(
    served: Served, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    await answered(served, site, "count 100 4")
    small_pieces(monkeypatch)
    response = await served.http.get(ALL)
    events = await stored(site)
    assert len(events) > 20
    assert pairs(response.json()) == events
    assert "content-length" not in response.headers  # it was written as it was read
    assert response.headers["stream-next-offset"] == wire(events[-1][0])
    assert response.headers["stream-up-to-date"] == "true"
    again = await served.http.get(ALL, headers={"if-none-match": response.headers["etag"]})
    assert again.status_code == 304


async def test_a_large_answer_ends_where_its_headers_say(
    served: Served, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch)
    await served.send("s", "count 300 5")
    await anyio.sleep(0.5)
    first = await served.http.get(ALL)
    events = pairs(first.json())
    assert first.headers["stream-next-offset"] == wire(events[-1][0])
    rest = await served.http.get(EVENTS, params={"offset": first.headers["stream-next-offset"]})
    events += pairs(rest.json())
    assert events == (await stored(site))[: len(events)]


async def test_a_long_poll_gives_a_large_history_in_pieces(
    served: Served, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    await answered(served, site, "count 100 4")
    small_pieces(monkeypatch)
    offset, found = "-1", []
    while True:
        response = await served.http.get(EVENTS, params={"offset": offset, "live": "long-poll"})
        found += pairs(response.json())
        offset = response.headers["stream-next-offset"]
        assert offset == wire(found[-1][0])
        if "stream-up-to-date" in response.headers:
            break
        assert len(response.json()) == 10
    assert found == await stored(site)


async def test_a_long_poll_wakes_for_the_first_event(served: Served, site: Site) -> None:
    async with anyio.create_task_group() as group:
        done: list[httpx.Response] = []

        async def poll() -> None:
            done.append(await served.http.get(EVENTS, params={"offset": wire(0), "live": "long-poll"}))

        group.start_soon(poll)
        await anyio.sleep(0.2)
        assert not done
        await answered(served, site)
    (response,) = done
    events = await stored(site)
    found = pairs(response.json())
    assert response.status_code == 200
    assert found == events[: len(found)] != []
    assert response.headers["stream-next-offset"] == wire(found[-1][0])
    assert response.headers["stream-cursor"].isdigit()


async def test_a_long_poll_ends_with_its_client(site: Site) -> None:
    served = await site.gateway(linger=0.1)
    with anyio.move_on_after(0.3):
        await served.http.get(EVENTS, params={"offset": wire(0), "live": "long-poll"})
    with anyio.fail_after(10):
        while served.gateway.hub.watched:  # noqa: ASYNC110 - it has no event
            await anyio.sleep(0.02)


async def test_a_long_poll_for_nothing_ends_empty(site: Site) -> None:
    served = await site.gateway(long_poll=0.2)
    await answered(served, site)
    end = wire((await stored(site))[-1][0])
    for offset in (end, "now"):
        response = await served.http.get(EVENTS, params={"offset": offset, "live": "long-poll"})
        assert (response.status_code, response.content) == (204, b"")
        assert response.headers["stream-next-offset"] == end
        assert response.headers["stream-up-to-date"] == "true"
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["stream-cursor"].isdigit()


async def test_a_cursor_always_moves_on(served: Served, site: Site) -> None:
    await answered(served, site)
    poll = {"offset": "-1", "live": "long-poll"}
    cursor = int((await served.http.get(EVENTS, params=poll)).headers["stream-cursor"])
    assert cursor > 3_000_000  # 20-second intervals since October 2024
    for sent in (cursor, cursor + 5, cursor - 5):
        response = await served.http.get(EVENTS, params={**poll, "cursor": str(sent)})
        assert sent < int(response.headers["stream-cursor"]) <= sent + 180 + 5
        async with served.sse(EVENTS, params={"offset": "-1", "live": "sse", "cursor": str(sent)}) as frames:
            found = await read_frames(frames, (await stored(site))[-1][0])
        assert int(json.loads(found[-1]["data"])["streamCursor"]) > sent


async def test_sse_pairs_each_data_event_with_a_control_event(served: Served, site: Site) -> None:
    await answered(served, site)
    async with served.sse(EVENTS, params={"offset": "-1", "live": "sse"}) as frames:
        found = await read_frames(frames, (await stored(site))[-1][0])
        await answered(served, site, "four five")
        events = await stored(site)
        found += await read_frames(frames, events[-1][0])
    assert [frame["event"] for frame in found] == ["data", "control"] * (len(found) // 2)
    items: list[dict[str, Any]] = []
    for data, control in zip(found[::2], found[1::2], strict=True):
        items += json.loads(data["data"])
        said = json.loads(control["data"])
        assert said["streamNextOffset"] == data["id"] == control["id"] == wire(items[-1]["offset"])
        assert said["streamCursor"].isdigit()
        assert "streamClosed" not in said
    assert said["upToDate"] is True
    assert pairs(items) == events


async def test_sse_tells_at_once_that_there_is_nothing(served: Served, site: Site) -> None:
    async with served.http.stream("GET", EVENTS, params={"offset": "-1", "live": "sse"}) as response:
        assert response.headers["content-type"] == "text/event-stream"
        assert "no-cache" in response.headers["cache-control"]
        assert "content-length" not in response.headers
        lines = response.aiter_lines()
        first = [await anext(lines) for _ in range(4)]
    assert first[0] == f"id:{wire(0)}"
    assert first[1] == "event: control"
    assert json.loads(first[2].removeprefix("data:")) | {"streamCursor": ""} == {
        "streamNextOffset": wire(0),
        "streamCursor": "",
        "upToDate": True,
    }
    assert first[3] == ""


async def test_an_event_source_goes_on_where_it_was(served: Served, site: Site) -> None:
    await answered(served, site)
    events = await stored(site)
    seen = wire(events[1][0])
    for offset in ("-1", "now"):
        headers = {"last-event-id": seen}
        async with served.sse(EVENTS, params={"offset": offset, "live": "sse"}, headers=headers) as frames:
            found = await read_frames(frames, events[-1][0])
        items = [item for frame in found[::2] for item in json.loads(frame["data"])]
        assert pairs(items) == events[2:]


async def test_sse_ends_cleanly_after_its_time(site: Site) -> None:
    served = await site.gateway(durable_seconds=0.3, keep_alive=0.05)
    await answered(served, site)
    with anyio.fail_after(10):
        async with served.sse(EVENTS, params={"offset": "-1", "live": "sse"}) as frames:
            found = [frame async for frame in frames]  # raises if the connection breaks
    assert [frame["event"] for frame in found if "event" in frame][:2] == ["data", "control"]
    assert any(frame.get("") == "keep-alive" for frame in found)


async def test_a_gateway_that_ends_ends_what_waits(site: Site) -> None:
    served = await site.gateway()
    statuses: list[int] = []
    async with anyio.create_task_group() as group:

        async def poll() -> None:
            response = await served.http.get(EVENTS, params={"offset": "now", "live": "long-poll"})
            assert response.headers["retry-after"]
            statuses.append(response.status_code)

        async def follow() -> None:
            async with served.sse(EVENTS, params={"offset": "now", "live": "sse"}) as frames:
                async for _ in frames:
                    pass
            statuses.append(200)

        group.start_soon(poll)
        group.start_soon(follow)
        await anyio.sleep(0.3)
        assert not statuses
        served.gateway.drain()
    assert sorted(statuses) == [200, 503]
    for live in ("long-poll", "sse"):
        # To the protocol's client three streams that end at once are the end of the session.
        response = await served.http.get(EVENTS, params={"offset": "-1", "live": live})
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")


async def test_a_deleted_session_ends_its_stream_and_is_gone_at_that_offset(served: Served, site: Site) -> None:
    await answered(served, site)
    end = (await stored(site))[-1][0]
    with anyio.fail_after(20):
        async with served.sse(EVENTS, params={"offset": "-1", "live": "sse"}) as frames:
            await read_frames(frames, end)
            await site.client.session("s").delete()
            await served.send("s", "hello")
            async for _ in frames:
                pass
    for live in ({}, {"live": "long-poll"}, {"live": "sse"}):
        response = await served.http.get(EVENTS, params={"offset": wire(end + 1000), **live})
        assert response.status_code == 410
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["code"] == "session_gone"


@pytest.mark.parametrize(
    "query",
    [
        "offset=",
        "offset=0,1",
        "offset=0 1",
        "offset=-2",
        "offset=x",
        "offset=1.0",
        "offset=00000000000000001",
        "offset=%D9%A1",
        "offset=-1&offset=now",
        "offset=-1&live=",
        "offset=-1&live=true",
        "offset=-1&live=sse&live=sse",
        "offset=-1&live=long-poll&cursor=x",
        "offset=-1&live=long-poll&cursor=",
        "offset=-1&cursor=-1",
        "live=long-poll",
        "live=sse",
        "live=nonsense",
    ],
)
async def test_what_cannot_be_read_is_told(served: Served, query: str) -> None:
    response = await served.http.get(f"{EVENTS}?{query}")
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["detail"]


async def test_unknown_parameters_are_ignored(served: Served) -> None:
    assert (await served.http.get(f"{ALL}&foo=bar")).status_code == 200


async def test_the_stream_is_not_for_writing(served: Served) -> None:
    for method in ("PUT", "POST", "PATCH", "DELETE"):
        response = await served.http.request(method, EVENTS, json=[1])
        assert response.status_code == 405
        assert response.headers["allow"] == "GET, HEAD"
        assert response.headers["content-type"] == "application/problem+json"


async def test_a_body_that_is_too_large_is_refused_while_a_poll_waits(site: Site) -> None:
    served = await site.gateway(max_body=1000)
    host, port = served.url.removeprefix("http://").split(":")
    head = f"GET {EVENTS}?offset=-1&live=long-poll HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n"
    with anyio.fail_after(10):
        async with await anyio.connect_tcp(host, int(port)) as stream:
            await stream.send(head.encode() + b"7d0\r\n" + b"x" * 2000 + b"\r\n")
            answer = await stream.receive()
    assert answer.startswith(b"HTTP/1.1 413 ")


async def test_reading_needs_a_token_for_the_session(site: Site) -> None:
    served = await site.gateway(auth=Auth(Keys.secret(SECRET)))
    await served_directly(site)
    good = token()
    for query in ("offset=-1", "offset=-1&live=long-poll", "offset=-1&live=sse", "offset=now"):
        path = f"{EVENTS}?{query}"
        assert (await served.http.get(path)).status_code == 401
        for wrong in (token(sessions=["other"]), token(rights=["send"])):
            response = await served.http.get(path, headers={"authorization": f"Bearer {wrong}"})
            assert response.status_code == 403
    bearer = {"authorization": f"Bearer {good}"}
    assert len((await served.http.get(ALL, headers=bearer)).json()) == len(await stored(site))
    assert (await served.http.head(EVENTS)).status_code == 401
    assert (await served.http.head(EVENTS, headers=bearer)).status_code == 200


async def test_an_event_source_gives_its_token_in_the_address(site: Site) -> None:
    served = await site.gateway(auth=Auth(Keys.secret(SECRET)))
    await served_directly(site)
    params = {"offset": "-1", "live": "sse", "access_token": token()}
    async with served.sse(EVENTS, params=params) as frames:
        found = await read_frames(frames, (await stored(site))[-1][0])
    assert pairs(json.loads(found[0]["data"])) == await stored(site)


async def test_what_is_live_ends_when_the_token_does(site: Site) -> None:
    served = await site.gateway(auth=Auth(Keys.secret(SECRET), leeway=0.0))
    for live in ("long-poll", "sse"):
        bearer = {"authorization": f"Bearer {token(ttl=2.0)}"}
        with anyio.fail_after(10):
            response = await served.http.get(EVENTS, params={"offset": "now", "live": live}, headers=bearer)
        assert response.status_code == (200 if live == "sse" else 401)
        again = await served.http.get(EVENTS, params={"offset": "now", "live": live}, headers=bearer)
        assert again.status_code == 401
