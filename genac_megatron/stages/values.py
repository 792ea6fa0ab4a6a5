"""A scalar critic at work: values of responses, its training on them, its judgements for evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from genac_megatron import compact
from genac_megatron.algorithms.baselines.ppo import token_gae, value_targets
from genac_megatron.algorithms.baselines.sp3o import trained_places
from genac_megatron.algorithms.baselines.vapo import length_adaptive_lambda
from genac_megatron.algorithms.baselines.vc_ppo import decoupled_gae
from genac_megatron.algorithms.losses import make_value_loss
from genac_megatron.critic.states import cut_states
from genac_megatron.errors import InputError, on_all_ranks
from genac_megatron.recipe.algorithms import RegressionConfig, ValueConfig
from genac_megatron.records import Completion, Judgement, Rollout, Sample, sample_of
from genac_megatron.stages.dealt import Dealt, placed
from genac_megatron.stages.minibatches import launch_parts, minibatches, pop_tokens
from genac_megatron.stages.ranks import ALONE, Ranks
from genac_megatron.stages.rollouts import Group
from genac_megatron.stages.runtime import Run, largest, mean
from genac_megatron.stages.under_way import Update
from genac_megatron.training.distributed_batch import DistributedBatch
from genac_megatron.training.role import Samples

if TYPE_CHECKING:
    from genac_megatron.stages.batch import Batch


@dataclass(frozen=True)
class Lesson:
    """What a scalar critic is to learn of a batch, per response of T tokens."""

    targets: list[Tensor]  # [T]
    places: list[list[int]] | None = None  # tokens whose value is trained; None: all
    kept: list[Tensor] | None = None  # bool [T]: which of them are not dropped
    scales: list[float] | None = None  # what the response's loss is multiplied by


def is_scalar(run: Run) -> bool:
    """Whether the run's critic is a scalar one."""
    return "critic" in run.roles and run.critic.shape.value


def need_same_tokens(run: Run) -> None:
    """Raise InputError where actor and scalar critic do not share a vocabulary: it reads the actor's ids."""
    actor, critic = run.tokenizers["actor"], run.tokenizers["critic"]
    if actor.get_vocab() != critic.get_vocab():
        raise on_all_ranks(
            InputError(
                "the scalar critic has another tokenizer than the actor, whose token ids it must read",
                where="roles.critic.model.tokenizer",
                way_out="give both the same tokenizer",
            )
        )


def response_values(
    run: Run, rollouts: Sequence[Rollout], phase: str = "value", batch: Batch | None = None
) -> list[Tensor]:
    """Per rollout, V(prefix strictly before token t) of each sampled token, [T]. Collective.

    phase: what its tokens are counted to. batch: the one whose responses they are, of all ranks; None: they
    are the same on every rank.
    """
    samples = _dealt([_sequence(rollout) for rollout in rollouts], batch)
    counted = run.count_sequences(phase, samples)
    found = run.critic.values(samples, counted=counted)
    for rollout, values in zip(rollouts, found, strict=True):
        rollout.values = values
    return [torch.tensor(values) for values in found]


def _dealt(samples: list[Sample], batch: Batch | None) -> Samples:
    """Of a batch's responses, in their order."""
    return samples if batch is None else batch.dealt(placed(samples, batch.numbers[0]))


def _sequence(rollout: Rollout) -> Sample:
    return replace(sample_of(rollout.prompt.ids, rollout.completion), experts=None)  # the actor's, not its


def advantages_and_targets(
    values: Sequence[Tensor], outcomes: Sequence[float], config: ValueConfig
) -> tuple[list[Tensor], list[Tensor]]:
    """The actor's advantages and what the critic learns, per response [T]; not whitened."""
    lengths = [len(value) for value in values]
    lam = (
        config.lam_actor
        if config.length_alpha is None
        else length_adaptive_lambda(lengths, config.length_alpha)
    )
    return decoupled_gae(values, torch.tensor(outcomes), config.gamma, lam, config.lam_critic)


def returns(values: Sequence[Tensor], outcomes: Sequence[float], config: RegressionConfig) -> list[Tensor]:
    """What the critic learns, per response [T]."""
    advantages = token_gae(values, torch.tensor(outcomes), config.gamma, config.lam_critic)
    return value_targets(values, advantages)


def value_samples(
    rollouts: Sequence[Rollout], values: Sequence[Tensor], lesson: Lesson, ranks: Ranks = ALONE
) -> list[Sample]:
    """What the critic is trained on: every token of every response, or those of the lesson alone.

    Loss weights sum to 1 where no response is scaled, over all `ranks`, and to 0 where all is dropped.
    """
    masks = [torch.ones(len(value)) for value in values]
    if lesson.places is not None:
        masks = [_mask(len(value), indices) for value, indices in zip(values, lesson.places, strict=True)]
    if lesson.kept is not None:
        masks = [mask * kept for mask, kept in zip(masks, lesson.kept, strict=True)]
    total = ranks.totals(sum(float(mask.sum()) for mask in masks))[0] or 1.0
    samples = []
    for i, (rollout, value, target) in enumerate(zip(rollouts, values, lesson.targets, strict=True)):
        sample = _sequence(rollout)
        weights = masks[i] / total
        if lesson.scales is not None:
            weights = weights * lesson.scales[i]
        given = {"weights": weights, "targets": target, "old": value}
        sample.fields = {name: compact.figures(numbers.tolist()) for name, numbers in given.items()}
        samples.append(sample)
    return samples


