"""Joint training: the actor by PPO with the critic's values, the critic by REINFORCE (arXiv 2604.10701)."""

from __future__ import annotations

from functools import partial

from genac_megatron.algorithms.advantages import gated_lam
from genac_megatron.algorithms.losses import make_ppo_loss, make_reinforce_loss
from genac_megatron.recipe.schema import LossConfig, PolicyStage, PpoStage
from genac_megatron.records import Sample
from genac_megatron.stages.ahead import Batches
from genac_megatron.stages.batch import Batch, actor_rewards, actor_samples, critic_samples, trained_figures
from genac_megatron.stages.heldout import evaluate
from genac_megatron.stages.loop import Loop
from genac_megatron.stages.minibatches import launch_parts, minibatches, updates
from genac_megatron.stages.runtime import Run, mean
from genac_megatron.stages.seeds import seed_for
from genac_megatron.stages.under_way import Update, collected
from genac_megatron.training.launched import Launched

REFERENCE = "reference"  # the frozen role that a KL term is to


def joint_ppo(run: Run, stage: PpoStage, loop: Loop) -> None:
    """rollout -> verify -> states -> critic -> advantages -> actor PPO + critic REINFORCE -> publish."""
    total = stage.steps * updates(stage)
    begin_reference(run, stage.actor_loss, loop)
    run.actor.begin_stage(stage.actor_optimizer, total)
    trained = ["actor", "critic"] if stage.train_critic else ["actor"]
    if stage.train_critic:
        run.critic.begin_stage(stage.critic_optimizer, stage.steps)
    loop.restore_optimizers()
    if loop.fresh:
        run.publish("actor", "critic")
        evaluate(run, stage, "start", 0)
    with Batches(run, stage) as batches:
        for step in loop.steps(stage.steps):
            batch, figures = batches.next(step)
            figures |= train(run, stage, batch, step)
            figures |= run.publish(*trained, step=None if loop.whole(step) else step)
            due = stage.eval_every and step % stage.eval_every == 0 and step < stage.steps
            loop.done(step, figures, partial(evaluate, run, stage, f"step {step}", step) if due else None)
    evaluate(run, stage, "end", stage.steps, monte_carlo=True)


def begin_reference(run: Run, config: LossConfig, loop: Loop) -> None:
    """The reference of a KL term is the actor as the stage finds it. Collective."""
    if config.kl_coef and loop.fresh:
        run.copy_weights("actor", REFERENCE)


def train(run: Run, stage: PpoStage, batch: Batch, step: int) -> dict[str, float]:
    """One update of the actor and, unless it is frozen, of the critic; then p_bar moves on.

    Both at once where they are on disjoint ranks.
    """
    lam = gated_lam(stage.advantage.lam, stage.advantage.lam_gate, run.at.explained_variance)
    figures = {"actor/lam": lam, "critic/p_bar": run.icc.p_bar if run.icc else float("nan")}
    under_way = [launch_actor(run, stage, batch, lam, step)]
    if stage.train_critic:
        under_way.append(launch_critic(run, stage, batch))
    figures |= collected(run, under_way)
    if run.icc is not None:
        run.icc.update(batch.targets)
    return figures


def launch_actor(run: Run, stage: PpoStage, batch: Batch, lam: float, step: int) -> Update:
    """PPO over the batch's responses, with the generative critic's values."""
    limit, cache = stage.rollout.max_new_tokens, stage.overlong.cache if stage.overlong else None
    samples = actor_samples(batch, stage.advantage, lam, stage.actor_loss, limit, cache)
    update = launch_policy(run, stage, stage.actor_loss, batch, samples, step)
    if cache is None:
        return update
    overlong = mean(actor_rewards(batch, limit, cache).tolist()) - mean(batch.outcomes)
    return Update(update.passes, lambda: update.figures() | {"actor/overlong": overlong})


def launch_policy(
    run: Run,
    stage: PpoStage | PolicyStage,
    config: LossConfig,
    batch: Batch,
    samples: list[Sample],
    step: int,
) -> Update:
    """The actor's updates on one batch, `minibatches` an epoch; for `collected`. Collective."""
    temperature = stage.rollout.temperature
    loss = make_ppo_loss(config)
    if config.kl_coef:
        run.count_sequences("reference", samples)
        with run.phase("reference"):
            reference = run.roles[REFERENCE].launch_logprobs(samples, temperature=temperature)
            add_field(samples, "reference", reference.for_ranks_of(run.actor.layout))
    before: Launched[list[list[float]]] | None = None
    with run.phase("actor_train"):
        parts = [samples]
        if stage.epochs * stage.minibatches > 1:
            run.count_sequences("actor_old", samples)
            before = run.actor.launch_logprobs(samples, temperature=temperature)
            add_field(samples, "old", before.for_ranks_of(run.actor.layout))
            seed = seed_for(run.recipe.seed, stage.name, step)
            constant = config.aggregate == "constant"
            parts = minibatches(samples, stage.minibatches, stage.epochs, seed, constant=constant)
        options = {"temperature": temperature, "with_entropy": True}
        launched = launch_parts(run.actor, parts, loss, updates(stage), **options)

    def figures() -> dict[str, float]:
        results = [one.result() for one in launched]
        known = results[0].logprobs if before is None else before.result()
        return trained_figures("actor", results, batch, samples, known)

    return Update([*([] if before is None else [before]), *launched], figures)


def add_field(samples: list[Sample], name: str, logprobs: list[list[float]] | None) -> None:
    """Give samples a field; on ranks that do not train on them (None) they go without."""
    for sample, values in zip(samples, logprobs or (), strict=logprobs is not None):
        sample.fields[name] = values


def launch_critic(run: Run, stage: PpoStage, batch: Batch) -> Update:
    """REINFORCE over the same batch's judgements."""
    samples = critic_samples(batch, stage.train_states, stage.baseline, stage.critic_loss, stage.train_share)
    with run.phase("critic_train"):
        launched = run.critic.launch_step(
            samples,
            make_reinforce_loss(stage.critic_loss),
            temperature=run.recipe.judging.temperature,
            with_entropy=True,
        )

    def figures() -> dict[str, float]:
        result = launched.result()
        return trained_figures("critic", [result], batch, samples, result.logprobs)

    return Update([launched], figures)
