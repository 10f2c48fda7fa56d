"""Readers of sessions, by every transport: they come, are given events, are cut off, come back, and note it all.

What a reader is given is noted as it comes: nothing is left out that came twice, nothing put in order.
"""

from __future__ import annotations

import functools
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import aclosing
from typing import ClassVar

import anyio
import msgspec
from msgspec import Struct
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage, InvalidStatus

from agentrun import Client, SessionGone, Unavailable
from tests.chaos.evidence import Got, Joined, Left, Notebook, Said, digest
from tests.chaos.http import Away, Response, request
from tests.chaos.place import Place

_STAND_INS = (b'{"type":"gap"', b'{"type":"snapshot"')
"""What is given where something is missing; in a run nothing expires."""
_COME_BACK = {1001, 1006, 1011, 1012, 1013, 4429, 4503}
"""Codes of a WebSocket's end after which one comes back. 1011 is also what our own side says of a silent gateway."""
_HURRY = 10.0
"""Seconds a connection lasts at most once its reader is to read to the end."""
_LONG_POLL = 60.0
"""Seconds a gateway keeps a long poll of its own at most."""


class Gone(Exception):
    """The session does not exist any more."""


class _Item(Struct):
    offset: int
    event: msgspec.Raw


class _Page(Struct):
    offset: int
    events: list[_Item]


class _Control(Struct, rename="camel"):
    stream_next_offset: str
    stream_cursor: str


class _Chunk(Struct, rename="camel"):
    type: str
    message_id: str = ""
    delta: str = ""
    finish_reason: str = ""


_item = msgspec.json.Decoder(_Item)
_items = msgspec.json.Decoder(list[_Item])
_page = msgspec.json.Decoder(_Page)
_control = msgspec.json.Decoder(_Control)
_chunk = msgspec.json.Decoder(_Chunk)
_digest = functools.lru_cache(maxsize=8192)(digest)  # most events are read by several


class Reader(ABC):
    """One reader of one session, over however many connections.

    Args:
        place: Where the gateways are.
        client: For readers that use the library.
        book: Where it notes what it is given.
        dice: When it drops its connection and how long it stays away.
        name: Its name.
        session: What it reads.
        after: The offset it begins behind.
        slow: Seconds it takes over what comes at once.
        mortal: Whether the session may be deleted under it.

    Attributes:
        offset: Of the last event it was given.
        ended: It has left.
    """

    transport: ClassVar[str]

    def __init__(
        self,
        place: Place,
        client: Client,
        book: Notebook,
        dice: random.Random,
        *,
        name: str,
        session: str,
        after: int = 0,
        slow: float = 0.0,
        mortal: bool = False,
    ) -> None:
        self.name = name
        self.offset = after
        self.ended = anyio.Event()
        self._client = client
        self._place = place
        self._book = book
        self._dice = dice
        self._session = session
        self._began_behind = after
        self._slow = slow
        self._mortal = mortal
        self._gateway = dice.choice(place.gateways)
        self._connection = anyio.CancelScope()
        self._goal: int | None = None
        self._leaving = False

    async def run(self) -> None:
        """Read until told to leave, or to the end that `finish` has told.

        Raises:
            AssertionError: It was told what no reader may be told in a run.
        """
        asked: int | None = None
        while not self._done:
            if asked != self.offset:  # one that was refused, or given nothing, has not read since
                asked = self.offset
                self._join()
            lasts = 0.2 + self._dice.expovariate(1 / 8)
            self._connection = anyio.CancelScope(
                deadline=anyio.current_time() + (lasts if self._goal is None else min(lasts + 1, _HURRY))
            )
            pause = self._dice.random() * self._dice.choice((0.02, 0.5, 0.5, 4))
            with self._connection:
                try:
                    await self._read()
                except Away:
                    self._gateway = self._dice.choice(self._place.gateways)
                    pause = 0.1 + self._dice.random()
                except Gone as gone:
                    if self._mortal:
                        break
                    raise AssertionError(f"{self.name}: session {self._session} is gone: {gone}") from gone
            if not self._done:
                await anyio.sleep(min(pause, 0.5) if self._goal is not None else pause)
        self._leave()
        self.ended.set()

    def leave(self) -> None:
        """Leave now, whatever is still to come."""
        self._leaving = True
        self._connection.cancel()

    def finish(self, upto: int) -> None:
        """Leave with all events up to this offset, which is the session's last; not if it is leaving already."""
        if self._leaving:
            return
        self._goal = upto
        if self._done:
            self._connection.cancel()

    @property
    def _done(self) -> bool:
        return self._leaving or (self._goal is not None and self.offset >= self._goal)

    def _join(self) -> None:
        self._book.note(Joined(reader=self.name, session=self._session, transport=self.transport, after=self.offset))

    def _leave(self) -> None:
        # One that was to read to the end and could not in time has said what it must have all the same.
        self._book.note(Left(reader=self.name, whole=self._goal is not None, upto=self._goal or 0))

    def _take(self, offset: int, raw: bytes) -> None:
        hash = "" if raw.startswith(_STAND_INS) else _digest(raw)
        self._book.note(Got(reader=self.name, offset=offset, hash=hash))
        self.offset = offset
        if self._goal is not None and offset >= self._goal:
            self._connection.cancel()

    def _take_items(self, items: list[_Item]) -> None:
        for item in items:
            self._take(item.offset, bytes(item.event))

    async def _dawdle(self) -> None:
        if self._slow and self._goal is None:
            await anyio.sleep(self._slow)

    @property
    def _events(self) -> str:
        return f"/v1/sessions/{self._session}/events"

    @abstractmethod
    async def _read(self) -> None:
        """Read over one connection, or with one request; returning is coming back for more.

        Raises:
            Away: Try elsewhere.
            Gone: The session is.
        """


