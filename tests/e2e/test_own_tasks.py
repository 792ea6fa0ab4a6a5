"""Runs on the user's own functions: mixture, reward in parts, privileged critic, and what goes wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.warm import Popen, command, environment, genac

OWN = """
import asyncio, os, pathlib

def prompts(seed):
    for n in range(20):
        yield {"prompt": f"Count to {n}.", "reference": {"limit": n, "seed": seed}}

async def score(response, reference):
    await asyncio.sleep(0)
    return {"even": len(response) % 2 == 0, "short": 1 / (1 + len(response))}

def broken(response):
    pathlib.Path(f"worker-{os.getpid()}").touch()
    return 0.5 if not response or response.isdigit() else None
"""
SHAPE = {"layers": 2, "hidden": 32, "ffn": 64, "heads": 2, "kv_heads": 2, "init_std": 0.1}
ROLE = {
    "model": {"family": "qwen3", "tokenizer": "builtin:tiny", "shape": SHAPE},
    "training": {"dtype": "fp32", "tokens_per_microbatch": 512},
    "engine": {"dtype": "fp32"},
}
COUNTS = {
    "kind": "python",
    "path": "./own.py",
    "prompts": "prompts",
    "heldout_size": 4,
    "verifier": {"python": "./own.py:score", "parts": {"even": 1, "short": 2}},
}
SWAPS = {"kind": "state_tracking", "objects": 3, "min_swaps": 1, "max_swaps": 2, "heldout_size": 4}
MIXTURE = {
    "kind": "mixture",
    "parts": [{"name": "counts", "weight": 3, "task": COUNTS}, {"name": "swaps", "task": SWAPS}],
}


def recipe(folder: Path, task: dict[str, Any], **changes: Any) -> str:
    (folder / "own.py").write_text(OWN)
    rollout = {"prompts": 8, "samples": 2, "max_new_tokens": 12, "truncated_critic": "zero"}
    whole = {
        "name": "run",
        "seed": 5,
        "world": {"ranks": 2, "timeout_s": 300},
        "task": task,
        "roles": {"actor": ROLE, "critic": ROLE},
        "judging": {"template": "brief", "privileged": True, "max_new_tokens": 16,
                    "states": {"max_states": 2, "min_segment": 4}},
        "stages": [
            {"kind": "ppo", "steps": 3, "rollout": rollout, "eval_every": 0, "overlong": {"cache": 6},
             "gate": {"action": "off"}}
        ],
        "evaluation": {"prompts": 6, "samples": 2},
        "checkpoint": {"every": 1},
        "observe": {"plots": False, "tensorboard": False},
        **changes,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(whole))
    return str(path)


def logged(folder: Path, log: str = "metrics.jsonl") -> list[dict[str, Any]]:
    path = folder / "runs" / "run" / log
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def told(folder: Path) -> list[dict[str, float]]:
    """By step, what was drawn and what it earned."""
    rows = [row for row in logged(folder) if "actor/loss" in row]
    groups = ("rollout/", "reward/", "source_", "judge/brier", "actor/overlong")
    return [{key: value for key, value in row.items() if key.startswith(groups)} for row in rows]


def test_a_mixture_with_a_reward_of_ones_own_resumes_with_the_same_prompts(tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder in (whole, halves):
        folder.mkdir()
    done = genac("run", recipe(whole, MIXTURE), cwd=whole)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    steps = told(whole)
    assert len(steps) == 3
    for step in steps:
        assert 0 < step["source_share/counts"] <= 1
        outcome = (step["reward/counts.even"] + 2 * step["reward/counts.short"]) / 3
        assert abs(outcome - step["source_outcome/counts"]) < 1e-9
        assert step["rollout/truncated"] > 0
        assert step["rollout/target_mean"] < step["rollout/outcome_mean"]
        assert -0.5 <= step["actor/overlong"] < 0
    assert abs(sum(8 * step["source_share/counts"] for step in steps) - 18) <= 2
    [start, end] = [row["actor"] for row in logged(whole, "evaluations.jsonl")]
    assert end["sources"].keys() == {"counts", "swaps"}
    assert end["parts"].keys() == {"counts.even", "counts.short"}
    assert all(one.partition("/")[0] in ("counts", "swaps") for one in start["outcomes"])

    path = recipe(halves, MIXTURE)
    assert stopped_after(path, halves, 1) == 75
    resumed = genac("run", path, "--resume", cwd=halves)
    assert resumed.returncode == 0, resumed.stdout[-3000:] + resumed.stderr[-5000:]
    assert told(halves) == steps

    (halves / "own.py").write_text(OWN.replace("Count to", "Go to"))
    other = genac("run", path, "--resume", "stages.ppo.steps=4", cwd=halves)
    assert other.returncode == 2, other.stdout
    assert "the task gives other prompts than when the checkpoint was made" in other.stderr


def stopped_after(path: str, folder: Path, step: int) -> int:
    """Run until a step is logged, then ask to stop; the exit code."""
    nothing = subprocess.DEVNULL
    with Popen(
        command("run", path), cwd=folder, env=environment(), stdout=nothing, stderr=nothing
    ) as process:
        until = time.monotonic() + 600
        while process.poll() is None and time.monotonic() < until:
            if len(told(folder)) >= step:
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.02)
        return process.wait(timeout=600)


def test_a_reward_that_breaks_later_ends_the_run_with_its_name_and_leaves_nothing_behind(
    tmp_path: Path,
) -> None:
    verifier = {"python": "./own.py:broken", "give_up": 4}
    stages = [{"kind": "policy", "algorithm": {"kind": "grpo"}, "steps": 1,
               "rollout": {"prompts": 8, "samples": 2, "max_new_tokens": 12}}]  # fmt: skip
    task = {**COUNTS, "verifier": verifier}
    path = recipe(tmp_path, task, stages=stages, judging={}, roles={"actor": ROLE})
    (tmp_path / "own.py").write_text(OWN.replace('"reference": {"limit": n, "seed": seed}', '"reference": 7'))
    done = genac("run", path, cwd=tmp_path)
    assert done.returncode == 2, done.stdout[-3000:] + done.stderr[-5000:]
    assert "own.py:broken: failed on 4 responses in a row; the last, on " in done.stderr
    assert "returned None (NoneType), not a number" in done.stderr
    assert "it counts as 0" in done.stderr + done.stdout
    workers = [int(one.name.partition("-")[2]) for one in tmp_path.glob("worker-*")]
    assert workers
    until = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in workers):
        assert time.monotonic() < until, "a reward process outlives its run"
        time.sleep(0.1)


def test_a_reward_that_fails_on_its_first_samples_ends_before_time_is_spent(tmp_path: Path) -> None:
    parts = {"even": 1, "short": 2, "polite": 1}
    task = {**COUNTS, "verifier": {"python": "./own.py:score", "parts": parts}}
    done = genac("run", recipe(tmp_path, task), cwd=tmp_path)
    assert done.returncode == 2
    assert "own.py:score: returned no part polite" in done.stderr
    assert "on train/0 with its reference as the response" in done.stderr
    assert not logged(tmp_path)
