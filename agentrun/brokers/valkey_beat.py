"""What goes out even while an agent blocks the event loop, from a thread of its own: heartbeats and announcements."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
from valkey.exceptions import NoScriptError

from agentrun.brokers.valkey_link import Link, LinkOptions, NotSent, log
from agentrun.brokers.valkey_scripts import EXTEND
from agentrun.errors import BrokerError


class Heartbeats:
    """Sends over its own connection, in its own thread, started with the first queue that is opened."""

    def __init__(self, options: LinkOptions) -> None:
        self._options = options
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._link: Link | None = None
        self._over: anyio.Event | None = None
        self._ready = threading.Event()

    def start(self) -> None:
        """Start the thread if it does not run yet; does not wait for it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="agentrun-heartbeats", daemon=True)
            self._thread.start()

    def extend(self, key: str, args: tuple[str, ...]) -> None:
        """Extend a lease; any thread, never blocks, best effort."""
        self._put("EVALSHA", EXTEND.sha, "1", key, *args)

    def publish(self, channel: str, body: bytes) -> None:
        """Publish; any thread, never blocks, best effort: while there is no connection, nothing is kept."""
        self._put("PUBLISH", channel, body)

    def _put(self, *words: str | bytes) -> None:
        self._call(lambda: self._send(words))

    def _call(self, function: Callable[[], None]) -> None:
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # the loop was closed: nothing is left to keep alive
                loop.call_soon_threadsafe(function)

    def _send(self, words: tuple[str | bytes, ...]) -> None:
        if self._link is not None:
            with suppress(NotSent):
                self._link.send(*words).add_done_callback(self._on_answer)

    def _on_answer(self, future: asyncio.Future[Any]) -> None:
        error = None if future.cancelled() else future.exception()
        if isinstance(error, NoScriptError):
            # The scripts were flushed: the next heartbeat finds it again.
            self._send(("SCRIPT", "LOAD", EXTEND.text))
        elif error is not None:
            log.debug("a heartbeat or an announcement was lost: %s", error)

    async def stop(self) -> None:
        """End the thread and its connection."""
        thread = self._thread
        if thread is None:
            return
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._ready.wait, 2.0)
            self._call(lambda: self._over.set() if self._over is not None else None)
            await anyio.to_thread.run_sync(thread.join, 10.0)
        self._thread = None

    def _run(self) -> None:
        try:
            anyio.run(self._main)
        except Exception:
            log.exception("the heartbeat thread ended: leases of this process will run out")
        finally:
            self._loop = None
            self._ready.set()

    async def _main(self) -> None:
        self._over = anyio.Event()
        self._loop = asyncio.get_running_loop()
        self._ready.set()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._beat)
            await self._over.wait()
            await anyio.lowlevel.checkpoint()  # what was put before is sent
            tasks.cancel_scope.cancel()

    async def _beat(self) -> None:
        while True:
            link = self._link = Link(self._options, "heartbeats")
            try:
                async with anyio.create_task_group() as tasks:
                    await tasks.start(link.run)
            except* BrokerError as errors:
                log.warning("heartbeats: %s", errors.exceptions[0])
            await anyio.sleep(1.0)
