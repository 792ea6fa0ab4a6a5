"""A batch cut into the parts of several updates, and how many those are."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from genac_megatron.recipe.algorithms import WithScalarCritic
from genac_megatron.recipe.schema import PolicyStage, PpoStage, ValueStage
from genac_megatron.records import Sample
from genac_megatron.training.distributed_batch import NORMALISED, DistributedBatch

if TYPE_CHECKING:
    from genac_megatron.training.launched import ScoredPass
    from genac_megatron.training.role import Loss, Role, Samples, StepResult


def minibatches(
    samples: Samples, parts: int, epochs: int, seed: int, *, constant: bool = False
) -> Sequence[Samples]:
    """Each epoch's shuffled parts, none without loss; a single part is the batch as it is. The same on every
    rank.

    Weights are rescaled so that every part's sum is the batch's, but for those whose sum over a part is 0.
    constant: loss weights depend on the number of samples alone (Dr.GRPO), and so does their scale.
    """
    if parts * epochs == 1:
        return [samples]
    rng, count, sums = random.Random(seed), len(samples), _sums(samples)
    totals = {name: sum(each) for name, each in sums.items()}
    made: list[Samples] = []
    for _ in range(epochs):
        order = rng.sample(range(count), count)
        for i in range(parts):
            part = order[i::parts]
            own = {name: sum(each[k] for k in part) for name, each in sums.items()}
            if part and own.get("weights", 0.0) > 0:
                if constant:
                    own["weights"] = totals["weights"] * len(part) / count
                factors = {name: totals[name] / own[name] for name in own if own[name] > 0}
                if isinstance(samples, DistributedBatch):
                    made.append(samples.part(part, factors))
                else:
                    made.append(_rescaled([samples[k] for k in part], factors))
    return made


def launch_parts(
    role: Role, parts: Sequence[Samples], loss: Loss, planned: int, **options: Any
) -> list[ScoredPass[StepResult]]:
    """An update of `role` with each part, with `options` of `Role.launch_step`. Its schedule goes on by the
    updates that were `planned`, also where a batch was too small for as many. Collective over its block.

    The first update that is not finite is the last: its result is refused on every rank, which collect in
    this order, and updates of spoilt weights take as long as any.
    """
    launched: list[ScoredPass[StepResult]] = []
    for number, part in enumerate(parts, start=1):
        launched.append(role.launch_step(part, loss, **options))
        if number < len(parts) and launched[-1].spoilt():
            break
    if len(parts) < planned:
        role.skip(planned - len(parts))
    return launched


def updates(stage: PpoStage | PolicyStage) -> int:
    """A step's updates of the actor: no more parts than a batch has responses."""
    return stage.epochs * min(stage.minibatches, stage.rollout.prompts * stage.rollout.samples)


def critic_passes(stage: PolicyStage | ValueStage) -> tuple[int, int]:
    """(parts, epochs) of a scalar critic's training on one batch; (0, 0) where there is none."""
    if isinstance(stage, ValueStage):
        return stage.value.minibatches or stage.minibatches, stage.value.updates
    if not isinstance(stage.algorithm, WithScalarCritic):
        return 0, 0
    value = stage.algorithm.value
    return value.minibatches or stage.minibatches, stage.epochs * value.updates


def critic_updates(stage: PolicyStage | ValueStage) -> int:
    """A step's updates of a scalar critic."""
    parts, epochs = critic_passes(stage)
    return epochs * min(parts, stage.rollout.prompts * stage.rollout.samples)


def pop_tokens(role: str, stats: dict[str, float], updates: int = 1) -> dict[str, float]:
    """Of `updates` with these mean stats, the tokens trained on, and how many of them were computed.

    unique: a beginning that several samples of a micro-batch share once (training.share_prefixes). Both are
    taken out of stats.
    """
    return {
        f"tokens/{role}_train": stats.pop("tokens") * updates,
        f"unique/{role}_train": stats.pop("computed_tokens") * updates,
    }


def _sums(samples: Samples) -> dict[str, list[float]]:
    """By normalised field that is there: its sum over each sample."""
    if isinstance(samples, DistributedBatch):
        return {name: sums.tolist() for name, sums in samples.known.sums.items()}
    present = [name for name in NORMALISED if samples and name in samples[0].fields]
    return {name: [sum(sample.fields[name]) for sample in samples] for name in present}


def _rescaled(part: Sequence[Sample], factors: Mapping[str, float]) -> list[Sample]:
    return [
        replace(
            sample,
            fields=sample.fields
            | {name: [x * factor for x in sample.fields[name]] for name, factor in factors.items()},
        )
        for sample in part
    ]
