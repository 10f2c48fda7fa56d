"""The documents of the gateway say what it has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

from agentrun import errors
from agentrun.cli._settings import field_texts
from agentrun.gateway import Auth, Gateway, GatewaySettings, native, openapi, problems, socket

ROOT = Path(__file__).parents[2]
GATEWAY = (ROOT / "docs" / "gateway.md").read_text()
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text()
HTTP = PROTOCOL.partition("\n## HTTP\n")[2]


def settings_table() -> str:
    texts = field_texts(GatewaySettings)
    rows = ["| setting | default | |", "|---|---|---|"]
    for field in msgspec.structs.fields(GatewaySettings):
        rows += [f"| `{field.name}` | {shown(field.default)} | {text(texts[field.name])} |"]
    return "\n".join(rows)


def shown(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return f"{default:g}" if isinstance(default, float) else str(default or "")


def text(comment: str) -> str:
    return " ".join(comment.replace("``", "`").split()).replace("|", "\\|")


def test_every_setting_is_in_the_table_as_the_code_has_it() -> None:
    assert settings_table() in GATEWAY, f"put this into docs/gateway.md:\n{settings_table()}"


def test_the_protocol_lists_every_route() -> None:
    gateway = Gateway("memory://x", auth=Auth.insecure())
    for route in (*native.routes(gateway), *openapi.routes(gateway), *socket.routes(gateway)):
        path = getattr(route, "path", "").removeprefix("/v1")
        assert re.search(rf"^\| `[A-Z ,]+` \| `{re.escape(path)}` ", HTTP, re.MULTILINE), path


def test_the_protocol_lists_every_code_of_a_problem() -> None:
    codes = {code for _, _, code in problems._STATUS}
    for path in (ROOT / "agentrun" / "gateway").glob("*.py"):
        if path.name.startswith("ai_"):
            continue
        codes |= set(re.findall(r'Problem\(\s*\d{3},\s*"([a-z_]+)"', path.read_text()))
    for code in sorted(codes):
        assert f"`{code}`" in HTTP, code


def test_the_protocol_lists_every_operation_and_close_code_of_a_socket() -> None:
    for op in ("auth", "read", "send", "cancel", "steer", "answer"):
        assert f'{{"op": "{op}"' in HTTP
    for code in socket._CODES.values():
        assert str(code) in HTTP


def test_every_error_a_route_can_meet_has_a_status() -> None:
    for name in errors.__all__:
        kind = getattr(errors, name)
        if kind is not errors.SessionError and issubclass(kind, (errors.SessionError, errors.BrokerError, ValueError)):
            assert any(issubclass(kind, known) for known, _, _ in problems._STATUS), name
