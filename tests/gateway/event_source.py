"""What a browser's EventSource does, for tests: it comes back with the last id it saw until it is told to stay away."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import anyio
import httpx

from tests.gateway.conftest import frames


class GaveUp(Exception):
    """An answer after which an EventSource never comes back."""


class EventSource:
    """Reads a stream of server-sent events over however many connections it takes.

    Attributes:
        last: The last id seen.
        connections: How many it took.
        broken: How many of them did not end cleanly.
        refused: How many could not be made.
    """

    def __init__(self, http: httpx.AsyncClient, path: str, *, last: str = "") -> None:
        self.last = last
        self.connections = 0
        self.broken = 0
        self.refused = 0
        self._http = http
        self._path = path
        self._retry = 3.0

    async def items(self) -> AsyncGenerator[dict[str, Any]]:
        """The data of every event; ends when the server says 204."""
        while True:
            opened = False
            try:
                async with self._http.stream("GET", self._path, headers=self._headers(), timeout=60) as response:
                    self.connections += 1
                    opened = True
                    if response.status_code == 204:
                        return
                    if response.status_code != 200:
                        raise GaveUp(f"{response.status_code}: {(await response.aread()).decode()}")
                    assert response.headers["content-type"].startswith("text/event-stream")
                    async for frame in frames(response):
                        self._retry = int(frame.get("retry", self._retry * 1000)) / 1000
                        if "id" in frame:
                            self.last = frame["id"]
                        if "data" in frame:
                            yield json.loads(frame["data"])
            except httpx.TransportError:
                # A connection that was kept may be closed by the server in the moment it is used again.
                self.broken += opened
                self.refused += not opened
            await anyio.sleep(self._retry)

    async def until(self, type: str, count: int = 1, within: float = 30) -> list[dict[str, Any]]:
        """The items up to the ``count``-th event of a type."""
        found: list[dict[str, Any]] = []
        with anyio.fail_after(within):
            async for item in self.items():
                found.append(item)
                count -= item["event"]["type"] == type
                if count == 0:
                    return found
        raise AssertionError(f"the stream ended before {type}: {found}")

    def _headers(self) -> dict[str, str]:
        return {"accept": "text/event-stream", "cache-control": "no-cache"} | (
            {"last-event-id": self.last} if self.last else {}
        )
