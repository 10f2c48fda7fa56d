"""The example with curl, against a gateway process with tokens, prints what it says it prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from agentrun.brokers.server import NatsServer
from tests.e2e.processes import ROOT, Cli, new_cli

SCRIPT = ROOT / "examples" / "08_curl.sh"
SECRET = "what this gateway and this test share"
_VARIES = re.compile(r'("(?:time|took|lease)":|^retry: )("[0-9a-f]+"|[0-9.e-]+)')
"""What differs with each run; the script's comment has dots for it."""


@pytest.fixture
def cli(nats_server: NatsServer) -> Iterator[Cli]:
    cli = new_cli(nats_server.url)
    try:
        yield cli
    finally:
        cli.end()


def test_prints_what_it_says(cli: Cli) -> None:
    cli.worker("w1")
    gateway = cli.start("gateway", "--port", 0, "--agent", "echo", env={"AGENTRUN_GATEWAY_SECRET": SECRET})
    url = gateway.until(r"gateway on (http://\S+)")[1]
    said = re.search(r"^# Output:\n((?:#.*\n?)+)\Z", SCRIPT.read_text(), re.MULTILINE)
    assert said
    expected = [line.removeprefix("#").strip() for line in said[1].splitlines()]
    environment = {
        "AGENTRUN": f"{sys.executable} -m agentrun",
        "AGENTRUN_GATEWAY": url,
        "AGENTRUN_GATEWAY_SECRET": SECRET,
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        ["bash", str(SCRIPT), "curl-1"],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [_VARIES.sub(r"\1…", line).strip() for line in done.stdout.strip().splitlines()] == expected
    assert done.stderr == ""
    assert SECRET not in gateway.result_so_far().err
