"""A whole joint PPO step by phase, with an SGLang server for each role on the one GPU of the trainer.

`genac run` on a recipe made here; figures are those of its metrics.jsonl: the median second of each phase
over the steps after the first, tokens, publication. Both servers are colocated (CUDA IPC publication), each
with a share of the memory. Pairs: SmolLM2-135M-Instruct (tools/fetch_smollm2.py) on one-digit sums, and two
random models of 1.2 billion parameters. On a CPU (--tiny) the engines are embedded ones.
Needs the serving environment (GENAC_SERVE_PYTHON). Run: python -m benchmarks.gpu.joint_step
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.gpu.common import need_gpu, parser, report
from benchmarks.gpu.publication import SERVER_ARGS
from genac_megatron.serving.sglang.server import PYTHON_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
PAIRS = ("smollm2", "1.2B random")
RANDOM: dict[str, dict[str, Any]] = {
    "1.2B random": {
        "family": "qwen2",
        "tokenizer": "builtin:tiny",
        # Two roles' weights, gradients and optimizers take 42 GiB; of an 80 GiB GPU 24 are the servers'.
        "shape": {"layers": 20, "hidden": 1536, "ffn": 8960, "heads": 12, "kv_heads": 2, "rope_theta": 1e6,
                  "vocab": 151_936},
    },
    "135M random": {  # SmolLM2's shape, where there is no package index to take the real one from
        "family": "llama",
        "tokenizer": "builtin:tiny",
        "shape": {"layers": 30, "hidden": 576, "ffn": 1536, "heads": 9, "kv_heads": 3, "head_dim": 64,
                  "rope_theta": 1e5, "vocab": 49_152, "init_std": 0.04},
    },
}  # fmt: skip
TINY = {
    "family": "qwen3",
    "tokenizer": "builtin:tiny",
    "shape": {"layers": 2, "hidden": 32, "ffn": 64, "heads": 2, "kv_heads": 2, "init_std": 0.1, "vocab": 512},
}


def smollm2() -> dict[str, Any]:
    """The real model's folder, made once."""
    command = [sys.executable, str(ROOT / "tools" / "fetch_smollm2.py")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {"hf": done.stdout.strip()}


def recipe(pair: str, options: argparse.Namespace) -> dict[str, Any]:
    """Joint PPO of two roles of one model, everything on one rank."""
    engine: dict[str, Any] = {"kind": "embedded", "dtype": "fp32"}
    training: dict[str, Any] = {"dtype": "fp32", "tokens_per_microbatch": 512}
    model = TINY
    task: dict[str, Any] = {"kind": "state_tracking", "objects": 3, "min_swaps": 1, "max_swaps": 2,
                            "heldout_size": 8}  # fmt: skip
    if not options.tiny:
        model = smollm2() if pair == "smollm2" else RANDOM[pair]
        engine = {"kind": "sglang", "dtype": "bf16", "gpus": [0], "mem_fraction": options.mem_fraction,
                  "args": list(SERVER_ARGS)}  # fmt: skip
        training = {"dtype": "bf16", "fp8": options.fp8, "tokens_per_microbatch": 8192}
        if pair == "smollm2":
            one_digit = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
            task = {"kind": "reasoning_gym", "name": "chain_sum", "heldout_size": 16, "options": one_digit}
    role = {"model": model, "training": training, "engine": engine}
    new, prompts = (8, 2) if options.tiny else (options.new_tokens, options.prompts)
    rollout = {"prompts": prompts, "samples": 2 if options.tiny else 8, "max_new_tokens": new}
    return {
        "name": "run",
        "world": {"ranks": 1, "threads": 1},
        "task": task,
        "roles": {"actor": role, "critic": role},
        "judging": {"template": "brief", "max_new_tokens": new, "states": {"max_states": 4}},
        "stages": [
            {
                "kind": "ppo",
                "steps": options.steps,
                "eval_every": 0,
                "rollout": rollout,
                "gate": {"action": "off"},
            }
        ],  # an untrained critic
        "evaluation": {"prompts": 2, "samples": 1},
        "checkpoint": {"every": 0},
        "observe": {"tensorboard": False},
    }


def steps_of(pair: str, options: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """The rows of a run's steps, but for its first."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(pair, options)))
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "ignore", "-m", "genac_megatron", "run", str(path)]
    done = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=options.limit_s
    )
    if done.returncode:
        raise SystemExit(f"{pair}: the run ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    lines = (folder / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "actor/loss" in row]
    return [row for row in rows if row["step"] > 1]


def measure(pair: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per phase of the median step."""
    with tempfile.TemporaryDirectory(prefix="genac-") as folder:
        found = steps_of(pair, options, Path(folder))
    keys = sorted({key for row in found for key in row if key.startswith("time/") and key.endswith("_s")})
    spent = {key: statistics.median(row.get(key, 0.0) for row in found) for key in keys}
    total = spent.pop("time/total_s")
    spent["time/other_s"] = total - sum(spent.values())
    tokens = {key.split("/")[1]: value for key, value in found[-1].items() if key.startswith("tokens/")}
    rows = []
    for key, value in sorted(spent.items(), key=lambda item: -item[1]):
        phase = key.removeprefix("time/").removesuffix("_s")
        rows.append(
            {
                "pair": pair,
                "phase": phase,
                "s": round(value, 3),
                "share_%": round(100 * value / total, 1),
                "tokens": round(tokens.get(phase, 0)) or "",
            }
        )
    rows.append({"pair": pair, "phase": "whole step", "s": round(total, 3), "share_%": 100.0, "tokens": ""})
    return rows


def main(arguments: list[str] | None = None) -> None:
    grammar = parser(__doc__)
    grammar.add_argument("--pair", choices=PAIRS, help="default: both")
    grammar.add_argument("--steps", type=int, default=6)
    grammar.add_argument("--prompts", type=int, default=32)
    grammar.add_argument("--new-tokens", type=int, default=128)
    grammar.add_argument("--mem-fraction", type=float, default=0.15, help="of the GPU, for each server")
    grammar.add_argument("--fp8", default="off", help="the trainer's recipe")
    grammar.add_argument("--limit-s", type=float, default=3600.0, help="for each pair's run")
    options = grammar.parse_args(arguments)
    need_gpu(options.tiny)
    if not options.tiny and PYTHON_VARIABLE not in os.environ:
        print(f"{PYTHON_VARIABLE} is not set\n  way out: tools/gpu_setup.sh prints it", flush=True)
        raise SystemExit(2)
    pairs = (options.pair,) if options.pair else PAIRS
    if options.tiny:
        pairs, options.steps = ("tiny",), 2
    rows: list[dict[str, Any]] = []
    for pair in pairs:
        rows += measure(pair, options)
        report("joint_step", options, rows, [])


if __name__ == "__main__":
    main()
