"""The servers for development and tests: they are ours, they keep their data, and they never outlive their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agentrun.brokers import server as nats_module
from agentrun.brokers import valkey_server as valkey_module
from agentrun.brokers.process import ServerProcess
from agentrun.brokers.server import NatsServer, find_nats_server
from agentrun.brokers.valkey_server import ValkeyServer, find_valkey_server
from agentrun.errors import Misconfigured

both = pytest.mark.parametrize("kind", [NatsServer, ValkeyServer])


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text() if Path("/proc").is_dir() else True


def becomes(condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + 8
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


@both
def test_stop_ends_the_process_and_removes_what_is_temporary(kind: type[ServerProcess]) -> None:
    server = kind()
    server.start()
    pid, directory = server.pid, server._temporary
    assert pid is not None
    assert directory is not None
    assert alive(pid)
    server.stop()
    assert not alive(pid)
    assert not directory.exists()


@both
async def test_async_context_starts_and_stops(kind: type[ServerProcess]) -> None:
    async with kind() as server:
        pid = server.pid
        assert pid is not None
        assert alive(pid)
    assert not alive(pid)


@pytest.mark.parametrize(("kind", "kept"), [(NatsServer, "jetstream"), (ValkeyServer, "**/*.aof")])
def test_port_and_data_survive_a_crash(kind: type[ServerProcess], kept: str, tmp_path: Path) -> None:
    with kind(data=tmp_path / "data") as server:
        port, pid = server.port, server.pid
        server.kill()
        assert server.pid is None
        server.start()
        assert server.port == port
        assert server.pid != pid
    assert list((tmp_path / "data").glob(kept))


@pytest.mark.parametrize(("kind", "why"), [(NatsServer, "taken by another server|in use"), (ValkeyServer, "in use")])
def test_a_port_that_another_server_holds_is_refused(kind: type[ServerProcess], why: str) -> None:
    with kind() as first, pytest.raises(Misconfigured, match=why):
        kind(port=first.port).start()


@pytest.mark.parametrize(("kind", "settings"), [(NatsServer, "nonsense: true"), (ValkeyServer, "nonsense true")])
def test_what_the_server_says_when_it_does_not_start_is_told_and_nothing_is_left(
    kind: type[ServerProcess], settings: str
) -> None:
    server = kind(settings=settings)
    with pytest.raises(Misconfigured, match="nonsense"):
        server.start()
    assert server.pid is None
    assert server._temporary is None


def test_a_missing_server_names_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(nats_module.sysconfig, "get_path", lambda _name: str(tmp_path))
    monkeypatch.setattr(valkey_module.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(Misconfigured, match=r"agentrun\[server\]"):
        find_nats_server()
    with pytest.raises(Misconfigured, match=r"agentrun\[valkey-server\]"):
        find_valkey_server()


@both
def test_a_killed_parent_takes_the_server_along(kind: type[ServerProcess]) -> None:
    code = (
        "import time\n"
        f"from {kind.__module__} import {kind.__name__}\n"
        f"server = {kind.__name__}(); server.start()\n"
        "print(server.pid, server._temporary, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid, directory = parent.stdout.readline().split()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert becomes(lambda: not alive(int(pid)))
    assert becomes(lambda: not Path(directory.decode()).exists())
