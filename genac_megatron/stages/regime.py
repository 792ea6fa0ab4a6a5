"""How far a joint step trusts its critic: lambda per response, and baselines between value and group.

What they go by was measured before the batch, on other responses: baselines that knew this batch's outcomes
would be biased. It is in the run's state (`Progression.measured`, `.regime`), so a resumed run goes on alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genac_megatron import metrics
from genac_megatron.algorithms.advantages import (
    RIGHT,
    advantage_gap,
    blend_weight,
    gated_lam,
    least_noise_share,
    others_mean,
    scheduled_lam,
    segment_gae,
    to_tokens,
    variance_within,
)
from genac_megatron.algorithms.filters import keep_whole
from genac_megatron.recipe.algorithms import (
    LOWER_IS_BETTER,
    OF_MONTE_CARLO,
    AdvantageConfig,
    LamGate,
    Readiness,
)
from genac_megatron.recipe.schema import PpoStage
from genac_megatron.records import Sample
from genac_megatron.stages.accuracy import BLEND, blend_errors, pairs_of
from genac_megatron.stages.batch import Batch, actor_rewards, actor_samples, segment_lengths
from genac_megatron.stages.progression import Progression
from genac_megatron.stages.ranks import Ranks
from genac_megatron.stages.runtime import mean


def stage_rewards(stage: PpoStage, batch: Batch) -> Tensor:
    """The actor's rewards in a joint stage, [B]."""
    cache = stage.overlong.cache if stage.overlong is not None else None
    return actor_rewards(batch, stage.rollout.max_new_tokens, cache)


def trusted_samples(
    at: Progression, stage: PpoStage, batch: Batch, step: int
) -> tuple[list[Sample], dict[str, float]]:
    """What the actor is trained on, by lambda, baselines and filter of the recipe; and their figures.

    [] where every response was cut off and these are filtered.
    """
    config, limit = stage.advantage, stage.rollout.max_new_tokens
    cache = stage.overlong.cache if stage.overlong is not None else None
    lams, ranks = lambdas(at, config, batch, step), batch.ranks
    values, figures = baselines(at, config, batch, stage_rewards(stage, batch))
    figures |= {"actor/lam": _shown_lam(lams, ranks), **_normalised(config)}
    if config.readiness is not None:
        ready = [is_ready(at.regime, config.readiness, g.prompt.id) for g in batch.groups]
        figures |= ranks.means({"actor/ready": ready})
    kept = [True] * len(lams)
    if stage.overlong_filter:
        kept = keep_whole([rollout.truncated for rollout in batch.rollouts])
        figures["actor/filtered"] = 1.0 - ranks.means({"": kept})[""]
        if not ranks.any(any(kept)):
            return [], figures
    taught = batch.only(kept)
    lams, values = _kept(lams, kept), _kept(values, kept)
    samples = actor_samples(taught, config, lams, stage.actor_loss, limit, cache, values)
    advantages = [
        torch.tensor(rollout.advantages) for rollout in taught.rollouts
    ]  # not of each turn's sample
    found = {
        "advantage/gap": advantage_gap(advantages, taught.outcomes, ranks.totals),
        "advantage/within_response": variance_within(advantages, ranks.totals),
        "advantage/least_noise_share": _least_noise_share(
            taught, config, lams, actor_rewards(taught, limit, cache), values
        ),
    }
    return samples, figures | {key: value for key, value in found.items() if value == value}


def _least_noise_share(
    batch: Batch, config: AdvantageConfig, lams: Sequence[float], rewards: Tensor, values: Sequence[Tensor]
) -> float:
    """Of the values, over the batch's tokens. rewards: [B]; values: per response its segments' baselines.

    Collective.
    """
    returns = segment_gae(values, rewards, config.gamma, lams, 0.0)
    parts: list[Tensor] = [torch.zeros(3, 0, dtype=torch.float64)]
    for rollout, judgements, *both in zip(batch.rollouts, batch.judgements, returns, values, strict=True):
        lengths = segment_lengths(judgements, rollout.completion)
        logprobs = torch.tensor(rollout.completion.logprobs)
        parts.append(torch.stack([*(to_tokens(one, lengths).double() for one in both), logprobs.double()]))
    returns_T, values_T, logprobs_T = torch.cat(parts, 1)
    return least_noise_share(returns_T, values_T, logprobs_T, batch.ranks.totals)


