"""The bench of the gateway in its smallest form, and that its clients would see what they say they saw not."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from typing import cast

import msgspec
import pytest
from rich.console import Console

from agentrun import wire
from agentrun.cli._bench_http import Job, Stream
from agentrun.cli._bench_report import Report, show_rows
from tests.bench.test_bench import parsed, run

SMALL = (
    *("--sessions", "3", "--seconds", "0.5", "--rate", "20", "--rounds", "1", "--events", "1200"),
    *("--readers", "7", "--clients", "5"),
)


def test_every_part_in_small() -> None:
    report = parsed(run("gateway", *SMALL, "--json"))
    rows = {(row["bench"], row["case"]): row["figures"] for row in report["rows"]}
    for way in ("broker", "sse", "socket"):
        figures = rows.pop(("gateway streams", f"3 streams, {way}"))
        assert (figures["tokens"], figures["lost"], figures["doubled"]) == (30, 0, 0)
        assert 0 < figures["latency_p50_ms"] <= figures["latency_p99_ms"] <= figures["latency_max_ms"]
    figures = rows.pop(("gateway fan-out", "7 clients of one stream"))
    assert (figures["tokens"], figures["lost"], figures["doubled"], figures["subscriptions"]) == (70, 0, 0, 1)
    assert {"gateway_cpu_per_token_us", "client_cpu_per_token_us", "at_the_broker_p50_ms"} <= set(figures)
    for way in ("broker", "sse", "pages"):
        figures = rows.pop(("gateway resume", f"1200 events, {way}"))
        assert 0 < figures["first_event_p50_ms"] <= figures["whole_p50_ms"]
    for case, subscriptions in (("5, each its own", 5), ("5 on one session", 1)):
        figures = rows.pop(("gateway idle", case))
        assert (figures["clients"], figures["subscriptions"]) == (5, subscriptions)
        assert figures["memory_MB"] is None or figures["memory_MB"] > 0
    assert rows == {}


def test_a_table_for_each_part() -> None:
    report = Report({})
    report.add("gateway streams", "3 streams, sse", tokens=30)
    report.add("gateway streams", "3 streams, socket", tokens=31)
    report.add("gateway idle", "5 on one session", memory_per_client_kB=1.5)
    with io.StringIO() as text:
        show_rows(Console(file=text, width=80), report.rows)
        lines = [line.split() for line in text.getvalue().splitlines() if line.strip()]
    assert lines == [
        ["gateway", "streams"],
        ["3", "streams,", "sse", "3", "streams,", "socket"],
        ["tokens", "30", "31"],
        ["gateway", "idle"],
        ["5", "on", "one", "session"],
        ["memory/client", "kB", "1.5"],
    ]


# ------------------------------------------------------------------------------------------------------ the clients


class Transport:
    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return False


def item(offset: int, event: wire.KnownEvent) -> bytes:
    return b'{"offset":%d,"time":1.000,"event":%s}' % (offset, wire.encode(event))


def words(*texts: str) -> list[bytes]:
    events = [wire.TextDelta(turn="t", attempt=1, text=text, index=i) for i, text in enumerate(texts)]
    message = wire.Message([wire.TextPart("".join(texts))])
    end = wire.TurnCompleted(turn="t", attempt=1, turn_offset=1, message=message)
    return [item(offset, event) for offset, event in enumerate([*events, end], 6)]


def as_sse(items: list[bytes]) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    events = [b"retry: 500\n\n", *(b"id: 1\ndata: %s\n\n" % item for item in items), b": keep-alive\n\n"]
    return head + b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events)


def as_frames(items: list[bytes]) -> bytes:
    def frame(item: bytes) -> bytes:
        return (
            bytes((0x81, 126)) + len(item).to_bytes(2, "big") + item
            if len(item) > 125
            else b"\x81%c" % len(item) + item
        )

    return b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n\r\n" + b"".join(map(frame, items))


WAYS = pytest.mark.parametrize(("how", "written"), [("sse", as_sse), ("socket", as_frames)])


def read(how: str, data: bytes, size: int) -> Stream:
    job = msgspec.convert({"port": 1, "how": how, "paths": []}, Job)
    stream = Stream(job, "/v1/sessions/s/events?after=5")
    stream.connection_made(cast("asyncio.Transport", Transport()))
    for at in range(0, len(data), size):
        stream.data_received(data[at : at + size])
    return stream


@WAYS
@pytest.mark.parametrize("size", [1, 7, 100_000])
async def test_what_comes_in_any_pieces_is_read(how: str, written: Callable[[list[bytes]], bytes], size: int) -> None:
    stream = read(how, written(words("w0@1 ", "w1@2 w2@3 ", "w3@4 ")), size)
    assert stream.opened.is_set()
    assert stream.done
    assert (stream.seen.words.seen, stream.seen.words.lost, stream.seen.words.doubled, stream.jumps) == (4, 0, 0, 0)
    assert stream.seen.as_stored


@WAYS
async def test_what_is_missing_or_double_is_counted(how: str, written: Callable[[list[bytes]], bytes]) -> None:
    items = words("w0@1 ", "w1@2 ", "w2@3 ")
    lost = read(how, written([items[0], items[2], items[3]]), 1000)
    assert (lost.seen.words.lost, lost.jumps, lost.seen.as_stored) == (1, 1, False)
    double = read(how, written([items[0], items[1], items[1], items[2], items[3]]), 1000)
    assert (double.seen.words.doubled, double.jumps, double.seen.as_stored) == (1, 1, False)
    cut = read(how, written(items[:2]), 1000)
    assert not cut.done
