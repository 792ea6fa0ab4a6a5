"""`genac parity`: trainer and engine on fixed prompts, by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.test_run import write_recipe
from tests.warm import genac


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_trainer_and_engine_of_a_role_agree(tmp_path: Path, role: str) -> None:
    recipe = write_recipe(tmp_path)
    done = genac("parity", role, str(recipe), "--prompts", "6", "--max-new-tokens", "20", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "runs" / "run" / "parity" / f"{role}.json").read_text())
    assert report[f"parity/{role}_max"] < 1e-4  # fp32 on both sides: rounding alone
    assert 6 <= report["tokens"] <= 120
    assert [span["first"] for span in report["positions"]] == [0, 1, 3, 7, 15][: len(report["positions"])]
    assert len(report["worst"]) == 5
    worst = report["worst"][0]
    gaps = [abs(a - b) for a, b in zip(worst["engine"], worst["trainer"], strict=True)]
    assert max(gaps) == worst["max"] == report[f"parity/{role}_max"]
    assert f"parity of {role} over {report['tokens']} tokens" in done.stdout


def test_above_the_alarm_the_command_ends_with_3_and_an_unknown_role_with_2(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, observe={"parity_alarm": 1e-12})
    done = genac("parity", "actor", str(recipe), "--prompts", "4", "--max-new-tokens", "8", cwd=tmp_path)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "observe.parity_alarm" in done.stderr
    assert (tmp_path / "runs" / "run" / "parity" / "actor.json").exists()
    done = genac("parity", "referee", str(recipe), cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "one of: actor, critic" in done.stderr
