"""Supervised fine-tuning of one role, loss on the completion only (method §4)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from genac_megatron.algorithms.losses import make_sft_loss
from genac_megatron.recipe.schema import SftStage
from genac_megatron.records import Sample
from genac_megatron.stages.batch import supervised
from genac_megatron.stages.dealt import Dealt, placed
from genac_megatron.stages.fallback import keep_weights
from genac_megatron.stages.figures import prefixed
from genac_megatron.stages.gates import check_sft_gate
from genac_megatron.stages.heldout import evaluate
from genac_megatron.stages.loop import Loop
from genac_megatron.stages.merging import merge_due
from genac_megatron.stages.minibatches import pop_tokens
from genac_megatron.stages.ranks import ALONE, EVERYONE, Ranks
from genac_megatron.stages.runtime import Run
from genac_megatron.stages.seeds import seed_for
from genac_megatron.stages.sft_data import check_room, kept_data, pass_order, phases_of, with_room
from genac_megatron.stages.sft_heldout import Watch, hold_out
from genac_megatron.training.distributed_batch import distributed


def sft(run: Run, stage: SftStage, loop: Loop) -> None:
    """At most `epochs` passes over the data in batches; a critic is then held to its parse rate."""
    role = run.roles[stage.role]
    if loop.fresh:
        run.at.forget_critic()
        run.at.heldout = None
        if stage.start_from is not None:
            run.copy_weights(stage.start_from, stage.role)
        if stage.data == "traces":
            run.publish("actor", *(["critic"] if stage.asks_itself else []))
            evaluate(run, stage, "start", 0, critic=False)  # seeds p_bar
    with run.phase("data"):
        samples = kept_data(run, stage, fresh=loop.fresh)
    if stage.data == "traces":
        samples = with_room(run, stage, samples, role.shape.max_positions)
    check_room(stage, samples, role.shape.max_positions)
    total, learnt = _train(run, stage, loop, samples)
    run.publish(stage.role)
    if stage.role == "actor":
        run.icc = None  # the actor is another one now: p_bar is seeded anew
        evaluate(run, stage, "end", total, critic=False)
        check_sft_gate(stage, learnt)
    elif stage.role == "critic":
        run.publish("actor")
        check_sft_gate(stage, {**evaluate(run, stage, "end", total, monte_carlo=True), **learnt})
        keep_weights(run, stage, loop, total)
    else:
        check_sft_gate(stage, learnt)


def _train(run: Run, stage: SftStage, loop: Loop, samples: list[Sample]) -> tuple[int, dict[str, float]]:
    """The stage's steps that are left: the last one's number, and the held-out figure they end with."""
    role, loss = run.roles[stage.role], make_sft_loss()
    held: list[Sample] = []
    if stage.heldout is not None:
        seed = seed_for(run.recipe.seed, stage.name, "heldout")
        samples, held = hold_out(samples, stage.heldout, f"stage {stage.name}", seed)
    per_epoch = math.ceil(len(samples) / stage.batch)
    total = per_epoch * stage.epochs
    run.serving.turns.train()  # a resumed run has brought servers their weights, and asks them nothing here
    role.begin_stage(stage.optimizer, total)
    watch = Watch(run, stage, held, total) if stage.heldout is not None else None
    if watch is not None:
        watch.begin()
    loop.restore_optimizers()
    order, ordered = samples, -1
    for step in loop.steps(watch.last if watch is not None else total):
        epoch, index = divmod(step - 1, per_epoch)
        if epoch != ordered:
            order = pass_order(samples, phases_of(stage), seed_for(run.recipe.seed, stage.name, epoch))
            ordered = epoch
        batch = _share(run, order[index * stage.batch : (index + 1) * stage.batch])
        with run.phase(f"{stage.role}_train"):
            result = role.train_step(batch.where, loss)
        stats = dict(result.stats)
        tokens = pop_tokens(stage.role, stats)
        merged = merge_due(run, stage.role, step=step)
        seen = watch.look(step, loop) if watch is not None else {}
        parts = part_figures(stage.role, batch.mine, result.logprobs, _ranks(run))
        figures = {**prefixed(stage.role, stats), **parts}
        loop.done(step, {**figures, **merged, **seen, **tokens}, None)
    return loop.total, watch.settle(loop.total) if watch is not None else {}


def _ranks(run: Run) -> Ranks:
    return ALONE if run.world.size == 1 else EVERYONE


def _share(run: Run, batch: Sequence[Sample]) -> Dealt:
    """A step's samples, each on one rank, those of one source together: they begin alike. Collective."""
    alike = sorted(range(len(batch)), key=lambda i: batch[i].source)
    here = sorted(alike[place] for place in run.places(len(batch)))
    mine = placed(supervised([batch[i] for i in here], _ranks(run)), here)
    return Dealt(mine, mine if run.world.size == 1 else distributed(mine))


def part_figures(
    role: str, batch: Sequence[Sample], logprobs: Sequence[Sequence[float]], ranks: Ranks = ALONE
) -> dict[str, float]:
    """By source, nats a token of those that carry loss, and how many do; nothing where there is no source.

    Of the samples that all `ranks` have.
    """
    sums: dict[str, list[float]] = {}
    for sample, values in zip(batch, logprobs, strict=True):
        if sample.part:
            nats = sums.setdefault(sample.part, [0.0, 0.0])
            for weight, value in zip(sample.fields["weights"], values, strict=True):
                nats[0] -= value if weight else 0.0
                nats[1] += 1.0 if weight else 0.0
    names = sums if ranks is ALONE else ranks.words(sums)
    totals = ranks.totals(*(x for name in names for x in sums.get(name, (0.0, 0.0))))
    found = dict(zip(names, zip(totals[::2], totals[1::2], strict=True), strict=True))
    figures = {f"{role}/nll_{name}": nats / count for name, (nats, count) in found.items() if count}
    return figures | {f"{role}/tokens_{name}": count for name, (_, count) in found.items()}