def _mask(length: int, places: Sequence[int]) -> Tensor:
    mask = torch.zeros(length)
    mask[list(places)] = 1.0
    return mask


def places_of(run: Run, rollouts: Sequence[Rollout], config: RegressionConfig) -> list[list[int]] | None:
    """Per rollout the tokens whose value is trained, by config.at; None: all of all."""
    if not config.at:
        return None
    tokenizer, states = run.tokenizers["actor"], run.recipe.judging.states
    cuts = (
        [rollout.completion.written_before(state.cut) for state in cut_states(rollout, tokenizer, states)]
        if config.at_cuts
        else None
        for rollout in rollouts
    )
    return [
        trained_places(rollout.completion.written, config.at, found)
        for rollout, found in zip(rollouts, cuts, strict=True)
    ]


def value_batch(
    run: Run,
    rollouts: Sequence[Rollout],
    values: Sequence[Tensor],
    lesson: Lesson,
    batch: Batch | None = None,
) -> Dealt:
    """What the critic is trained on, where it trains. Collective. batch: as for `response_values`."""
    ranks = ALONE if batch is None else batch.ranks
    samples = value_samples(rollouts, values, lesson, ranks)
    made = _dealt(samples, batch)
    where = run.critic.take(made) if isinstance(made, DistributedBatch) else made
    return Dealt(samples, where, ranks.any(any(max(one.fields["weights"], default=0) > 0 for one in samples)))


def launch_values(
    run: Run,
    taught: Dealt,
    values: Sequence[Tensor],
    lesson: Lesson,
    config: RegressionConfig,
    *,
    parts: int,
    epochs: int,
    seed: int,
    ranks: Ranks = ALONE,
) -> Update:
    """Regression on one batch, in `parts` updates an epoch, for `collected`. Collective.

    Where every token is dropped there is no update. ranks: whose responses they are.
    """
    loss = make_value_loss(config.clip, logit=run.critic.shape.logit)
    trained = torch.tensor([weight for one in taught.mine for weight in one.fields["weights"]]) > 0
    with run.phase("critic_train"):
        # A scaled response keeps its share of the loss in whichever part it comes to.
        made = minibatches(taught.where, parts, epochs, seed, constant=lesson.scales is not None)
        planned = epochs * min(parts, len(taught.where))
        launched = launch_parts(run.critic, made if taught.carries_loss else [], loss, planned)

    def figures() -> dict[str, float]:
        dropped = {} if lesson.kept is None else {"critic/dropped_share": _dropped_share(lesson, ranks)}
        if not launched:
            return dropped
        results = [one.result() for one in launched]
        stats = {key: mean(result.stats[key] for result in results) for key in results[0].stats}
        stats["grad_norm"] = largest(result.stats["grad_norm"] for result in results)
        tokens = pop_tokens("critic", stats, len(results))
        nothing = torch.zeros(0)
        found = torch.cat([nothing, *values])[trained], torch.cat([nothing, *lesson.targets])[trained]
        return {
            **{f"critic/{key}": value for key, value in stats.items()},
            "critic/explained_variance": ranks.explained_variance(*found),
            **tokens,
            **dropped,
        }

    return Update(launched, figures)


def _dropped_share(lesson: Lesson, ranks: Ranks) -> float:
    """Of the tokens whose value would be trained. Collective over `ranks`."""
    assert lesson.kept is not None
    kept = lesson.kept
    if lesson.places is not None:
        kept = [one[torch.tensor(at, dtype=torch.long)] for one, at in zip(kept, lesson.places, strict=True)]
    left, whole = ranks.totals(sum(int(one.sum()) for one in kept), sum(len(one) for one in kept))
    return 1.0 - left / whole


def judged_by_values(run: Run, mine: Sequence[Group]) -> list[Group]:
    """This rank's groups with the scalar critic's values of their states as judgements. Collective.

    The states are those that a generative critic would be asked about. Values are clipped to [0, 1], where
    outcomes lie: that can only lower their error.
    """
    from genac_megatron.stages.batch import spread  # which leans on evaluations

    rollouts = [rollout for group in mine for rollout in group.rollouts]
    found = iter(response_values(run, rollouts, "evaluate", spread(run, list(mine))))
    judged = [
        Group(
            group.prompt,
            group.rollouts,
            [_judgements(run, rollout, next(found)) for rollout in group.rollouts],
        )
        for group in mine
    ]
    for group in judged:
        for judgements in group.judgements[1:]:  # one prompt state for all: the prefix is the same
            judgements[0] = group.judgements[0][0]
    return judged


def _judgements(run: Run, rollout: Rollout, values: Tensor) -> list[Judgement]:
    states = cut_states(rollout, run.tokenizers["actor"], run.recipe.judging.states)
    places = (rollout.completion.written_before(state.cut) for state in states)
    found = [min(max(float(values[place]), 0.0), 1.0) for place in places]
    nothing = Completion((), (), "stop")
    return [
        Judgement(state, (), nothing, "", value, used=value)
        for state, value in zip(states, found, strict=True)
    ]
