"""`genac parity`: trainer and engine on fixed prompts, by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from genac_megatron.cluster.heartbeat import read_beats
from genac_megatron.observe.lock import held
from genac_megatron.observe.runinfo import RunFolder
from tests.conversion.tiny_folder import make_folder, tiny_shape
from tests.e2e.test_run import write_recipe
from tests.warm import genac


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_trainer_and_engine_of_a_role_agree(tmp_path: Path, role: str) -> None:
    recipe = write_recipe(tmp_path)
    done = genac("parity", role, str(recipe), "--prompts", "6", "--max-new-tokens", "20", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "run"
    report = json.loads((run / "parity" / f"{role}.json").read_text())
    assert report[f"parity/{role}_max"] < 1e-4  # fp32 on both sides: rounding alone
    assert 6 <= report["tokens"] <= 120
    assert [span["first"] for span in report["positions"]] == [0, 1, 3, 7, 15][: len(report["positions"])]
    assert len(report["worst"]) == 5
    worst = report["worst"][0]
    gaps = [abs(a - b) for a, b in zip(worst["engine"], worst["trainer"], strict=True)]
    assert max(gaps) == worst["max"] == report[f"parity/{role}_max"]
    assert f"parity of {role} over {report['tokens']} tokens" in done.stdout
    assert sorted(path.name for path in run.iterdir()) == ["evaluate", "parity"]
    (own,) = (run / "evaluate").iterdir()  # a run of the recipe may beat in logs/local
    assert {beat["state"] for beat in read_beats(own / "logs" / "local")} == {"done"}


def test_the_same_command_beside_itself_is_refused(tmp_path: Path) -> None:
    words = ["parity", "actor", str(write_recipe(tmp_path))]
    folder = RunFolder(tmp_path / "runs" / "run").beside("parity", words)
    with held(folder, "what this test does"):
        done = genac(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "the same command is under way: process" in done.stderr


def test_a_model_folder_whose_weights_are_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    """Before, its first generation told to resume from an earlier checkpoint and lower the learning rate."""
    folder = make_folder(tmp_path / "hf", tiny_shape())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("inf")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    overrides = [
        f"roles={{actor: {{model: {{hf: {folder}}}}}}}",
        "stages=[{kind: sft, role: actor, data: demonstrations, rollout: {max_new_tokens: 8}}]",
    ]
    done = genac("parity", "actor", str(write_recipe(tmp_path)), *overrides, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"{folder}: its actor holds numbers that are not finite: " in done.stderr
    assert "layers.1.mlp" in done.stderr
    assert "fetch the folder again" in done.stderr


def test_above_the_alarm_the_command_ends_with_3_and_an_unknown_role_with_2(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, observe={"parity_alarm": 1e-12})
    done = genac("parity", "actor", str(recipe), "--prompts", "4", "--max-new-tokens", "8", cwd=tmp_path)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "observe.parity_alarm" in done.stderr
    assert (tmp_path / "runs" / "run" / "parity" / "actor.json").exists()
    done = genac("parity", "referee", str(recipe), cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "one of: actor, critic" in done.stderr
