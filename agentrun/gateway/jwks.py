"""A key set (JWKS) that stands in a file or at a URL, looked at again now and then."""

from __future__ import annotations

import ipaddress
import logging
import ssl
import time
import urllib.request
from collections.abc import Callable
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.error import HTTPError
from urllib.parse import urlsplit

import anyio
import anyio.to_thread

from agentrun.errors import InvalidInput

__all__ = ["Source", "is_loopback"]

_TIMEOUT = 5.0
_LARGEST = 256 << 10

_log = logging.getLogger("agentrun.gateway")


class Source:
    """Where a key set stands.

    Looking costs a worker thread for at most about 5 seconds and takes at most 256 KiB. Redirects are not followed.

    Args:
        place: A file, or an ``https://`` URL; ``http://`` only on loopback.
        least_gap: Seconds between two looks, whoever asks for them.
        clock: Seconds, monotonic.

    Raises:
        InvalidInput: It is neither, or there is no such file.
    """

    def __init__(
        self, place: str | Path, *, least_gap: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._place = str(place)
        self._is_url = "://" in self._place
        self.least_gap = least_gap
        self._clock = clock
        self._looked = -float("inf")
        self._lock = anyio.Lock()
        self._threads = anyio.CapacityLimiter(1)
        if self._is_url:
            _check_url(self._place)
        elif not Path(self._place).is_file():
            raise InvalidInput(f"there is no key set at {self._place!r}: give a file, or an https:// URL")

    async def look(self, use: Callable[[bytes], None]) -> None:
        """Give the document to ``use``, unless it was looked at just now. A failure is logged and changes nothing."""
        async with self._lock:
            if self._clock() - self._looked < self.least_gap:
                return
            try:
                use(await anyio.to_thread.run_sync(self._read, limiter=self._threads, abandon_on_cancel=True))
            except (OSError, ValueError, HTTPException) as error:
                _log.warning("the key set at %s cannot be used: %s", self._place, error)
            finally:
                self._looked = self._clock()

    def _read(self) -> bytes:
        if self._is_url:
            return _fetch(self._place)
        with open(self._place, "rb") as file:
            return _checked(file.read(_LARGEST + 1))


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


def _fetch(url: str) -> bytes:
    # Loopback is never reached through a proxy; the outside may have to be.
    proxies = [urllib.request.ProxyHandler({})] if url.startswith("http://") else []
    https = urllib.request.HTTPSHandler(context=ssl.create_default_context())
    opener = urllib.request.build_opener(_NoRedirects(), https, *proxies)
    end = time.monotonic() + _TIMEOUT
    request = urllib.request.Request(url, headers={"Accept": "application/json"})  # noqa: S310 - the scheme is checked
    body = b""
    try:
        opened = opener.open(request, timeout=_TIMEOUT)
    except HTTPError as error:
        error.close()
        raise ValueError(f"the answer is {error.code} {error.reason}") from None
    with opened as response:
        while chunk := response.read1(65536):
            body = _checked(body + chunk)
            if time.monotonic() > end:
                raise TimeoutError(f"not read within {_TIMEOUT} s")
    return body


def _checked(body: bytes) -> bytes:
    if len(body) > _LARGEST:
        raise ValueError(f"it has more than {_LARGEST} bytes")
    return body


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return
    if parts.scheme == "http" and parts.hostname and is_loopback(parts.hostname):
        return
    raise InvalidInput(f"keys are fetched from https:// (http:// only on loopback), not from {url!r}")


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine, to a browser as well."""
    host = host.lower().rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
