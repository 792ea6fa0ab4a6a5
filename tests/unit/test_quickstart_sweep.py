"""The sweep's verdicts and table; that kernels differ is shown by its results' first losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import quickstart_sweep as sweep

ROOT = Path(__file__).resolve().parents[2]
GOOD: dict[str, Any] = {
    "seed": 1, "kernels": "native", "recipe": "x", "code": 0, "seconds": 200.0, "gain": 0.25,
    "mse_reinforce": 0.01, "mse_ppo": 0.03, "brier_ratio_reinforce": 0.6, "brier_ratio_ppo": 0.75,
    "parse_rate": 0.98, "first_losses": [6.0, 5.5, 5.123456789],
}  # fmt: skip


def test_a_run_on_its_bounds_holds() -> None:
    assert sweep.wrong_with(GOOD) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gain": 0.149}, "gain 0.149, not >= 0.15"),
        ({"mse_ppo": 0.0301}, "mse_ppo 0.030, not <= 0.03"),
        ({"brier_ratio_reinforce": 0.8}, "brier_ratio_reinforce 0.800, not <= 0.75"),
        ({"parse_rate": None}, "no parse_rate"),
        ({"parse_rate": float("nan")}, "parse_rate nan"),
        ({"code": 3}, "exit code 3"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], said: str) -> None:
    (found,) = sweep.wrong_with({**GOOD, **change})
    assert said in found


def test_the_table_tells_kernels_that_are_the_native_ones() -> None:
    rows = [
        GOOD,
        {**GOOD, "kernels": "avx2"},
        {**GOOD, "kernels": "default", "first_losses": [6.0, 5.5, 5.123456788], "gain": 0.1},
    ]
    lines = sweep.table([{**row, "sources": "now"} for row in rows], "now").splitlines()
    assert [("(as native)" in line) for line in lines[2:5]] == [False, True, False]
    assert "gain 0.100" in lines[4]
    assert lines[-1].startswith("2 of 3 hold")


def test_results_of_another_recipe_are_not_taken(tmp_path: Path) -> None:
    results = tmp_path / "sweep.json"
    now = sweep.Sweep(results, tmp_path / "runs", [], again=False)
    kept = {"1-native": {**GOOD, "recipe": now.digest}, "2-native": {**GOOD, "recipe": "of another"}}
    results.write_text(json.dumps({"runs": kept}))
    assert list(sweep.Sweep(results, tmp_path / "runs", [], again=False).records) == ["1-native"]
    assert not sweep.Sweep(results, tmp_path / "runs", [], again=True).records
    assert not sweep.Sweep(results, tmp_path / "runs", ["stages.ppo.steps=1"], again=False).records


def test_what_other_code_gave_stands_and_is_told_and_stale_runs_it_again(tmp_path: Path) -> None:
    results = tmp_path / "sweep.json"
    now = sweep.Sweep(results, tmp_path / "runs", [], again=False)
    mine = {**GOOD, "recipe": now.digest, "sources": now.sources}
    kept = {"1-native": mine, "2-native": {**mine, "seed": 2, "sources": "of another"}}
    results.write_text(json.dumps({"runs": kept}))
    one = sweep.Sweep(results, tmp_path / "runs", [], again=False)
    pairs = [(1, "native"), (2, "native"), (3, "native")]
    assert [one.has(*pair, stale=False) for pair in pairs] == [True, True, False]
    assert [one.has(*pair, stale=True) for pair in pairs] == [True, False, False]
    last = sweep.table(one.records.values(), one.sources).splitlines()[-1]
    assert last == "Of other code than the rest (--stale runs them again): seed 2 native."


STOP = """
import subprocess, sys, time
from pathlib import Path
from tools import quickstart_sweep as sweep
sweep.GRACE_S = 0.5
sweep.adopt_orphans()
run = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
while not Path("rank").exists():
    time.sleep(0.05)
sweep._stop([sweep.Active(1, "native", Path("run"), run, time.monotonic())], [2])
print(Path("rank").read_text())
"""
DEAF = """
import os, signal, time
from pathlib import Path
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
if os.fork() == 0:  # as a rank
    os.setsid()
    Path("part").write_text(str(os.getpid()))
    Path("part").rename("rank")
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="adopting orphans needs Linux")
def test_a_stop_leaves_no_rank_that_hears_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STOP, DEAF],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rank = int(done.stdout.splitlines()[-1])
    assert not Path(f"/proc/{rank}").exists()
    assert "[sweep] ended: " in done.stdout


@pytest.mark.parametrize("arguments", [["--seeds", "one"], ["--kernels", "sse9"], ["no.such=key"]])
def test_wrong_arguments_are_told_with_exit_2(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "quickstart_sweep.py"), *arguments,
         "--results", str(tmp_path / "x.json")],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip()
