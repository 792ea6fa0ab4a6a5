"""What a run has spent: tokens, and FLOPs by 2 per weight and token forward, 6 in training.

Weights are those that multiply tokens: all but an untied input embedding. Attention's own products are left
out (they grow with length: small here), and so are evaluations.

Weights that are frozen, attention's or a whole base's, need no gradients of their own: 4 for them in
training, as activations have theirs all the same. Adapters' parameters count as weights in the trainer's
passes; engines have them merged, and a KL term's base goes without.

Of the trainer's passes those tokens count that were computed: a beginning that samples of a micro-batch share
counts once (`training.share_prefixes`); in rows of earlier versions every token was.

Prompt tokens are counted in two ways. `flops` has those that were asked for, which an engine without a
prefix cache reads, as the embedded one: an upper bound for a critic whose states nest. `flops_shared` has
each prefix once that several prompts of a step begin with, as SGLang's servers read them (where they served:
what they computed).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from genac_megatron.models.families.base import Shape
from genac_megatron.models.sizes import adapter_parameters, attention_parameters, parameters
from genac_megatron.recipe.schema import TrainingConfig

TRAINING = 6
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
    "tokens/actor_train": ("actor", TRAINING),
    "tokens/critic_train": ("critic", TRAINING),
}
# Of the trainer's passes, where a row says what was computed.
PASSES = {
    f"tokens/{phase}": f"unique/{phase}"
    for phase in ("value", "reference", "actor_old", "moved", "actor_train", "critic_train")
}
SHARED = {"tokens/rollout_prompt": "unique/rollout_prompt", "tokens/judge_prompt": "unique/judge_prompt"}
BESIDE = {*PASSES} - {"tokens/reference"}  # with adapters beside weights
APART = ("time/evaluate_s", "time/checkpoint_s")  # what is not the method's


class Weights(NamedTuple):
    """What of a role's weights costs otherwise than a whole model's that is trained."""

    frozen: int = 0  # without gradients
    beside: int = 0  # adapters', besides the model's


def weights_of(training: TrainingConfig, shape: Shape) -> Weights:
    """Of a role, by how it is trained."""
    if training.adapter is not None:
        return Weights(multiplied(shape), adapter_parameters(shape, training.adapter, 1, shape.layers))
    return Weights(attention_parameters(shape, 1, shape.layers) if training.frozen_attention else 0)


def multiplied(shape: Shape) -> int:
    """Weights that multiply every token."""
    return parameters(shape) - (0 if shape.tie else shape.vocab * shape.hidden)


def spent(
    row: Mapping[str, Any], shapes: Mapping[str, Shape], weights: Mapping[str, Weights] | None = None
) -> dict[str, float]:
    """Tokens, flops, flops_shared and seconds of a row of metrics; no flops_shared where it does not say.

    weights: of roles that are not trained whole.
    """
    found = {key: float(row.get(PASSES.get(key, key), row.get(key)) or 0.0) for key in COUNTS}
    seconds = float(row.get("time/total_s") or 0.0) - sum(float(row.get(key) or 0.0) for key in APART)
    sums = {
        "tokens": sum(found.values()),
        "flops": _flops(found, shapes, weights or {}),
        "seconds": max(seconds, 0.0),
    }
    if all(SHARED[key] in row for key in SHARED if found[key]):
        once = {key: float(row[unique]) for key, unique in SHARED.items() if found[key]}
        sums["flops_shared"] = _flops(found | once, shapes, weights or {})
    return sums


def _flops(counts: Mapping[str, float], shapes: Mapping[str, Shape], weights: Mapping[str, Weights]) -> float:
    found = 0.0
    for key, count in counts.items():
        if count:
            role, each = COUNTS[key]
            role = role if role in shapes else "actor"  # whose adapter's base is its reference
            apart = weights.get(role, Weights())
            found += count * each * multiplied(shapes[role])
            if each == TRAINING:
                found -= count * 2 * apart.frozen
            if key in BESIDE:
                found += count * each * apart.beside
    return found


def total(
    rows: Iterable[Mapping[str, Any]],
    shapes: Mapping[str, Shape],
    weights: Mapping[str, Weights] | None = None,
) -> dict[str, float]:
    """The same over rows; no flops_shared where one of them has none."""
    each = [spent(row, shapes, weights) for row in rows]
    names = ["tokens", "flops", "seconds"]
    if all("flops_shared" in one for one in each):
        names.append("flops_shared")
    return {name: sum((one[name] for one in each), 0.0) for name in names}
