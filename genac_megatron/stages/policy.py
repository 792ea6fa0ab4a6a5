"""RL of the actor by the algorithms that a generative critic must beat (method §5), on the same rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from genac_megatron.algorithms.baselines.dapo import dapo, mixed, overlong_penalty
from genac_megatron.algorithms.baselines.dr_grpo import dr_grpo
from genac_megatron.algorithms.baselines.grpo import grpo
from genac_megatron.algorithms.baselines.reinforce_pp import reinforce_pp
from genac_megatron.algorithms.baselines.rloo import rloo
from genac_megatron.algorithms.filters import keep_whole
from genac_megatron.recipe.algorithms import (
    Dapo,
    DrGrpo,
    Grpo,
    ReinforcePlusPlus,
    Rloo,
    ValueConfig,
    WithoutCritic,
    WithScalarCritic,
)
from genac_megatron.recipe.schema import PolicyStage
from genac_megatron.stages.ahead import Batches
from genac_megatron.stages.batch import (
    Batch,
    batch_figures,
    next_prompts,
    play,
    response_samples,
    whitened,
)
from genac_megatron.stages.heldout import evaluate
from genac_megatron.stages.loop import Loop
from genac_megatron.stages.merging import merge_due
from genac_megatron.stages.minibatches import critic_passes, critic_updates, updates
from genac_megatron.stages.ppo import begin_reference, launch_policy
from genac_megatron.stages.rollouts import Group
from genac_megatron.stages.runtime import Run
from genac_megatron.stages.seeds import seed_for
from genac_megatron.stages.shown import keep_batch
from genac_megatron.stages.under_way import Update, collected
from genac_megatron.stages.value_targets import lesson_of, towards_the_moved
from genac_megatron.stages.values import advantages_and_targets, launch_values, response_values, returns


def policy(run: Run, stage: PolicyStage, loop: Loop) -> None:
    """rollout -> verify -> (scalar critic ->) advantages -> actor (+ scalar critic) -> publish."""
    scalar = isinstance(stage.algorithm, WithScalarCritic)
    begin_reference(run, stage.algorithm.loss, loop)
    run.actor.begin_stage(stage.actor_optimizer, stage.steps * updates(stage))
    if scalar:
        if loop.fresh and stage.start_from is not None:
            run.copy_weights(stage.start_from, "critic")
        run.critic.begin_stage(stage.critic_optimizer, stage.steps * critic_updates(stage))
    loop.restore_optimizers()
    judge = partial(evaluate, run, stage, critic=scalar)
    if loop.fresh:
        run.publish("actor")
        judge("start", 0)
    with Batches(run, stage) as batches:
        for step in loop.steps(stage.steps):
            batch, figures = draw(run, stage, batches, step)
            figures |= train(run, stage, batch, step)
            keep_batch(run, stage, batch, step)
            if run.icc is not None:  # for a critic that is trained later: over all that was sampled
                run.icc.update([figures.get("rollout/target_mean", figures["rollout/outcome_mean"])])
            figures |= merge_due(run, "actor", *(["critic"] if scalar else []), step=step)
            figures |= run.publish("actor", step=None if loop.whole(step) else step)
            due = stage.eval_every and step % stage.eval_every == 0 and step < stage.steps
            loop.done(step, figures, partial(judge, f"step {step}", step) if due else None)
    judge("end", stage.steps, monte_carlo=scalar)


def draw(run: Run, stage: PolicyStage, batches: Batches, step: int) -> tuple[Batch, dict[str, float]]:
    """The step's batch and its figures. Collective."""
    if isinstance(stage.algorithm, Dapo):
        return mixed_batch(run, stage, stage.algorithm.rounds, step)
    return batches.next(step)


def mixed_batch(run: Run, stage: PolicyStage, rounds: int, step: int) -> tuple[Batch, dict[str, float]]:
    """DAPO's dynamic sampling: prompts are played until enough groups are mixed, or `rounds` times.

    Fewer groups than asked for are trained then; none at all: the last round's, which teach nothing.
    The rollouts' figures are those of everything sampled.
    """
    wanted, kept, everything = stage.rollout.prompts, list[Group](), list[Group]()
    fresh = frozenset(run.roles)
    for turn in range(rounds):
        prompts = next_prompts(run, wanted)
        seed = (run.recipe.seed, stage.name, step, turn)
        played = play(run, prompts, stage.rollout, seed, judged=False)
        everything += played.groups
        fresh &= played.fresh
        teaching = mixed(table(played)[0]).tolist()
        kept += [group for group, teaches in zip(played.groups, teaching, strict=True) if teaches]
        if len(kept) >= wanted:
            break
    batch = Batch(kept[:wanted] or played.groups, fresh)
    figures = batch_figures(run, Batch(everything))
    figures |= {"rollout/rounds": float(turn + 1), "rollout/groups": float(len(kept[:wanted]))}
    return batch, figures


