"""`agentrun export` and `import`: a namespace moves from a server into a file, and back."""

from __future__ import annotations

import fcntl
import json
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.processes import Cli, new_cli, on


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Cli]:
    """A broker in a file."""
    cli = Cli(f"sqlite:///{tmp_path}/dev.db", "default")
    cli.within("setup")
    try:
        yield cli
    finally:
        cli.end()


@on("nats", "valkey")
def test_a_namespace_moves_into_a_file_and_back(cli: Cli, file: Cli) -> None:
    worker = cli.worker("w", "--ask-hold", "0.1")
    cli.ended("a", "hello you", "t1")
    cli.send("b", "approve 3 1", "t2")
    cli.events_until("b", "turn.suspended")
    worker.signal(signal.SIGTERM)
    worker.wait()
    cli.send("c", "hello later", "t3")

    export = cli.run("export", "--all")
    assert export.err.startswith("3 sessions, ")
    assert file.run("import", stdin=export.out).out == f"{export.err.split()[0]} sessions, " + (
        f"{len(export.out.splitlines()) - 3} records imported, 0 were there\n"
    )
    assert cli.log("a")[-1].offset == file.log("a")[-1].offset
    again = file.run("import", "--json", stdin=export.out).json
    assert again == {"sessions": 3, "records": 0, "known": len(export.out.splitlines()) - 3, "refused": 0}

    file.worker("f")
    assert file.result("c", "t3").text == "hello later"
    file.within("answer", "b", "t2", "yes")
    assert file.result("b", "t2").text.split()[-1] == "w2"
    assert file.within("history", "a").out == cli.within("history", "a").out
    file.ended("a", "and on", "t4")
    assert file.result("a", "t4").text.strip() == "and on"

    back = new_cli(cli.url)
    try:
        moved = back.run("import", "--json", stdin=file.run("export", "a", "b", "c").out).json
        assert (moved["sessions"], moved["known"], moved["refused"]) == (3, 0, 0)
        for name in ("a", "b", "c"):
            assert [(e.offset, e.raw) for e in back.log(name)] == [(e.offset, e.raw) for e in file.log(name)]
    finally:
        back.end()


def test_what_runs_stays_unless_forced(cli: Cli, file: Cli) -> None:
    worker = cli.worker("w")
    cli.ended("idle", "hello", "t1")
    cli.send("s", "count 1000 20", "t1")
    cli.events_until("s", "text.delta", 3)
    refused = cli.run("export", "--all", code=1)
    assert "a worker runs a turn of session s" in refused.err
    assert "SIGTERM" in refused.err
    assert {json.loads(line).get("session") for line in refused.out.splitlines()} == {"idle", None}
    worker.signal(signal.SIGKILL)
    worker.wait()
    export = cli.run("export", "--all", "--force")
    assert file.run("import", stdin=export.out).out.startswith("2 sessions, ")
    assert file.log("s")[-1].type == "turn.lost"
    file.worker("f")
    file.events_until("s", "turn.started", 2)
    assert file.within("cancel", "s", "t1").out.startswith("cancelled")


def test_what_cannot_be_done_is_a_line(cli: Cli, file: Cli) -> None:
    assert "--all" in cli.within("export", code=2).err
    assert "--all" in cli.within("export", "s", "--all", code=2).err
    assert "session no has no records" in cli.within("export", "no", code=1).err
    cut = '{"line":"session","session":"s","end":2,"time":1.0}\n'
    bad = file.run("import", stdin=cut, code=1).err
    assert bad.startswith("agentrun: line 2: session s ends at offset 2, and its lines at 0")
    assert "line 1: a session's header or a record is expected" in file.run("import", stdin="hello\n", code=1).err
    cli.send("s", "hello", "t1")
    file.send("s", "other", "t1")
    refused = file.run("import", stdin=cli.run("export", "s").out, code=1)
    assert refused.out == "0 sessions, 0 records imported, 0 were there\n"
    assert "session s is there already" in refused.err


def test_an_import_to_which_nothing_comes_ends_with_ctrl_c(file: Cli) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "agentrun", "--url", file.url, "import"], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        stdin = process.stdin.fileno()
        interrupt(process, when=lambda: fionread(stdin) == 0)
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_an_export_that_nobody_takes_ends_with_ctrl_c(file: Cli) -> None:
    file.send("s", "x" * 200_000, "t1")
    process = subprocess.Popen(
        [sys.executable, "-m", "agentrun", "--url", file.url, "export", "s"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        stdout = process.stdout.fileno()
        interrupt(process, when=lambda: fionread(stdout) >= 60_000)


def test_an_export_that_is_taken_slowly_is_whole(file: Cli) -> None:
    file.send("s", "x" * 200_000, "t1")
    whole = file.run("export", "s").out
    process = subprocess.Popen(
        [sys.executable, "-m", "agentrun", "--url", file.url, "export", "s"], stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        taken = b""
        while piece := process.stdout.read(20_000):
            taken += piece
            time.sleep(0.02)
        assert process.wait(20) == 0
    assert taken.decode().splitlines()[1:] == whole.splitlines()[1:]  # the first one has the time


def interrupt(process: subprocess.Popen[bytes], when: Callable[[], bool]) -> None:
    """Send Ctrl-C when it has come so far, and see that it ends by it."""
    until = time.monotonic() + 30
    try:
        while not when():
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    finally:
        process.kill()


def fionread(pipe: int) -> int:
    """How many bytes in the pipe nobody has taken yet."""
    return struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4))[0]
