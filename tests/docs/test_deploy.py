"""What deploy/ says is what the command line, the package and the servers take; no container is started for it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click
import httpx
import pytest
import yaml

from agentrun import brokers
from agentrun.brokers.server import find_nats_server
from agentrun.brokers.valkey import ValkeyBroker
from agentrun.brokers.valkey_server import ValkeyServer
from agentrun.cli import main
from agentrun.cli.common import duration
from agentrun.cli.worker import load_agent
from agentrun.gateway import Auth, Gateway

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
README = (DEPLOY / "README.md").read_text()
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
FILES = sorted(path.name for path in DEPLOY.glob("compose*.yaml"))
NOT_OPTIONS = {
    "AGENTRUN_GATEWAY_SECRET": "agentrun/cli/gateway.py",
    "AGENTRUN_MODEL": "workers/chat.py",
    "OPENAI_API_KEY": "workers/chat.py",
}
"""What the environment may hold besides options, and who reads it."""


class Compose:
    """A compose file as compose sees it."""

    def __init__(self, name: str) -> None:
        text = (DEPLOY / name).read_text()
        self.required = set(re.findall(r"\$\{(\w+):\?", text))
        text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
        self.body: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{(\w+):\?[^}]*\}", r"given-\1", text))
        self.services: dict[str, dict[str, Any]] = self.body["services"]
        self.ours = {name: service for name, service in self.services.items() if service["image"] == "agentrun"}
        ((self.server_name, self.server),) = (item for item in self.services.items() if item[0] not in self.ours)


@pytest.fixture(params=FILES)
def compose(request: pytest.FixtureRequest) -> Compose:
    return Compose(request.param)


def parsed(words: list[str], env: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> click.Context:
    """A command as the command line understands it; not run."""
    for name, value in env.items():
        monkeypatch.setenv(name, str(value))
    context = click.Context(main)
    command = main.get_command(context, words[0])
    assert command is not None
    return command.make_context(words[0], words[1:], parent=context)


def options(context: click.Context) -> set[str]:
    """The environment variables that a command reads."""
    return {str(p.envvar) for c in (main, context.command) for p in c.params if getattr(p, "envvar", None)}


def test_there_is_a_file_for_each_server() -> None:
    assert FILES == ["compose.valkey.yaml", "compose.yaml"]


def test_each_command_is_one_and_each_variable_is_read(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(compose.ours) == {"setup", "gateway", "worker"}
    for name, service in compose.ours.items():
        with monkeypatch.context() as patch:
            context = parsed(service["command"], service["environment"], patch)
            assert context.info_name == name
            for variable in service["environment"]:
                if variable in NOT_OPTIONS:
                    assert variable in (ROOT / NOT_OPTIONS[variable]).read_text()
                else:
                    assert variable in options(context), f"{name} reads no {variable}"


def test_the_url_leads_to_the_server(compose: Compose) -> None:
    for service in compose.ours.values():
        url = service["environment"]["AGENTRUN_URL"]
        scheme, host, port = re.fullmatch(r"(\w+)://(\w+):(\d+)", url).groups()  # type: ignore[union-attr]
        assert (scheme, host) == (compose.server_name, compose.server_name)
        assert int(port) == {"nats": 4222, "valkey": 6379}[scheme]
        assert brokers.connect(url).capabilities.name == scheme


def test_the_agents_are_there(compose: Compose) -> None:
    agents = compose.services["worker"]["environment"]["AGENTRUN_AGENTS"].split()
    assert agents
    assert all(load_agent(spec) for spec in agents)
    assert compose.services["worker"]["deploy"]["replicas"] == 2


def test_a_worker_may_drain_before_it_is_killed(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = compose.services["worker"]
    settings = parsed(worker["command"], worker["environment"], monkeypatch).params
    assert duration(worker["stop_grace_period"]) >= settings["drain"] + settings["cancel_grace"] + 5


async def test_the_gateway_is_asked_where_it_answers(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    service = compose.services["gateway"]
    context = parsed(service["command"], service["environment"], monkeypatch)
    (check,) = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", service["healthcheck"]["test"][-1])
    compile(service["healthcheck"]["test"][-1], "healthcheck", "exec")
    published, inside = service["ports"][0].rsplit(":", 1)
    assert int(check[0]) == int(inside) == context.params["port"]
    assert published.startswith("127.0.0.1:")
    assert context.params["host"] == "0.0.0.0"
    gateway = Gateway("memory://deploy", auth=Auth.insecure())
    async with gateway, httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://127.0.0.1") as http:
        assert (await http.get(check[1])).json()["status"] == "ready"


def test_nobody_gets_in_without_a_token(compose: Compose) -> None:
    assert "AGENTRUN_GATEWAY_SECRET" in compose.required
    assert "--insecure" not in compose.services["gateway"]["command"]
    assert [name for name, service in compose.services.items() if "ports" in service] == ["gateway"]


def test_who_waits_for_whom_can_be_waited_for(compose: Compose) -> None:
    for service in compose.services.values():
        for name, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in compose.services[name]
            else:
                assert how["condition"] == "service_completed_successfully"
                assert compose.services[name]["restart"] == "on-failure"
    assert set(compose.services["worker"]["depends_on"]) == {"setup", compose.server_name}
    (volume,) = compose.server["volumes"]
    assert volume.split(":") == [next(iter(compose.body["volumes"])), "/data"]


def test_all_services_share_the_image_of_the_dockerfile(compose: Compose) -> None:
    for service in compose.ours.values():
        assert (
            DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]
        ).resolve() == DEPLOY / "Dockerfile"


def test_nats_takes_its_configuration(tmp_path: Path) -> None:
    compose = Compose("compose.yaml")
    (mount,) = compose.server["configs"]
    assert compose.server["command"] == ["--config", mount["target"]]
    config = compose.body["configs"][mount["source"]]["content"]
    port = re.search(r"http: (\d+)", config)
    assert port is not None
    assert f":{port[1]}/healthz" in compose.server["healthcheck"]["test"][-1]
    (tmp_path / "server.conf").write_text(config.replace("/data", str(tmp_path)))
    command = [find_nats_server(), "-t", "-c", str(tmp_path / "server.conf")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


async def test_valkey_takes_its_flags_and_keeps_what_it_is_given() -> None:
    program, *flags = Compose("compose.valkey.yaml").server["command"]
    assert program == "valkey-server"
    lines = [
        f"{name.removeprefix('--')} {value or json.dumps('')}" for name, value in zip(*[iter(flags)] * 2, strict=True)
    ]
    async with ValkeyServer(settings="\n".join(lines)) as server, ValkeyBroker(server.url, check=False) as broker:
        assert await broker.setup()
        assert broker.capabilities.durable


def test_the_dockerfile_copies_what_is_there_and_let_in() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "*"
    copied = [
        word for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]
    ]
    assert {"agentrun", "workers", "pyproject.toml"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists()
        assert any(fnmatch(name, pattern[1:]) for pattern in ignored if pattern.startswith("!")), f"{name} is ignored"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [project["project"]["readme"], *project["project"]["license-files"]]
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert set(needed + packages) <= set(copied)


def test_the_image_has_what_the_services_need() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"'\.\[([\w,-]+)\]'", DOCKERFILE)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert {"gateway", "litellm", "valkey"} <= set(extras.split(","))
    (entry,) = re.findall(r"^ENTRYPOINT (.+)$", DOCKERFILE, re.MULTILINE)
    assert json.loads(entry) == [next(iter(project["scripts"]))]
    *_, user = re.findall(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)
    assert int(user) > 0
    assert set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)) == {"python:3.13-slim"}


def test_the_commands_of_the_document_are_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line.strip().split("  #")[0] for line in README.splitlines() if line.startswith("    docker compose")]
    ours = [words for line in lines if "exec" in (words := shlex.split(line)) or "run" in words]
    assert len(ours) == 3
    for words in ours:
        service, *rest = words[words.index("exec") + 1 if "exec" in words else words.index("--rm") + 1 :]
        assert service in Compose("compose.yaml").services
        with monkeypatch.context() as patch:
            name = parsed(rest[1:] if "exec" in words else rest, {}, patch).info_name
            assert name in ("token", "status", "setup")
    for path in re.findall(r"deploy/[\w.]+", README):
        assert (ROOT / path).exists()
