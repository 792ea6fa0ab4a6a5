"""tools/areas.py: areas side by side, by a Makefile of the test's own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "areas.py"
MAKEFILE = """\
test-good:
	@touch good.begun; while [ ! -e other.begun ]; do sleep 0.05; done; echo "tests/a.py .. [ 50%]"
	@echo "===== 2 passed, 1 skipped in 0.10s ====="
test-other:
	@touch other.begun; while [ ! -e good.begun ]; do sleep 0.05; done; echo "3 passed in 0.10s"
test-bad:
	@echo "the reason it failed"; echo "1 failed, 2 passed in 0.10s"; exit 1
test-long:
	@trap 'echo cleaned > cleaned; exit 1' INT; echo $$$$ > pid; touch long.begun; \\
	while :; do sleep 0.05; done
"""


def areas(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(
        [sys.executable, str(TOOL), *names],
        cwd=folder, env=environ, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "Makefile").write_text(MAKEFILE)
    return tmp_path


def test_two_areas_run_at_once_and_a_table_tells_their_ends(folder: Path) -> None:
    """Each of the two waits for the other to have begun."""
    done = areas(folder, "good", "other")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("  ")]
    assert [row[0] for row in rows] == ["good", "other"]
    assert " ".join(rows[0][3:]) == "2 passed, 1 skipped in 0.10s"
    assert "all passed" in done.stdout
    assert "[ 50%]" in (folder / "runs/test-logs/good.log").read_text()


def test_a_failed_area_is_shown_whole_and_the_others_still_run(folder: Path) -> None:
    done = areas(folder, "bad", "good", "other")
    assert done.returncode == 1
    assert "the reason it failed" in done.stdout
    assert "failed: bad" in done.stdout
    assert "3 passed" in done.stdout


def test_asked_to_end_it_lets_areas_clean_up(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(TOOL), "long"],
        cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True,
        env={key: value for key, value in os.environ.items() if not key.startswith("MAKE")},
    )  # fmt: skip
    until = time.monotonic() + 30
    while not (folder / "long.begun").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in said
    assert (folder / "cleaned").exists()
    pid = int((folder / "pid").read_text())
    assert not Path(f"/proc/{pid}").exists()
