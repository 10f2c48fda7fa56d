"""docs/testing.md: its test files are written down, and pass; its tables say what there is."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

from agentrun.testing import Script, TurnResult, mishaps, run_turn

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "testing.md").read_text()
BLOCKS = {block.split()[1]: block for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)}
PLUGIN = (ROOT / "agentrun" / "testing" / "pytest_plugin.py").read_text()
TESTS = sorted(name for name in BLOCKS if name.startswith("test_"))


def test_the_test_files_pass(tmp_path: Path) -> None:
    for name, block in BLOCKS.items():
        (tmp_path / name).write_text(block)
    (tmp_path / "pytest.ini").write_text("[pytest]\nanyio_mode = auto\n")
    # It takes seconds, on a busy machine many: not to be counted to the turn that needs it first.
    with (tmp_path / "conftest.py").open("a") as conftest:
        conftest.write("from agentrun.adapters.litellm import load\nload()\n")
    command = ["-m", "pytest", "-rA", "-q", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.findall(r"^PASSED (\w+\.py)::", done.stdout, re.MULTILINE)
    assert sorted(set(passed)) == TESTS
    written = sum(len(re.findall(r"^(?:async )?def test_", BLOCKS[name], re.MULTILINE)) for name in TESTS)
    assert len(passed) == written + 3  # one is parametrized, two run on a server as well


def test_every_option_of_run_turn_is_told() -> None:
    table = TEXT.partition("| option | |")[2].partition("\n\n")[0]
    options = [name for name in inspect.signature(run_turn).parameters if name not in ("agent", "input")]
    assert re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in table.splitlines()[2:])) == options


def test_every_name_is_told() -> None:
    steps = [name for name in vars(Script) if not name.startswith("_") and callable(getattr(Script, name))]
    results = [field for field in TurnResult.__struct_fields__ if field not in ("turn", "finish_reason", "reason")]
    mishap_names = [mishap.__name__ for mishap in mishaps.Mishap.__args__]
    for name in (*steps, *results, *mishap_names, *re.findall(r"^def (\w+)", PLUGIN, re.MULTILINE)):
        assert f"`{name}" in TEXT, name
