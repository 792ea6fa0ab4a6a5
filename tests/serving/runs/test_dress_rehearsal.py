"""The 8B pipelines as they ship, with nothing but sizes overridden, on a small model in the place of theirs.

Gates are on, and pass: tests/serving/runs/small_qwen3.py has a model that can do the work.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from genac_megatron.recipe.loader import load_recipe
from genac_megatron.serving.sglang.server import PYTHON_VARIABLE
from tests.serving.runs.small_qwen3 import make_place
from tests.warm import ROOT, genac

MODEL = "Qwen3-8B"
WHOLE, LORA = "pipeline-qwen3-8b-2n8g-tp4", "pipeline-qwen3-8b-1n8g-tp4-lora"
ENGINE = (
    "gpus=[]",
    "engines=1",
    "tp=1",
    "max_batch=16",
    "max_batch_tokens=8192",
)
STAGES = ("sft-critic", "reinforce", "ppo")
SIZES = [
    "world.ranks=2", "world.threads=1", "cluster.gpu=null", "judging.max_new_tokens=32",
    "judging.states.min_segment=4", "evaluation.prompts=12",
    "evaluation.mc_states=8", "evaluation.mc_continuations=4",
    *(f"roles.{role}.training.tokens_per_microbatch=1024" for role in ("actor", "critic")),
    *(f"roles.actor.engine.{one}" for one in ENGINE),
    *(f"stages.{stage}.rollout.{size}" for stage in STAGES
      for size in ("prompts=4", "samples=4", "max_new_tokens=48")),
    "stages.sft-critic.size=32", "stages.sft-critic.batch=8",
    "stages.reinforce.steps=2", "stages.ppo.steps=2",
]  # fmt: skip
SMALL = {
    WHOLE: [*SIZES, "roles.actor.layout.tp=1", "roles.critic.layout.tp=2",
            *(f"roles.critic.engine.{one}" for one in ENGINE)],
    LORA: [*SIZES, "roles.actor.layout.tp=2", "roles.critic.layout.tp=2"],
}  # fmt: skip


def recipe_of(name: str) -> str:
    return str(ROOT / "recipes" / "cluster" / f"{name}.yaml")


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", SMALL)
def test_data_template_and_room_hold_without_servers(name: str, tmp_path: Path) -> None:
    """The data set by its name, Qwen3's chat template, the critic's prompts, where everything is."""
    make_place(tmp_path, MODEL, taught=False)
    done = genac("run", recipe_of(name), *SMALL[name], "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "64 training and 16 held-out prompts in openai/gsm8k" in done.stdout
    assert "all of them have room in the model of actor and critic" in done.stdout


@pytest.mark.extended
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    PYTHON_VARIABLE not in os.environ,
    reason=f"{PYTHON_VARIABLE} is not set: `make test-serving` builds SGLang's environment and sets it",
)
def test_the_pipelines_run_on_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_place(tmp_path, MODEL)
    monkeypatch.chdir(tmp_path)
    for name, small in SMALL.items():
        done = genac("run", recipe_of(name), *small, cwd=tmp_path, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == "", "nothing that a user could take for a fault"
        run = tmp_path / "runs" / name
        _check(run, len(load_recipe(recipe_of(name), small).stages))
    again = genac("run", recipe_of(LORA), *SMALL[LORA], "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    _check_folders(tmp_path)


def _check(run: Path, stages: int) -> None:
    found = rows(run)
    for stage in STAGES[:stages]:
        assert any(row["stage"] == stage for row in found)
    trained = [row for row in found if row["kind"] == "ppo" and "actor/loss" in row]
    assert [row["step"] for row in trained] == [1, 2]
    assert all(row["judge/parse_rate"] > 0.9 for row in trained)
    assert max(row.get("parity/actor_p99", 0.0) for row in found) < 0.1  # BF16 on both sides
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert summary["critic/brier_sft"] < summary["critic/brier_constant"]
    assert (run / "report" / "index.html").exists()


def _check_folders(folder: Path) -> None:
    """What is trained goes back to a folder with the names and sizes of the one it came from."""
    for role in ("actor", "critic"):
        done = genac("convert", "to-hf", f"runs/{WHOLE}", f"{role}-hf", "--role", role, cwd=folder)
        assert done.returncode == 0, done.stderr
        sizes = [_sizes(path) for path in (folder / "models" / MODEL, folder / f"{role}-hf")]
        assert sizes[0] == sizes[1]


def _sizes(folder: Path) -> dict[str, list[int]]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return found
