"""Fan-out: one subscription at the broker per session that is watched, whatever the number of its readers.

A watched session has a `Feed`: a task that follows its log, and a bounded list of its newest events. Readers hold
places in that list and take what is new when they are ready for it, so a reader has no buffer of its own that could
grow, and a slow one holds nobody up: when the list has moved past its place it is told so, and comes back with its
offset. What is older than the list is read from the log, page by page.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_right
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Literal

import anyio
import msgspec
from anyio.abc import TaskGroup, TaskStatus
from opentelemetry import context

from agentrun.bell import Bell, Ear
from agentrun.broker import Tail
from agentrun.client import Client, Session
from agentrun.errors import AgentrunError, BrokerError, InvalidInput, SessionGone, Unavailable
from agentrun.gateway.telemetry import Counts
from agentrun.reading import Event
from agentrun.settings import GatewaySettings
from agentrun.telemetry import Telemetry
from agentrun.telemetry.instruments import Levels
from agentrun.wire import Gap

__all__ = ["Closed", "Hub", "Item", "Reading"]

log = logging.getLogger(__name__)

_TAKE = 500
"""Events given at once."""
_TAKE_BYTES = 256 << 10
_PROBE = 2.0
_PROBE_TIMEOUT = 3.0
_PROBED = "agentrun--probe"
_LAG = 0.02
"""Pause before the log is read again whose end, as read, is behind what the feed was told; doubles with each."""
_LAG_MOST = 0.5
_LAG_WAIT = 1.0
"""Seconds for which such an end is not yet taken for all there is, even by a reader that does not wait."""
_BELIEVED = 1.0
"""Seconds for which a session that is watched is not asked whether it still exists."""
_UNUSABLE = b'{"type":"unusable"}'
_json = msgspec.json.Decoder()


class Closed(Exception):
    """The response ends here, cleanly; its client may come back with its offset."""

    def __init__(self, reason: Literal["drain", "slow", "revoked"]) -> None:
        super().__init__(reason)
        self.reason = reason


class Item(msgspec.Struct, gc=False, eq=False):
    """One event, as all readers of its session share it.

    Attributes:
        event: The event.
    """

    event: Event
    _json: bytes | None = None
    _sse: bytes | None = None

    @property
    def offset(self) -> int:
        """Its offset."""
        return self.event.offset

    @property
    def json(self) -> bytes:
        """``{"offset": …, "time": …, "event": …}``; the event is what is stored, byte by byte."""
        if self._json is None:
            event = self.event
            raw = event.raw if _usable(event) else _UNUSABLE
            self._json = b'{"offset":%d,"time":%.3f,"event":%s}' % (event.offset, event.time, raw)
        return self._json

    @property
    def sse(self) -> bytes:
        """`json` as a server-sent event whose id is the offset."""
        if self._sse is None:
            body = self.json
            if b"\n" in body or b"\r" in body:
                # Between the tokens of JSON only: inside its strings they are escaped.
                body = body.replace(b"\r", b" ").replace(b"\n", b" ")
            self._sse = b"id: %d\ndata: %s\n\n" % (self.offset, body)
        return self._sse


def _usable(event: Event) -> bool:
    """Whether it may be passed on as it is: no forgery, and JSON. Whoever writes to the log may write anything."""
    if event.unusable:
        return False
    try:
        value = _json.decode(event.raw)
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors, and so is bad UTF-8
        return False
    return isinstance(value, dict) and isinstance(value.get("type"), str)  # pyright: ignore[reportUnknownMemberType]


class Feed:
    """A watched session: its newest events.

    Attributes:
        floor: Every event behind this offset is in ``items``.
        end: The offset of the newest event.
        seen: When the session was last known to exist, on the monotonic clock.
        base: How many events came before ``items[0]`` since the feed began.
        gaps: How many of all of them are a `Gap`.
    """

    def __init__(self, session: Session, settings: GatewaySettings) -> None:
        self.session = session
        self.readers = 0
        self.idle_since = 0.0
        self.items: list[Item] = []
        self.base = 0
        self.gaps = 0
        self.floor = 0
        self.end = 0
        self.seen = 0.0
        self.ready = anyio.Event()
        self.changed = Bell()
        self.error: Exception | None = None
        self.scope = anyio.CancelScope()
        self._bytes = 0
        self._settings = settings

    async def run(self, hub: Hub) -> None:
        """Follow the session until cancelled."""
        try:
            with self.scope:
                tail = await hub.tail(self.session.id)
                async with self.session.follow(tail.offset, cursor=tail.cursor) as events:
                    self.floor = self.end = tail.offset
                    self.seen = time.monotonic()
                    self.ready.set()
                    async for event in events:
                        self._add(Item(event))
        except AgentrunError as error:
            self.error = error
        except Exception:
            log.exception("session %s cannot be watched any more", self.session.id)
        finally:
            self.fail(self.error or Unavailable(f"session {self.session.id} is not watched any more: read again"))
            hub.forget(self)
            self.ready.set()

    def fail(self, error: Exception) -> None:
        """Let all readers know that nothing more comes."""
        self.error = error
        self.wake()

    def check(self) -> None:
        """Raise what it has failed with, if it has."""
        if self.error is not None:
            raise self.error.with_traceback(None)  # or it would grow with every reader

    def wake(self) -> None:
        """Let all readers look."""
        self.changed.ring()

    def index(self, offset: int) -> int:
        """Return the place behind ``offset``, which is not below the floor."""
        return self.base + bisect_right(self.items, offset, key=_offset_of)

    def _add(self, item: Item) -> None:
        self.items.append(item)
        self.gaps += isinstance(item.event.decoded, Gap)
        self.end = item.offset
        self.seen = time.monotonic()
        self._bytes += len(item.event.raw)
        if len(self.items) > self._settings.ring_events or self._bytes > self._settings.ring_bytes:
            self._trim()
        self.wake()

    def _trim(self) -> None:
        # More than is needed, so that it is not done again for each event.
        drop = 0
        keep_bytes, keep = self._settings.ring_bytes * 3 // 4, self._settings.ring_events * 3 // 4
        while drop < len(self.items) - 1 and (self._bytes > keep_bytes or len(self.items) - drop > keep):
            self._bytes -= len(self.items[drop].event.raw)
            drop += 1
        if drop:
            self.floor = self.items[drop - 1].offset
            self.base += drop
            del self.items[:drop]


def _offset_of(item: Item) -> int:
    return item.offset


async def _check_end(feed: Feed, after: int) -> None:
    """Raise SessionGone if the session ends before ``after``, also for a broker whose replicas lag."""
    async with aclosing(feed.session.events(after=after, follow=False)) as events:
        async for _ in events:
            break


class Reading:
    """One reader's place in a session.

    Attributes:
        offset: Of the last event given.
    """

    def __init__(self, hub: Hub, feed: Feed, after: int, valid: Callable[[], bool]) -> None:
        self.offset = after
        self._valid = valid
        self._hub = hub
        self._feed = feed
        self._index = -1
        """The place in the feed, counted from its beginning; -1 while what is older is read from the log."""
        self._stored: AsyncGenerator[Event] | None = None
        self._ear = Ear(feed.changed)

    @property
    def at_end(self) -> bool:
        """Whether everything that is known to be stored was given."""
        return self.offset >= self._feed.end

    async def next(self, wait: float) -> Sequence[Item]:
        """Return the next events, or none if there are none for ``wait`` seconds.

        Raises:
            Closed: The gateway shuts down, this reader has fallen behind what is kept for it, or it may not read on.
            SessionGone: The session is deleted, or was and began anew.
            Unavailable: The broker is away while older events are to be read from it.
        """
        began = time.monotonic()
        pause = _LAG
        while True:
            self._check()
            items = self._take() if self._index >= 0 else await self._older()
            if not items and self._index >= 0:
                items = self._take()
            if items:
                self._count(items)
                return items
            self._feed.check()
            left = began + wait - time.monotonic()
            if self._index < 0:
                left = min(max(left, began + _LAG_WAIT - time.monotonic()), pause)
                pause = min(2 * pause, _LAG_MOST)
            if left <= 0:
                return ()
            await self._ear.wait(left)

    def _check(self) -> None:
        if self._hub.closing:
            raise Closed("drain")
        if not self._valid():
            raise Closed("revoked")

    def _take(self) -> Sequence[Item]:
        feed = self._feed
        if self._index < feed.base:
            self._hub.counts.slow.value += 1
            raise Closed("slow")
        start = self._index - feed.base
        if start < len(feed.items) and feed.items[start].offset <= self.offset:
            # This client was told elsewhere of events that came here after it.
            self._index = feed.index(self.offset)
            start = self._index - feed.base
        items = feed.items[start : start + _TAKE]
        if items:
            self._index += len(items)
            self.offset = items[-1].offset
        return items

    async def _older(self) -> Sequence[Item]:
        """The next events from the log; none if the feed has all that follows, or if the log has no more yet."""
        feed = self._feed
        if self.offset >= feed.floor:
            await self.aclose()
            self._index = feed.index(self.offset)
            return ()
        if anew := self._stored is None:
            self._stored = feed.session.events(after=self.offset, follow=False)
        items: list[Item] = []
        size = 0
        async for event in self._stored:
            items.append(Item(event))
            size += len(event.raw)
            if len(items) >= _TAKE or size >= _TAKE_BYTES:
                break
        else:
            await self.aclose()
        if isinstance(feed.error, SessionGone):
            feed.check()  # what was read may be of its successor
        if items:
            self.offset = items[-1].offset
        elif not anew:
            return await self._older()  # the log has grown since that was its end
        return items

    def _count(self, items: Sequence[Item]) -> None:
        counts = self._hub.counts
        counts.events.value += len(items)
        if self._feed.gaps or self._index < 0:
            counts.gaps.value += sum(isinstance(item.event.decoded, Gap) for item in items)

    async def aclose(self) -> None:
        """Free what reading holds; it may go on all the same."""
        self._ear.close()
        if self._stored is not None:
            stored, self._stored = self._stored, None
            await stored.aclose()


class Hub:
    """The sessions that are watched.

    Attributes:
        closing: The gateway shuts down: all responses are to end.
        lost: The broker has been away for ``settings.outage`` seconds.
        counts: What is counted of readers.
    """

    def __init__(self, client: Client, settings: GatewaySettings, telemetry: Telemetry | None = None) -> None:
        self.closing = False
        self.lost = False
        self.counts = Counts((telemetry or client.telemetry).instruments)
        self._readers = 0
        self._client = client
        self._settings = settings
        self._feeds: dict[str, Feed] = {}
        self._group: TaskGroup | None = None
        self._answered = time.monotonic()

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Serve until cancelled."""
        async with anyio.create_task_group() as group:
            self._group = group
            group.start_soon(self._sweep)
            group.start_soon(self._probe)
            task_status.started()

    def close(self) -> None:
        """Let every response end."""
        self.closing = True
        self.wake()

    def wake(self) -> None:
        """Let every reader look whether it is to end."""
        for feed in self._feeds.values():
            feed.wake()

    async def tail(self, session: str) -> Tail:
        """The session's end."""
        return await self._client.broker.log.last(session)

    @property
    def watched(self) -> int:
        """Sessions with a subscription at the broker."""
        return len(self._feeds)

    @property
    def levels(self) -> dict[str, Levels]:
        """What its gauges stand at."""
        return {"readers": lambda: [(self._readers, {})], "watched": lambda: [(self.watched, {})]}

    @asynccontextmanager
    async def read(
        self, session: str, *, after: int = 0, resumed: bool = False, valid: Callable[[], bool] = lambda: True
    ) -> AsyncGenerator[Reading]:
        """Read a session's events behind offset ``after``, stored and to come, for as long as ``valid``.

        ``resumed`` says that a client came with an offset it had, for what is counted.

        Raises:
            InvalidInput: ``after`` is negative.
            SessionGone: ``after`` lies beyond the session's end.
            Unavailable: The broker is away.
        """
        if after < 0:
            raise InvalidInput(f"after is the last offset seen, 0 for none; not {after}")
        feed = await self._join(session)
        reading = Reading(self, feed, after, valid)
        self._readers += 1
        try:
            if after > feed.end:
                await _check_end(feed, after)
            self.counts.resumes.value += resumed
            yield reading
        finally:
            self._readers -= 1
            self._leave(feed)
            with anyio.CancelScope(shield=True):
                await reading.aclose()

    def gone(self, session: str) -> None:
        """Tell the readers of a session at once that it was deleted."""
        if feed := self._feeds.get(session):
            self._end(feed, SessionGone(f"session {session} was deleted"))

    async def _join(self, session: str) -> Feed:
        """Return the session's feed, with one reader more."""
        while True:
            feed = self._feed(session)
            feed.readers += 1
            try:
                await feed.ready.wait()
                if not isinstance(feed.error, SessionGone):
                    feed.check()
                    if await self._stands(feed):
                        return feed
            except BaseException:
                self._leave(feed)
                raise
            self._leave(feed)

    def _leave(self, feed: Feed) -> None:
        feed.readers -= 1
        feed.idle_since = time.monotonic()

    async def _stands(self, feed: Feed) -> bool:
        """Whether the session is still the one that is watched: of a deletion a feed may be told late.

        Without asking, who comes anew would be given what memory holds of a session that is gone.
        """
        if time.monotonic() - feed.seen > _BELIEVED:
            try:
                with anyio.move_on_after(_BELIEVED):
                    await _check_end(feed, feed.end)
                    feed.seen = time.monotonic()
            except SessionGone as error:
                self._end(feed, error)
            except Unavailable:
                pass  # what memory holds is all there is to go by
        return feed.error is None

    def _end(self, feed: Feed, error: Exception) -> None:
        self.forget(feed)
        feed.fail(error)
        feed.scope.cancel()

    def forget(self, feed: Feed) -> None:
        """Drop a feed that has ended; the next reader begins a new one."""
        if self._feeds.get(feed.session.id) is feed:
            del self._feeds[feed.session.id]

    def _feed(self, session: str) -> Feed:
        feed = self._feeds.get(session)
        if feed is None:
            if self._group is None:
                raise Unavailable("the gateway is not open")
            feed = self._feeds[session] = Feed(self._client.session(session), self._settings)
            token = context.attach(context.Context())  # it outlives the request that begins it, and serves others
            self._group.start_soon(feed.run, self)
            context.detach(token)
        return feed

    async def _sweep(self) -> None:
        linger = self._settings.linger
        while True:
            await anyio.sleep(max(linger / 4, 0.05))
            now = time.monotonic()
            for feed in list(self._feeds.values()):
                if feed.readers == 0 and now - feed.idle_since > linger:
                    self.forget(feed)
                    feed.scope.cancel()

    async def _probe(self) -> None:
        while True:
            try:
                with anyio.fail_after(_PROBE_TIMEOUT):
                    await self.tail(_PROBED)
                self._answered = time.monotonic()
            except (BrokerError, TimeoutError):
                pass
            silent = time.monotonic() - self._answered
            if self.lost != (silent > self._settings.outage):
                self.lost = not self.lost
                log.warning("the broker is away" if self.lost else "the broker is back")
                self.wake()
            await anyio.sleep(min(_PROBE, self._settings.outage / 2))
