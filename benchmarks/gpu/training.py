"""Training: tokens/s, TFLOP/s and MFU, ours beside a bare Megatron-core loop of the same shapes.

Each loop runs in a process of its own (a GPU does not hold two), in rounds that take turns; the median step
of all rounds counts. TFLOP/s are those of the model (benchmarks/bare.py: model_flops): 6 per weight of a
matrix and token, output layer included, and causal attention's 6 x layers x heads x head_dim x s^2 each;
nothing that is computed twice. MFU is against the dense BF16 peak, under FP8 against the FP8 peak.
Shapes: Qwen2.5-0.5B, Qwen2.5-1.5B, and 8 layers of Qwen3-8B's with tied embeddings (18 bytes a parameter, so
the whole does not fit one GPU). Micro-batches of 4,096 and 8,192 packed tokens of 1/16 to 1/4 of that each.
Goals: at most 1.03 times a bare loop; BF16 MFU at least 50 %; FP8 at least 1.4 times BF16 on the 8B shape.
Run: python -m benchmarks.gpu.training
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch

from benchmarks.bare import MODES, make_samples, make_step, model_flops, role_config
from benchmarks.gpu.common import child, need_gpu, parser, peak_tflops, report, seconds, verdict
from genac_megatron.models.registry import shape_of
from genac_megatron.platform.fp8 import refusal_here
from genac_megatron.training.layout import close_world, init_world

QWEN: dict[str, Any] = {"vocab": 151_936, "tie_embeddings": True, "rope_theta": 1e6, "max_positions": 32_768}
SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": QWEN | {"layers": 24, "hidden": 896, "ffn": 4864, "heads": 14, "kv_heads": 2},
    "1.5B": QWEN | {"layers": 28, "hidden": 1536, "ffn": 8960, "heads": 12, "kv_heads": 2},
    "8B, 8 layers": QWEN
    | {"family": "qwen3", "layers": 8, "hidden": 4096, "ffn": 12_288, "heads": 32, "kv_heads": 8,
       "head_dim": 128},
}  # fmt: skip
TINY: dict[str, Any] = {
    "layers": 2, "hidden": 64, "ffn": 128, "heads": 4, "kv_heads": 2, "vocab": 128, "tie_embeddings": True,
}  # fmt: skip
BARE_GOAL, MFU_GOAL, FP8_GOAL = 1.03, 50.0, 1.4


def run_variant(given: dict[str, Any]) -> dict[str, Any]:
    """One loop in this process: seconds of its steps, its first loss, its peak memory."""
    torch.set_num_threads(1)
    init_world()
    shape = given["shape"]
    specs = "torch" if given["tiny"] else "te"
    config = role_config(
        shape, given["tokens"], dtype=given["dtype"], fp8=given["fp8"], specs=specs, **given["training"]
    )
    samples = make_samples(given["tokens"], given["microbatches"], shape["vocab"])
    step = make_step(given["mode"], config, samples)
    first = step()
    for _ in range(given["warm"]):
        step()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times = [seconds(step) for _ in range(given["steps"])]
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    close_world()
    flops = model_flops(shape_of(config.model, shape["vocab"]), samples)
    tokens = sum(len(sample.tokens) - 1 for sample in samples)
    return {"seconds": times, "loss": first, "flops": flops, "tokens": tokens, "peak_gib": peak}


def measure(
    name: str, shape: dict[str, Any], tokens: int, fp8: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row per loop, of one shape, length and precision."""
    given = {
        "shape": shape,
        "tokens": tokens,
        "fp8": fp8,
        "tiny": options.tiny,
        "dtype": "fp32" if options.tiny else "bf16",
        "microbatches": options.microbatches,
        "steps": options.steps,
        "warm": 0 if options.tiny else 3,
        "training": {"recompute": options.recompute},
    }
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for turn in range(options.rounds):
        for mode in MODES if turn % 2 else reversed(MODES):
            found[mode].append(child("benchmarks.gpu.training", given | {"mode": mode}))
    step_s = {m: statistics.median(s for run in runs for s in run["seconds"]) for m, runs in found.items()}
    peak = peak_tflops(fp8 != "off")
    rows = []
    for mode in MODES:
        run = found[mode][0]
        tflops = run["flops"] / step_s[mode] / 1e12
        rows.append(
            {
                "shape": name,
                "tokens": tokens,
                "precision": "fp32" if options.tiny else ("bf16" if fp8 == "off" else f"fp8 {fp8}"),
                "loop": mode,
                "step_s": round(step_s[mode], 4),
                "tokens/s": round(run["tokens"] / step_s[mode]),
                "TFLOP/s": round(tflops, 1),
                "MFU_%": round(100 * tflops / peak, 1) if peak else None,
                "times bare": round(step_s[mode] / step_s["bare"], 3),
                "peak_GiB": round(run["peak_gib"], 2),
                "loss": round(run["loss"], 4),
            }
        )
    return rows


