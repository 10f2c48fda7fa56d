"""docs/write-a-broker.md: its files are written down, run, and do what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from agentrun import broker

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "write-a-broker.md").read_text()
BLOCKS = {block.split()[1]: block for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)}
SCRIPTS = [name for name, block in BLOCKS.items() if "# Output:" in block]
LINES = re.findall(r"^  ([LQS]\d)  ", broker.__doc__ or "", re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, block in BLOCKS.items():
        (tmp_path / name).write_text(block)
    return tmp_path


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_block_is_run() -> None:
    assert sorted(BLOCKS) == sorted([*SCRIPTS, "test_acme.py", "test_mutants.py"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_prints_what_it_says(folder: Path, name: str) -> None:
    said = re.search(r"^# Output:\n((?:#.*\n?)+)\Z", BLOCKS[name], re.MULTILINE)
    assert said
    expected = [line.removeprefix("#").strip() for line in said[1].splitlines()]
    assert [line.strip() for line in run(folder, name).splitlines()] == expected


def test_the_test_files_pass(folder: Path) -> None:
    few = "L3 or L4 or L5_trimmed or Q1 or Q7 or S1 or S2 or fault"
    said = run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", few, "test_acme.py", "test_mutants.py")
    passed = re.search(r"^(\d+) passed, \d+ deselected in ", said, re.MULTILINE)
    assert passed, said
    assert int(passed[1]) >= 15


def test_every_line_of_the_contract_is_explained() -> None:
    assert len(LINES) == len(set(LINES)) == 21
    assert re.findall(r"^\| ([LQS]\d) \|", TEXT, re.MULTILINE) == LINES
    assert "21 promises" in TEXT
