"""GRPO and RLOO steps, ours against TRL's: the same model, prompts, batch, precision, machine. Goal: <= 0.7.

A step samples `prompts` x `samples` completions, verifies them, and makes one update. Both sides: one process
with one thread, fp32, the same random weights (so completions end by chance, alike: at one token), the same
prompts, no reference model, no gradient checkpointing. Ours is `genac run` with a stage of kind policy (the
embedded engine samples); TRL's is its trainer with transformers' generate, in an environment of its own
(`python tools/env.py trl`). Runs take turns, each side's once with few steps and once with all.

The goal is held against processor time (of the process tree: the difference of the two runs, by the steps
between them), which other programs disturb little; wall time is the median step without a run's first two.
Both are per sampled token too, as lengths differ by chance. Peak memory is the process's largest resident
set; `libraries` is what a process has that imported the same and no more.

A group's prompt is computed once on our side (training.share_prefixes; `computed` is the share of a step's
trained tokens that was). --shots puts solved problems before each, the same on both sides: a longer prompt to
share. --flat adds our side without sharing.
--model measures one of them, with more steps, say, where a step is short against what a run's start
varies by; the other's saved rows stay.
Run: python -m benchmarks.vs_trl [--shots 8] [--flat] [--model "0.2 M" --steps 41]
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

from benchmarks.machine import RESULTS, ROOT, checked, save, table

ALGORITHMS = ("grpo", "rloo")
GOAL = 0.7
WARM = 2  # steps of each run whose wall time does not count
HELD = 16  # held-out problems
FEW = 3  # steps of the short runs
MODELS: dict[str, dict[str, Any]] = {
    "0.2 M": {"layers": 2, "hidden": 96, "ffn": 256, "heads": 3, "kv_heads": 3, "head_dim": 32},
    "6 M": {"layers": 6, "hidden": 256, "ffn": 1024, "heads": 8, "kv_heads": 4, "head_dim": 32},
}
TASK: dict[str, Any] = {
    "kind": "state_tracking", "objects": 4, "min_swaps": 2, "max_swaps": 5, "heldout_size": 16,
}  # fmt: skip
IMPORTS = {
    "ours": "import genac_megatron.stages.pipeline",
    "trl": "from trl import GRPOTrainer, RLOOTrainer",
}


def make_model(folder: Path, sizes: dict[str, Any]) -> None:
    """A Hugging Face folder with random weights and the small tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from genac_megatron.models.registry import hf_config, shape_of
    from genac_megatron.recipe.schema import ModelConfig, ModelShape
    from genac_megatron.tasks.tokenizer import BUILTIN, load_tokenizer

    tokenizer = load_tokenizer(BUILTIN)
    shape = shape_of(ModelConfig(family="qwen3", shape=ModelShape(**sizes)), len(tokenizer))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_config(shape)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Ours ends at every known end of a turn, TRL's at the tokenizer's: so there is one.
    saved = folder / "tokenizer.json"
    saved.write_text(saved.read_text().replace("<|endoftext|>", "<|unused|>"))


def write_prompts(folder: Path, count: int, shots: int = 0) -> dict[str, Any]:
    """prompts.json: training prompts as text, and their answers, for TRL. The task's block of our recipe.

    shots: solved problems before each one; the task is then of the file tasks.jsonl, with the same prompts.
    """
    from pydantic import TypeAdapter

    from genac_megatron.recipe.tasks import TaskConfig
    from genac_megatron.tasks import make_task
    from genac_megatron.tasks.tokenizer import BUILTIN, load_tokenizer

    tokenizer = load_tokenizer(BUILTIN)
    block = TASK
    task = make_task(TypeAdapter(TaskConfig).validate_python(block), tokenizer, 1)
    if shots:
        solved = [task.prompt("train", count + HELD + n) for n in range(shots)]
        before = "".join(f"{one.problem}\n{one.reference}\n" for one in solved)
        asked = [task.prompt("train", n) for n in range(count + HELD)]
        lines = [{"question": before + one.problem, "answer": str(one.reference)} for one in asked]
        path = folder / "tasks.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        block = {
            "kind": "jsonl", "path": str(path), "heldout_size": HELD, "verifier": "exact", "instruction": "",
        }  # fmt: skip
        task = make_task(TypeAdapter(TaskConfig).validate_python(block), tokenizer, 1)
    rows = []
    for index in range(count):
        prompt = task.prompt("train", index)
        rows.append({"prompt": tokenizer.decode(prompt.ids), "answer": str(prompt.reference)})
    (folder / "prompts.json").write_text(json.dumps(rows))
    return block


