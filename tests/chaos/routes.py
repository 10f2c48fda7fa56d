"""What lies between the servers of a cluster: a cable from each to each, so that any of them can be parted from any."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio

from tests.chaos.cable import Cable
from tests.chaos.http import request

Way = tuple[int, int]
"""From one server to another, by their numbers."""

_UNDER_WAY = 0.5
"""Seconds after which nothing that a server has sent is still on its way."""


class Leaky(Exception):
    """Servers heard each other although nothing should have passed: the run says nothing about partitions."""


class Routes:
    """The network of a cluster.

    Servers that hear of each other from a third one connect to what each advertises. Here that is a port where nobody
    listens: each server has exactly the routes that it is given, each through a cable of its own.

    Args:
        listening: The ports at which the servers take routes.
        monitoring: The ports at which they tell which routes they have.
        between: A port for each way there is, for the cables.
    """

    def __init__(self, listening: Sequence[int], monitoring: Sequence[int], between: Sequence[int]) -> None:
        self._listening = listening
        self._monitoring = monitoring
        self.ways: list[Way] = list(itertools.permutations(range(len(listening)), 2))
        self._cables = {way: Cable(listening[way[1]], port=port) for way, port in zip(self.ways, between, strict=True)}

    def settings(self, server: int) -> str:
        """The lines for a server's configuration file."""
        routes = ", ".join(
            f"nats://127.0.0.1:{cable.port}" for (dials, _), cable in self._cables.items() if dials == server
        )
        # Clients must not learn of ways that lead round their cables, either.
        return (
            f"http: 127.0.0.1:{self._monitoring[server]}\n"
            f"cluster {{ name: chaos, listen: 127.0.0.1:{self._listening[server]}, advertise: 127.0.0.1:1, "
            f"routes: [{routes}], no_advertise: true }}"
        )

    @asynccontextmanager
    async def laid(self) -> AsyncGenerator[None]:
        """Have the cables."""
        async with AsyncExitStack() as stack:
            for cable in self._cables.values():
                await stack.enter_async_context(cable)
            yield

    def cut(self, ways: Collection[Way]) -> None:
        """Reset the connections between the servers of these ways, whoever of them dialled, and every new one."""
        for (one, other), cable in self._cables.items():
            if (one, other) in ways or (other, one) in ways:
                cable.cut()

    def silence(self, ways: Collection[Way]) -> None:
        """Let nothing pass on these ways; connections stay."""
        for (one, other), cable in self._cables.items():
            cable.silence(up=(one, other) in ways, down=(other, one) in ways)

    def restore(self) -> None:
        """Have good cables again."""
        for cable in self._cables.values():
            cable.restore()

    def to(self, server: int) -> list[Way]:
        """The ways to a server."""
        return [way for way in self.ways if way[1] == server]

    def of(self, server: int) -> list[Way]:
        """The ways from a server."""
        return [way for way in self.ways if way[0] == server]

    def alone(self, server: int) -> list[Way]:
        """All of both."""
        return self.to(server) + self.of(server)

    def link(self, server: int) -> list[Way]:
        """Those between a server and one of the others; a third one hears both."""
        return [way for way in self.alone(server) if (server + 1) % len(self._listening) in way]

    async def routes(self, server: int) -> list[dict[str, Any]]:
        """The routes that a server has, as it tells them itself."""
        async with request(f"http://127.0.0.1:{self._monitoring[server]}", "GET", "/routez") as response:
            return json.loads(await response.body()).get("routes") or []

    @asynccontextmanager
    async def parted(self, ways: Collection[Way], names: Sequence[str], *, cut: bool) -> AsyncGenerator[None]:
        """Cut or silence these ways while the context lasts; its body may not start or end servers.

        Args:
            ways: Which.
            names: Of the servers, by number.
            cut: Whether connections are reset; else they are silent.

        Raises:
            Leaky: Something has passed.
        """
        try:
            (self.cut if cut else self.silence)(ways)
            await anyio.sleep(_UNDER_WAY)
            before = await self._heard(ways, names)
            yield
            after = await self._heard(ways, names)
        finally:
            self.restore()
        for way in ways:
            if after[way] > before[way]:
                raise Leaky(f"{names[way[1]]} has heard {after[way] - before[way]} messages of {names[way[0]]}")

    async def _heard(self, ways: Collection[Way], names: Sequence[str]) -> dict[Way, int]:
        """How much came to the end of each way, on the routes that are there now."""
        heard: dict[Way, int] = {}
        for speaks, hears in ways:
            found = [route for route in await self.routes(hears) if route["remote_name"] == names[speaks]]
            heard[speaks, hears] = sum(route["in_msgs"] for route in found)
        return heard
