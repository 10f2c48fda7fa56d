"""What goes to stdout while the event loop has other things to do: who reads it slowly holds up nothing else."""

from __future__ import annotations

import os
import sys

import anyio
import anyio.to_thread

_AT_ONCE = 4096
"""Bytes that a pipe which is ready takes without blocking, on any system that has such."""


async def write(data: bytes) -> None:
    """Write all of it, as fast as it is taken; without a thread that would keep the process from ending.

    Raises:
        BrokenPipeError: Nobody reads it any more.
    """
    fd = sys.stdout.fileno()
    if sys.platform == "win32":
        await anyio.to_thread.run_sync(_put, fd, data)
        return
    left = memoryview(data)
    try:
        while left:
            await anyio.wait_writable(fd)
            left = left[os.write(fd, left[:_AT_ONCE]) :]
    except PermissionError:
        _put(fd, left)  # a file: always ready


def _put(fd: int, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]
