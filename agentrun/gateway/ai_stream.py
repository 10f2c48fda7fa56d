"""One response of a UI message stream: what is stored of a turn, and what comes, until it ends or asks.

A response ends cleanly only with a ``finish``: a client takes any clean end for success. Whenever it cannot be told to
the end, the connection is broken off, which every client takes for what it is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from agentrun.errors import AgentrunError, SessionGone
from agentrun.gateway.ai_chunks import Chunker, message_id
from agentrun.gateway.ai_input import Run
from agentrun.gateway.ai_message import Chunk, Options, encode
from agentrun.gateway.hub import Closed, Item, Reading
from agentrun.gateway.rights import Principal
from agentrun.gateway.sse import KEEP_ALIVE, Broken, Writer, deadline_of

if TYPE_CHECKING:
    from agentrun.gateway.app import Gateway

__all__ = ["Answer", "frame"]

DONE = b"data: [DONE]\n\n"
OPEN = b": stream-open\n\n"
_GATHER = 0.25
"""Seconds after a question in which another one, or an answer, is waited for before the response ends with it."""
_LAG = 2.0
"""Seconds in which what was stored a moment ago is waited for."""
_LOST = "the beginning of this answer has expired from the log: read it again from its start"


def frame(chunks: Sequence[Chunk]) -> bytes:
    """Return the chunks as server-sent events."""
    return b"".join([b"data: " + encode(chunk) + b"\n\n" for chunk in chunks])


class Answer:
    """One response.

    Args:
        gateway: The gateway.
        principal: Whose response it is.
        reading: The session, from the turn's request on.
        run: The turn; with ``after``, what follows the question there, for a client that has what came before.
        options: How chunks are made.
        start: How many chunks to leave out; from the end, if negative.
        exact: Whether chunks must be the same as for every other reader, so that they can be counted.

    Attributes:
        chunker: The turn as far as it was read.
        total: Chunks there were when the response began.
    """

    def __init__(
        self,
        gateway: Gateway,
        principal: Principal,
        reading: Reading,
        run: Run,
        options: Options,
        *,
        start: int = 0,
        exact: bool = True,
    ) -> None:
        self.chunker = Chunker(run.turn, options)
        self.total = 0
        self._gateway = gateway
        self._principal = principal
        self._reading = reading
        self._run = run
        self._options = options
        self._start = start
        self._exact = exact
        self._ready: list[Chunk] = []
        self._held: list[Chunk] = []
        """What came after a question: for the response that follows the answer."""

    async def catch_up(self, upto: int) -> None:
        """Read what is stored, to the offset ``upto`` at least. To be done before the response begins.

        Raises:
            SessionGone: The session was deleted.
            Unavailable: The broker is away.
            Closed: The gateway shuts down.
        """
        items: list[Item] = []
        patience = time.monotonic() + _LAG
        while not self.chunker.ended:
            behind = self._reading.offset < upto and time.monotonic() < patience
            more = await self._reading.next(0.05 if behind else 0)
            items += more
            if self._exact:
                self._take(more)
            if not more and not behind and self._reading.at_end:
                break
        if self._exact:
            if self._run.after:
                self._ready.insert(0, {"type": "start", "messageId": message_id(self._run.turn)})
        else:
            self._replay(items)
        self.total = len(self._ready)
        if self._start < 0:
            self._start = max(0, self.total + self._start)

    def _replay(self, items: Sequence[Item]) -> None:
        chunker = Chunker(self._run.turn, self._options)
        for item in items:
            chunker.feed(item.offset, item.event.data, time=item.event.time)
        upto = chunker.asked if chunker.waiting else items[-1].offset if items else 0
        for item in items:
            if item.offset <= upto:
                self.chunker.feed(item.offset, item.event.data, time=item.event.time)
        self._ready = self.chunker.replay()
        self.chunker.broken = False
        self._take([item for item in items if item.offset > upto])

    def _take(self, items: Sequence[Item]) -> bool:
        """Make chunks of events, and return whether a question was among them."""
        asked = False
        for item in items:
            chunks = self.chunker.feed(item.offset, item.event.data, time=item.event.time)
            if item.offset <= self._run.after:
                self.chunker.broken = False
                continue
            if self.chunker.waiting and self.chunker.asked != item.offset:
                self._held += chunks
                continue
            asked = asked or self.chunker.waiting
            self._ready += self._held
            self._ready += chunks
            self._held.clear()
        return asked

    async def body(self, writer: Writer) -> None:
        """Write the response.

        Raises:
            Broken: It cannot be told to its end.
        """
        await writer.write(OPEN)
        if self._exact and self._start > 0 and not self.chunker.exact:
            await writer.write(frame([{"type": "error", "errorText": _LOST}, _finish("error")]) + DONE)
            return
        settings, hub = self._gateway.settings, self._gateway.hub
        deadline = deadline_of(self._principal, 0)
        patience = 0.0
        while True:
            if self.chunker.broken:
                raise Broken("what was shown is superseded")
            if self._ready:
                await self._write(writer)
            now = time.monotonic()
            if self.chunker.ended:
                await self._end(writer)
                return
            if self.chunker.waiting and now >= patience:
                await writer.write(frame(self.chunker.pause()) + DONE)
                return
            if hub.lost or now >= deadline:
                raise Broken("the broker is away" if hub.lost else "the token has expired")
            wait = min(deadline - now, writer.last + settings.keep_alive - now)
            if self.chunker.waiting:
                wait = min(wait, patience - now)
            try:
                if self._take(await self._reading.next(max(wait, 0.01))):
                    patience = time.monotonic() + _GATHER
            except SessionGone as error:
                await writer.write(frame([{"type": "error", "errorText": str(error)}, _finish("error")]) + DONE)
                return
            except (Closed, AgentrunError) as error:
                raise Broken(str(error)) from error
            if time.monotonic() - writer.last >= settings.keep_alive:
                await writer.write(KEEP_ALIVE)

    async def _write(self, writer: Writer) -> None:
        skipped = min(self._start, len(self._ready))
        self._start -= skipped
        chunks, self._ready = self._ready[skipped:], []
        if chunks:
            await writer.write(frame(chunks))

    async def _end(self, writer: Writer) -> None:
        if self._start > 0:
            # It had more than there is, its end included; without one it would ask again and again.
            await writer.write(frame([_finish("other")]))
        await writer.write(DONE)


def _finish(reason: str) -> Chunk:
    return {"type": "finish", "finishReason": reason}
