"""How accurate a critic's values are on judged groups, in the figures that a joint stage goes by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from genac_megatron import metrics
from genac_megatron.algorithms.advantages import others_mean
from genac_megatron.records import Judgement, Rollout
from genac_megatron.stages.ranks import ALONE, Ranks
from genac_megatron.stages.rollouts import Group

BLEND = ("value_error", "group_error", "group_distance")  # what a blend's weight is made of
# Figures of an evaluation that lambda and baselines may go by, beside explained variance.
MEASURED = ("explained_variance_prompt", "explained_variance_response", "mse", *BLEND)


def pairs_of(groups: Sequence[Group]) -> list[tuple[Judgement, Rollout]]:
    """Every state with the response that it is of; none of responses that were left out as certain."""
    return [
        (judgement, rollout)
        for group in groups
        for rollout, judgements in zip(group.rollouts, group.judgements, strict=True)
        for judgement in judgements
        if judgement.certain is None
    ]


def within_prompts(groups: Sequence[Group]) -> float:
    """Explained variance of outcomes about their prompt's mean: a critic that knows hard prompts alone has 0.

    The prompt state, which a group shares, says nothing within it. NaN where no prompt's outcomes vary.
    """
    pairs = [(j, r) for j, r in pairs_of(groups) if j.state.index > 0]
    return metrics.explained_within(
        [j.used for j, _ in pairs], [r.target for _, r in pairs], [r.prompt.id for _, r in pairs]
    )


def within_responses(groups: Sequence[Group], known: Mapping[tuple[str, int], Sequence[float]]) -> float:
    """Explained variance of Monte-Carlo values about their response's mean, their noise taken off: what
    credit inside a response rests on. NaN where no response has two such values that differ.

    known: by (response, state), outcomes of continuations; a response's outcome is one and the same for all
    of its states, so these alone vary within it.
    """
    states = {(r.key, j.state.index): j for j, r in pairs_of(groups)}
    keys = sorted(states.keys() & known.keys())
    draws = [known[key] for key in keys]
    return metrics.explained_within(
        [states[key].used for key in keys],
        metrics.monte_carlo_means(draws),
        [response for response, _ in keys],
        metrics.monte_carlo_noise(draws),
    )


def blend_errors(groups: Sequence[Group], rewards: Sequence[float], ranks: Ranks = ALONE) -> dict[str, float]:
    """The mean squares that a blend's weight is made of, over all (state, response) pairs (`blend_weight`).

    rewards: the actor's, of each response, in order. {} where a prompt has a single response. Collective over
    `ranks`, of whose groups the errors are.
    """
    if ranks.any(any(len(group.rollouts) < 2 for group in groups)):
        return {}
    sums, count = dict.fromkeys(BLEND, 0.0), 0
    split = torch.tensor(rewards, dtype=torch.float64).split([len(group.rollouts) for group in groups])
    for group, earned in zip(groups, split, strict=True):
        others = others_mean(earned).tolist()
        for reward, other, judgements in zip(earned.tolist(), others, group.judgements, strict=True):
            for judgement in (j for j in judgements if j.certain is None):
                sums["value_error"] += (reward - judgement.used) ** 2
                sums["group_error"] += (reward - other) ** 2
                sums["group_distance"] += (judgement.used - other) ** 2
                count += 1
    *totals, whole = ranks.totals(*sums.values(), count)
    return {key: value / whole for key, value in zip(sums, totals, strict=True)} if whole else {}
