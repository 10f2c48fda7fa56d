"""What users and readers of a run do when a gateway is not as it should be."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import msgspec
import pytest
from anyio.abc import ByteStream, SocketAttribute

import agentrun
from tests.chaos.clients import Clients, Order, Refused
from tests.chaos.evidence import Got, Joined, Left, Notebook, Said, Sent, digest, read_notes
from tests.chaos.place import Place
from tests.chaos.readers import Chat, DurableStream, EventStream, Pages, Reader

OK = b"HTTP/1.1 200 OK\r\n"
ORDER = Order(turn="t", agent="chaos", text="count 3 0")


def answer(status: str, body: bytes) -> bytes:
    return b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


def chunked(*parts: bytes, whole: bool = True) -> bytes:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n" * whole


def item(offset: int, event: bytes = b'{"type":"x"}') -> bytes:
    return b'{"offset":%d,"time":1.000,"event":%s}' % (offset, event)


def sse(offset: int, event: bytes = b'{"type":"x"}') -> bytes:
    return b"id: %d\ndata: %s\n\n" % (offset, item(offset, event))


class OneWay(random.Random):
    """Always through a gateway, and soon."""

    def random(self) -> float:
        return 0.9


class Script:
    """A gateway that gives these answers, one for each connection, the last one for ever.

    Attributes:
        place: Where it is.
        asked: The requests.
        book: Notes.
    """

    def __init__(self, folder: Path, client: agentrun.Client, answers: Sequence[bytes]) -> None:
        self.client = client
        self.asked: list[str] = []
        self.book = Notebook(folder, "test")
        self.place: Place
        self._folder = folder
        self._answers = answers

    def at(self, port: int) -> None:
        gateway = f"http://127.0.0.1:{port}"
        self.place = Place(brokers=(), namespace="n", gateways=(gateway,), agents=("chaos",), folder=self._folder)

    async def serve(self, stream: ByteStream) -> None:
        async with stream:
            request = (await stream.receive()).decode()
            said = self._answers[min(len(self.asked), len(self._answers) - 1)]
            self.asked.append(request)
            if said:
                await stream.send(said)

    def notes(self, kind: type) -> list[object]:
        return [note for note in read_notes(self._folder) if isinstance(note, kind)]

    def clients(self) -> Clients:
        return Clients(self.place, self.client, self.book, OneWay(1))

    async def read(self, kind: type[Reader], *, upto: int, mortal: bool = False) -> list[tuple[int, str]]:
        """Let a reader read up to an offset; return what it notes."""
        reader = kind(self.place, self.client, self.book, random.Random(1), name="r", session="s", mortal=mortal)
        if upto:
            reader.finish(upto)
        with anyio.fail_after(20):
            await reader.run()
        return [(note.offset, note.hash) for note in read_notes(self._folder) if isinstance(note, Got)]


@asynccontextmanager
async def script(folder: Path, *answers: bytes) -> AsyncGenerator[Script]:
    async with agentrun.connect(f"memory://{folder}") as client, anyio.create_task_group() as group:
        gateway = Script(folder, client, answers)
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        gateway.at(listener.extra(SocketAttribute.local_port))
        group.start_soon(listener.serve, gateway.serve)
        yield gateway
        group.cancel_scope.cancel()
    await listener.aclose()
    gateway.book.close()


# --------------------------------------------------------------------------------------------------------------- users


async def test_a_turn_is_sent_under_its_id_until_it_is_known_what_came_of_it(tmp_path: Path) -> None:
    away = answer("503 Service Unavailable", b'{"code":"unavailable"}')
    accepted = answer("202 Accepted", b'{"session":"s","turn":"t","offset":4}')
    async with script(tmp_path, b"", away, accepted) as gateway:
        assert await gateway.clients().send("s", ORDER) == 4
        bodies = [msgspec.json.decode(request.partition("\r\n\r\n")[2]) for request in gateway.asked]
        assert [body["id"] for body in bodies] == ["t", "t", "t"]
        assert [(n.turn, n.offset, n.words) for n in gateway.notes(Sent) if isinstance(n, Sent)] == [("t", 4, 3)]


async def test_a_refusal_that_must_be_expected_is_no_turn(tmp_path: Path) -> None:
    async with script(tmp_path, answer("409 Conflict", b'{"code":"session_busy"}')) as gateway:
        with pytest.raises(Refused):
            await gateway.clients().send("s", ORDER)
        assert gateway.notes(Sent) == []


@pytest.mark.parametrize(
    "said",
    [
        answer("500 Internal Server Error", b'{"code":"internal"}'),
        answer("409 Conflict", b'{"code":"id_taken"}'),
        answer("503 Service Unavailable", b'{"code":"misconfigured"}'),
        answer("404 Not Found", b"no such page"),
    ],
    ids=["internal", "id_taken", "misconfigured", "not_found"],
)
async def test_any_other_error_ends_the_run(tmp_path: Path, said: bytes) -> None:
    async with script(tmp_path, said) as gateway:
        with pytest.raises(AssertionError, match="was answered"):
            await gateway.clients().send("s", ORDER)


# ------------------------------------------------------------------------------------------------------------- readers


async def test_a_reader_whose_connection_breaks_goes_on_where_it_was(tmp_path: Path) -> None:
    broken = chunked(b"retry: 1\n\n" + sse(1)[:9], sse(1)[9:] + sse(2) + sse(3)[:12], whole=False)
    async with script(tmp_path, broken, chunked(sse(3))) as gateway:
        found = await gateway.read(EventStream, upto=3)
        assert found == [(n, digest(b'{"type":"x"}')) for n in (1, 2, 3)]
        assert "last-event-id: 2" in gateway.asked[1].lower()
        assert [note.after for note in gateway.notes(Joined) if isinstance(note, Joined)] == [0, 2]
        assert [(n.whole, n.upto) for n in gateway.notes(Left) if isinstance(n, Left)] == [(True, 3)]


async def test_what_comes_twice_or_too_soon_is_noted_as_it_comes(tmp_path: Path) -> None:
    async with script(tmp_path, chunked(sse(2), sse(1), sse(1), sse(3))) as gateway:
        assert [offset for offset, _ in await gateway.read(EventStream, upto=3)] == [2, 1, 1, 3]


@pytest.mark.parametrize(
    "stand_in", [b'{"type":"gap","from":1,"to":3}', b'{"type":"snapshot","turn":"t"}'], ids=["gap", "snapshot"]
)
async def test_what_stands_for_a_hole_is_noted_without_a_hash(tmp_path: Path, stand_in: bytes) -> None:
    page = b'{"offset":3,"events":[%s]}' % item(3, stand_in)
    async with script(tmp_path, answer("200 OK", page)) as gateway:
        assert await gateway.read(Pages, upto=3) == [(3, "")]


async def test_a_session_that_is_gone_ends_the_run_unless_it_was_to_be_deleted(tmp_path: Path) -> None:
    async with script(tmp_path, answer("410 Gone", b'{"code":"session_gone"}')) as gateway:
        with pytest.raises(AssertionError, match="is gone"):
            await gateway.read(EventStream, upto=0)
        assert gateway.notes(Left) == []
        await gateway.read(EventStream, upto=0, mortal=True)
        assert [note.whole for note in gateway.notes(Left) if isinstance(note, Left)] == [False]


async def test_a_position_that_is_not_what_was_read_ends_the_run(tmp_path: Path) -> None:
    data = b"id:%016d\nevent: data\ndata:[%s]\n\n" % (1, item(1))
    control = b'id:%016d\nevent: control\ndata:{"streamNextOffset":"%016d","streamCursor":"1"}\n\n' % (2, 2)
    async with script(tmp_path, chunked(data + control)) as gateway:
        with pytest.raises(AssertionError, match=r"has 1 and is told 0+2"):
            await gateway.read(DurableStream, upto=9)


async def test_a_chat_has_its_answer_only_when_the_stream_says_so(tmp_path: Path) -> None:
    def frame(chunk: bytes) -> bytes:
        return b"data: %s\n\n" % chunk

    said = (
        frame(b'{"type":"start","messageId":"msg_t"}')
        + frame(b'{"type":"text-delta","id":"1","delta":"lost"}')
        + frame(b'{"type":"reset-step"}')
        + frame(b'{"type":"text-delta","id":"2","delta":"w0 w1 "}')
    )
    asks = frame(b'{"type":"finish","finishReason":"tool-calls"}') + frame(b"[DONE]")
    ends = frame(b'{"type":"finish","finishReason":"stop"}') + frame(b"[DONE]")
    answers = (chunked(said, whole=False), chunked(said, asks), chunked(said, ends), chunked(said))
    async with script(tmp_path, *answers) as gateway:
        with pytest.raises(AssertionError, match="ended cleanly without its end"):
            await gateway.read(Chat, upto=0)
        assert [(note.turn, note.text) for note in gateway.notes(Said) if isinstance(note, Said)] == [("t", "w0 w1 ")]
