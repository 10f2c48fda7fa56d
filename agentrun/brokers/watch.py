"""Seeing that what was set up stays as the promises need it, while it is used."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Generic

import anyio

from agentrun.brokers.shared import LayoutT, Shared
from agentrun.errors import Misconfigured, Unavailable

EVERY = 300.0
"""Seconds between two looks as a rule."""
WHILE_WRONG = 15.0
"""Seconds between two looks while something is not as needed."""
SPREAD = 2.0
"""Seconds over which a fleet that comes back spreads its looks."""
NOT_BEFORE = 5.0
"""Seconds between two looks that something gave reason for."""


class Watch(Generic[LayoutT]):
    """Looks at a namespace's settings now and then, after a reconnect, and where something makes it suspicious.

    What is not as needed is an error in the log, told once, with the command that mends it. That it was mended is told
    as well.

    Args:
        shared: The broker's state; it gets what is found.
        load: Reads the settings, and raises `Misconfigured` where they are not as needed.
        log: Where to tell.
    """

    def __init__(self, shared: Shared[LayoutT], load: Callable[[], Awaitable[LayoutT]], log: logging.Logger) -> None:
        self._shared = shared
        self._load = load
        self._log = log
        self._suspicion = anyio.Event()
        self._said = ""

    def look(self) -> None:
        """Look soon: there is a reason to."""
        self._suspicion.set()

    async def run(self) -> None:
        """Watch for ever.

        Raises:
            Misconfigured: The namespace has another number of partitions now: sessions are somewhere else.
        """
        while True:
            self._suspicion = anyio.Event()
            with anyio.move_on_after((WHILE_WRONG if self._said else EVERY) * random.uniform(0.8, 1.2)):  # noqa: S311
                await self._suspicion.wait()
                await anyio.sleep(random.uniform(0.0, SPREAD))  # noqa: S311
            self._suspicion = anyio.Event()
            looked = time.monotonic()
            await self._look()
            await anyio.sleep(max(0.0, looked + NOT_BEFORE - time.monotonic()))

    async def _look(self) -> None:
        namespace, before = self._shared.namespace, self._shared.found
        try:
            found = await self._load()
        except Unavailable as error:
            self._log.debug("the settings cannot be looked at: %s", error)
            return
        except Misconfigured as error:
            if self._said != (said := str(error)):
                self._said = said
                self._log.error("what is promised does not hold now: %s", error)
            return
        if found.partitions != before.partitions:
            raise Misconfigured(
                f"namespace {namespace} has {found.partitions} partitions now, and had {before.partitions}: "
                "whoever uses it must be started again"
            )
        self._shared.layout = found
        if self._said:
            self._said = ""
            self._log.warning("namespace %s is as needed again", namespace)
