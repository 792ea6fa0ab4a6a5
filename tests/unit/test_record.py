"""A recorded command: its lines as they came, with times, and its exit code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "record.py"


def test_a_command_is_recorded_as_it_ran(tmp_path: Path) -> None:
    out = tmp_path / "said.txt"
    words = ["sh", "-c", f"echo one; echo two >&2; echo {TOOL}; exit 3"]
    done = subprocess.run(
        [sys.executable, str(TOOL), str(out), "--", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert done.stdout == f"one\ntwo\n{TOOL}\n"
    first, command, *lines = out.read_text().splitlines()
    assert re.fullmatch(r"# \d{4}-\d\d-\d\d, commit \w+, \d+ cores, load before it [\d., ]+", first)
    assert command == "$ sh -c 'echo one; echo two >&2; echo ./tools/record.py; exit 3'"
    assert [re.sub(r"^\[\d\d:\d\d\] ", "", line) for line in lines] == [
        "one", "two", "./tools/record.py", "ended with code 3"
    ]  # fmt: skip


def test_without_a_command_it_says_how(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(TOOL), "x"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: record.py OUT -- COMMAND ...\n")
