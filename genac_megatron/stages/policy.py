"""RL of the actor by the algorithms that a generative critic must beat (method §5), on the same rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

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
from genac_megatron.stages.batch import Batch, next_prompts, play, response_samples, whitened
from genac_megatron.stages.dealt import Dealt
from genac_megatron.stages.figures import batch_figures
from genac_megatron.stages.heldout import evaluate
from genac_megatron.stages.loop import Loop
from genac_megatron.stages.merging import merge_due
from genac_megatron.stages.minibatches import critic_passes, critic_updates, updates
from genac_megatron.stages.ppo import begin_reference, launch_policy, policy_batch
from genac_megatron.stages.rollouts import Group
from genac_megatron.stages.runtime import Run
from genac_megatron.stages.seeds import seed_for
from genac_megatron.stages.shown import keep_batch
from genac_megatron.stages.under_way import Update, collected
from genac_megatron.stages.value_targets import lesson_of, towards_the_moved
from genac_megatron.stages.values import (
    advantages_and_targets,
    launch_values,
    response_values,
    returns,
    value_batch,
)


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
    with Batches(run, stage, loop) as batches:
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
    wanted, fresh, kept = stage.rollout.prompts, frozenset(run.roles), 0
    everything, teaching = list[Played](), list[Played]()
    for turn in range(rounds):
        prompts = next_prompts(run, wanted)
        seed = (run.recipe.seed, stage.name, step, turn)
        played = play(run, prompts, stage.rollout, seed, judged=False)
        last = [(place + turn * wanted, group) for place, group in played.placed]
        everything += last
        fresh &= played.fresh
        mask = mixed(table(played)[0]).tolist() if last else []
        teaching += [one for one, teaches in zip(last, mask, strict=True) if teaches]
        kept = len(played.all_places(place for place, _ in teaching))
        if kept >= wanted:
            break
    chosen = set(played.all_places(place for place, _ in teaching)[:wanted])
    batch = played.of([one for one in teaching if one[0] in chosen] if kept else last)
    batch.fresh = fresh
    figures = batch_figures(run, played.of(everything))
    figures |= {"rollout/rounds": float(turn + 1), "rollout/groups": float(min(kept, wanted))}
    return batch, figures


Played = tuple[int, Group]  # with its place among the groups of all ranks and rounds


def train(run: Run, stage: PolicyStage, batch: Batch, step: int) -> dict[str, float]:
    """The updates of one batch, at once where roles are on disjoint ranks; their figures. Collective."""
    if isinstance(stage.algorithm, WithScalarCritic):
        return train_with_critic(run, stage, stage.algorithm.value, batch, step)
    rewards, lengths = table(batch)
    trained = lengths
    if stage.overlong_filter and batch.groups:
        cut_off = torch.tensor([[r.truncated for r in group.rollouts] for group in batch.groups])
        trained = lengths.masked_fill(cut_off, 0)
    limit = stage.rollout.max_new_tokens
    per_response = group_advantages(stage.algorithm, rewards, lengths, limit, trained, batch.moments)
    flat = zip(per_response.flatten().tolist(), lengths.flatten().tolist(), strict=True)
    taught = actor_batch(run, stage, batch, [torch.full((n,), a) for a, n in flat])
    return collected(run, [launch_actor(run, stage, batch, taught, step)])


def train_with_critic(
    run: Run, stage: PolicyStage, config: ValueConfig, batch: Batch, step: int
) -> dict[str, float]:
    """Advantages by the critic's values, then the actor's updates and the critic's, both or one by one."""
    at = (run.recipe.seed, stage.name, step)
    with run.phase("values"):
        values = response_values(run, batch.rollouts, batch=batch)
    advantages, learnt = advantages_and_targets(values, batch.outcomes, config)
    if batch.targets != batch.outcomes:  # cut-off responses have a rule for the critic
        learnt = returns(values, batch.targets, config)
    lesson = lesson_of(run, stage.rollout, batch, learnt, config, at)
    parts, epochs = critic_passes(stage)
    options: Any = {"parts": parts, "epochs": epochs, "seed": seed_for(*at, "critic"), "ranks": batch.ranks}
    actors = actor_batch(run, stage, batch, advantages, whiten=config.whiten)
    if config.importance_limit is not None:
        figures = collected(run, [launch_actor(run, stage, batch, actors, step)])
        lesson = towards_the_moved(run, batch, lesson, config.importance_limit, stage.rollout.temperature)
        critics = value_batch(run, batch.rollouts, values, lesson, batch)
        return figures | collected(run, [launch_values(run, critics, values, lesson, config, **options)])
    critics = value_batch(run, batch.rollouts, values, lesson, batch)
    return collected(
        run,
        [
            launch_values(run, critics, values, lesson, config, **options),
            launch_actor(run, stage, batch, actors, step),
        ],
    )


def actor_batch(
    run: Run, stage: PolicyStage, batch: Batch, advantages: Sequence[Tensor], *, whiten: bool = False
) -> Dealt | None:
    """What the actor is trained on by its responses' advantages, [T] each; cut-off ones may be filtered out.

    None where nothing is left. Collective.
    """
    loss = stage.algorithm.loss
    if stage.overlong_filter:
        kept = keep_whole([rollout.truncated for rollout in batch.rollouts])
        advantages = [advantage for advantage, keep in zip(advantages, kept, strict=True) if keep]
        batch = batch.only(kept)
    made = whitened(batch, advantages) if whiten else advantages
    samples = response_samples(batch, made, loss, stage.rollout.max_new_tokens)
    return policy_batch(run, loss, batch, samples, stage.rollout.temperature)


def launch_actor(run: Run, stage: PolicyStage, batch: Batch, taught: Dealt | None, step: int) -> Update:
    """The actor's updates. Where nothing is left there is none."""
    if taught is None:
        run.actor.skip(updates(stage))
        return Update([], lambda: {"actor/skipped": 1.0})
    return launch_policy(run, stage, stage.algorithm.loss, batch, taught, step)


def table(batch: Batch) -> tuple[Tensor, Tensor]:
    """Outcomes and sampled tokens of responses, [G, N] each; every group has as many responses."""
    groups: Sequence[Group] = batch.groups
    if not groups:
        return torch.zeros(0, 1, dtype=torch.float64), torch.zeros(0, 1, dtype=torch.int64)
    rewards = torch.tensor([[r.outcome for r in g.rollouts] for g in groups], dtype=torch.float64)
    lengths = torch.tensor([[r.completion.written for r in g.rollouts] for g in groups])
    return rewards, lengths


def group_advantages(
    algorithm: WithoutCritic,
    rewards_GN: Tensor,
    lengths_GN: Tensor,
    limit: int,
    trained_GN: Tensor | None = None,
    moments: Callable[[Tensor], Tensor | None] = lambda tokens: None,
) -> Tensor:
    """[G, N]: the advantage of every token of a response, by an algorithm that has no critic.

    trained: the lengths that whitening goes by, 0 of responses that are not trained on; None: all of all.
    moments: of the tokens of all ranks (`Batch.moments`).
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
            kind, share = algorithm.baseline, algorithm.mean_share
            return reinforce_pp(rewards_GN, counted_GN, baseline=kind, share=share, moments=moments)
