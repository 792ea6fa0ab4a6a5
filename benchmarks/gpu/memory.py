"""Peak memory of training beside what `--dry-run` estimates (recipe/estimate.py), role by role.

A role of one rank does three steps in a process of its own; the peak of torch's allocator above what was
there before, beside weights + gradients + optimizer + activations of the estimate. CUDA's context and the
libraries' workspaces are in neither: recipe/memory.py has RANK_GIB for them (assumed) and for `waste`, what
the allocator holds beyond its peak; `outside_GiB` is what this GPU shows in use beyond the allocator. On a
CPU, resident memory stands in for it.
Goal: the estimate is within a quarter of the peak. Run: python -m benchmarks.gpu.memory
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from benchmarks.bare import make_samples, ours, role_config
from benchmarks.gpu.common import child, need_gpu, parser, report, verdict
from benchmarks.gpu.training import SHAPES, TINY
from genac_megatron.models.registry import shape_of
from genac_megatron.publication.memory import PeakMemory
from genac_megatron.recipe.estimate import Place, memory_of
from genac_megatron.training.layout import close_world, init_world

GIB = 2**30
GOAL = 0.25  # |peak / estimate - 1|
STEPS = 3


def run_variant(given: dict[str, Any]) -> dict[str, Any]:
    """Train one role; its peak and its estimate, in GiB."""
    torch.set_num_threads(1)
    init_world()
    shape = given["shape"]
    config = role_config(shape, given["tokens"], **given["training"])
    samples = make_samples(given["tokens"], 2, shape["vocab"])
    with PeakMemory() as memory:
        step = ours(config, samples)
        for _ in range(STEPS):
            step()
    close_world()
    parts = memory_of(config, shape_of(config.model, shape["vocab"]), Place(0, 0, 0, 0), 1)
    cuda = torch.cuda.is_available()
    outside = waste = 0.0
    if cuda:
        waste = (torch.cuda.max_memory_reserved() - torch.cuda.max_memory_allocated()) / GIB
        free, total = torch.cuda.mem_get_info()
        outside = (total - free - torch.cuda.memory_reserved()) / GIB
    return {
        "peak": (memory.device if cuda else memory.host) / GIB,
        "estimate": (parts.total - parts.engine) / GIB,
        "activations": parts.activations / GIB,
        "outside": outside,
        "waste": waste,
    }


def cases(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Shapes, precisions and recomputation to try."""
    if options.tiny:
        return [
            {"name": "tiny", "shape": TINY, "tokens": 64, "training": {"dtype": "fp32", "specs": "torch"}}
        ]
    made = []
    for name, shape in SHAPES.items():
        for tokens in (4096, 8192):
            for training in ({}, {"recompute": "full"}, {"fp8": "blockwise"}):
                made.append({"name": name, "shape": shape, "tokens": tokens, "training": training})
    return made


def main(arguments: list[str] | None = None) -> None:
    grammar = parser(__doc__)
    grammar.add_argument("--variant", help=argparse.SUPPRESS)
    options = grammar.parse_args(arguments)
    if options.variant:
        print(json.dumps(run_variant(json.loads(options.variant))))
        return
    need_gpu(options.tiny)
    rows = []
    for case in cases(options):
        found = child("benchmarks.gpu.memory", case)
        rows.append(
            {
                "shape": case["name"],
                "tokens": case["tokens"],
                "training": " ".join(f"{k}={v}" for k, v in case["training"].items()) or "bf16",
                "peak_GiB": round(found["peak"], 3),
                "estimate_GiB": round(found["estimate"], 3),
                "peak/estimate": round(found["peak"] / found["estimate"], 2),
                "of it activations": round(found["activations"], 3),
                "outside_GiB": round(found["outside"], 2),
            }
        )
    worst = max(abs(row["peak/estimate"] - 1) for row in rows)
    report("memory", options, rows, [verdict("furthest from the estimate", worst, GOAL, at_least=False)])


if __name__ == "__main__":
    main()
