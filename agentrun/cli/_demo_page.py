"""The web page of the demonstration, served by a gateway process of its own."""

from __future__ import annotations

import subprocess
import tempfile
import urllib.request
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
import anyio.to_thread
import msgspec
from anyio.abc import Process
from msgspec import Struct

from agentrun.cli._page import HOST, gateway_command, gateway_environment, missing, pick_port
from agentrun.cli._place import Place
from agentrun.cli.common import Fatal

_START = 30.0
_LOOK = 0.05


@asynccontextmanager
async def served_page(place: Place, asked: int | None, *, agent: str) -> AsyncGenerator[str | None]:
    """Serve the page while the context is open, and give its address; None where the extra ``gateway`` is missing.

    Raises:
        Fatal: The gateway does not start; the message says what it said.
    """
    if missing() is not None:
        yield None
        return
    port = pick_port(asked)
    command = gateway_command(port, agent=agent)
    with tempfile.TemporaryFile("a+b") as log:
        process = await anyio.open_process(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=gateway_environment(place.environment),
            start_new_session=True,
        )
        try:
            try:
                await _until_served(process, port)
            except TimeoutError:
                log.seek(0)
                said = log.read().decode(errors="replace").strip()[-1000:]
                raise Fatal(f"the web page's gateway does not start: {said}") from None
            yield f"http://{HOST}:{port}"
        finally:
            with anyio.CancelScope(shield=True):
                if process.returncode is None:
                    process.terminate()
                await process.wait()
                await process.aclose()


async def _until_served(process: Process, port: int) -> None:
    with anyio.fail_after(_START):
        while True:
            if process.returncode is not None:
                raise TimeoutError
            try:
                async with await anyio.connect_tcp(HOST, port):
                    return
            except OSError:
                await anyio.sleep(_LOOK)


class _Item(Struct):
    offset: int
    event: msgspec.Raw


class _Page(Struct):
    offset: int
    events: list[_Item]


async def read_events(address: str, session: str) -> list[tuple[int, bytes]]:
    """Return the session's events as the gateway gives them: offsets, and their JSON byte by byte."""
    found: list[tuple[int, bytes]] = []
    after = 0
    while True:
        url = f"{address}/v1/sessions/{session}/events?after={after}"
        page = msgspec.json.decode(await anyio.to_thread.run_sync(_get, url), type=_Page)
        if not page.events:
            return found
        found += [(item.offset, bytes(item.event)) for item in page.events]
        after = page.offset


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=_START) as response:  # noqa: S310 - an address of our own
        return response.read()
