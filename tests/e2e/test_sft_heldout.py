"""SFT stages that end by held-out samples: early, on a plateau, with the best weights, or at their gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml

from tests.warm import genac

RECIPE: dict[str, Any] = {
    "name": "run",
    "task": {"kind": "state_tracking", "objects": 3, "min_swaps": 1, "max_swaps": 2, "heldout_size": 16},
    "roles": {
        "actor": {
            "model": {
                "family": "qwen3",
                "tokenizer": "builtin:tiny",
                "shape": {"layers": 1, "hidden": 32, "ffn": 64, "heads": 2, "kv_heads": 2, "init_std": 0.1},
            },
            "training": {"dtype": "fp32"},
            "engine": {"dtype": "fp32"},
        }
    },
    "evaluation": {"prompts": 2, "samples": 1},
    "observe": {"tensorboard": False, "plots": False},
}


def run(folder: Path, heldout: dict[str, Any], lr: float = 3e-3, **stage: Any) -> tuple[int, str]:
    """`genac run` of one SFT stage of at most 20 steps in `folder`: its exit code and output."""
    recipe = dict(RECIPE)
    recipe["stages"] = [
        {"kind": "sft", "role": "actor", "data": "demonstrations", "size": 96, "epochs": 2, "batch": 8,
         "optimizer": {"lr": lr}, "rollout": {"prompts": 2, "samples": 1, "max_new_tokens": 8},
         "heldout": {"size": 16, "every": 2, **heldout}, **stage}
    ]  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    done = genac("run", str(path), cwd=folder)
    return done.returncode, done.stdout + done.stderr


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    return [row for line in lines if "actor/loss" in (row := json.loads(line))]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The actor's tensors of a checkpoint, by torch's own reader."""
    reader = dcp.FileSystemReader(checkpoint / "weights")
    sizes = reader.read_metadata().state_dict_metadata
    wanted = {
        key: torch.empty(item.size, dtype=item.properties.dtype)
        for key, item in sizes.items()
        if key.startswith("actor.") and hasattr(item, "size")
    }
    dcp.load(wanted, storage_reader=reader)
    return wanted


def test_a_target_that_is_reached_ends_the_stage_after_its_cooldown(tmp_path: Path) -> None:
    code, text = run(tmp_path, {"metric": "loss", "target": 3.0, "cooldown": 4})
    assert code == 0, text
    steps = rows(tmp_path)
    looks = {row["step"]: row["actor/heldout_loss"] for row in steps if "actor/heldout_loss" in row}
    reached = next(step for step, loss in looks.items() if loss <= 3.0)
    assert steps[-1]["step"] == reached + 4 < 20
    rates = {row["step"]: row["actor/lr"] for row in steps}
    assert rates[reached] == 3e-3
    falling = [rates[reached + i] for i in range(1, 5)]
    # The first step of the cooldown still has the whole rate, as the first of any schedule here.
    assert falling == [3e-3 * (1 - i / 4) for i in range(4)]
    assert f"step {reached}: held-out loss" in text
    assert f"the last step is {reached + 4}" in text


def test_where_nothing_gets_better_it_ends_with_the_best_weights(tmp_path: Path) -> None:
    code, text = run(tmp_path, {"patience": 1}, lr=0.3)  # far too high: it gets worse
    assert code == 0, text
    looks = {row["step"]: row["actor/heldout_loss"] for row in rows(tmp_path) if "actor/heldout_loss" in row}
    best = min(looks, key=lambda step: looks[step])
    last = max(looks)
    assert best < last < 20, looks
    assert f"did not get better in 1 looks; the last step is {last}" in text
    assert f"the best, at step {best} of {last}, whose weights are kept" in text
    folder = tmp_path / "runs" / "run"
    kept, ended = weights(folder / "heldout" / f"sft-{best:05d}"), weights(folder / "checkpoints" / "sft-end")
    assert kept.keys() == ended.keys()
    assert all(torch.equal(kept[key], ended[key]) for key in kept)


def test_a_target_that_is_never_reached_fails_the_gate(tmp_path: Path) -> None:
    code, text = run(tmp_path, {"metric": "exact_match", "target": 0.99, "cooldown": 4})
    assert code == 3, text
    assert rows(tmp_path)[-1]["step"] == 20
    assert "held-out exact_match" in text
    assert "stages.sft.epochs" in text


def test_too_few_samples_are_refused_before_training(tmp_path: Path) -> None:
    code, text = run(tmp_path, {"size": 90})
    assert code == 2, text
    assert "90 samples cannot be held out" in text
    assert "[sft 1/" not in text
