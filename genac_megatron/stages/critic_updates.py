"""A joint step's updates of the generative critic: one beside the actor's, or several after it."""

from __future__ import annotations

from genac_megatron.algorithms.importance import dropped, tail_ratios
from genac_megatron.algorithms.losses import make_reinforce_loss
from genac_megatron.recipe.schema import PpoStage
from genac_megatron.records import Sample
from genac_megatron.stages.batch import Batch, critic_samples, trained_figures
from genac_megatron.stages.minibatches import launch_parts
from genac_megatron.stages.parity import engine_sample
from genac_megatron.stages.runtime import Run, mean
from genac_megatron.stages.under_way import Update

Ratios = list[list[float | None]]


def launch_critic(run: Run, stage: PpoStage, batch: Batch) -> Update:
    """REINFORCE over the batch's judgements, once. Where none of it is trained on there is no update."""
    samples = critic_batch(run, stage, batch, None)
    if not samples:
        run.critic.skip(1)
        return Update([], lambda: {"critic/skipped": 1.0})
    return _launch(run, stage, batch, samples, 1)


def launch_critic_after(run: Run, stage: PpoStage, batch: Batch) -> Update:
    """`critic_updates` updates once the actor has moved: a judgement is rewarded for an outcome of the actor
    that sampled it, which counts for the actor of now by its importance weight (PACT). Collective.

    Updates after the first are of a critic that has moved itself: truncated importance sampling of its loss
    corrects for that, as for an engine's log-probs.
    """
    plain = [engine_sample(rollout.prompt.ids, rollout.completion) for rollout in batch.rollouts]
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
    figures = {
        "critic/importance": mean(kept) if kept else 0.0,
        "critic/importance_dropped": 1.0 - len(kept) / sum(len(row) for row in every),
    }
    samples = critic_batch(run, stage, batch, ratios)
    if not samples:
        run.critic.skip(stage.critic_updates)
        return Update([], lambda: figures)
    update = _launch(run, stage, batch, samples, stage.critic_updates)
    return Update(update.passes, lambda: update.figures() | figures)


def critic_batch(run: Run, stage: PpoStage, batch: Batch, ratios: Ratios | None) -> list[Sample]:
    """What the critic is trained on."""
    return critic_samples(
        batch,
        stage.train_states,
        stage.baseline,
        stage.critic_loss,
        stage.train_share,
        ratios=ratios,
        final_weight=run.recipe.judging.states.final_weight if batch.finals else 1.0,
    )


def _launch(run: Run, stage: PpoStage, batch: Batch, samples: list[Sample], times: int) -> Update:
    with run.phase("critic_train"):
        launched = launch_parts(
            run.critic,
            [samples] * times,
            make_reinforce_loss(stage.critic_loss),
            times,
            temperature=run.recipe.judging.temperature,
            with_entropy=True,
        )

    def figures() -> dict[str, float]:
        results = [one.result() for one in launched]
        return trained_figures("critic", results, batch, samples, results[0].logprobs)

    return Update(launched, figures)
