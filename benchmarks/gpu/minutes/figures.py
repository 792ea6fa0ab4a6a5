"""The other benchmarks of this folder, their sizes cut to the minutes there are."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import accuracy, joint_step, logprobs, memory, publication, training
from benchmarks.gpu.common import peak_tflops
from benchmarks.gpu.minutes.rows import Case, Figures, Step, beside, short
from genac_megatron.platform.fp8 import refusal_here
from genac_megatron.recipe.memory import RANK_GIB
from genac_megatron.training.layout import init_world

BIG = "8B, 8 layers"
# (shape, precision, loop, tokens of a micro-batch), the figure that is wanted most first.
TRAINED = {
    "train8b": [
        (BIG, "off", "ours", 8192),
        (BIG, "tensorwise", "ours", 8192),
        (BIG, "blockwise", "ours", 8192),
        (BIG, "off", "bare", 8192),
    ],
    "train1b": [
        ("1.5B", "off", "ours", 8192),
        ("1.5B", "off", "bare", 8192),
        ("1.5B", "off", "bare, our log-probs", 8192),
    ],
    "train0b": [
        ("0.5B", "off", "ours", 8192),
        ("0.5B", "off", "bare", 8192),
        ("0.5B", "off", "ours", 4096),
    ],
}
KEPT = (
    "time/",
    "publish/",
    "parity/",
    "tokens/",
    "memory/",
    "actor/loss",
    "critic/loss",
    "actor/grad",
    "critic/grad",
)
LOG_BYTES = 4 << 20


def train(step: Step) -> bool:
    """Step time, tokens/s and MFU of one shape."""
    wanted = TRAINED[step.name][: 1 if step.tiny else None]
    return step.each(
        [
            (f"{shape}, {tokens} tokens, {'bf16' if fp8 == 'off' else fp8}, {mode}",
             partial(one_loop, step.tiny, shape, fp8, mode, tokens))
            for shape, fp8, mode, tokens in wanted
        ]
    )  # fmt: skip


def one_loop(tiny: bool, shape: str, fp8: str, mode: str, tokens: int) -> Figures:
    if fp8 != "off" and (reason := refusal_here(fp8)):
        return {"left_out": reason}
    given = {
        "shape": training.TINY if tiny else training.SHAPES[shape],
        "tokens": 64 if tiny else tokens,
        "fp8": fp8,
        "tiny": tiny,
        "dtype": "fp32" if tiny else "bf16",
        "microbatches": 2 if tiny else 4,
        "steps": 1 if tiny else 5,
        "warm": 0 if tiny else 2,
        "training": {"recompute": "off"},
        "mode": mode,
    }
    run = training.run_variant(given)
    times = sorted(run["seconds"])
    took = times[len(times) // 2]
    tflops, peak = run["flops"] / took / 1e12, peak_tflops(fp8 != "off")
    return {
        "step_s": short(took),
        "spread": [short(times[0]), short(times[-1])],
        "tokens_s": round(run["tokens"] / took),
        "tflops": round(tflops, 1),
        "mfu": round(100 * tflops / peak, 1) if peak else None,
        "peak_gib": round(run["peak_gib"], 2),
        "loss": round(run["loss"], 4),
    }


def log_probs(step: Step) -> bool:
    """Each way to log-probs at a vocabulary of 152k."""
    size: dict[str, Any] = {"vocab": 151_936, "hidden": 2048, "count": 8192}
    if step.tiny:
        size = {"vocab": 512, "hidden": 32, "count": 64}
    more = {"repeats": 1 if step.tiny else 5, "tiny": step.tiny}

    def one(name: str, dtype: str) -> Figures:
        found = logprobs.run_variant(size | more | {"dtype": dtype, "name": name})
        return {key: short(value) for key, value in found.items()}

    dtypes = ("float32",) if step.tiny else ("bfloat16", "float32")
    return step.each([(f"{n}, {d}", partial(one, n, d)) for d in dtypes for n in logprobs.variants()])


def publish(step: Step) -> bool:
    """Joining, the embedded engine and CUDA IPC against a plain copy, 1.5B parameters."""

    def one() -> Figures:
        torch.set_num_threads(1)
        init_world()
        options = argparse.Namespace(
            tiny=step.tiny, bucket_mib=1 if step.tiny else 512, repeats=1 if step.tiny else 5, server=False
        )
        with tempfile.TemporaryDirectory(prefix="genac-") as folder:
            return {"rows": publication.measure(options, Path(folder))}

    return step.each([("1.5B, bf16", one)])


def joint(step: Step) -> bool:
    """A joint PPO step, both roles and both servers on one GPU."""
    pair = "tiny" if step.tiny else "135M random"
    options = argparse.Namespace(
        tiny=step.tiny, steps=2 if step.tiny else 4, prompts=16, new_tokens=64, fp8="off",
        mem_fraction=0.15, limit_s=1500.0 if step.tiny else 165.0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="genac-") as kept:
        folder = Path(kept)

        def one() -> Figures:
            rows = joint_step.steps_of(pair, options, folder)
            return {"steps": [{k: short(v) for k, v in row.items() if k.startswith(KEPT)} for row in rows]}

        try:
            return step.each([("SmolLM2's shape, actor and critic on one GPU", one)])
        finally:
            for path in folder.rglob("*"):
                if path.suffix in (".log", ".jsonl", ".txt") and path.stat().st_size < LOG_BYTES:
                    name = "-".join(path.relative_to(folder).parts[-3:])
                    shutil.copy(path, step.logs / f"joint.{name}")


def accuracies(step: Step) -> bool:
    """Curves and mismatches with the embedded engine, per precision."""
    steps, batch = (2, 4) if step.tiny else (20, 48)
    shape = accuracy.TINY if step.tiny else accuracy.SHAPE
    rows: list[Figures] = []
    reference: Figures = {}

    def one(name: str, given: dict[str, Any]) -> Figures:
        found = accuracy.run_variant({"shape": shape, "steps": steps, "batch": batch, "training": given})
        if not reference:
            reference.update(found)
        rows.append(accuracy.row_of(name, found, reference))
        return rows[-1]

    well = step.each(
        [(name, partial(one, name, given)) for name, given in accuracy.precisions(step.tiny).items()]
    )
    print("\n".join(accuracy.goals(rows)))
    return well


def peaks(step: Step) -> bool:
    """Peaks of training beside the estimate of --dry-run."""
    cases = memory.cases(argparse.Namespace(tiny=step.tiny))
    if not step.tiny:
        cases = [case for case in cases if case["tokens"] == 8192 and case["name"] != "0.5B"]

    def one(case: dict[str, Any]) -> Figures:
        found = memory.run_variant(case)
        ratio = found["peak"] / found["estimate"]
        figures = {key: short(value) for key, value in found.items()} | {"peak_of_estimate": short(ratio)}
        return figures | {"rank_gib": beside(RANK_GIB, found["outside"] + found["waste"])}

    named: list[Case] = [(f"{case['name']} {case['training']}", partial(one, case)) for case in cases]
    return step.each(named)
