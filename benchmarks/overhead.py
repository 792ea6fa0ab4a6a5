"""Our training step against a bare Megatron-core loop (benchmarks/bare.py) on a CPU. Goal: <= 1.03 times.

Same shapes, sequences, layer specs and optimizer; the steps of the loops take turns in one process, and the
median of each counts, in wall seconds and in processor seconds (which other programs disturb less). Losses of
the first step must agree. "bare, our log-probs" tells what is the log-probs' own (they never hold all logits,
and compute the output layer a second time) from what the step around them costs.
Run: python -m benchmarks.overhead
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import torch

from benchmarks.bare import MODES, Step, make_samples, make_step, role_config
from benchmarks.machine import save, table
from genac_megatron.training.layout import close_world, init_world

GOAL = 1.03
AGREE = 1e-4  # of a loss of about log(vocabulary): fp32 sums in another order

SHAPES: dict[str, dict[str, Any]] = {
    # Deep enough that layers, not the output layer, rule: 7 % of the weights are the output layer's here,
    # 5 to 15 % in models of 4 to 30 billion parameters.
    "8 layers": {"layers": 8, "hidden": 256, "ffn": 768, "heads": 8, "kv_heads": 4, "vocab": 2048},
    "small vocabulary": {"layers": 4, "hidden": 256, "ffn": 768, "heads": 8, "kv_heads": 4, "vocab": 256},
    "large vocabulary": {"layers": 4, "hidden": 256, "ffn": 768, "heads": 8, "kv_heads": 4, "vocab": 16_384},
}


def timed(step: Step) -> tuple[float, float]:
    """Seconds by the clock and of this process's processor time."""
    began, used = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - began, time.process_time() - used


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per loop."""
    shape = SHAPES[name] | ({"layers": 1} if options.tiny else {})
    config = role_config(shape, options.tokens, dtype="fp32", specs="torch")
    samples = make_samples(options.tokens, options.microbatches, shape["vocab"])
    steps = {mode: make_step(mode, config, samples) for mode in MODES}
    losses = {mode: step() for mode, step in steps.items()}  # also warms up
    spread = max(losses.values()) - min(losses.values())
    if spread > AGREE:
        raise SystemExit(f"the loops do not train alike: {losses}")
    seconds: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    for turn in range(options.steps):
        for mode in MODES if turn % 2 else reversed(MODES):
            seconds[mode].append(timed(steps[mode]))
    wall = {mode: statistics.median(x for x, _ in found) for mode, found in seconds.items()}
    used = {mode: statistics.median(x for _, x in found) for mode, found in seconds.items()}
    return [
        {
            "shape": name,
            "loop": mode,
            "step_s": round(wall[mode], 4),
            "times bare": round(wall[mode] / wall["bare"], 3),
            "cpu_s": round(used[mode], 4),
            "cpu times bare": round(used[mode] / used["bare"], 3),
            "loss": round(losses[mode], 5),
        }
        for mode in MODES
    ]


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024, help="of a micro-batch")
    parser.add_argument("--microbatches", type=int, default=4, help="of a step")
    parser.add_argument("--steps", type=int, default=15, help="of each loop, taking turns")
    parser.add_argument("--shape", choices=list(SHAPES), help="default: all")
    parser.add_argument("--tiny", action="store_true", help="a try, not saved")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.tokens, options.microbatches, options.steps = 64, 2, 1
    torch.set_num_threads(1)
    init_world()
    rows: list[dict[str, Any]] = []
    for name in [options.shape] if options.shape else SHAPES:
        rows += measure(name, options)
    close_world()
    print(table(rows))
    for row in rows:
        if row["loop"] == "ours":
            met = "met" if row["cpu times bare"] <= GOAL else "missed"
            print(f"{row['shape']}: {row['cpu times bare']} times a bare loop (goal {GOAL}: {met})")
    if not options.tiny:
        settings = vars(options) | {"shapes": SHAPES, "goal": GOAL, "load": round(os.getloadavg()[0], 1)}
        suffix = f"-{options.shape.replace(' ', '-')}" if options.shape else ""
        print("written", save(f"overhead{suffix}", settings, rows).name)
    return rows


if __name__ == "__main__":
    main()
