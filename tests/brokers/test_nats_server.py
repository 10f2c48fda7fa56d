"""The embedded server: it is ours, it keeps its data, and it never outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentrun.brokers import server as server_module
from agentrun.brokers.server import NatsServer, find_nats_server
from agentrun.errors import Misconfigured


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text() if Path("/proc").is_dir() else True


def gone_soon(pid: int) -> bool:
    until = time.monotonic() + 8
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not alive(pid)


def test_stop_ends_the_process_and_removes_what_is_temporary() -> None:
    server = NatsServer()
    server.start()
    pid, directory = server.pid, server._temporary
    assert pid is not None
    assert directory is not None
    assert alive(pid)
    server.stop()
    assert not alive(pid)
    assert not directory.exists()


async def test_async_context_starts_and_stops() -> None:
    async with NatsServer() as server:
        pid = server.pid
        assert pid is not None
        assert alive(pid)
    assert not alive(pid)


def test_port_and_data_survive_a_crash(tmp_path: Path) -> None:
    with NatsServer(data=tmp_path / "data") as server:
        port, pid = server.port, server.pid
        server.kill()
        assert server.pid is None
        server.start()
        assert server.port == port
        assert server.pid != pid
    assert (tmp_path / "data").is_dir()


def test_a_port_that_another_server_holds_is_refused() -> None:
    with NatsServer() as first, pytest.raises(Misconfigured):
        NatsServer(port=first.port).start()


def test_what_the_server_says_when_it_does_not_start_is_told_and_nothing_is_left() -> None:
    server = NatsServer(settings="nonsense: true")
    with pytest.raises(Misconfigured, match="nonsense"):
        server.start()
    assert server.pid is None
    assert server._temporary is None


def test_a_missing_server_names_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(server_module.sysconfig, "get_path", lambda _name: str(tmp_path))
    with pytest.raises(Misconfigured, match=r"agentrun\[server\]"):
        find_nats_server()


def test_a_killed_parent_takes_the_server_along() -> None:
    code = (
        "import time\n"
        "from agentrun.brokers.server import NatsServer\n"
        "server = NatsServer(); server.start()\n"
        "print(server.pid, server._temporary, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid, directory = parent.stdout.readline().split()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert gone_soon(int(pid))
    until = time.monotonic() + 5
    while Path(directory.decode()).exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert not Path(directory.decode()).exists()
