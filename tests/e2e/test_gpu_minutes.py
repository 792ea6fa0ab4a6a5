"""tools/gpu_minutes.sh on a CPU, with tiny shapes: its steps, boxes, results and refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
    rows = rows_of(tmp_path)
    assert (rows[-1]["step"], rows[-1]["rc"]) == ("facts", 1)
    cases = {row["what"]: row["ok"] for row in rows[:-1]}
    assert cases == {"packages": True, "machine": True, "sglang": False, "doctor": True}
    assert "FAIL facts: sglang" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.jsonl", "summary.txt", "log.txt", "extra.tar.gz"
    }  # fmt: skip


def test_a_step_ends_with_its_box_and_none_begins_beyond_the_limit(tmp_path: Path) -> None:
    done = call("--tiny", "--out", str(tmp_path), *SHORT, "facts", "parity", "memory")
    assert done.returncode == 1, done.stdout
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert lines[0].split()[:3] == ["facts", "rc", "124"]
    assert all("not begun" in line for line in lines[1:])
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tiny"], "no step named"),
        (["--tiny", "tea"], "there is no step tea"),
        (["--bundles", "/nowhere", "1"], "no te.tar.xz and sgl.tar.xz in /nowhere"),
        (["--limit", "soon", "1"], "--limit and --scale are numbers"),
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
    steps = ["parity", "fp8", "train", "logprobs", "publish", "joint", "accuracy", "memory", "server"]
    if "GENAC_SERVE_PYTHON" not in os.environ:
        steps.remove("server")
    done = call("--tiny", "--out", str(tmp_path), "--scale", "10", "--limit", "1400", *steps)
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()[-6000:]
    assert all(row.get("ok", True) for row in rows_of(tmp_path))
