"""How much one token, or one address without a good one, may ask of a gateway."""

from __future__ import annotations

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager

from agentrun.gateway.problems import Problem
from agentrun.settings import GatewaySettings

__all__ = ["Limiter"]

_EXACT = 1e-6
_KEYS = 50_000
"""Buckets kept; the one longest unused is forgotten first, and is full when it is made again."""


class _Buckets:
    """A token bucket for each key, as the one time at which it will be full again."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float]) -> None:
        self._gap = 1 / rate if rate > 0 else 0.0
        self._depth = max(burst, 1) * self._gap
        self._clock = clock
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def take(self, key: str) -> float:
        """Take one if there is one, and return 0; else the seconds to wait."""
        if self._gap == 0.0:
            return 0.0
        now = self._clock()
        full_at = max(self._full_at.get(key, now), now) + self._gap
        if (wait := full_at - now - self._depth) > _EXACT:
            return wait
        self._full_at[key] = full_at
        self._full_at.move_to_end(key)
        if len(self._full_at) > _KEYS:
            self._full_at.popitem(last=False)
        return 0.0


class Limiter:
    """Counts requests and streams per key (`Principal.key`), and failures per address. The empty key has no limits.

    Memory is bounded: 50,000 keys and as many addresses, about 100 bytes each, besides the streams that are open.

    Args:
        settings: ``rate`` and ``burst`` (a rate of 0: no limit), ``max_streams``, ``max_failures`` (0: no limit).
        clock: Seconds, monotonic.
    """

    def __init__(self, settings: GatewaySettings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._requests = _Buckets(settings.rate, settings.burst, clock)
        self._failures = _Buckets(settings.max_failures / 60, settings.max_failures, clock)
        self._max_streams = settings.max_streams
        self._streams: dict[str, int] = {}

    def take(self, key: str) -> None:
        """Count one request.

        Raises:
            Problem: 429, with Retry-After: there were too many.
        """
        if key and (wait := self._requests.take(key)):
            raise _too_many("too_many_requests", "this token sends too many requests", wait)

    @contextmanager
    def stream(self, key: str) -> Generator[None]:
        """Count one open stream, for as long as the context lasts.

        Raises:
            Problem: 429: as many are open as may be.
        """
        if not key:
            yield
            return
        count = self._streams.get(key, 0)
        if count >= self._max_streams:
            raise _too_many("too_many_streams", f"this token has {count} streams open, close one first", 5.0)
        self._streams[key] = count + 1
        try:
            yield
        finally:
            left = self._streams[key] - 1
            if left:
                self._streams[key] = left
            else:
                del self._streams[key]

    def failed(self, address: str | None) -> None:
        """Count one request without a good token.

        Raises:
            Problem: 429: there were too many.
        """
        if address is not None and (wait := self._failures.take(_network(address))):
            raise _too_many("too_many_failures", "too many requests without a good token came from this address", wait)


def _too_many(code: str, detail: str, wait: float) -> Problem:
    return Problem(429, code, detail, headers={"Retry-After": str(math.ceil(wait))})


def _network(address: str) -> str:
    """What one sender cannot change at will: of an IPv6 address, the first half."""
    if ":" not in address:
        return address
    try:
        return str(ipaddress.ip_network((address.partition("%")[0], 64), strict=False))
    except ValueError:
        return address
