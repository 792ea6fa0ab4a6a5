"""Fabricates a run folder: invented figures in the files that stages write, for tests of the report only."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from genac_megatron.metrics import critic_figures, score_histogram

RECIPE = {
    "name": "fabricated",
    "roles": {
        "actor": {"model": {"family": "qwen3", "tokenizer": "builtin:tiny"}},
        "critic": {"model": {"family": "qwen3", "tokenizer": "builtin:tiny"}},
    },
    "task": {"kind": "state_tracking", "objects": 4},
    "stages": [
        {"kind": "sft", "name": "sft-actor", "role": "actor", "data": "demonstrations"},
        {"kind": "sft", "name": "sft-critic", "role": "critic", "data": "traces"},
        {"kind": "reinforce", "name": "reinforce", "steps": 20},
        {"kind": "ppo", "name": "ppo", "steps": 30},
    ],
    "observe": {"parity_alarm": 0.5},
}
STAGES = (
    ("sft-actor", "sft", 12),
    ("sft-critic", "sft", 12),
    ("reinforce", "reinforce", 20),
    ("ppo", "ppo", 30),
)
T0 = 1_700_000_000.0


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def metric_rows(rng: random.Random) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    clock = T0
    for stage, kind, steps in STAGES:
        role = "actor" if stage in ("sft-actor", "ppo") else "critic"
        for step in range(1, steps + 1):
            row: dict[str, Any] = {"stage": stage, "kind": kind, "step": step}
            row[f"{role}/loss"] = 2.0 / (1 + step / 5) + rng.gauss(0, 0.05)
            row[f"{role}/grad_norm"] = abs(rng.gauss(1.0, 0.2))
            row |= {
                "time/train_s": 1.0,
                "tokens/train": 1000,
                "memory/rss_gib": 2.0,
                "memory/peak_gib": 2.0 + step / 100,
                "memory/peak_rank_gib": 1.0 + step / 100,
            }
            if kind != "sft":
                row |= rl_row(rng, kind, step)
            row["time/total_s"] = sum(v for k, v in row.items() if k.startswith("time/")) + 0.25
            clock += row["time/total_s"]
            row["time"] = clock
            rows.append(row)
    return rows


def rl_row(rng: random.Random, kind: str, step: int) -> dict[str, Any]:
    rate = 0.45 + (0.012 * step if kind == "ppo" else 0.0)
    row = {
        "rollout/outcome_mean": min(1.0, rate + rng.gauss(0, 0.04)),
        "rollout/length_mean": 60 + rng.gauss(0, 2),
        "rollout/truncated": abs(rng.gauss(0.02, 0.01)),
        "judge/parse_rate": min(1.0, 0.985 + step / 2000),
        "judge/score_mean": rate + rng.gauss(0, 0.02),
        "judge/brier": 0.2 - step / 400,
        "judge/score_entropy": 1.5 + rng.gauss(0, 0.1),
        "judge/value_first": rate,
        "judge/value_last": rate + 0.1,
        "critic/entropy": 1.2 - step / 60,
        "parity/critic_mean": 2e-6,
        "parity/critic_p99": 1e-5,
        "parity/critic_max": 4e-5 * (1 + step / 30),
        "parity/critic_k3": 1e-11,
        "publish/critic_version": step if kind == "reinforce" else 20 + step,
        "publish/seconds": 0.5,
        "time/generate_s": 4.0,
        "time/judge_s": 6.0,
        "time/publish_s": 0.5,
        "tokens/generate": 5000,
        "tokens/judge": 12_000,
    }
    if kind == "ppo":
        row |= {
            "actor/entropy": 0.8 - step / 100,
            "actor/clip_share": abs(rng.gauss(0.05, 0.01)),
            "critic/loss": 0.05,
            "critic/grad_norm": abs(rng.gauss(0.6, 0.1)),
            "parity/actor_mean": 3e-6,
            "parity/actor_p99": 2e-5 + step * 1e-6,
            "parity/actor_max": 1e-4,
            "parity/actor_k3": 2e-11,
            "publish/actor_version": step,
            "advantage/gap": 0.8 + rng.gauss(0, 0.1),
            "advantage/within_response": 0.3 + rng.gauss(0, 0.05),
        }
    return row


def critic_block(rng: np.random.Generator, rate: float, sharp: float, parse: float) -> dict[str, Any]:
    """Values on 40 prompts x 2 responses x 4 states; `sharp` is how much of the true value they show."""
    values, outcomes, positions, prompts, responses, truth = [], [], [], [], [], []
    for p in range(40):
        base = rng.beta(3 * rate, 3 * (1 - rate))
        for sample in range(2):
            r = float(rng.random() < base)
            for k in range(4):
                true = base + (r - base) * k / 4
                v = rate + sharp * (true - rate) + rng.normal(0, 0.08)
                values.append(float(np.clip(np.rint(10 * v), 0, 10) / 10))
                truth.append(rng.binomial(1, true, 32))
                outcomes.append(r)
                positions.append(k)
                prompts.append(f"heldout/{p}")
                responses.append(sample)
    parsed = [v if rng.random() < parse else None for v in values]
    figures = critic_figures(values, outcomes, prompts, responses, parsed=parsed, draws=truth)
    histogram = score_histogram([v for v in parsed if v is not None]).tolist()
    errors = [1.0 if v is None else (v - r) ** 2 for v, r in zip(parsed, outcomes, strict=True)]
    return {
        **figures,
        "brier": float(np.mean(errors)),
        "errors": errors,
        "values": values,
        "outcomes": outcomes,
        "positions": positions,
        "prompts": prompts,
        "scores_hist": histogram,
    }


def actor_block(rng: np.random.Generator, rate: float) -> dict[str, Any]:
    outcomes = {
        f"heldout/{p}": rng.binomial(1, rng.beta(4 * rate, 4 * (1 - rate)), 4).tolist() for p in range(64)
    }
    return {"accuracy": float(np.mean(list(outcomes.values()))), "outcomes": outcomes, "truncated": 0.01}


def evaluation_rows(seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    plan = (
        ("sft-actor", "sft", "end", 12, 0.45, None),
        ("sft-critic", "sft", "end", 12, None, 0.35),
        ("reinforce", "reinforce", "start", 0, None, 0.35),
        ("reinforce", "reinforce", "step 10", 10, None, 0.6),
        ("reinforce", "reinforce", "end", 20, None, 0.8),
        ("ppo", "ppo", "start", 0, 0.45, 0.8),
        ("ppo", "ppo", "step 10", 10, 0.6, 0.8),
        ("ppo", "ppo", "step 20", 20, 0.7, 0.85),
        ("ppo", "ppo", "end", 30, 0.8, 0.9),
    )
    rows = []
    for stage, kind, name, step, rate, sharp in plan:
        now = rate if kind == "ppo" and rate else 0.45
        rows.append(
            {
                "stage": stage,
                "kind": kind,
                "name": name,
                "step": step,
                "actor": None if rate is None else actor_block(rng, rate),
                "critic": None if sharp is None else critic_block(rng, now, sharp, 0.97 + step / 1000),
            }
        )
    return rows


def rollout_rows() -> list[dict[str, Any]]:
    rows = []
    lines = [
        "Start: A=red, B=blue, C=green.\n",
        "Swap A and B: A=blue, B=red, C=green.\n",
        "Swap B and C: A=blue, B=green, C=red.\n",
        "<b>Final</b>: blue green red & done",
    ]
    starts = [0, *np.cumsum([len(line) for line in lines])[:-1].tolist()]
    for stage in ("reinforce", "ppo"):
        for outcome, values in ((1.0, [0.5, 0.6, None, 0.9]), (0.0, [0.5, 0.4, 0.2, 0.1])):
            states = [
                {
                    "cut_text": cut,
                    "text": f"Three objects, {k} swaps read. <script>alert(1)</script> They hold so far.\n"
                    f"<answer>{'?' if v is None else round(10 * v)}</answer>",
                    "value": v,
                    "used": 0.6 if v is None else v,
                }
                for k, (cut, v) in enumerate(zip(starts, values, strict=True))
            ]
            rows.append(
                {
                    "stage": stage,
                    "step": 10,
                    "prompt": "train/7",
                    "problem": "Swap A and B, then B and C.",
                    "response": "".join(lines),
                    "outcome": outcome,
                    "states": states,
                }
            )
    return rows


def fabricate(path: Path, seed: int = 0) -> Path:
    """A whole run: sft of both roles, reinforce, ppo."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False), encoding="utf-8")
    write_lines(path / "metrics.jsonl", metric_rows(random.Random(seed)))
    write_lines(path / "evaluations.jsonl", evaluation_rows(seed))
    write_lines(path / "rollouts.jsonl", rollout_rows())
    return path


def part(path: Path, *, steps: int, evaluations: int, rollouts: int, recipe: bool = True) -> Path:
    """A run that was stopped: its first rows only."""
    fabricate(path)
    write_lines(path / "metrics.jsonl", metric_rows(random.Random(0))[:steps])
    write_lines(path / "evaluations.jsonl", evaluation_rows(0)[:evaluations])
    write_lines(path / "rollouts.jsonl", rollout_rows()[:rollouts])
    if not recipe:
        (path / "recipe.yaml").unlink()
    return path
