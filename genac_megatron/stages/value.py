"""Value pre-training of a scalar critic on the frozen actor's outcomes (VC-PPO, arXiv 2503.01491)."""

from __future__ import annotations

from functools import partial

from genac_megatron.recipe.schema import ValueStage
from genac_megatron.stages.batch import next_batch
from genac_megatron.stages.distil import distil
from genac_megatron.stages.gates import check_critic_gate
from genac_megatron.stages.heldout import evaluate
from genac_megatron.stages.loop import Loop
from genac_megatron.stages.merging import merge_due
from genac_megatron.stages.minibatches import critic_passes, critic_updates
from genac_megatron.stages.runtime import Run
from genac_megatron.stages.seeds import seed_for
from genac_megatron.stages.shown import keep_batch
from genac_megatron.stages.under_way import collected
from genac_megatron.stages.value_targets import lesson_of
from genac_megatron.stages.values import launch_values, response_values, returns, value_batch


def value(run: Run, stage: ValueStage, loop: Loop) -> None:
    """Regression of the responses' outcomes, of what stage.value.target says, or of a generative critic's
    judgements, on the text so far."""
    if loop.fresh and stage.start_from is not None:
        run.copy_weights(stage.start_from, "critic")
    updates = 1 if stage.distil is not None else critic_updates(stage)
    run.critic.begin_stage(stage.optimizer, stage.steps * updates)
    loop.restore_optimizers()
    if loop.fresh:
        run.publish("actor")
        evaluate(run, stage, "start", 0)
    if stage.distil is not None:
        distil(run, stage, stage.distil, loop)
    else:
        from_rollouts(run, stage, loop)
    held_out = evaluate(run, stage, "end", stage.steps, monte_carlo=True)
    check_critic_gate(stage, held_out)


def from_rollouts(run: Run, stage: ValueStage, loop: Loop) -> None:
    """Its steps, each on a fresh batch."""
    parts, epochs = critic_passes(stage)
    for step in loop.steps(stage.steps):
        batch, figures = next_batch(run, stage, step)
        with run.phase("values"):
            values = response_values(run, batch.rollouts, batch=batch)
        learnt = returns(values, batch.targets, stage.value)
        at = (run.recipe.seed, stage.name, step)
        lesson = lesson_of(run, stage.rollout, batch, learnt, stage.value, at)
        update = launch_values(
            run,
            value_batch(run, batch.rollouts, values, lesson, batch),
            values,
            lesson,
            stage.value,
            parts=parts,
            epochs=epochs,
            seed=seed_for(*at, "critic"),
            ranks=batch.ranks,
        )
        figures |= collected(run, [update]) | merge_due(run, "critic", step=step)
        keep_batch(run, stage, batch, step)
        due = stage.eval_every and step % stage.eval_every == 0 and step < stage.steps
        loop.done(step, figures, partial(evaluate, run, stage, f"step {step}", step) if due else None)