def _shown_lam(lams: Sequence[float], ranks: Ranks) -> float:
    least, most = ranks.least(min(lams, default=math.inf)), -ranks.least(-max(lams, default=-math.inf))
    # A mean of equal figures has its own rounding.
    return least if least == most else ranks.means({"": lams})[""]


def _kept(items: Sequence[Any], kept: Sequence[bool]) -> list[Any]:
    return [item for item, keep in zip(items, kept, strict=True) if keep]


def _normalised(config: AdvantageConfig) -> dict[str, float]:
    how = config.normalise
    return {
        "advantage/whitened": float(how == "whiten"),
        "advantage/centred": float(how in ("whiten", "centre")),
        "advantage/value_share": config.value_share,
    }


def goes_by_monte_carlo(config: AdvantageConfig) -> bool:
    """Whether lambda goes by a figure of Monte-Carlo values, which every evaluation then makes."""
    return config.gate is not None and config.gate.figure in OF_MONTE_CARLO


# --- lambda --------------------------------------------------------------------------------------


def lambdas(at: Progression, config: AdvantageConfig, batch: Batch, step: int) -> list[float]:
    """The lambda of each of the batch's responses, at a step of the stage counted from 1. [B]"""
    if config.readiness is not None:
        return [
            config.readiness.lam if is_ready(at.regime, config.readiness, rollout.prompt.id) else 1.0
            for rollout in batch.rollouts
        ]
    lam = config.lam if config.lam_schedule is None else scheduled_lam(config.lam_schedule, step)
    if config.gate is not None:
        lower = config.gate.figure in LOWER_IS_BETTER
        lam = gated_lam(lam, config.gate.threshold, _figure(at, config.gate), lower=lower)
    return [lam] * len(batch.rollouts)


def _figure(at: Progression, gate: LamGate) -> float | None:
    """The gate's figure as it was measured last; None where it was not."""
    if gate.of == "batch":
        figure: float | None = at.regime.get("batch", {}).get(gate.figure)
        return figure
    return at.explained_variance if gate.figure == "explained_variance" else at.measured.get(gate.figure)


def is_ready(regime: dict[str, Any], config: Readiness, problem: str) -> bool:
    """Whether the critic may be trusted on a problem (AC2)."""
    recent = regime.get("recent", [])[-config.steps :]
    own = regime.get("problems", {}).get(problem)
    if own is None or len(recent) < config.steps:
        return False
    error, seen_right = own
    return mean(recent) < config.error and error < config.own_error and bool(seen_right)


# --- baselines -----------------------------------------------------------------------------------


def baselines(
    at: Progression, config: AdvantageConfig, batch: Batch, rewards: Tensor
) -> tuple[list[Tensor], dict[str, float]]:
    """Per response the baselines of its segments, [N]; figures of the blend. rewards: the actor's, [B]."""
    values = [torch.tensor([j.used for j in judgements]) for judgements in batch.judgements]
    if config.blend is None:
        return values, {}
    weight = config.blend.weight
    if weight is None:
        known = at.regime.get("blend") if config.blend.of == "running" else at.measured
        # The group's mean alone until something is measured.
        weight = blend_weight(*(known[key] for key in BLEND)) if known and BLEND[0] in known else 0.0
    sizes = [len(group.rollouts) for group in batch.groups]
    nothing = rewards.new_zeros(0)  # a rank may have no group
    others = torch.cat([nothing, *(others_mean(group) for group in rewards.split(sizes))])
    blended = [
        (weight * value.double() + (1.0 - weight) * other).float()
        for value, other in zip(values, others, strict=True)
    ]
    return blended, {"actor/value_weight": weight}