def run_flat(
    algorithm: str, model: Path, folder: Path, options: argparse.Namespace, steps: int
) -> dict[str, Any]:
    """`run_ours` with each prompt computed for each of its responses."""
    return run_ours(algorithm, model, folder, options, steps, share=False)


def run_ours(
    algorithm: str,
    model: Path,
    folder: Path,
    options: argparse.Namespace,
    steps: int,
    share: bool = True,
) -> dict[str, Any]:
    """`genac run` of one policy stage; its steps' seconds and sampled tokens."""
    recipe = {
        "name": "run",
        "world": {"ranks": 1, "threads": 1},
        "task": options.task,
        "roles": {
            "actor": {
                "model": {"hf": str(model)},
                "training": {
                    "dtype": "fp32",
                    "tokens_per_microbatch": options.tokens_per_microbatch,
                    "share_prefixes": share,
                },
                "engine": {"dtype": "fp32", "max_batch": options.prompts * options.samples},
                "optimizer": {"lr": options.lr, "weight_decay": 0.0},
            }
        },
        "stages": [
            {
                "kind": "policy",
                "algorithm": {"kind": algorithm},
                "steps": steps,
                "rollout": {
                    "prompts": options.prompts,
                    "samples": options.samples,
                    "max_new_tokens": options.new_tokens,
                },
                "eval_every": 0,
            }
        ],
        "evaluation": {"prompts": 2, "samples": 2},
        "checkpoint": {"every": 0},
        "observe": {"tensorboard": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-W", "ignore", "-m", "genac_megatron", "run", "recipe.yaml"]
    _, cpu_s = checked(command, folder)
    lines = (folder / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "actor/loss" in row]
    return {
        "seconds": [row["time/total_s"] for row in rows],
        "tokens": [row["tokens/rollout"] for row in rows],
        "computed": sum(row["unique/actor_train"] for row in rows)
        / sum(row["tokens/actor_train"] for row in rows),
        "peak_gib": rows[-1]["memory/peak_gib"],
        "cpu_s": cpu_s,
    }


def run_trl(
    algorithm: str, model: Path, folder: Path, options: argparse.Namespace, steps: int
) -> dict[str, Any]:
    """TRL's trainer in its own environment."""
    given = {
        "algorithm": algorithm,
        "model": str(model),
        "prompts": str(model / "prompts.json"),
        "out": str(folder / "trl"),
        "count": options.prompts,
        "samples": options.samples,
        "new_tokens": options.new_tokens,
        "steps": steps,
        "lr": options.lr,
        "seed": 1,
    }
    script = str(ROOT / "benchmarks" / "peers" / "trl_steps.py")
    output, cpu_s = checked([options.trl_python, "-W", "ignore", script, json.dumps(given)], folder)
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found | {"cpu_s": cpu_s}


def libraries(python: str, imports: str, folder: Path) -> float:
    """GiB that a process has at its peak which imported what a side imports, and no more."""
    code = (
        "from genac_megatron.platform.megatron import install; install()\n" if "genac" in imports else ""
    ) + f"{imports}\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
    return float(checked([python, "-W", "ignore", "-c", code], folder)[0].splitlines()[-1])


def row_of(
    name: str,
    algorithm: str,
    side: str,
    runs: list[dict[str, Any]],
    short: list[dict[str, Any]],
    libraries_gib: float,
) -> dict[str, Any]:
    """One side's figures from its long and its short runs."""
    seconds = [s for run in runs for s in run["seconds"][WARM:]]
    tokens = statistics.mean(t for run in runs for t in run["tokens"])
    steps = len(runs[0]["seconds"]) - FEW
    cpu_s = statistics.median(
        (long["cpu_s"] - few["cpu_s"]) / steps for long, few in zip(runs, short, strict=True)
    )
    return {
        "model": name,
        "algorithm": algorithm,
        "side": side,
        "step_s": round(statistics.median(seconds), 3),
        "cpu_s": round(cpu_s, 3),
        "tokens a step": round(tokens),
        "computed": round(statistics.mean(run.get("computed", 1.0) for run in runs), 2),
        "ms a token": round(1000 * statistics.median(seconds) / tokens, 4),
        "cpu ms a token": round(1000 * cpu_s / tokens, 4),
        "peak_GiB": round(max(run["peak_gib"] for run in runs), 3),
        "libraries_GiB": round(libraries_gib, 3),
    }


def measure(name: str, algorithm: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per side, for one model and algorithm."""
    sides = {"ours": run_ours, **({"ours, flat": run_flat} if options.flat else {}), "trl": run_trl}
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    short: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory(prefix="genac-") as scratch:
        model = Path(scratch) / "model"
        make_model(model, MODELS[name])
        options.task = write_prompts(model, options.prompts * (options.steps + 1), options.shots)
        for turn in range(options.rounds):
            for side, run in sides.items():
                for runs, steps in ((short, FEW), (found, options.steps)):
                    folder = Path(scratch) / f"{side.replace(', ', '-')}-{turn}-{steps}"
                    folder.mkdir()
                    runs[side].append(run(algorithm, model, folder, options, steps))
        ours = libraries(sys.executable, IMPORTS["ours"], Path(scratch))
        theirs_gib = libraries(options.trl_python, IMPORTS["trl"], Path(scratch))
        bases = {side: theirs_gib if side == "trl" else ours for side in sides}
    rows = [row_of(name, algorithm, side, found[side], short[side], bases[side]) for side in found]
    theirs = rows[-1]
    for row in rows:
        row["time, of TRL's"] = round(row["cpu ms a token"] / theirs["cpu ms a token"], 3)
        row["wall time, of TRL's"] = round(row["ms a token"] / theirs["ms a token"], 3)
        row["memory, of TRL's"] = round(row["peak_GiB"] / theirs["peak_GiB"], 3)
        row |= {"steps": options.steps, "rounds": options.rounds, "load": round(os.getloadavg()[0], 1)}
    return rows


def kept(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved rows of models that were not measured now."""
    path = RESULTS / "vs_trl.json"
    saved = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in saved if row["model"] not in {new["model"] for new in measured}]


def trl_python() -> str:
    """The interpreter of TRL's environment, built first where there is none."""
    command = [sys._base_executable, str(ROOT / "tools" / "env.py"), "trl"]  # type: ignore[attr-defined]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--tokens-per-microbatch", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=15, help="of each long run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-6, help="so small that the model stays as it is")
    parser.add_argument("--shots", type=int, default=0, help="solved problems before each: a longer prompt")
    parser.add_argument("--flat", action="store_true", help="our side without shared prompts too")
    parser.add_argument("--model", choices=list(MODELS), help="default: all")
    parser.add_argument("--trl-python", help="an interpreter that has TRL; default: tools/env.py's")
    parser.add_argument("--no-save", action="store_true", help="a try")
    options = parser.parse_args(arguments)
    options.trl_python = options.trl_python or trl_python()
    rows: list[dict[str, Any]] = []
    for name in [options.model] if options.model else MODELS:
        for algorithm in ALGORITHMS:
            rows += measure(name, algorithm, options)
            print(table(rows[-(3 if options.flat else 2) :]), flush=True)
    print(table(rows))
    for row in rows:
        if row["side"] == "ours":
            for what in ("time, of TRL's", "memory, of TRL's"):
                met = "met" if row[what] <= GOAL else "missed"
                print(f"{row['model']} {row['algorithm']}: {what}: {row[what]} (goal <= {GOAL}: {met})")
    if not options.no_save:
        left_out = ("trl_python", "task", "model", "no_save")
        settings = {key: value for key, value in vars(options).items() if key not in left_out}
        settings |= {"trl": "1.16.0", "models": MODELS}
        print("written", save("vs_trl", settings, rows + kept(rows)).name)


if __name__ == "__main__":
    main()
