"""The embedded valkey-server: it is ours, it keeps its data, and it never outlives its parent."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agentrun.brokers import valkey_server as server_module
from agentrun.brokers.valkey_server import ValkeyServer, find_valkey_server
from agentrun.errors import Misconfigured
from tests.brokers.test_nats_server import alive, gone_soon


def test_stop_ends_the_process_and_removes_what_is_temporary() -> None:
    server = ValkeyServer()
    server.start()
    pid, directory = server.pid, server._temporary
    assert pid is not None
    assert directory is not None
    assert alive(pid)
    server.stop()
    assert not alive(pid)
    assert not directory.exists()


def test_port_and_data_survive_a_crash(tmp_path: Path) -> None:
    with ValkeyServer(data=tmp_path / "data") as server:
        port, pid = server.port, server.pid
        server.kill()
        assert server.pid is None
        server.start()
        assert server.port == port
        assert server.pid != pid
    assert list((tmp_path / "data").glob("**/*.aof"))


def test_a_port_that_another_server_holds_is_refused() -> None:
    with ValkeyServer() as first, pytest.raises(Misconfigured, match="in use"):
        ValkeyServer(port=first.port).start()


def test_what_the_server_says_when_it_does_not_start_is_told_and_nothing_is_left() -> None:
    server = ValkeyServer(settings="nonsense true")
    with pytest.raises(Misconfigured, match="nonsense"):
        server.start()
    assert server.pid is None
    assert server._temporary is None


def test_a_missing_server_names_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(server_module.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(Misconfigured, match=r"agentrun\[valkey-server\]"):
        find_valkey_server()


def test_a_killed_parent_takes_the_server_along() -> None:
    code = (
        "import time\n"
        "from agentrun.brokers.valkey_server import ValkeyServer\n"
        "server = ValkeyServer(); server.start()\n"
        "print(server.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert gone_soon(pid)