def train(run: Run, stage: PolicyStage, batch: Batch, step: int) -> dict[str, float]:
    """The updates of one batch, at once where roles are on disjoint ranks; their figures. Collective."""
    if isinstance(stage.algorithm, WithScalarCritic):
        return train_with_critic(run, stage, stage.algorithm.value, batch, step)
    rewards, lengths = table(batch)
    trained = lengths
    if stage.overlong_filter:
        cut_off = torch.tensor([[r.truncated for r in group.rollouts] for group in batch.groups])
        trained = lengths.masked_fill(cut_off, 0)
    limit = stage.rollout.max_new_tokens
    per_response = group_advantages(stage.algorithm, rewards, lengths, limit, trained)
    flat = zip(per_response.flatten().tolist(), lengths.flatten().tolist(), strict=True)
    return collected(run, [launch_actor(run, stage, batch, [torch.full((n,), a) for a, n in flat], step)])


def train_with_critic(
    run: Run, stage: PolicyStage, config: ValueConfig, batch: Batch, step: int
) -> dict[str, float]:
    """Advantages by the critic's values, then the actor's updates and the critic's, both or one by one."""
    at = (run.recipe.seed, stage.name, step)
    with run.phase("values"):
        values = response_values(run, batch.rollouts)
    advantages, learnt = advantages_and_targets(values, batch.outcomes, config)
    if batch.targets != batch.outcomes:  # cut-off responses have a rule for the critic
        learnt = returns(values, batch.targets, config)
    lesson = lesson_of(run, stage.rollout, batch, learnt, config, at)
    parts, epochs = critic_passes(stage)
    options = {"parts": parts, "epochs": epochs, "seed": seed_for(*at, "critic")}
    if config.importance_limit is not None:
        figures = collected(run, [launch_actor(run, stage, batch, advantages, step, whiten=config.whiten)])
        lesson = towards_the_moved(run, batch, lesson, config.importance_limit, stage.rollout.temperature)
        return figures | collected(
            run, [launch_values(run, batch.rollouts, values, lesson, config, **options)]
        )
    return collected(
        run,
        [
            launch_values(run, batch.rollouts, values, lesson, config, **options),
            launch_actor(run, stage, batch, advantages, step, whiten=config.whiten),
        ],
    )


def launch_actor(
    run: Run,
    stage: PolicyStage,
    batch: Batch,
    advantages: Sequence[Tensor],
    step: int,
    *,
    whiten: bool = False,
) -> Update:
    """The actor's updates by its responses' advantages, [T] each; cut-off ones may be filtered out.

    Where nothing is left there is no update.
    """
    loss = stage.algorithm.loss
    if stage.overlong_filter:
        kept = keep_whole([rollout.truncated for rollout in batch.rollouts])
        advantages = [advantage for advantage, keep in zip(advantages, kept, strict=True) if keep]
        batch = batch.only(kept)
        if not advantages:
            run.actor.skip(updates(stage))
            return Update([], lambda: {"actor/skipped": 1.0})
    made = whitened(advantages) if whiten else advantages
    samples = response_samples(batch, made, loss, stage.rollout.max_new_tokens)
    return launch_policy(run, stage, loss, batch, samples, step)


def table(batch: Batch) -> tuple[Tensor, Tensor]:
    """Outcomes and sampled tokens of responses, [G, N] each; every group has as many responses."""
    groups: Sequence[Group] = batch.groups
    rewards = torch.tensor([[r.outcome for r in g.rollouts] for g in groups], dtype=torch.float64)
    lengths = torch.tensor([[r.completion.written for r in g.rollouts] for g in groups])
    return rewards, lengths


def group_advantages(
    algorithm: WithoutCritic,
    rewards_GN: Tensor,
    lengths_GN: Tensor,
    limit: int,
    trained_GN: Tensor | None = None,
) -> Tensor:
    """[G, N]: the advantage of every token of a response, by an algorithm that has no critic.

    trained: the lengths that whitening goes by, 0 of responses that are not trained on; None: all of all.
    """
    match algorithm:
        case Grpo():
            return grpo(rewards_GN)
        case DrGrpo():
            return dr_grpo(rewards_GN)
        case Dapo():
            cache = algorithm.overlong.cache if algorithm.overlong is not None else None
            penalty_GN = None if cache is None else overlong_penalty(lengths_GN, limit, cache)
            return dapo(rewards_GN, penalty_GN)
        case Rloo():
            return rloo(rewards_GN)
        case ReinforcePlusPlus():
            counted_GN = lengths_GN if trained_GN is None else trained_GN
            return reinforce_pp(
                rewards_GN, counted_GN, baseline=algorithm.baseline, share=algorithm.mean_share
            )
