"""``agentrun gateway``: HTTP for sessions."""

from __future__ import annotations

import gc
import ipaddress
import os
import sys
from contextlib import ExitStack
from pathlib import Path

import anyio
import click

from agentrun.cli._settings import settings_options
from agentrun.cli._telemetry import seen_as
from agentrun.cli.common import App, Fatal, command, duration, option
from agentrun.errors import InvalidInput
from agentrun.settings import GatewaySettings

try:
    from agentrun.gateway import Auth, Gateway, Keys
    from agentrun.gateway.server import bind, serve
except ModuleNotFoundError as error:
    raise click.UsageError(f"this needs {error.name}: pip install 'agentrun[gateway]'") from error

gateway_options = settings_options(GatewaySettings, plain=("rate",))

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@command("gateway", uvloop=True)
@option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: a free one.")
@option("--insecure", is_flag=True, help="Let everybody do everything. Only on a loopback address.")
@click.option(
    "--secret-file", type=_FILE, envvar="AGENTRUN_GATEWAY_SECRET_FILE",
    help="Holds the secret that HS256 tokens are signed with; or AGENTRUN_GATEWAY_SECRET is the secret itself.",
)  # fmt: skip
@option("--public-key", type=_FILE, multiple=True, help="Ed25519 key (PEM) that EdDSA tokens are checked with.")
@option("--jwks", help="File or https address of the identity provider's keys.")
@option("--audience", default="agentrun", show_default=True, help="Whom tokens must be meant for.")
@option("--issuer", help="Who must have issued them. Default: anyone who has the key.")
@option("--max-ttl", type=duration, default="24h", show_default=True, help="The longest life a token may have.")
@click.option("--while-stdin", is_flag=True, hidden=True, help="Stop when stdin is closed, as by a parent that died.")
@gateway_options
async def gateway(
    app: App,
    host: str,
    port: int,
    insecure: bool,
    secret_file: Path | None,
    public_key: tuple[Path, ...],
    jwks: str | None,
    audience: str,
    issuer: str | None,
    max_ttl: float,
    while_stdin: bool,
    settings: GatewaySettings,
) -> None:
    """Serve sessions over HTTP: events as SSE, long-poll and WebSocket, useChat, Durable Streams.

    Tokens are JWTs; `agentrun token mint` makes them. SIGTERM ends every stream cleanly: clients resume elsewhere. Exit
    codes: 0 stopped as told, 1 the broker is lost or not set up, 2 it cannot be started as written.
    """
    app.log("info")
    url = app.shared_url()
    try:
        auth = _auth(insecure, host, _keys(secret_file, public_key, jwks), audience, issuer, max_ttl)
    except InvalidInput as error:
        raise Fatal(str(error), 2) from error
    try:
        sockets = bind(host, port, send_timeout=settings.send_timeout)
    except OSError as error:
        raise Fatal(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    address = f"http://{host if ':' not in host else f'[{host}]'}:{sockets[0].getsockname()[1]}"
    with ExitStack() as listening:
        for listener in sockets:
            listening.enter_context(listener)  # closed also where it is never served
        async with (
            seen_as("agentrun-gateway"),
            Gateway(url, auth=auth, namespace=app.namespace, settings=settings) as served,
            anyio.create_task_group() as group,
        ):
            if while_stdin:
                group.start_soon(_stop_with_stdin)
            gc.collect()
            gc.freeze()  # what was imported stays: looking at it again would hold up every stream for 50 ms
            click.echo(f"gateway on {address}" + (", open to everybody on this machine" if insecure else ""))
            await serve(served, sockets, drain=served.drain, max_message=settings.max_body)
            group.cancel_scope.cancel()


def _keys(secret_file: Path | None, public_keys: tuple[Path, ...], jwks: str | None) -> list[Keys]:
    keys: list[Keys] = []
    secret = os.environ.get("AGENTRUN_GATEWAY_SECRET")
    if secret_file is not None:
        secret = secret_file.read_text(encoding="utf-8").strip()
    if secret:
        keys.append(Keys.secret(secret))
    keys += [Keys.public(path.read_bytes()) for path in public_keys]
    if jwks:
        keys.append(Keys.jwks(jwks))
    return keys


def _auth(insecure: bool, host: str, keys: list[Keys], audience: str, issuer: str | None, max_ttl: float) -> Auth:
    if insecure:
        if keys:
            raise Fatal("--insecure and keys contradict each other: give one", 2)
        if not _is_loopback(host):
            raise Fatal(f"--insecure is for loopback addresses only, not for {host}: give keys instead", 2)
        return Auth.insecure()
    if not keys:
        raise Fatal(
            "whose tokens are good? Give --secret-file, --public-key or --jwks (`agentrun token key` makes a key); "
            "or --insecure on this machine alone",
            2,
        )
    return Auth(*keys, audience=audience, issuer=issuer, max_ttl=max_ttl)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _stop_with_stdin() -> None:
    while True:
        await anyio.wait_readable(sys.stdin)
        if not os.read(sys.stdin.fileno(), 4096):
            os.kill(os.getpid(), 15)
            return
