"""Who holds a GPU's memory in which phase, for every cluster recipe; and the estimate against real ranks.

First, without running anything, the timeline of recipe/memory.py: per recipe the most that any GPU holds
when servers start, while they generate, in training, in publications and when a lost server starts again,
beside the GPU's memory, and the KV cache of each role's servers (--timeline: that alone). None may be above.

Then the memory estimate of --dry-run against the peaks of real ranks, on a CPU.
Joint PPO of two steps with models large enough to stand out against the interpreter: each rank's peak RSS
after the last step, less that of the same run with tiny models (libraries, tokenizers, torch's own), summed
over ranks, beside the estimate of recipe/estimate.py less the tiny models'. Activations are small beside
weights here, so this compares weights, gradients, optimizer states and engines; a GPU's allocator and CUDA's
context (recipe/memory.py: 6 GiB, assumed) are not in it.
Run: python -m benchmarks.memory_estimate [--timeline]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.machine import save, table
from benchmarks.published_models import write_place
from genac_megatron.cluster.gpus import gpu
from genac_megatron.cluster.placement import misfits, server_shares, tenants
from genac_megatron.recipe.estimate import memory_of, place_of
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.memory import Phase, timelines
from genac_megatron.recipe.rules import read_shape
from genac_megatron.recipe.share import GIB

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "cluster"
LARGE = {"layers": 8, "hidden": 512, "ffn": 2048, "heads": 8, "kv_heads": 8}
TINY = {"layers": 2, "hidden": 32, "ffn": 64, "heads": 2, "kv_heads": 2}
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "1 rank": (1, {}),
    "dp 2": (2, {}),
    "tp 2": (2, {"tp": 2}),
    "pp 2": (2, {"pp": 2}),
}


def timeline(path: Path) -> dict[str, Any]:
    """The most GiB that a GPU of the recipe holds in each phase, and what its servers' KV caches hold."""
    read = load_recipe(path)
    has = gpu(read.cluster.gpu or "").memory_gib
    lines = timelines(read, tenants(read), has * GIB)
    row: dict[str, Any] = {"recipe": path.stem}
    row |= {phase.value: round(max(line.used(phase) for line in lines) / GIB, 1) for phase in Phase}
    row["gpu"] = has
    for name, share in server_shares(read).items():
        row[f"{name} KV GiB"] = round(share.cache / GIB, 1)
    row["fits"] = "no" if misfits(read) else "yes"
    return row


def timelines_of_all() -> list[dict[str, Any]]:
    """A row for every cluster recipe, with stand-ins for the models' folders."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        write_place(Path(folder))
        os.chdir(folder)
        try:
            return [timeline(path) for path in sorted(RECIPES.glob("*-*.yaml"))]
        finally:
            os.chdir(before)


def recipe(shape: dict[str, int], ranks: int, layout: dict[str, int]) -> dict[str, Any]:
    role = {
        "model": {"family": "qwen3", "tokenizer": "builtin:tiny", "shape": shape},
        "layout": layout,
        "training": {"dtype": "fp32", "tokens_per_microbatch": 512},
        "engine": {"dtype": "fp32", "max_batch_tokens": 1024, "max_batch": 8},
    }
    return {
        "name": "run",
        "world": {"ranks": ranks},
        "task": {
            "kind": "state_tracking", "objects": 3, "min_swaps": 1, "max_swaps": 2, "heldout_size": 8,
        },
        "roles": {"actor": role, "critic": role},
        "judging": {"template": "brief", "max_new_tokens": 8, "states": {"max_states": 2}},
        "stages": [{"kind": "ppo", "steps": 2, "eval_every": 0, "gate": {"action": "off"},
                    "rollout": {"prompts": 2, "samples": 2, "max_new_tokens": 8}}],
        "evaluation": {"prompts": 2, "samples": 1},
        "checkpoint": {"every": 0},
        "observe": {"tensorboard": False},
    }  # fmt: skip


def estimated(path: Path) -> float:
    """GiB of all ranks."""
    read = load_recipe(path)
    world, total = read.world.ranks, 0.0
    for role in read.roles.values():
        shape = read_shape(role.model)
        total += sum(
            memory_of(role, shape, place_of(role.layout, r, world), world).total for r in range(world)
        )
    return total / 2**30


def measured(folder: Path) -> float:
    """GiB of all ranks at their peaks, after the last step and before its checkpoint."""
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "genac_megatron", "run", "recipe.yaml"]
    environ = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, env=environ, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / "runs/run/metrics.jsonl").read_text().splitlines()]
    return float(next(row["memory/peak_gib"] for row in rows if row["step"] == 2))


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory by phase, and the estimate against real ranks.")
    parser.add_argument("--timeline", action="store_true", help="the cluster recipes' phases alone")
    options = parser.parse_args()
    rows = timelines_of_all()
    columns = dict.fromkeys(key for row in rows for key in row)
    print(table([{key: row.get(key, "-") for key in columns} for row in rows]))
    print(save("memory_timeline", {"phases": [phase.value for phase in Phase]}, rows))
    if not options.timeline:
        compare()


def compare() -> None:
    """The estimate beside real ranks' peaks, by layout."""
    rows = []
    for name, (ranks, layout) in LAYOUTS.items():
        figures = []
        for shape in (TINY, LARGE):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "recipe.yaml"
                path.write_text(yaml.safe_dump(recipe(shape, ranks, layout)))
                figures.append((estimated(path), measured(Path(folder))))
        (guess_tiny, real_tiny), (guess, real) = figures
        ratio = (real - real_tiny) / (guess - guess_tiny)
        rows.append(
            {
                "layout": name,
                "estimate_gib": round(guess - guess_tiny, 3),
                "measured_gib": round(real - real_tiny, 3),
                "measured/estimate": round(ratio, 2),
                "without_models_gib": round(real_tiny, 3),
            }
        )
    print(table(rows))
    print(save("memory_estimate", {"large": LARGE, "tiny": TINY}, rows))


if __name__ == "__main__":
    main()
