"""tools/gpu_minutes.sh on a CPU, with tiny shapes: its steps, boxes, results and refusals."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.warm import ROOT, environment

SCRIPT = str(ROOT / "tools" / "gpu_minutes.sh")


SHORT = ("--scale", "0.12", "--limit", "20")  # 9 s for the first step, and then less than 8 for others


def call(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    environ = environment(GENAC_GPU_PYTHON=sys.executable, **changes)
    return subprocess.run(
        ["bash", SCRIPT, *arguments], env=environ, capture_output=True, text=True, timeout=1500
    )


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_step_leaves_a_line_of_json_per_figure_and_goes_on_after_one_that_fails(tmp_path: Path) -> None:
    """The servers' interpreter is no Python here: that case fails, and says so, and the rest goes on."""
    done = call("--tiny", "--out", str(tmp_path), "--scale", "9", "--limit", "900", "facts",
                GENAC_SERVE_PYTHON="/bin/false")  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    call_row, *rows = rows_of(tmp_path)
    assert (call_row["what"], call_row["steps"], call_row["tiny"]) == ("call", "facts", True)
    assert (rows[-1]["step"], rows[-1]["rc"]) == ("facts", 1)
    cases = {row["what"]: row["ok"] for row in rows[:-1]}
    assert cases == {"packages": True, "machine": True, "sglang": False, "doctor": True}
    assert "FAIL facts: sglang" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.jsonl", "summary.txt", "log.txt", "extra.tar.gz"
    }  # fmt: skip


def test_a_step_ends_with_its_box_and_none_begins_beyond_the_limit(tmp_path: Path) -> None:
    """What an earlier call has found in the folder is kept."""
    (tmp_path / "results.jsonl").write_text('{"step": "earlier"}\n')
    done = call("--tiny", "--out", str(tmp_path), *SHORT, "facts", "parity", "memory")
    assert (tmp_path / "results.jsonl.before").read_text() == '{"step": "earlier"}\n'
    assert done.returncode == 1, done.stdout
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert lines[0].split()[:3] == ["facts", "rc", "124"]
    assert all("not begun" in line for line in lines[1:])
    assert len(lines) == 3


def test_a_stop_ends_what_is_under_way_and_keeps_what_is_known(tmp_path: Path) -> None:
    """Steps run in process groups of their own, so that nothing of one outlives its box."""
    words = ["bash", SCRIPT, "--tiny", "--out", str(tmp_path), "--limit", "900", "--scale", "9", "facts"]
    begun = subprocess.Popen(words, env=environment(GENAC_GPU_PYTHON=sys.executable), start_new_session=True)
    until = time.monotonic() + 60.0
    while not running(str(tmp_path), "benchmarks.gpu.minutes"):
        assert time.monotonic() < until
        time.sleep(0.1)
    begun.terminate()
    assert begun.wait(60.0) == 130
    assert running(str(tmp_path)) == []
    assert rows_of(tmp_path)[0]["what"] == "call"
    assert (tmp_path / "log.txt").exists()


def running(*words: str) -> list[str]:
    """Command lines that name all of these."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if all(word in line for word in words):
                found.append(line)
    return found


def test_tests_that_were_all_skipped_are_a_failure_but_in_a_try(tmp_path: Path) -> None:
    """A line per test as it ends, with its reason; a file that cannot be imported is one too."""
    (tmp_path / "test_one.py").write_text("import pytest\ndef test_a(): pytest.skip('no device')\n")
    (tmp_path / "test_two.py").write_text("def test_b(): pass\ndef test_c(): assert 1 == 2\n")
    (tmp_path / "test_three.py").write_text("import nothing_of_this_name\n")
    codes = [plugged(tmp_path, "test_one.py"), plugged(tmp_path, "test_one.py", "--tiny")]
    assert codes == [1, 0]
    lost, counts, *_ = rows_of(tmp_path)
    assert (lost["ok"], lost["outcome"], lost["why"]) == (True, "skipped", "no device")
    assert (counts["what"], counts["ok"], counts["skipped"]) == ("tests", False, 1)
    assert plugged(tmp_path, "test_two.py", "test_three.py", "--continue-on-collection-errors") == 1
    *rows, counts = rows_of(tmp_path)[4:]
    assert {row["what"].split("/")[-1]: row["outcome"] for row in rows} == {
        "test_three.py": "failed", "test_two.py::test_b": "passed", "test_two.py::test_c": "failed"
    }  # fmt: skip
    assert any("nothing_of_this_name" in row.get("why", "") for row in rows)
    assert (counts["passed"], counts["failed"], counts["ok"]) == (1, 2, False)


def plugged(folder: Path, *arguments: str) -> int:
    """pytest's exit code with the plugin of the script's steps."""
    options = ["-p", "benchmarks.gpu.minutes.each_test", "--step", "tests", "-q", "-p", "no:cacheprovider"]
    words = [sys.executable, "-m", "pytest", *options, "--results", str(folder / "results.jsonl"), *arguments]
    environ = environment(PYTHONPATH=str(ROOT))
    return subprocess.run(words, cwd=folder, env=environ, capture_output=True, timeout=300).returncode


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tiny"], "no step named"),
        (["--tiny", "tea"], "there is no step tea"),
        (["--bundles", "/nowhere", "1"], "no te.tar.xz and sgl.tar.xz in /nowhere"),
        (["--limit", "soon", "1"], "--limit and --scale are numbers"),
        (["--scale", "1.2.3", "1"], "--limit and --scale are numbers"),
        (["--out"], "--out needs a value"),
        (["--quick", "1"], "unknown option --quick"),
    ],
)
def test_wrong_arguments_are_refused_with_a_way_out(arguments: list[str], said: str) -> None:
    done = call(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "way out" in done.stderr


def test_without_an_interpreter_it_names_the_ways_to_one(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "GENAC_GPU_PYTHON"}
    words = ["bash", SCRIPT, "--out", str(tmp_path), "facts"]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "GENAC_GPU_PYTHON is not set" in done.stderr


@pytest.mark.extended  # the other steps: each is a benchmark or a test that has a tiny run of its own
@pytest.mark.timeout(1500)
def test_every_step_that_a_cpu_has_goes_well(tmp_path: Path) -> None:
    steps = ["facts", "ipc", "tests", "parity", "fp8", "serverfp8", "server", "serverlora"]
    steps += ["train", "logprobs", "publish", "joint", "accuracy", "memory"]
    if "GENAC_SERVE_PYTHON" not in os.environ:
        steps = [step for step in steps if step not in ("facts", "server", "serverlora")]
    done = call("--tiny", "--out", str(tmp_path), "--scale", "10", "--limit", "1400", *steps)
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()[-6000:]
    assert all(row.get("ok", True) for row in rows_of(tmp_path))
