"""What a run has spent: tokens, and FLOPs by 2 per weight and token forward, 6 in training.

Weights are those that multiply tokens: all but an untied input embedding. Attention's own products are left
out (they grow with length: small here), and so are evaluations. Prompt tokens are those asked for, whether a
prefix cache had them or not: an upper bound for a critic whose states nest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from genac_megatron.models.families.base import Shape
from genac_megatron.models.sizes import parameters

# What a row counts: the role whose weights the tokens go through, and FLOPs per weight and token.
COUNTS = {
    "tokens/rollout": ("actor", 2),
    "tokens/rollout_prompt": ("actor", 2),
    "tokens/judge": ("critic", 2),
    "tokens/judge_prompt": ("critic", 2),
    "tokens/value": ("critic", 2),
    "tokens/reference": ("reference", 2),
    "tokens/actor_old": ("actor", 2),  # log-probs before the first of several updates
    "tokens/moved": ("actor", 2),  # log-probs after its update, for the critic's importance weights
    "tokens/actor_train": ("actor", 6),
    "tokens/critic_train": ("critic", 6),
}
APART = ("time/evaluate_s", "time/checkpoint_s")  # what is not the method's


def multiplied(shape: Shape) -> int:
    """Weights that multiply every token."""
    return parameters(shape) - (0 if shape.tie else shape.vocab * shape.hidden)


def spent(row: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, float]:
    """Tokens, flops and seconds of a row of metrics."""
    found = {key: float(row.get(key) or 0.0) for key in COUNTS}
    seconds = float(row.get("time/total_s") or 0.0) - sum(float(row.get(key) or 0.0) for key in APART)
    flops = sum(
        count * COUNTS[key][1] * multiplied(shapes[COUNTS[key][0]]) for key, count in found.items() if count
    )
    return {"tokens": sum(found.values()), "flops": flops, "seconds": max(seconds, 0.0)}


def total(rows: Iterable[Mapping[str, Any]], shapes: Mapping[str, Shape]) -> dict[str, float]:
    """The same over rows."""
    sums = {"tokens": 0.0, "flops": 0.0, "seconds": 0.0}
    for row in rows:
        for key, value in spent(row, shapes).items():
            sums[key] += value
    return sums