def goals(rows: list[dict[str, Any]]) -> list[str]:
    """The goals' verdicts, over all shapes."""
    mine = [row for row in rows if row["loop"] == "ours"]
    lines = [
        verdict(f"{r['shape']}, {r['tokens']} tokens, {r['precision']}: times a bare loop", r["times bare"],
                BARE_GOAL, at_least=False)
        for r in mine
    ]  # fmt: skip
    plain = [row for row in mine if row["precision"] == "bf16"]
    lines += [
        verdict(f"{r['shape']}, {r['tokens']} tokens: BF16 MFU, %", r["MFU_%"], MFU_GOAL, at_least=True)
        for r in plain
    ]
    for base in plain:
        for row in mine:
            same = (row["shape"], row["tokens"]) == (base["shape"], base["tokens"])
            if same and row["precision"].startswith("fp8") and base["shape"].startswith("8B"):
                gain = row["tokens/s"] / base["tokens/s"]
                what = f"{row['shape']}, {row['tokens']} tokens: {row['precision']} over BF16"
                lines.append(verdict(what, gain, FP8_GOAL, at_least=True))
    return lines


def main(arguments: list[str] | None = None) -> None:
    grammar = parser(__doc__)
    grammar.add_argument("--variant", help=argparse.SUPPRESS)
    grammar.add_argument("--shape", choices=list(SHAPES), help="default: all")
    grammar.add_argument("--fp8", nargs="*", default=["tensorwise", "blockwise"], help="recipes beside BF16")
    grammar.add_argument("--tokens", type=int, nargs="*", default=[4096, 8192], help="of a micro-batch")
    grammar.add_argument("--microbatches", type=int, default=8, help="of a step")
    grammar.add_argument("--steps", type=int, default=10, help="timed in each round")
    grammar.add_argument("--rounds", type=int, default=2, help="of each loop, taking turns")
    grammar.add_argument("--recompute", default="off", choices=["off", "selective", "full"])
    options = grammar.parse_args(arguments)
    if options.variant:
        print(json.dumps(run_variant(json.loads(options.variant))))
        return
    need_gpu(options.tiny)
    shapes = SHAPES if options.shape is None else {options.shape: SHAPES[options.shape]}
    if options.tiny:
        shapes, options.tokens, options.fp8 = {"tiny": TINY}, [64], []
        options.microbatches, options.steps, options.rounds = 2, 1, 1
    rows: list[dict[str, Any]] = []
    for name, shape in shapes.items():
        for tokens in options.tokens:
            for fp8 in ["off", *options.fp8]:
                if fp8 != "off" and (reason := refusal_here(fp8)):
                    print(f"left out: {reason}", flush=True)
                    continue
                rows += measure(name, shape, tokens, fp8, options)
                report("training", options, rows, [])  # after each, as the whole takes long
    report("training", options, rows, goals(rows))


if __name__ == "__main__":
    main()
