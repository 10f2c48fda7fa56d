"""stdout, to which the command line writes while its connection lives."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from agentrun.cli import stdout

DATA = os.urandom(300_000)  # more than a pipe takes


@contextmanager
def piped(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The other end of stdout."""
    reads, writes = os.pipe()
    with os.fdopen(writes, "w", encoding="utf-8") as out, os.fdopen(reads, "rb"):
        monkeypatch.setattr(sys, "stdout", out)
        yield reads


async def test_who_reads_late_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    lives = threading.Event()
    found: list[bool] = []
    taken = bytearray()

    def read() -> None:
        found.append(lives.wait(10))
        while len(taken) < len(DATA):
            taken.extend(os.read(pipe, 65536))

    reader = threading.Thread(target=read)
    with piped(monkeypatch) as pipe:
        reader.start()
        async with anyio.create_task_group() as group:
            group.start_soon(stdout.write, DATA)
            await anyio.sleep(0.05)
            lives.set()
        reader.join(10)
    assert found == [True], "the event loop stood still until somebody read"
    assert taken == DATA


async def test_a_write_that_nobody_takes_can_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    with piped(monkeypatch), anyio.fail_after(10):
        with anyio.move_on_after(0.05) as scope:
            await stdout.write(DATA)
        assert scope.cancelled_caught


async def test_nobody_reads_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w", encoding="utf-8") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(BrokenPipeError):
            await stdout.write(DATA)


async def test_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="utf-8") as out:
        monkeypatch.setattr(sys, "stdout", out)
        await stdout.write(DATA[:1000])
        await stdout.write(DATA[1000:])
    assert (tmp_path / "out").read_bytes() == DATA
