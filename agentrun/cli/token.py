"""``agentrun token``: keys and tokens for the gateway."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import msgspec

from agentrun.cli.common import App, Fatal, command, duration, json_option, option

try:
    from agentrun.gateway.keys import AUDIENCE, mint, new_key_pair, read_key, unverified
    from agentrun.gateway.revoked import revoke
    from agentrun.gateway.rights import ALL_RIGHTS
except ModuleNotFoundError as error:
    raise click.UsageError(f"this needs {error.name}: pip install 'agentrun[gateway]'") from error

SECRET = "AGENTRUN_GATEWAY_SECRET"  # noqa: S105 - the name of a variable
_SLACK = 60.0
"""Seconds a revocation outlives its token, whose clock may be another."""


@click.group("token")
def token() -> None:
    """Make, look at and revoke the tokens of the gateway's clients."""


@command("mint")
@option("--session", "sessions", multiple=True, required=True, metavar="PATTERN", help="Sessions it is for; * matches.")
@option("--right", "rights", multiple=True, required=True, help=f"One of {', '.join(sorted(ALL_RIGHTS))}; repeated.")
@option("--user", help="Whose it is: stands in the log as the sender. Without, it owns no turn.")
@option("--agent", "agents", multiple=True, metavar="PATTERN", help="Agents it may send to. Default: any.")
@option("--ttl", type=duration, default="10m", show_default=True, help="How long it is good for.")
@option("--key-file", metavar="FILE", help=f"Ed25519 private key (PEM), or a secret. Default: the secret in {SECRET}.")
@option("--audience", default=AUDIENCE, show_default=True, help="As the gateway expects it.")
@option("--issuer", help="As the gateway expects it, if it does.")
@option("--jti", help="Its id, by which it is revoked. Default: a random one.")
async def mint_token(
    app: App,
    sessions: tuple[str, ...],
    rights: tuple[str, ...],
    user: str | None,
    agents: tuple[str, ...],
    ttl: float,
    key_file: str | None,
    audience: str,
    issuer: str | None,
    jti: str | None,
) -> None:
    """Print a token, and nothing else.

    Whoever holds it may do what it says until it expires: backends make one for each of their users with
    agentrun.gateway.mint.
    """
    key = read_key(key_file) if key_file else os.environ.get(SECRET, "").encode()
    if not key:
        raise Fatal(f"sign it with what? Give --key-file FILE, or the secret in {SECRET}", 2)
    minted = mint(
        key,
        user=user,
        sessions=sessions,
        rights=rights,
        agents=agents or None,
        ttl=ttl,
        audience=audience,
        issuer=issuer,
        jti=jti,
    )
    click.echo(minted)


@command("key")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
async def make_key(app: App, file: Path) -> None:
    """Write a fresh Ed25519 key pair: the private key to FILE, for whoever mints tokens, readable by you alone; the
    public key to FILE.pub, for the gateway. What exists is not overwritten.
    """
    private, public = new_key_pair()
    beside = file.with_name(file.name + ".pub")
    if beside.exists():
        raise Fatal(f"{beside} exists already", 2)
    try:
        _write(file, private, 0o600)
        _write(beside, public, 0o644)
    except FileExistsError as error:
        raise Fatal(f"{error.filename} exists already", 2) from error
    click.echo(f"{file}: private key, keep it where you mint (agentrun token mint --key-file {file})")
    click.echo(f"{beside}: public key, for the gateway (agentrun gateway --public-key {beside})")


def _write(file: Path, content: bytes, mode: int) -> None:
    # Made with its mode: there is no moment in which others can read it.
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb") as opened:
        opened.write(content)


@command("revoke")
@click.argument("id_or_token", metavar="JTI|TOKEN")
@option("--by", help="Who revokes it, for whoever reads the log.")
async def revoke_token(app: App, id_or_token: str, by: str | None) -> None:
    """Let no gateway of this namespace accept a token any more; streams it has open are ended at once.

    Give its id (jti), or the token itself (- reads stdin), which is then remembered only until it expires.
    """
    jti, until = _identity(_given(id_or_token))
    async with app.client() as client:
        offset = await revoke(client, jti, until=until, by=by)
    click.echo(f"token {jti} is revoked, at offset {offset}")


def _given(text: str) -> str:
    return sys.stdin.read().strip() if text == "-" else text


def _identity(id_or_token: str) -> tuple[str, float | None]:
    if id_or_token.count(".") != 2:
        return id_or_token, None
    claims = unverified(id_or_token)
    jti, expires = claims.get("jti"), claims.get("exp")
    if not isinstance(jti, str):
        raise Fatal("this token has no id (jti), so it cannot be revoked: it ends when it expires", 2)
    return jti, expires + _SLACK if isinstance(expires, (int, float)) else None


@command("show")
@click.argument("token")
@json_option
async def show_token(app: App, token: str, as_json: bool) -> None:
    """Print what a token (- reads stdin) says. Whether it is true, by its signature, is not looked at."""
    claims = unverified(_given(token))
    if as_json:
        click.echo(msgspec.json.encode(claims))
        return
    click.echo("not verified: anyone can write a token that says this", err=True)
    width = max((len(name) for name in claims), default=0)
    for name in filter(str.isprintable, claims):
        click.echo(f"{name:<{width}}  {_text(claims, name)}")


def _text(claims: Mapping[str, Any], name: str) -> str:
    value = claims[name]
    # Anyone can write a token: what it says must not steer the terminal.
    text = value if isinstance(value, str) and value.isprintable() else msgspec.json.encode(value).decode()
    if name not in ("exp", "iat", "nbf") or not isinstance(value, (int, float)):
        return text
    try:
        at = datetime.fromtimestamp(value, UTC)
    except (ValueError, OverflowError, OSError):
        return text
    ago = " (expired)" if name == "exp" and value < time.time() else ""
    return f"{text}  {at:%Y-%m-%d %H:%M:%S} UTC{ago}"


for _command in (mint_token, make_key, revoke_token, show_token):
    token.add_command(_command)
