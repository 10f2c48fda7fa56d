"""Each command once on the brokers that are not NATS, and servers that want TLS and a password."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import anyio.to_thread
import httpx
import pytest

from agentrun.brokers.server import NatsServer
from agentrun.brokers.valkey_server import ValkeyServer
from tests.brokers.test_valkey_setup import Certificate, behind_tls
from tests.e2e.processes import Cli, Result, on, one_line, within

GIVES_UP = ("--max-attempts", "1")


@on("valkey", "sqlite")
def test_every_command_does_its_work(cli: Cli, session: str) -> None:
    assert "nothing to do" in cli.within("setup").out
    cli.worker("w", *GIVES_UP)
    sent = cli.run("send", session, "count 3 1", "--id", "t1", "--json").events
    assert sent == cli.run("tail", session, "--json", "--no-follow").events
    assert [e["offset"] for e in sent] == list(range(1, len(sent) + 1))

    sending = cli.start("send", session, "count 1000 20", "--id", "t2")
    sending.until("w3 ")
    status = cli.within("status", "--json").json
    assert (status["agents"][0]["agent"], status["agents"][0]["leased"]) == ("echo", 1)
    assert [(turn["session"], turn["turn"]) for turn in status["workers"][0]["running"]] == [(session, "t2")]
    assert "1 worker   1/50 slots" in cli.within("top", "--once").out
    receipt = cli.within("cancel", session, "t2", "--by", "ann", "--json").json
    assert (receipt["status"], receipt["offset"]) == ("cancelled", cli.log(session)[-1].offset)
    assert "stopped by ann" in sending.wait().err

    sending = cli.start("send", session, "approve 2 1", "--id", "t3")
    sending.until(r"agentrun answer \S+ t3 deploy", err=True)
    cli.within("answer", session, "t3", "yes")
    assert sending.wait().out.split()[-1] == "w1"
    turns = cli.within("history", session, "--json").json["turns"]
    assert [turn["state"] for turn in turns] == ["completed", "cancelled", "completed"]

    said = cli.run("chat", "other", stdin="hello you\n").out
    assert "› hello you" in said
    found = cli.within("sessions", "--json").json["sessions"]
    assert [(s["session"], s["busy"]) for s in found] == [("other", False), (session, False)]

    cli.run("send", "gives-up", "retry 0", "--id", "t4", code=1)
    assert [d["turn"] for d in cli.within("dead", "list", "--json").json["dead"]] == ["t4"]
    assert cli.within("dead", "drop", "gives-up", "t4").out == "1 dropped\n"

    cli.within("delete", session, "--yes")
    assert cli.run("tail", session, "--no-follow").out == ""


@on("valkey", "sqlite")
@pytest.mark.parametrize("flags", [("--replicas", "3"), ("--max-age", "3d")])
def test_setup_refuses_what_the_broker_has_not(broker: str, flags: tuple[str, ...]) -> None:
    for more in ((), ("--dry-run",)):
        said = one_line(within("setup", "--url", broker, *flags, *more, code=2).err)
        assert "replicas" in said or "give no options" in said


def test_setup_on_valkey_says_what_it_does(valkey_server: ValkeyServer, session: str) -> None:
    cli = Cli(valkey_server.url, session)
    create = f"create namespace {session} with 2 partition(s)\n"
    assert cli.within("setup", "--dry-run", "--partitions", "2").out == f"would {create}"
    assert "agentrun setup" in one_line(cli.within("status", code=1).err)
    assert cli.within("setup", "--partitions", "2").out == create
    assert "delta_ttl: 3600 -> 7200" in cli.within("setup", "--delta-ttl", "2h").out
    assert "2 partitions, not 3" in one_line(cli.within("setup", "--partitions", "3", code=1).err)


@pytest.mark.parametrize("command", [("worker", "workers.echo:echo"), ("status",)])
def test_errors_name_the_server_and_no_secret(command: tuple[str, ...]) -> None:
    said = one_line(within(*command, "--url", "valkey://me:secret@127.0.0.1:1", code=1).err)
    assert "cannot reach valkey://127.0.0.1:1" in said
    assert "secret" not in said


# ------------------------------------------------------------------------------------------------------- TLS

Tls = Callable[[Certificate], AsyncGenerator[str]]


@asynccontextmanager
async def nats_with_tls(certificate: Certificate) -> AsyncGenerator[str]:
    """The address of a server, with what its password is left out."""
    pem = json.dumps(str(certificate.path))
    settings = f"tls {{ cert_file: {pem}, key_file: {pem} }}\nauthorization {{ user: me, password: secret }}"
    async with NatsServer(settings=settings) as server:
        yield f"tls://me:{{}}@127.0.0.1:{server.port}"


@asynccontextmanager
async def valkey_with_tls(certificate: Certificate) -> AsyncGenerator[str]:
    """The same. The server of the wheel has no TLS of its own, so something ends it in front of the server."""
    async with (
        ValkeyServer(settings="user default off\nuser me on >secret ~* &* +@all") as server,
        behind_tls(server, certificate) as port,
    ):
        yield f"rediss://me:{{}}@127.0.0.1:{port}"


@pytest.mark.parametrize("open_server", [nats_with_tls, valkey_with_tls])
async def test_tls_and_a_password(open_server: Tls, tmp_path: Path, session: str) -> None:
    """The certificate's authority is named as for all programs: in SSL_CERT_FILE."""
    certificate = Certificate(tmp_path)
    trusting = {"SSL_CERT_FILE": str(certificate.path)}
    async with open_server(certificate) as address:
        cli = Cli(address.format("secret"), "default")

        async def run(*arguments: str, code: int = 0, env: dict[str, str] = trusting) -> Result:
            return await anyio.to_thread.run_sync(partial(cli.run, *arguments, code=code, env=env))

        try:
            await run("setup")
            worker = cli.start("worker", "workers.echo:echo", "--name", "w", "--lease", "2", env=trusting)
            await anyio.to_thread.run_sync(partial(worker.until, "worker w runs", err=True))
            assert (await run("send", session, "hello")).out.strip() == "hello"
            gateway = cli.start("gateway", "--insecure", "--port", "0", env=trusting)
            url = (await anyio.to_thread.run_sync(gateway.until, r"gateway on (http://\S+?)[,\s]"))[1]
            async with httpx.AsyncClient(base_url=url, timeout=20) as http:
                page = (await http.get(f"/v1/sessions/{session}/events")).json()
                assert page["events"][-1]["event"]["type"] == "turn.completed"
            assert "certificate" in one_line((await run("status", code=1, env={})).err)
            cli.url = address.format("wrong")
            refused = one_line((await run("status", code=1)).err)
            assert "wrong" not in refused
        finally:
            await anyio.to_thread.run_sync(cli.end)
