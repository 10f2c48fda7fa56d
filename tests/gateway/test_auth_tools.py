"""``agentrun token``, and revoking on a real broker."""

from __future__ import annotations

import json
import re
import stat
import time
import uuid
from pathlib import Path

import anyio
import pytest
from click.testing import CliRunner, Result

from agentrun.brokers.memory import MemoryBroker
from agentrun.cli import main
from agentrun.cli.gateway import gateway
from agentrun.client import Client
from agentrun.gateway import revoked
from agentrun.gateway.auth import Auth
from agentrun.gateway.keys import Keys, mint, unverified
from agentrun.gateway.problems import Problem
from agentrun.gateway.rights import ALL_RIGHTS
from agentrun.testing import Settings
from tests.brokers.nats_environment import NatsEnvironments, NatsProxy
from tests.gateway.tokens import SECRET, signed, until

SECRET_ENV = {"AGENTRUN_GATEWAY_SECRET": SECRET}


def run(*args: str, code: int = 0, env: dict[str, str] | None = None, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(main, ["token", *args], env=env or {}, input=stdin)
    assert result.exit_code == code, result.output
    return result


def whose(keys: Keys, token: str) -> str | None:
    async def verify() -> str | None:
        auth = Auth(keys)
        async with anyio.create_task_group() as group:
            await group.start(auth.run, Client(MemoryBroker()), lambda: None)
            user = (await auth.verify(token)).user
            group.cancel_scope.cancel()
        return user

    return anyio.run(verify)


# --------------------------------------------------------------------------------------------------------- the command


def test_mint_prints_a_token_and_nothing_else() -> None:
    result = run(
        *("mint", "--session", "s-1", "--session", "u-*", "--right", "read", "--right", "cancel:any"),
        *("--user", "ann", "--agent", "support", "--ttl", "5m", "--jti", "j1", "--issuer", "me"),
        env=SECRET_ENV,
    )
    assert result.stderr == ""
    (token,) = result.stdout.splitlines()
    said = unverified(token)
    assert said["exp"] - said["iat"] == 300
    assert {name: said[name] for name in ("sub", "sessions", "rights", "agents", "jti", "iss", "aud")} == {
        "sub": "ann",
        "sessions": ["s-1", "u-*"],
        "rights": ["cancel:any", "read"],
        "agents": ["support"],
        "jti": "j1",
        "iss": "me",
        "aud": "agentrun",
    }
    assert whose(Keys.secret(SECRET), token) == "ann"


def test_a_key_pair_of_ones_own(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    run("key", str(key))
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    minted = run("mint", "--session", "*", "--right", "read", "--user", "ann", "--key-file", str(key)).stdout.strip()
    assert whose(Keys.public((tmp_path / "key.pem.pub").read_bytes()), minted) == "ann"
    before = key.read_bytes()
    assert "exists already" in run("key", str(key), code=2).stderr
    key.with_name("other.pub").touch()
    assert "exists already" in run("key", str(key.with_name("other")), code=2).stderr
    assert key.read_bytes() == before
    assert not key.with_name("other").exists()


def test_a_secret_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET + "\n")
    minted = run("mint", "--session", "*", "--right", "read", "--key-file", str(tmp_path / "secret")).stdout.strip()
    assert whose(Keys.secret(SECRET), minted) is None


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--session", "s", "--right", "read"], 2, "AGENTRUN_GATEWAY_SECRET"),
        (["--session", "s", "--right", "rule", "--key-file", "{secret}"], 1, "rights are"),
        (["--session", "s.1", "--right", "read", "--key-file", "{secret}"], 1, "sessions are ids"),
        (["--right", "read"], 2, "--session"),
        (["--session", "s"], 2, "--right"),
        (["--session", "s", "--right", "read", "--key-file", "{nothing}"], 1, "cannot be read"),
        (["--session", "s", "--right", "read", "--key-file", "{short}"], 1, "at least 32 bytes"),
        (["--session", "s", "--right", "read", "--ttl", "soon", "--key-file", "{secret}"], 2, "no duration"),
    ],
)
def test_mint_says_what_is_wrong(args: list[str], code: int, says: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "short").write_text("short")
    files = {name: str(tmp_path / name) for name in ("secret", "short", "nothing")}
    result = run("mint", *[arg.format(**files) for arg in args], code=code)
    assert says in result.stderr
    assert result.stdout == ""