# --------------------------------------------------------------------------------------------------------- the library


class Library(Reader):
    """`Session.follow`."""

    transport = "library"

    async def _read(self) -> None:
        try:
            async with self._client.session(self._session).follow(self.offset) as events:
                async for event in events:
                    self._take(event.offset, event.raw)
                    await self._dawdle()
        except Unavailable as error:
            raise Away(str(error)) from error
        except SessionGone as error:
            raise Gone(str(error)) from error


class LibraryToEnd(Reader):
    """`Session.events` to the end as it is, again and again."""

    transport = "library-to-end"

    async def _read(self) -> None:
        try:
            while True:
                async with aclosing(self._client.session(self._session).events(self.offset, follow=False)) as events:
                    async for event in events:
                        self._take(event.offset, event.raw)
                await anyio.sleep(self._dice.random())
        except Unavailable as error:
            raise Away(str(error)) from error
        except SessionGone as error:
            raise Gone(str(error)) from error


# ------------------------------------------------------------------------------------------------------ the native API


async def _check(response: Response, *good: int) -> None:
    """Raise what a response that is none of the good ones means."""
    if response.status in good:
        return
    said = (await response.body()).decode(errors="replace")
    if response.status == 410:
        raise Gone(said)
    if response.status in (429, 503) and '"misconfigured"' not in said:
        raise Away(said)
    raise AssertionError(f"a reader was answered {response.status}: {said}")


