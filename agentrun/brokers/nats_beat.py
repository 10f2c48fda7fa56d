"""What goes out even while an agent blocks the event loop, from a thread of its own: heartbeats and announcements."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

import anyio
import anyio.to_thread

from agentrun.brokers.nats_link import Link, LinkOptions, NotConnected, log
from agentrun.errors import Unavailable

IN_PROGRESS = b"+WPI"


class Heartbeats:
    """Publishes over its own connection, in its own thread, started with the first queue that is opened."""

    def __init__(self, options: LinkOptions) -> None:
        self._options = options
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._queue: asyncio.Queue[tuple[str, bytes] | None] | None = None
        self._ready = threading.Event()
        self._stopping = False

    def start(self) -> None:
        """Start the thread if it does not run yet; does not wait for it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="agentrun-heartbeats", daemon=True)
            self._thread.start()

    def beat(self, subject: str) -> None:
        """Extend the lease of this ack subject; any thread, never blocks, best effort."""
        self.publish(subject, IN_PROGRESS)

    def publish(self, subject: str, body: bytes) -> None:
        """Publish; any thread, never blocks, best effort: while there is no connection, nothing is kept."""
        self._put((subject, body))

    def _put(self, item: tuple[str, bytes] | None) -> None:
        loop, queue = self._loop, self._queue
        if loop is None or queue is None:
            return
        with suppress(RuntimeError):  # the loop was closed: nothing is left to keep alive
            loop.call_soon_threadsafe(queue.put_nowait, item)

    async def stop(self) -> None:
        """End the thread and its connection."""
        thread = self._thread
        if thread is None:
            return
        self._stopping = True
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._ready.wait, 2.0)
            self._put(None)
            await anyio.to_thread.run_sync(thread.join, 10.0)
        self._thread = None

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except Exception:
            log.exception("the heartbeat thread ended: leases of this process will run out")
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self._queue = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._ready.set()
        link = Link(self._options, "heartbeats")
        while True:
            try:
                await link.open()
                break
            except Unavailable as error:
                log.warning("heartbeats: %s", error)
                if self._stopping:
                    return
                link = Link(self._options, "heartbeats")
        try:
            while (item := await self._queue.get()) is not None:
                with suppress(NotConnected):
                    await link.publish(*item)
        finally:
            await link.close()