def test_show_says_that_it_verified_nothing() -> None:
    token = signed("whoever-writes-this-knows-no-secret-of-ours", sub="an\x1b[2Jn", iat=1000, exp=2000)
    result = run("show", "-", stdin=token + "\n")
    assert "not verified" in result.stderr
    assert "\x1b" not in result.output
    assert "1970-01-01 00:33:20 UTC (expired)" in result.stdout
    assert json.loads(run("show", token, "--json").stdout) == unverified(token)
    assert "not a JSON Web Token" in run("show", "hello", code=1).stderr


def test_revoke_takes_a_token_or_its_id() -> None:
    name = uuid.uuid4().hex
    token = mint(SECRET, user="ann", sessions=["*"], rights=["read"], jti="j1")
    url = ["--url", f"memory://{name}"]
    assert "token j1 is revoked, at offset 1" in run("revoke", token, *url, "--by", "ops").stdout
    assert "token j2 is revoked, at offset 2" in run("revoke", "j2", *url).stdout
    assert "no id (jti)" in run("revoke", signed(jti=None), *url, code=2).stderr

    async def bodies() -> list[dict[str, object]]:
        return [json.loads(record.body) for record in await MemoryBroker(name).log.read(revoked.SESSION)]

    first, second = anyio.run(bodies)
    assert first == {"type": "token.revoked", "jti": "j1", "until": unverified(token)["exp"] + 60.0, "by": "ops"}
    assert second == {"type": "token.revoked", "jti": "j2"}


def test_the_document_names_every_right_and_limit() -> None:
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    for right in ALL_RIGHTS:
        assert f"| `{right}` |" in text
    options = {option for param in gateway.params for option in param.opts if option.startswith("--")}
    named = set(re.findall(r"`(--[a-z-]+)", text)) - {"--max-age", "--log-level"}
    assert named <= options, named - options
    assert {"--origin", "--rate", "--burst", "--max-streams", "--max-failures", "--max-body", "--insecure"} <= named


# ------------------------------------------------------------------------------------------------------------- on NATS


async def _is_revoked(auth: Auth, token: str) -> bool:
    try:
        await auth.verify(token)
    except Problem as problem:
        return problem.code == "token_revoked"
    return False


async def test_every_gateway_knows_what_is_revoked(
    nats_environments: NatsEnvironments, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two gateways: one is connected, the other's connection breaks while tokens are revoked. And one that is late."""
    monkeypatch.setattr(revoked, "_PAUSE", 0.05)
    tokens = {jti: signed(jti=jti) for jti in ("j1", "j2", "j3")}
    async with (
        nats_environments(Settings()) as environment,
        NatsProxy(environment.server.port) as proxy,
        environment.broker() as near,
        environment.broker(proxy.url) as far,
        anyio.create_task_group() as group,
    ):
        client = Client(near)
        gateways = [Auth(Keys.secret(SECRET)), Auth(Keys.secret(SECRET))]
        changed = [anyio.Event(), anyio.Event()]
        for auth, broker, event in zip(gateways, (near, far), changed, strict=True):
            await group.start(auth.run, Client(broker), event.set)
            await auth.verify(tokens["j1"])
        await revoked.revoke(client, "j1", until=time.time() + 700)
        with anyio.fail_after(20):
            for event in changed:
                await event.wait()
        for auth in gateways:
            assert await _is_revoked(auth, tokens["j1"])
            assert not await _is_revoked(auth, tokens["j2"])

        proxy.refusing = True
        proxy.cut()
        await revoked.revoke(client, "j2")
        await until(lambda: "j2" in gateways[0]._revoked)
        assert await _is_revoked(gateways[1], tokens["j1"])  # what is known goes on being known
        proxy.refusing = False
        await until(lambda: "j2" in gateways[1]._revoked, within=20)

        await client.session(revoked.SESSION).delete()
        await revoked.revoke(client, "j3")
        for auth in gateways:
            await until(lambda auth=auth: "j3" in auth._revoked, within=20)
            assert await _is_revoked(auth, tokens["j1"])

        late = Auth(Keys.secret(SECRET))
        await group.start(late.run, client, lambda: None)
        assert await _is_revoked(late, tokens["j3"])
        assert not await _is_revoked(late, tokens["j1"])  # its record was deleted
        group.cancel_scope.cancel()
