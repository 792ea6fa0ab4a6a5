"""Parity: how far the trainer's log-probs of sampled tokens are from those that the engine sampled with.

A training batch is measured as it is trained on, before its update. Weights that are published last in a
stage meet no such batch; evaluations measure them on what they have sampled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from genac_megatron.records import Completion, Judgement, Rollout, Sample, sample_of, samples_of
from genac_megatron.stages.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from genac_megatron.stages.runtime import Run

MEASURED = 32  # sequences per measurement


def parity_figures(
    role: str,
    samples: Sequence[Sample],
    logprobs: Sequence[Sequence[float]],
    group: str = "parity",
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """mean, p99 and max of |delta|, and the k3 estimate of KL(engine || trainer) per token, of those that all
    `ranks` have.

    Nothing where there is no token.
    """
    engine = np.array([x for sample in samples for x in sample.fields["behaviour"]], np.float64)
    trainer = np.array([x for values in logprobs for x in values], np.float64)
    delta = trainer - engine
    size = np.abs(delta)
    count, distance, k3 = ranks.totals(len(size), size.sum(), (np.expm1(delta) - delta).sum())
    if not count:
        return {}
    p99, most = ranks.quantiles(size, (0.99, 1.0))
    return {
        f"{group}/{role}_mean": distance / count,
        f"{group}/{role}_p99": p99,
        f"{group}/{role}_max": most,
        f"{group}/{role}_k3": k3 / count,
    }


def measure_rollouts(run: Run, mine: Iterable[Rollout]) -> dict[str, float]:
    """The actor's parity on the first of every rank's rollouts by its current version. Collective."""
    rollouts = islice(mine, run.even_share(MEASURED))
    chosen = [one for r in rollouts for one in samples_of(r, {"behaviour": r.completion.logprobs})]
    return _measure(run, "actor", chosen, run.recipe.evaluation.temperature)


def measure_judgements(run: Run, mine: Iterable[Judgement]) -> dict[str, float]:
    """The critic's parity on the first of every rank's judgements by its current version. Collective."""
    unique = {id(judgement): judgement for judgement in mine}.values()  # a group shares its prompt state's
    chosen = [engine_sample(j.prompt_ids, j.completion) for j in islice(unique, run.even_share(MEASURED))]
    return _measure(run, "critic", chosen, run.recipe.judging.temperature)


def engine_sample(prompt: Sequence[int], completion: Completion) -> Sample:
    """A completion as the trainer scores it, beside the log-probs that it was sampled with."""
    return sample_of(prompt, completion, {"behaviour": completion.logprobs})


def _measure(run: Run, role: str, mine: Sequence[Sample], temperature: float) -> dict[str, float]:
    samples = [sample for sample in run.gather(mine) if sample.trained]
    if not samples:
        return {}
    return parity_figures(role, samples, run.roles[role].logprobs(samples, temperature=temperature))
