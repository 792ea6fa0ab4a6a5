"""REINFORCE pre-training of the critic on the frozen actor's rollouts (method §4)."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

from genac_megatron.algorithms.losses import Loss, make_reinforce_loss
from genac_megatron.recipe.schema import ReinforceStage
from genac_megatron.records import Sample
from genac_megatron.stages.batch import Batch, critic_samples, next_batch
from genac_megatron.stages.fallback import find_weights, go_back, keep_trained, keep_weights
from genac_megatron.stages.figures import trained_figures
from genac_megatron.stages.gates import check_critic_gate
from genac_megatron.stages.heldout import evaluate
from genac_megatron.stages.loop import Loop
from genac_megatron.stages.merging import merge_due
from genac_megatron.stages.replay import Replay
from genac_megatron.stages.runtime import Run
from genac_megatron.stages.shown import keep_batch
from genac_megatron.stages.strengths import Cast


def reinforce(run: Run, stage: ReinforceStage, loop: Loop) -> None:
    """Single outcomes and a strictly proper reward are enough to learn the actor's values."""
    if loop.fresh:
        keep_weights(run, stage, loop, 0)
    back = find_weights(run, stage)
    run.critic.begin_stage(stage.optimizer, stage.steps)
    loop.restore_optimizers()
    if loop.fresh:
        run.publish("actor", "critic")
        evaluate(run, stage, "start", 0)
    replay = Replay(run, stage, fresh=loop.fresh) if stage.replay is not None else None
    cast = Cast(run, stage, stage.actors)
    loss = make_reinforce_loss(stage.loss)
    loss = loss if replay is None else replay.loss(loss)
    for step in loop.steps(stage.steps):
        actor = stage.actors[(step - 1) % len(stage.actors)] if stage.actors else None
        with cast.playing(actor) if actor is not None else nullcontext() as met:
            batch, figures = next_batch(run, stage, step)
        samples = critic_samples(
            batch,
            stage.train_states,
            stage.baseline,
            stage.loss,
            stage.train_share,
            final_weight=run.recipe.judging.states.final_weight,
        )
        replayed: list[Sample] = []
        if replay is not None:
            samples, replayed = replay.joined(batch, samples, step)
        figures |= _trained(run, batch, samples, replayed, replay, loss)
        keep_batch(run, stage, batch, step)
        told = run.icc if actor is None else met
        if told is not None:  # each actor has a success rate of its own
            told.update([batch.mean_target], advance=False)
        if actor is not None and told is not None:
            cast.remember(actor, told)
        figures |= merge_due(run, "critic", step=step)
        figures |= run.publish("critic", step=None if loop.whole(step) else step)
        due = stage.eval_every and step % stage.eval_every == 0 and step < stage.steps
        loop.done(step, figures, partial(evaluate, run, stage, f"step {step}", step) if due else None)
    held_out = evaluate(run, stage, "end", stage.steps, monte_carlo=True)
    if not check_critic_gate(stage, held_out) and back is not None:
        keep_trained(run, stage, loop)
        go_back(run, stage, back)
        run.at.explained_variance = None  # of the critic that is gone
        evaluate(run, stage, "fallback", stage.steps, monte_carlo=True)


def _trained(
    run: Run,
    batch: Batch,
    samples: list[Sample],
    replayed: list[Sample],
    replay: Replay | None,
    loss: Loss,
) -> dict[str, float]:
    """One update of the critic, its figures; of nothing there is none. Collective."""
    if not batch.ranks.any(bool([*samples, *replayed])):  # every judgement had no room, or is left out
        run.critic.skip(1)
        return {"critic/skipped": 1.0}
    with run.phase("critic_train"):
        taught = batch.dealt([*samples, *replayed])
        result = run.critic.train_step(
            taught, loss, temperature=run.recipe.judging.temperature, with_entropy=True
        )
    own, others = result.logprobs[: len(samples)], result.logprobs[len(samples) :]
    figures = trained_figures("critic", [result], batch, samples, own)
    return figures if replay is None else figures | replay.figures(replayed, others, batch.ranks)
