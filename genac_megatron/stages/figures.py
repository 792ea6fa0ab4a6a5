"""Figures of a batch: what the actor did, how the critic judged, what their updates found. Over all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from genac_megatron.algorithms.losses import means
from genac_megatron.metrics import entropy, score_histogram
from genac_megatron.records import Judgement, Rollout, Sample
from genac_megatron.stages.conversations import conversation_figures
from genac_megatron.stages.heldout import tell_too_long
from genac_megatron.stages.minibatches import pop_tokens
from genac_megatron.stages.parity import parity_figures
from genac_megatron.stages.ranks import Ranks
from genac_megatron.stages.reward_figures import earned, part_figures, source_figures, source_shares
from genac_megatron.stages.runtime import Run, largest, mean
from genac_megatron.training.role import StepResult

if TYPE_CHECKING:
    from genac_megatron.stages.batch import Batch


def batch_figures(run: Run, batch: Batch) -> dict[str, float]:
    """What the actor and, where it judged, the critic did in this batch. Collective."""
    judged: dict[str, float] = {}
    if batch.ranks.any(any(batch.judgements)):
        judged = judge_figures(batch) | judge_staleness(batch, run.at.versions)
    every = [*(j for judgements in batch.judgements for j in judgements), *batch.finals]
    tell_too_long(run, [judgement for judgement in every if judgement.certain is None], batch.ranks)
    return {**rollout_figures(batch, run.at.versions), **judged, **run.serving.figures()}


def rollout_figures(batch: Batch, versions: Mapping[str, int]) -> dict[str, float]:
    """What the actor did in this batch. `versions`: the newest published of each role. Collective."""
    rollouts, ranks = batch.rollouts, batch.ranks
    found = earned(rollouts)
    figures = ranks.means(
        {
            "rollout/outcome_mean": batch.outcomes,
            "rollout/length_mean": [r.completion.written for r in rollouts],
            "rollout/truncated": [r.truncated for r in rollouts],
            "rollout/mixed_groups": [len({r.outcome for r in group.rollouts}) > 1 for group in batch.groups],
        }
    )
    oldest = ranks.least(min((r.completion.version for r in rollouts), default=math.inf))
    figures["rollout/staleness"] = float(versions["actor"] - oldest)
    spans = [span for rollout in rollouts for span in rollout.completion.spans]
    behind, tokens = ranks.totals(
        sum((versions["actor"] - version) * count for version, count in spans),
        sum(count for _, count in spans),
    )
    figures["rollout/staleness_mean"] = behind / max(tokens, 1.0)
    if ranks.any(batch.targets != batch.outcomes):
        figures |= ranks.means({"rollout/target_mean": batch.targets})
    return {
        **figures,
        **conversation_figures(rollouts, ranks),
        **prefixed("reward", part_figures(found, ranks)),
        **prefixed("source_outcome", source_figures(found, ranks)),
        **prefixed("source_share", source_shares(found, ranks)),
    }


Judged = tuple[Rollout, Sequence[Judgement]]


def judge_figures(batch: Batch) -> dict[str, float]:
    """How well the critic judged this batch, over all (state, outcome) pairs of responses that were not left
    out; and the share of those that were, where there are any. Collective.
    """
    rows, ranks = list(zip(batch.rollouts, batch.judgements, strict=True)), batch.ranks
    found = [(rollout, judgements) for rollout, judgements in rows if judgements[0].certain is None]
    asked, whole = ranks.totals(len(found), len(rows))
    left = {} if asked == whole else {"judge/certain": 1.0 - asked / whole}
    if not asked:
        return left
    return {**_pair_figures(found, ranks), **_final_figures(batch), **left}


def _pair_figures(found: Sequence[Judged], ranks: Ranks) -> dict[str, float]:
    pairs = [(judgement, rollout.target) for rollout, judgements in found for judgement in judgements]
    base = ranks.means({"": (outcome for _, outcome in pairs)})[""]
    every = {id(j): j for j, _ in pairs}.values()
    unique = [judgement for judgement in every if not judgement.skipped]
    scores = score_histogram([j.value for j in every if j.value is not None])
    scores = ranks.rows(scores[None]).sum(axis=0)
    return {
        **ranks.means(
            {
                "judge/skipped": [judgement.skipped for judgement in every],
                "judge/too_long": [judgement.too_long for judgement in every],
                "judge/parse_rate": [j.value is not None for j in unique],
                "judge/brier": [(j.used - outcome) ** 2 for j, outcome in pairs],
                "judge/brier_constant": [(base - outcome) ** 2 for _, outcome in pairs],
                "judge/score_mean": [j.used for j in unique],
                "judge/length_mean": [len(j.completion.ids) for j in unique],
                "judge/truncated": [j.completion.finish == "length" for j in unique],
                "judge/value_first": [judgements[0].used for _, judgements in found],
                "judge/value_last": [judgements[-1].used for _, judgements in found],
            }
        ),
        "judge/states": ranks.totals(len(unique))[0],
        **({"judge/score_entropy": entropy(scores)} if scores.sum() else {}),  # nats; 0: all on one score
    }


def _final_figures(batch: Batch) -> dict[str, float]:
    wholes = [
        (final, rollout)
        for final, rollout in zip(batch.finals, batch.rollouts, strict=bool(batch.finals))
        if final.certain is None
    ]
    if not batch.ranks.any(bool(wholes)):
        return {}
    return batch.ranks.means(
        {
            "judge/final_brier": [(j.used - r.target) ** 2 for j, r in wholes if not j.skipped],
            "judge/final_skipped": [j.skipped for j, _ in wholes],
        }
    )


def judge_staleness(batch: Batch, versions: Mapping[str, int]) -> dict[str, float]:
    """How many versions behind the newest published critic the batch's oldest judgement is. Collective.

    {} where no critic has written one.
    """
    written = (j.completion.version for js in batch.judgements for j in js if j.completion.spans)
    oldest = batch.ranks.least(min(written, default=math.inf))
    return {"judge/staleness": float(versions["critic"] - oldest)} if oldest < math.inf else {}


def prefixed(group: str, figures: dict[str, float]) -> dict[str, float]:
    """`figures` under `group/`."""
    return {f"{group}/{key}": value for key, value in figures.items()}


def trained_figures(
    role: str,
    results: Sequence[StepResult],
    batch: Batch,
    samples: list[Sample],
    logprobs: list[list[float]],
) -> dict[str, float]:
    """The figures of a step's updates: means of the losses' own, and tokens in all. Collective.

    samples, logprobs: of this rank, as the batch. Log-probs before the first update against those of
    sampling: parity/, or drift/ where the batch is not `fresh`.
    """
    stats = {key: mean(result.stats[key] for result in results) for key in results[0].stats}
    (weight,) = batch.ranks.totals(sum(sum(sample.fields["weights"]) for sample in samples))
    stats = means(stats, weight)
    stats["grad_norm"] = largest(result.stats["grad_norm"] for result in results)
    counts = pop_tokens(role, stats, len(results))
    group = "parity" if role in batch.fresh else "drift"
    return {
        **prefixed(role, stats),
        **counts,
        **parity_figures(role, samples, logprobs, group, batch.ranks),
    }
