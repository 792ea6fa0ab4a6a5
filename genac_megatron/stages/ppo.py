"""Joint training: the actor by PPO with the critic's values, the critic by REINFORCE (arXiv 2604.10701)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from genac_megatron.algorithms.losses import make_ppo_loss
from genac_megatron.recipe.schema import LossConfig, PolicyStage, PpoStage
from genac_megatron.records import Sample
from genac_megatron.stages.ahead import Batches
from genac_megatron.stages.batch import Batch
from genac_megatron.stages.critic_updates import critic_batch, launch_critic, launch_critic_after
from genac_megatron.stages.dealt import Dealt
from genac_megatron.stages.figures import trained_figures
from genac_megatron.stages.gates import check_entry_gate
from genac_megatron.stages.heldout import evaluate
from genac_megatron.stages.loop import Loop
from genac_megatron.stages.merging import merge_due
from genac_megatron.stages.minibatches import launch_parts, minibatches, updates
from genac_megatron.stages.regime import goes_by_monte_carlo, learn_of, stage_rewards, trusted_samples
from genac_megatron.stages.runtime import Run
from genac_megatron.stages.seeds import seed_for
from genac_megatron.stages.shown import keep_batch
from genac_megatron.stages.under_way import Update, collected
from genac_megatron.training.distributed_batch import DistributedBatch
from genac_megatron.training.launched import ScoredPass
from genac_megatron.training.layout import Layout
from genac_megatron.training.role import Role, Samples

REFERENCE = "reference"  # the frozen role that a KL term is to


def joint_ppo(run: Run, stage: PpoStage, loop: Loop) -> None:
    """rollout -> verify -> states -> critic -> advantages -> actor PPO + critic REINFORCE -> publish."""
    total = stage.steps * updates(stage)
    begin_reference(run, stage.actor_loss, loop)
    run.actor.begin_stage(stage.actor_optimizer, total)
    trained = ["actor", "critic"] if stage.train_critic else ["actor"]
    if stage.train_critic:
        run.critic.begin_stage(stage.critic_optimizer, stage.steps * stage.critic_updates)
    loop.restore_optimizers()
    by_monte_carlo = goes_by_monte_carlo(stage.advantage)
    judged = partial(evaluate, run, stage, monte_carlo=by_monte_carlo)
    if loop.fresh:
        run.at.regime = {}
        run.publish("actor", *([] if run.recipe.judging.teacher else ["critic"]))
        entered = evaluate(run, stage, "start", 0, monte_carlo=by_monte_carlo or stage.gate.of_monte_carlo)
        check_entry_gate(run.recipe, stage, entered)
    with Batches(run, stage, loop) as batches:
        for step in loop.steps(stage.steps):
            batch, figures = batches.next(step)
            figures |= train(run, stage, batch, step)
            keep_batch(run, stage, batch, step)
            figures |= merge_due(run, *trained, step=step)
            figures |= run.publish(*trained, step=None if loop.whole(step) else step)
            due = stage.eval_every and step % stage.eval_every == 0 and step < stage.steps
            loop.done(step, figures, partial(judged, f"step {step}", step) if due else None)
    evaluate(run, stage, "end", stage.steps, monte_carlo=True)


def begin_reference(run: Run, config: LossConfig, loop: Loop) -> None:
    """The reference of a KL term is the actor as the stage finds it; of an adapter without a role for it, its
    base. Collective.
    """
    if config.kl_coef and loop.fresh and REFERENCE in run.roles:
        run.copy_weights("actor", REFERENCE)


def train(run: Run, stage: PpoStage, batch: Batch, step: int) -> dict[str, float]:
    """One update of the actor and, unless it is frozen, of the critic, both at once where they are on
    disjoint ranks; or the actor's and then several of the critic. Then p_bar moves on.
    """
    figures = {"critic/p_bar": run.icc.p_bar if run.icc else float("nan")}
    taught, found = actor_batch(run, stage, batch, step)
    judged: Dealt | None = None
    at_once = stage.train_critic and stage.critic_updates == 1
    if at_once:  # who trains the actor sends and gets no sample of the critic's once it is at work
        judged = critic_batch(run, stage, batch, None)
    under_way = [launch_actor(run, stage, batch, taught, step)]
    if at_once:
        under_way.append(launch_critic(run, stage, batch, judged))
    figures |= found | collected(run, under_way)
    if stage.train_critic and stage.critic_updates > 1:
        figures |= collected(run, [launch_critic_after(run, stage, batch)])
    learn_of(run.at, stage.advantage, batch, stage_rewards(stage, batch))
    if run.icc is not None:
        run.icc.update([batch.mean_target])
    return figures


def actor_batch(run: Run, stage: PpoStage, batch: Batch, step: int) -> tuple[Dealt | None, dict[str, float]]:
    """What the actor is trained on, by the critic's values as far as they are trusted, where it trains; and
    their figures. None where nothing is left. Collective.
    """
    samples, figures = trusted_samples(run.at, stage, batch, step)
    if stage.overlong is not None:
        rewards = stage_rewards(stage, batch).tolist()
        found = batch.ranks.means({"reward": rewards, "outcome": batch.outcomes})
        figures["actor/overlong"] = found["reward"] - found["outcome"]
    return policy_batch(run, stage.actor_loss, batch, samples, stage.rollout.temperature), figures


def launch_actor(run: Run, stage: PpoStage, batch: Batch, taught: Dealt | None, step: int) -> Update:
    """PPO over the batch's responses. Where nothing is left there is no update."""
    if taught is None:
        run.actor.skip(updates(stage))
        return Update([], lambda: {"actor/skipped": 1.0})
    return launch_policy(run, stage, stage.actor_loss, batch, taught, step)


