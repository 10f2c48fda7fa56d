"""The documents say what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import agentrun
from agentrun import wire
from agentrun.brokers import nats_layout

ROOT = Path(__file__).parents[2]


def test_the_protocol_lists_every_event_and_its_fields() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text()
    for cls in (*wire.InputEvent.__args__, *wire.OutputEvent.__args__):
        tag = str(cls.__struct_config__.tag)
        rows = [line for line in text.splitlines() if line.startswith("|") and f"`{tag}`" in line.split("|")[1]]
        assert len(rows) == 1, f"{tag} needs one row in the table of events"
        if cls is wire.TurnRequested:
            continue  # told in the section on sending
        for field in cls.__struct_encode_fields__:
            known = field in ("turn", "attempt", "trace") or re.search(rf"\b{field}\b", rows[0])
            assert known, f"{tag}.{field} is not in its row"


def test_the_protocol_names_the_headers() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text()
    for header in (nats_layout.OFFSET, nats_layout.PENDING, nats_layout.WRITER, nats_layout.EXPECTED):
        assert f"`{header}`" in text


def test_links_between_documents_lead_somewhere() -> None:
    for path in (ROOT / "README.md", ROOT / "deploy" / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_public_names_are_sorted_and_there() -> None:
    assert agentrun.__all__ == sorted(agentrun.__all__)
    for name in agentrun.__all__:
        assert hasattr(agentrun, name)


def test_the_changelog_has_something_unreleased_or_a_release() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## \[(Unreleased|\d+\.\d+\.\d+)\]", text, re.MULTILINE)
