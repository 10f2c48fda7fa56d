"""Every example is run, and prints what it says it prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 6


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_prints_what_it_says(path: Path) -> None:
    said = re.search(r"^# Output:\n((?:#.*\n?)+)\Z", path.read_text(), re.MULTILINE)
    assert said, "an example ends in a block '# Output:'"
    expected = [line.removeprefix("#").strip() for line in said[1].splitlines()]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line.strip() for line in done.stdout.splitlines()] == expected
    assert done.stderr == ""


def test_the_readme_shows_the_examples_code() -> None:
    """Python in the README is taken from files that are run, line for line."""
    sources = [" ".join(p.read_text().split()) for p in (*EXAMPLES, *(ROOT / "tests" / "docs").glob("readme_*.py"))]
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        flat = " ".join(block.split())
        assert any(flat in source for source in sources), f"not found in any example:\n{block}"
