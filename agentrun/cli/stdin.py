"""What comes on stdin, without a thread that would keep the process from ending while nothing comes."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncGenerator

import anyio
import anyio.to_thread

_AT_ONCE = 1 << 16


async def chunks() -> AsyncGenerator[bytes]:
    """What comes, as it comes; empty at its end."""
    fd = sys.stdin.fileno()
    waits = True
    while True:
        if sys.platform == "win32":
            chunk = await anyio.to_thread.run_sync(os.read, fd, _AT_ONCE, abandon_on_cancel=True)
        else:
            if waits:
                try:
                    await anyio.wait_readable(fd)
                except PermissionError:
                    waits = False  # a file: always readable
            chunk = os.read(fd, _AT_ONCE)
        yield chunk
        if not chunk:
            return


async def lines() -> AsyncGenerator[bytes]:
    """The lines, without their ends; also the last one, where it has no end."""
    rest = b""
    async for chunk in chunks():
        *found, rest = (rest + chunk).split(b"\n")
        if not chunk and rest:
            found.append(rest)
        for line in found:
            yield line
