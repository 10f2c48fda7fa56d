"""The demonstration, as a person starts it: what its table counts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import anyio
import pytest

from agentrun.client import connect
from agentrun.testing.openai_server import FakeOpenAI, Refuse, Text
from tests.e2e.processes import Terminal, on

COLUMNS = "140"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "agentrun", "demo", *arguments]


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AGENTRUN_")}
    return {**kept, "COLUMNS": COLUMNS, **more}


def table(output: str) -> dict[str, tuple[str, str]]:
    rows = [re.split(r"\s{2,}", line.strip()) for line in output.partition("What was seen, counted")[2].splitlines()]
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}


def test_the_demonstration_counts_what_it_shows() -> None:
    done = subprocess.run(
        command("--speed", "5", "--http-port", "0"), capture_output=True, text=True, timeout=110, env=environment()
    )
    assert "(nats-server, process " in done.stdout
    assert done.returncode == 0, done.stdout + done.stderr
    rows = table(done.stdout)
    assert {good for _, good in rows.values()} == {"ok"}
    # How many events the words make depends on how many were merged: at least the turn, its start, a word and its end.
    one, two, identical = map(int, rows["events read by reader 1 / reader 2 / identical"][0].split(" / "))
    assert one == two == identical >= 4
    for what in ("the stream", "the answer of two workers", "the approved answer"):
        assert rows[f"{what}: words received / doubled / missing"][0] == "80 of 80 / 0 / 0"
    assert re.fullmatch(r"cancelled / \d+\.\d / 0", rows["stop: receipt / ms / words after it"][0])
    assert re.fullmatch(r"\d+\.\d s", rows["takeover: kill to next word"][0])
    assert rows["approval: asked / answered"][0] == "1 / 1"
    live, again, same = rows["all events, live / read again / identical"][0].split(" / ")
    assert live == again == same
    assert rows["all events, live / read over HTTP / identical"][0] == f"{live} / {live} / {live}"
    assert re.search(r"page +http://127\.0\.0\.1:\d+/\?session=demo-\w+\n", done.stdout)
    assert "went on from what was stored" in done.stdout
    assert done.stderr == ""


@on("valkey", "sqlite")
def test_on_a_broker_of_ones_own_it_keeps_to_its_namespace(broker: str) -> None:
    done = subprocess.run(
        command("--speed", "5", "--http-port", "0"),
        capture_output=True,
        text=True,
        timeout=110,
        env=environment(AGENTRUN_URL=broker),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"server   {broker}\n" in done.stdout
    assert {good for _, good in table(done.stdout).values()} == {"ok"}
    session = re.search(r"session=(demo-\w+)", done.stdout)
    assert session is not None

    async def turns() -> int:
        async with connect(broker, namespace="demo") as client:
            return len((await client.session(session[1]).history()).turns)

    assert anyio.run(turns) == 4


def test_at_a_terminal_it_stays_and_serves_the_page() -> None:
    terminal = Terminal(command("--speed", "10", "--http-port", "0"), environment(TERM="xterm"))
    try:
        page = terminal.until(r"page +(http://\S+?/)\?session=(demo-\w+)", timeout=40)
        terminal.until("stay until Ctrl-C", timeout=40)
        with urllib.request.urlopen(page[1], timeout=10) as response:
            assert b"agentrun" in response.read()
        with urllib.request.urlopen(f"{page[1]}v1/sessions/{page[2]}", timeout=10) as response:
            assert len(json.load(response)["turns"]) == 4
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.wait() == 0
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(page[1], timeout=5)
    finally:
        terminal.end()


async def test_the_same_with_a_model() -> None:
    async with FakeOpenAI() as model:
        model.script(Text("stone " * 30, delay=0.03))
        model.script(Text("wagon " * 1000, delay=0.03))
        model.script(Text("ship " * 1000, delay=0.03))
        model.script(Text("home " * 10))
        variables = environment(AGENTRUN_MODEL="openai/some", AGENTRUN_API_BASE=model.url, OPENAI_API_KEY="none")
        done = await anyio.run_process(command("--http-port", "0"), env=variables, check=False)
        stopped = len(model.disconnects)
    output = done.stdout.decode()
    assert done.returncode == 0, output + done.stderr.decode()
    rows = table(output)
    assert {good for _, good in rows.values()} == {"ok"}
    assert "the model openai/some" in output
    one, two, same = rows["events read by reader 1 / reader 2 / identical"][0].split(" / ")
    assert one == two == same
    assert rows["the stream"][0] == "30 words, completed"
    assert rows["the answer of two workers"][0].endswith(" words, completed")
    assert rows["stop: receipt / ms / words after it"][0].startswith("cancelled / ")
    # The stopped answer, and the one whose worker was killed: the provider was told both times. (A worker that ends
    # may close a connection that is only just through with its answer.)
    assert stopped >= 2


async def test_a_model_that_refuses_is_said_so() -> None:
    async with FakeOpenAI() as model:
        model.script(Refuse(401, "wrong key"))
        variables = environment(AGENTRUN_MODEL="openai/some", AGENTRUN_API_BASE=model.url, OPENAI_API_KEY="none")
        done = await anyio.run_process(command("--http-port", "0"), env=variables, check=False)
    assert done.returncode == 1
    assert "wrong key" in done.stderr.decode()
