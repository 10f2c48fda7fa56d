"""Seeing that the streams stay what the promises need, while they are used."""

from __future__ import annotations

import random
import time

import anyio

from agentrun.brokers.nats_admin import load
from agentrun.brokers.nats_core import Core
from agentrun.brokers.nats_link import log
from agentrun.errors import Misconfigured, Unavailable

EVERY = 300.0
"""Seconds between two looks as a rule."""
WHILE_WRONG = 15.0
"""Seconds between two looks while something is not as needed."""
SPREAD = 2.0
"""Seconds over which a fleet that comes back spreads its looks."""
NOT_BEFORE = 5.0
"""Seconds between two looks that something gave reason for."""


class Watch:
    """Looks at the streams' settings now and then, after a reconnect, and where a stream does not answer.

    What is not as needed is an error in the log, told once, with the command that mends it. That it was mended is told
    as well.

    Args:
        core: The broker's.
        min_dedupe_window: The least time, in seconds, for which the streams must remember ids of inputs.
    """

    def __init__(self, core: Core, min_dedupe_window: float) -> None:
        self._core = core
        self._min_dedupe_window = min_dedupe_window
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
        before = self._core.found
        try:
            found = await load(self._core, self._min_dedupe_window)
        except Unavailable as error:
            log.debug("the streams cannot be looked at: %s", error)
            return
        except Misconfigured as error:
            if self._said != (said := str(error)):
                self._said = said
                log.error("what is promised does not hold now: %s", error)
            return
        if found.partitions != before.partitions:
            raise Misconfigured(
                f"namespace {found.namespace} has {found.partitions} partitions now, and had {before.partitions}: "
                "whoever uses it must be started again"
            )
        self._core.layout = found
        if self._said:
            self._said = ""
            log.warning("the streams of namespace %s are as needed again", found.namespace)
