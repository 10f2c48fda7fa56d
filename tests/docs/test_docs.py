"""The documents say what the code has."""

from __future__ import annotations

import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec

import agentrun
from agentrun import wire
from agentrun.broker import QueueStats
from agentrun.brokers import nats_layout, sqlite_file, valkey_scripts
from agentrun.brokers.valkey_scripts import Script
from agentrun.worker import AgentLoad, RunningTurn, WorkerInfo

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


def rows_of(section: str) -> list[list[str]]:
    """The cells of the tables in a section of the protocol."""
    text = (ROOT / "docs" / "protocol.md").read_text()
    lines = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


def test_the_protocol_lists_valkeys_keys_and_fields() -> None:
    rows = rows_of("Valkey and Redis")
    scripts = "".join(script.text for script in valkey_scripts.__dict__.values() if isinstance(script, Script))
    keys = set(re.findall(r"P \.\. '([a-z])\b", scripts))
    assert keys == {cell[8] for cell, *_ in rows if cell.startswith("prefix `")}
    calls = re.findall(r"call\('H(?:M?GET|SET|DEL)', (?:s\.)?T, ([^)]*)\)", scripts)
    fields = {name for call in calls for name in re.findall(r"'([a-z]{1,2})'", call)}
    told = {name for cell, *_ in rows for name in re.findall(r"`([a-z]{1,2})`", cell) if not cell.startswith("prefix")}
    assert fields - {"q"} == told


def test_the_protocol_lists_valkeys_scripts_and_their_arguments() -> None:
    told = {row[0].strip("`"): row[1].split(", ") for row in rows_of("Valkey and Redis") if len(row) == 3}
    for script in valkey_scripts.__dict__.values():
        if isinstance(script, Script):
            used = max(int(number) for number in re.findall(r"ARGV\[(\d+)\]", script.text))
            assert len(told[script.name]) == used, f"the arguments of {script.name}"


def test_the_protocol_lists_sqlites_tables() -> None:
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript(sqlite_file._SCHEMA)
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        found = {
            name: [column for _, column, *_ in db.execute(f"PRAGMA table_info({name})")]
            for name in names
            if not name.startswith("sqlite_")
        }
    told = {row[0].strip("`"): re.findall(r"`(\w+)`", row[1]) for row in rows_of("SQLite")[1:]}
    assert told == found


def test_the_keys_of_status_are_those_of_the_document() -> None:
    text = (ROOT / "docs" / "cli.md").read_text().partition("\n## agentrun status\n")[2]
    told = json.loads(text.partition("```json\n")[2].partition("```")[0])
    assert list(told) == ["namespace", "agents", "workers", "dead"]
    for example, kind in (
        (told["agents"][0], QueueStats),
        (told["workers"][0], WorkerInfo),
        (told["workers"][0]["running"][0], RunningTurn),
        (told["workers"][0]["load"][0], AgentLoad),
    ):
        assert list(example) == list(kind.__struct_encode_fields__)
        msgspec.convert(example, kind)


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
