"""A joint step's updates of the generative critic: one beside the actor's, or several after it."""

from __future__ import annotations

from genac_megatron.algorithms.importance import dropped, tail_ratios
from genac_megatron.algorithms.losses import make_reinforce_loss
from genac_megatron.recipe.schema import PpoStage
from genac_megatron.stages.batch import Batch, critic_samples
from genac_megatron.stages.dealt import Dealt, placed
from genac_megatron.stages.figures import trained_figures
from genac_megatron.stages.minibatches import launch_parts
from genac_megatron.stages.parity import engine_sample
from genac_megatron.stages.runtime import Run
from genac_megatron.stages.under_way import Update
from genac_megatron.training.distributed_batch import DistributedBatch

Ratios = list[list[float | None]]


def launch_critic(run: Run, stage: PpoStage, batch: Batch, taught: Dealt | None) -> Update:
    """REINFORCE over the batch's judgements, once. Where none of it is trained on there is no update."""
    if taught is None:
        run.critic.skip(1)
        return Update([], lambda: {"critic/skipped": 1.0})
    return _launch(run, stage, batch, taught, 1)


def launch_critic_after(run: Run, stage: PpoStage, batch: Batch) -> Update:
    """`critic_updates` updates once the actor has moved: a judgement is rewarded for an outcome of the actor
    that sampled it, which counts for the actor of now by its importance weight (PACT). Collective.

    Updates after the first are of a critic that has moved itself: truncated importance sampling of its loss
    corrects for that, as for an engine's log-probs.
    """
    made = [engine_sample(rollout.prompt.ids, rollout.completion) for rollout in batch.rollouts]
    plain = batch.dealt(placed(made, batch.numbers[0]))
    counted = run.count_sequences("moved", plain)
    with run.phase("moved"):
        now = run.actor.logprobs(plain, temperature=stage.rollout.temperature, counted=counted)
    every = [
        tail_ratios(
            new,
            rollout.completion.logprobs,
            [rollout.completion.written_before(judgement.state.cut) for judgement in judgements],
        )
        for new, rollout, judgements in zip(now, batch.rollouts, batch.judgements, strict=True)
    ]
    ratios = dropped(every, stage.importance_limit)
    kept = [ratio for row in ratios for ratio in row if ratio is not None]
    total, count, whole = batch.ranks.totals(sum(kept), len(kept), sum(len(row) for row in every))
    figures = {
        "critic/importance": total / count if count else 0.0,
        "critic/importance_dropped": 1.0 - count / whole,
    }
    taught = critic_batch(run, stage, batch, ratios)
    if taught is None:
        run.critic.skip(stage.critic_updates)
        return Update([], lambda: figures)
    update = _launch(run, stage, batch, taught, stage.critic_updates)
    return Update(update.passes, lambda: update.figures() | figures)


def critic_batch(run: Run, stage: PpoStage, batch: Batch, ratios: Ratios | None) -> Dealt | None:
    """What the critic is trained on, where it trains; None of nothing. Collective."""
    samples = critic_samples(
        batch,
        stage.train_states,
        stage.baseline,
        stage.critic_loss,
        stage.train_share,
        ratios=ratios,
        final_weight=run.recipe.judging.states.final_weight if batch.finals else 1.0,
    )
    if not batch.ranks.any(bool(samples)):
        return None
    made = batch.dealt(samples)
    return Dealt(samples, run.critic.take(made) if isinstance(made, DistributedBatch) else made)


def _launch(run: Run, stage: PpoStage, batch: Batch, taught: Dealt, times: int) -> Update:
    with run.phase("critic_train"):
        launched = launch_parts(
            run.critic,
            [taught.where] * times,
            make_reinforce_loss(stage.critic_loss),
            times,
            temperature=run.recipe.judging.temperature,
            with_entropy=True,
        )

    def figures() -> dict[str, float]:
        results = [one.result() for one in launched]
        return trained_figures("critic", results, batch, taught.mine, results[0].logprobs)

    return Update(launched, figures)
