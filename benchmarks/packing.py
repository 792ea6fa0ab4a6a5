"""Padding waste and balance of plan_packs over realistic lengths, dp 1 to 8. Goal: at most 2 % waste.

waste: packs padded to the multiple that the layout asks for. one_shape: all packs of a step padded to
the step's longest, as pipelines want; one_shape_least: what no plan could go below, as whole
micro-batches must hold the tokens and the longest sample sets the shape. rows: unpacked, a sample per
row, rows padded to their micro-batch's longest. Run: python -m benchmarks.packing
"""

from __future__ import annotations

import argparse
import math
import random
import time
from typing import Any

from benchmarks.machine import save, table
from genac_megatron.training.packing import pack_length, packing_stats
from genac_megatron.training.plans import Rows, plan_packs

GOAL = 2.0  # percent of the positions computed that are padding; of imbalance between ranks too

# Log-normal lengths in tokens: (median, sigma of the logarithm, longest).
DISTRIBUTIONS = {
    "actor": (700, 0.6, 4096),  # prompt and a chain of thought
    "critic": (1100, 0.4, 4096),  # problem, partial response, judgement
    "long tail": (600, 1.1, 8192),
}


def draw(median: float, sigma: float, longest: int, count: int, rng: random.Random) -> list[int]:
    return [min(longest, max(2, round(median * rng.lognormvariate(0, sigma)))) for _ in range(count)]


def rowwise_waste(lengths: list[int], tokens_per_microbatch: int) -> float:
    """Padding share of unpacked micro-batches in order of arrival, rows padded to the longest."""
    slots, rows, longest = 0, 0, 0
    for n in lengths:
        if rows and (rows + 1) * max(longest, n) > tokens_per_microbatch:
            slots, rows, longest = slots + rows * longest, 0, 0
        rows, longest = rows + 1, max(longest, n)
    return 1 - sum(lengths) / (slots + rows * longest)


def least_waste(lengths: list[int], dp: int, tokens_per_microbatch: int) -> float:
    """A bound below the waste of any plan whose packs all have one shape."""
    total = sum(lengths)
    packs = dp * math.ceil(total / (dp * tokens_per_microbatch))
    return 1 - total / (packs * max(max(lengths), total / packs))


def measure(name: str, dp: int, options: argparse.Namespace) -> dict[str, Any]:
    """The worst of several drawn steps, in percent."""
    limits = {"tokens_per_microbatch": options.tokens_per_microbatch, "multiple": options.multiple}
    worst: dict[str, float] = {}
    for seed in range(options.steps):
        lengths = draw(*DISTRIBUTIONS[name], count=options.samples, rng=random.Random(seed))
        began = time.perf_counter()
        plan = plan_packs(lengths, rows=Rows.whole(dp), **limits).rows
        spent = time.perf_counter() - began
        used = [sum(lengths[i] for i in pack) for row in plan for pack in row]
        longest = pack_length(max(used), multiple=options.multiple)
        ragged = packing_stats(lengths, plan, multiple=options.multiple)
        square = packing_stats(lengths, plan, multiple=options.multiple, pad_to=longest)
        figures = {
            "waste_%": 100 * ragged.waste,
            "one_shape_%": 100 * square.waste,
            "one_shape_least_%": 100 * least_waste(lengths, dp, options.tokens_per_microbatch),
            "rank_imbalance_%": 100 * ragged.rank_imbalance,
            "pack_imbalance_%": 100 * ragged.microbatch_imbalance,
            "rows_%": 100 * rowwise_waste(lengths, options.tokens_per_microbatch),
            "plan_ms": 1000 * spent,
            "microbatches": ragged.microbatches,
        }
        worst = {key: max(value, worst.get(key, 0.0)) for key, value in figures.items()}
    return {"lengths": name, "dp": dp} | {key: round(value, 2) for key, value in worst.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1024, help="sequences per step")
    parser.add_argument("--tokens-per-microbatch", type=int, default=8192)
    parser.add_argument("--multiple", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help="draws; the worst is shown")
    options = parser.parse_args()
    rows = [measure(name, dp, options) for name in DISTRIBUTIONS for dp in range(1, 9)]
    print(table(rows))
    worst = {f: max(row[f] for row in rows) for f in ("waste_%", "one_shape_%", "rank_imbalance_%")}
    for figure, value in worst.items():
        print(f"worst {figure}: {value} (goal <= {GOAL}: {'met' if value <= GOAL else 'missed'})")
    settings = vars(options) | {"lognormal_median_sigma_longest": DISTRIBUTIONS}
    print("written", save("packing", settings, rows).name)


if __name__ == "__main__":
    main()