def policy_batch(
    run: Run, config: LossConfig, batch: Batch, samples: list[Sample], temperature: float
) -> Dealt | None:
    """The actor's samples where it trains; None of none. Collective.

    Where the reference of a KL term lies in another way, its log-probs come along.
    """
    if not batch.ranks.any(bool(samples)):
        return None
    made = batch.dealt(samples)
    if isinstance(made, DistributedBatch):
        if config.kl_coef and not _reference(run).layout.deals_as(run.actor.layout):
            found = _launch_reference(run, made, temperature).result()
            for sample, logprobs in zip(made.mine, found, strict=True):
                sample.fields["reference"] = logprobs
            made = batch.dealt(samples)
        made = run.actor.take(made)
    return Dealt(samples, made)


def _reference(run: Run) -> Role:
    return run.roles.get(REFERENCE) or run.actor


def _launch_reference(run: Run, samples: Samples, temperature: float) -> ScoredPass[list[list[float]]]:
    counted = run.count_sequences("reference", samples)
    base = REFERENCE not in run.roles
    with run.phase("reference"):
        return _reference(run).launch_logprobs(samples, temperature=temperature, base=base, counted=counted)


def launch_policy(
    run: Run, stage: PpoStage | PolicyStage, config: LossConfig, batch: Batch, taught: Dealt, step: int
) -> Update:
    """The actor's updates on one batch, `minibatches` an epoch. Collective over its block."""
    temperature, samples = stage.rollout.temperature, taught.where
    loss = make_ppo_loss(config)
    if config.kl_coef and not taught.has("reference"):
        add_field(samples, "reference", _launch_reference(run, samples, temperature), run.actor.layout)
    before: ScoredPass[list[list[float]]] | None = None
    with run.phase("actor_train"):
        parts: Sequence[Samples] = [samples]
        if stage.epochs * stage.minibatches > 1:
            counted = run.count_sequences("actor_old", samples)
            before = run.actor.launch_logprobs(samples, temperature=temperature, counted=counted)
            add_field(samples, "old", before, run.actor.layout)
            seed = seed_for(run.recipe.seed, stage.name, step)
            constant = config.aggregate == "constant"
            parts = minibatches(samples, stage.minibatches, stage.epochs, seed, constant=constant)
        options = {"temperature": temperature, "with_entropy": True}
        launched = launch_parts(run.actor, parts, loss, updates(stage), **options)

    def figures() -> dict[str, float]:
        results = [one.result() for one in launched]
        known = results[0].logprobs if before is None else before.result()
        return trained_figures("actor", results, batch, taught.mine, known)

    return Update([*([] if before is None else [before]), *launched], figures)


def add_field(samples: Samples, name: str, found: ScoredPass[list[list[float]]], layout: Layout) -> None:
    """Give samples the log-probs of a pass, on the ranks that train on them, in `layout`; a list's go without
    elsewhere.
    """
    if isinstance(samples, DistributedBatch):
        samples.add(name, found.there())
        return
    for i, logprobs in found.for_ranks_of(layout).items():
        samples[i].fields[name] = logprobs.tolist()