# --- what a batch teaches about the critic -------------------------------------------------------


def learn_of(at: Progression, config: AdvantageConfig, batch: Batch, rewards: Tensor) -> None:
    """Once the batch is trained on: take its errors into the run's state, for the batches after it, the same
    on every rank. Collective.

    rewards: the actor's, [B].
    """
    if not _reads_batches(config):
        return
    regime = at.regime
    if config.gate is not None and config.gate.of == "batch":
        figure = batch_accuracy(batch)[config.gate.figure]
        if figure == figure:
            regime["batch"] = {config.gate.figure: figure}
    if config.blend is not None and (found := blend_errors(batch.groups, rewards.tolist(), batch.ranks)):
        before, momentum = regime.get("blend"), config.blend.momentum
        regime["blend"] = found if before is None else {
            key: momentum * before[key] + (1.0 - momentum) * value for key, value in found.items()
        }  # fmt: skip
    if config.readiness is not None:
        _learn_problems(regime, config.readiness, batch)


def _reads_batches(config: AdvantageConfig) -> bool:
    gate = config.gate
    running = config.blend is not None and config.blend.weight is None and config.blend.of == "running"
    return config.readiness is not None or running or (gate is not None and gate.of == "batch")


def _learn_problems(regime: dict[str, Any], config: Readiness, batch: Batch) -> None:
    problems = regime.setdefault("problems", {})
    errors: dict[str, list[float]] = {}
    right: dict[str, bool] = {}
    for problem, error, target in zip(*_errors_of_all(batch), strict=True):  # a batch may have one twice
        errors.setdefault(problem, []).append(error)
        right[problem] = right.get(problem, False) or target >= RIGHT
    for problem, found in errors.items():
        seen = problems.get(problem, (0.0, False))[1]
        problems[problem] = [mean(found), bool(seen or right[problem])]
    everything = [error for found in errors.values() for error in found]
    regime["recent"] = [*regime.get("recent", []), mean(everything)][-config.steps :]


def _errors_of_all(batch: Batch) -> tuple[list[str], list[float], list[float]]:
    """Of every state that a rank judged: its problem, squared error, and response's target. Collective."""
    numbers, _ = batch.numbers
    rows = [
        (number, (judgement.used - rollout.target) ** 2, rollout.target)
        for number, rollout, judgements in zip(numbers, batch.rollouts, batch.judgements, strict=True)
        for judgement in judgements
    ]
    ids = batch.problems
    found = batch.ranks.rows(np.array(rows, np.float64).reshape(-1, 3))
    found = found[np.argsort(found[:, 0], kind="stable")]
    return [ids[int(number)] for number in found[:, 0]], found[:, 1].tolist(), found[:, 2].tolist()


def batch_accuracy(batch: Batch) -> dict[str, float]:
    """A batch's explained variance of outcomes, and the same within prompts; NaN where outcomes are alike.

    Collective.
    """
    numbers = dict(zip(map(id, batch.rollouts), batch.numbers[0], strict=True))
    rows = [(numbers[id(r)], j.used, r.target, j.state.index) for j, r in pairs_of(batch.groups)]
    found = batch.ranks.rows(np.array(rows, np.float64).reshape(-1, 4))
    found = found[np.argsort(found[:, 0], kind="stable")]
    whole = metrics.explained_variance(found[:, 1], found[:, 2])
    ids, found = batch.problems, found[found[:, 3] > 0]
    seen, which = np.unique(found[:, 0].astype(np.int64), return_inverse=True)
    codes: dict[str, int] = {}
    problems = np.array([codes.setdefault(ids[number], len(codes)) for number in seen.tolist()], np.int64)
    within = metrics.explained_within(found[:, 1], found[:, 2], problems[which])
    return {"explained_variance": whole, "explained_variance_prompt": within}
