"""REINFORCE pre-training of the critic on the frozen actor's rollouts (method §4)."""

from __future__ import annotations

from functools import partial

from genac_megatron.algorithms.losses import make_reinforce_loss
from genac_megatron.recipe.schema import ReinforceStage
from genac_megatron.stages.batch import critic_samples, next_batch, trained_figures
from genac_megatron.stages.gates import check_critic_gate
from genac_megatron.stages.heldout import evaluate
from genac_megatron.stages.loop import Loop
from genac_megatron.stages.runtime import Run


def reinforce(run: Run, stage: ReinforceStage, loop: Loop) -> None:
    """Single outcomes and a strictly proper reward are enough to learn the actor's values."""
    run.critic.begin_stage(stage.optimizer, stage.steps)
    loop.restore_optimizers()
    loss = make_reinforce_loss(stage.loss)
    if loop.fresh:
        run.publish("actor", "critic")
        evaluate(run, stage, "start", 0)
    for step in loop.steps(stage.steps):
        batch, figures = next_batch(run, stage, step)
        final_weight = run.recipe.judging.states.final_weight
        samples = critic_samples(
            batch,
            stage.train_states,
            stage.baseline,
            stage.loss,
            stage.train_share,
            final_weight=final_weight,
        )
        with run.phase("critic_train"):
            result = run.critic.train_step(
                samples, loss, temperature=run.recipe.judging.temperature, with_entropy=True
            )
        figures |= trained_figures("critic", [result], batch, samples, result.logprobs)
        if run.icc is not None:
            run.icc.update(batch.targets, advance=False)
        figures |= run.publish("critic", step=None if loop.whole(step) else step)
        due = stage.eval_every and step % stage.eval_every == 0 and step < stage.steps
        loop.done(step, figures, partial(evaluate, run, stage, f"step {step}", step) if due else None)
    held_out = evaluate(run, stage, "end", stage.steps, monte_carlo=True)
    check_critic_gate(stage, held_out)