class _Frames:
    """Takes a stream of server-sent events apart."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        *frames, self._rest = (self._rest + data).split(b"\n\n")
        return iter(frames)


class EventStream(Reader):
    """Server-sent events, as an EventSource reads them: the address stays, the last id is told."""

    transport = "sse"

    async def _read(self) -> None:
        headers = {"Accept": "text/event-stream"}
        if self.offset != self._began_behind:
            headers["Last-Event-ID"] = str(self.offset)
        async with request(
            self._gateway, "GET", f"{self._events}?after={self._began_behind}", headers=headers
        ) as response:
            await _check(response, 200)
            frames = _Frames()
            while (data := await response.more()) is not None:
                for frame in frames.feed(data):
                    if frame.startswith(b"id: "):
                        id, _, said = frame.partition(b"\ndata: ")
                        item = _item.decode(said)
                        assert int(id[4:]) == item.offset, frame
                        self._take(item.offset, bytes(item.event))
                await self._dawdle()


class Pages(Reader):
    """JSON, asked for again and again; mostly waiting for the next event."""

    transport = "pages"

    async def _read(self) -> None:
        wait, limit = self._dice.choice((0, 1, 5, 20)), self._dice.choice((7, 100, 1000))
        while True:
            query = f"after={self.offset}&wait={wait}&limit={limit}"
            async with request(self._gateway, "GET", f"{self._events}?{query}", waits=wait) as response:
                await _check(response, 200)
                page = _page.decode(await response.body())
            self._take_items(page.events)
            assert page.offset == self.offset, f"{self.name} has {self.offset} and is told {page.offset}"
            await anyio.sleep(0.0 if wait or page.events else 0.3)
            await self._dawdle()


class Socket(Reader):
    """The WebSocket."""

    transport = "socket"

    async def _read(self) -> None:
        url = f"{self._gateway.replace('http', 'ws', 1)}/v1/sessions/{self._session}/socket"
        try:
            socket = await connect(url, proxy=None, compression=None)
            try:
                await socket.send(b'{"op":"read","after":%d}' % self.offset, text=True)
                while True:
                    item = _item.decode(await socket.recv(decode=False))
                    self._take(item.offset, bytes(item.event))
                    await self._dawdle()
            finally:
                socket.transport.abort()
        except ConnectionClosed as closed:
            code = 1006 if closed.rcvd is None else closed.rcvd.code
            if code == 4410:
                raise Gone(str(closed)) from closed
            if code not in _COME_BACK:
                raise AssertionError(f"{self.name}: the socket was closed with {closed}") from closed
            raise Away(str(closed)) from closed
        except InvalidStatus as refused:
            if refused.response.status_code != 503:
                raise AssertionError(f"{self.name}: {refused}") from refused
            raise Away(str(refused)) from refused
        except InvalidMessage as broken:
            raise Away(str(broken)) from broken
        except InvalidHandshake as refused:
            raise AssertionError(f"{self.name}: {refused!r}") from refused
        except (OSError, TimeoutError) as error:
            raise Away(str(error)) from error


# ----------------------------------------------------------------------------------------------------- Durable Streams


class Durable(Reader):
    """The protocol of Durable Streams, by long polls: all there is first, then what comes."""

    transport = "durable-poll"

    _next = ""
    _cursor = ""
    _caught_up = False

    async def _read(self) -> None:
        while True:
            path = self._path("long-poll" if self._caught_up else "")
            async with request(self._gateway, "GET", path, waits=_LONG_POLL) as response:
                await _check(response, 200, 204)
                items = _items.decode(await response.body()) if response.status == 200 else []
            self._take_items(items)
            self._cursor = response.headers.get("stream-cursor", "")
            self._caught_up = response.headers.get("stream-up-to-date") == "true"
            self._go_on_at(response.headers["stream-next-offset"])
            await self._dawdle()

    def _path(self, live: str) -> str:
        # What an offset looks like is documented; else one could not begin at one that another transport gave.
        at = self._next or (f"{self.offset:016}" if self.offset else "-1")
        cursor = f"&cursor={self._cursor}" if self._cursor else ""
        return f"{self._events}?offset={at}" + (f"&live={live}{cursor}" if live else "")

    def _go_on_at(self, offset: str) -> None:
        assert int(offset) == self.offset, f"{self.name} has {self.offset} and is told {offset}"
        self._next = offset


class DurableStream(Durable):
    """The same by server-sent events. It goes on from the last id, as an EventSource would."""

    transport = "durable-sse"

    async def _read(self) -> None:
        async with request(self._gateway, "GET", self._path("sse")) as response:
            await _check(response, 200)
            frames = _Frames()
            while (data := await response.more()) is not None:
                for frame in frames.feed(data):
                    self._take_frame(frame)
                await self._dawdle()

    def _take_frame(self, frame: bytes) -> None:
        if frame.startswith(b":"):
            return
        id, kind, said = frame.split(b"\n")
        said = said.removeprefix(b"data:")
        if kind == b"event: data":
            self._take_items(_items.decode(said))
        else:
            control = _control.decode(said)
            self._cursor = control.stream_cursor
            self._go_on_at(control.stream_next_offset)
        self._go_on_at(id.removeprefix(b"id:").decode())


# ---------------------------------------------------------------------------------------------------------- the AI SDK


class Chat(Reader):
    """What useChat has of the turn that is being answered, each time it is loaded anew. It is given no offsets."""

    transport = "ai"

    def _join(self) -> None:
        pass

    def _leave(self) -> None:
        pass

    @property
    def _done(self) -> bool:
        return self._leaving or self._goal is not None

    async def _read(self) -> None:
        async with request(self._gateway, "GET", f"/api/chat/{self._session}/stream") as response:
            await _check(response, 200, 204)
            if response.status == 204:
                return
            frames, message = _Frames(), _Message()
            while (data := await response.more()) is not None:
                for frame in frames.feed(data):
                    message.take(frame)
                await self._dawdle()
        if not message.done:
            raise AssertionError(f"{self.name}: a stream ended cleanly without its end: {message.text!r}")
        # Of a turn that asks the client has a part only; one that never began has no message.
        if message.turn and message.finish != "tool-calls":
            self._book.note(Said(reader=self.name, session=self._session, turn=message.turn, text=message.text))


class _Message:
    def __init__(self) -> None:
        self.turn = ""
        self.text = ""
        self.finish = ""
        self.done = False

    def take(self, frame: bytes) -> None:
        if not frame.startswith(b"data: "):
            return
        if frame == b"data: [DONE]":
            self.done = bool(self.finish)
            return
        chunk = _chunk.decode(frame[6:])
        match chunk.type:
            case "start":
                self.turn = chunk.message_id.removeprefix("msg_") or self.turn
            case "text-delta":
                self.text += chunk.delta
            case "reset-step":
                self.text = ""
            case "finish":
                self.finish = chunk.finish_reason or "none"
            case _:
                pass


READERS: tuple[type[Reader], ...] = (
    Library, LibraryToEnd, EventStream, EventStream, Pages, Socket, Socket, Durable, DurableStream, Chat,
)  # fmt: skip
"""How one that comes may read; what is most used is there twice."""
