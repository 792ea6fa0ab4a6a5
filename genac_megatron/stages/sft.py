"""Supervised fine-tuning of one role, loss on the completion only (method §4)."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

from genac_megatron.algorithms.losses import make_sft_loss
from genac_megatron.critic import traces
from genac_megatron.critic.states import cut_states
from genac_megatron.errors import InputError, on_all_ranks
from genac_megatron.observe.runinfo import write_text_atomic
from genac_megatron.recipe.schema import SftStage
from genac_megatron.records import Judgement, Sample, State
from genac_megatron.stages.batch import Batch, play, prefixed, supervised, train_prompts
from genac_megatron.stages.gates import check_sft_gate
from genac_megatron.stages.heldout import actor_generator, evaluate, judge_for
from genac_megatron.stages.loop import Loop
from genac_megatron.stages.parity import measure_judgements
from genac_megatron.stages.rollouts import continue_states
from genac_megatron.stages.room import check_chats, listed
from genac_megatron.stages.runtime import Run, mean
from genac_megatron.stages.seeds import seed_for
from genac_megatron.stages.sft_chats import chat_samples, used_conversations
from genac_megatron.stages.sft_heldout import Watch, hold_out
from genac_megatron.training.agreement import from_first

SPARE = 2.0  # states made per trace wanted: short responses, balancing and rejection take some


def sft(run: Run, stage: SftStage, loop: Loop) -> None:
    """At most `epochs` passes over the data in batches; a critic is then held to its parse rate."""
    role = run.roles[stage.role]
    if loop.fresh:
        run.at.forget_critic()
        run.at.heldout = None
        if stage.start_from is not None:
            run.copy_weights(stage.start_from, stage.role)
        if stage.data == "traces":
            run.publish("actor", *(["critic"] if stage.teacher.kind == "self" else []))
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
    for step in loop.steps(watch.last if watch is not None else total):
        epoch, index = divmod(step - 1, per_epoch)
        order = random.Random(seed_for(run.recipe.seed, stage.name, epoch)).sample(samples, len(samples))
        batch = supervised(order[index * stage.batch : (index + 1) * stage.batch])
        with run.phase(f"{stage.role}_train"):
            stats = dict(role.train_step(batch, loss).stats)
        tokens = {f"tokens/{stage.role}_train": stats.pop("tokens")}
        seen = watch.look(step, loop) if watch is not None else {}
        loop.done(step, {**prefixed(stage.role, stats), **seen, **tokens}, None)
    return loop.total, watch.settle(loop.total) if watch is not None else {}


def kept_data(run: Run, stage: SftStage, *, fresh: bool) -> list[Sample]:
    """The stage's samples, made once and kept in the run folder: a resume trains on the same ones.

    A teacher asked again would answer otherwise, a critic that is trained by now judge otherwise.
    """
    path = run.folder.path / "data" / f"{stage.name}.jsonl"
    if not fresh:
        if (kept := from_first(lambda: _read_samples(path))) is not None:
            return kept
        run.progress.note(f"[{stage.name}] warning: {path} is gone: its samples are made again")
    samples = make_data(run, stage)
    run.together(lambda: _write_samples(path, samples) if run.world.rank == 0 else None)
    return samples


def check_room(stage: SftStage, samples: Sequence[Sample], positions: int) -> None:
    """Raise InputError where a sample is longer than the role's model has positions."""
    lengths = [len(sample.tokens) for sample in samples]
    long = [index for index, length in enumerate(lengths) if length > positions]
    if long:
        error = InputError(
            f"{len(long)} of {len(samples)} samples do not fit into the {positions} positions of "
            f"{stage.role}'s model; the first, number {long[0] + 1}, has {lengths[long[0]]} tokens",
            where=f"stage {stage.name}",
            way_out="leave them out or shorten them, or use a model with more positions (max_positions)",
        )
        raise on_all_ranks(error)


def with_room(run: Run, stage: SftStage, samples: list[Sample], positions: int) -> list[Sample]:
    """Traces that fit into the critic's model, told where not all do; all of them where none does."""
    kept = [sample for sample in samples if len(sample.tokens) <= positions]
    if not kept or len(kept) == len(samples):
        return samples
    run.progress.note(
        f"[{stage.name}] warning: {len(samples) - len(kept)} of {len(samples)} traces do not fit into the "
        f"{positions} positions of {stage.role}'s model and are left out"
    )
    return kept


def _read_samples(path: Path) -> list[Sample] | None:
    """Raises InputError where the file is not whole: a copy that was cut short."""
    if not path.exists():
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        rows = [json.loads(line) for line in lines]
        samples = [Sample(row["tokens"], row["start"], source=row.get("source", "")) for row in rows]
        count = rows[0].get("of", len(rows))  # earlier versions did not say
    except (ValueError, LookupError, TypeError):
        samples, count = [], 1
    if len(samples) != count:
        raise InputError(
            "it does not hold the samples that the stage was begun with, or not all of them",
            where=str(path),
            way_out="copy the whole run folder again, or begin a new run (name=...)",
        )
    return samples


def _write_samples(path: Path, samples: list[Sample]) -> None:
    rows = [{"tokens": sample.tokens, "start": sample.start, "source": sample.source} for sample in samples]
    rows[0]["of"] = len(rows)
    write_text_atomic(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def make_data(run: Run, stage: SftStage) -> list[Sample]:
    """The stage's samples, the same on every rank."""
    if stage.data == "jsonl":
        return run.together(lambda: jsonl_samples(run, stage))
    if stage.data == "demonstrations":
        return run.together(lambda: demonstrations(run, stage))
    return critic_traces(run, stage)


def demonstrations(run: Run, stage: SftStage) -> list[Sample]:
    """The exact teacher's responses to training prompts."""
    teacher = run.task.teacher
    if teacher is None:
        raise InputError(
            f"the task {run.recipe.task.kind} has no teacher that writes demonstrations",
            where=f"stage {stage.name}",
            way_out="give data: jsonl with a path, or start from a model that can already do the task",
        )
    samples = []
    for index in range(stage.made):
        prompt = run.task.prompt("train", run.task.train_index(run.recipe.seed, index))
        rng = random.Random(seed_for(run.recipe.seed, stage.name, "demonstration", index))
        text = teacher.demonstrate(prompt, rng)
        samples.append(traces.to_sample(run.tokenizers[stage.role], prompt.ids, text, prompt.id))
    return samples


def critic_traces(run: Run, stage: SftStage) -> list[Sample]:
    """Traces over states of the current actor, balanced by outcome and position."""
    assert run.icc is not None
    per_prompt = stage.rollout.samples * (run.recipe.judging.states.max_states - 1) + 1
    wanted = math.ceil(SPARE * stage.made / per_prompt)
    prompts = train_prompts(run, 0, wanted)
    batch = play(run, prompts, stage.rollout, (run.recipe.seed, stage.name, "states"), judged=False)
    states = run.together(lambda: traces.balance(batch_states(run, batch), stage.made, run.recipe.seed))
    context = traces.TraceContext(
        tokenizer=run.tokenizers[stage.role],
        actor_tokenizer=run.tokenizers["actor"],
        judging=run.recipe.judging,
        icc=run.icc,
        limit=stage.rollout.max_new_tokens,
        seed=run.recipe.seed,
    )
    kind = stage.teacher.kind
    if kind == "self":
        samples = own_traces(run, stage, states)
    elif kind == "endpoint":
        mine = run.together(lambda: traces.endpoint_samples(run.share(states), stage.teacher, context))
        samples = run.gather(mine)
    else:
        samples = run.together(lambda: exact_traces(run, stage, states, context))
    if not samples:
        what = f"the {kind} teacher gave no usable trace"
        raise on_all_ranks(InputError(what, where=f"stage {stage.name}"))
    run.progress.note(f"[{stage.name}] {len(samples)} traces from {len(batch.rollouts)} responses")
    return samples


def batch_states(run: Run, batch: Batch) -> list[State]:
    """Every state of every rollout of a batch."""
    config, tokenizer = run.recipe.judging.states, run.tokenizers["actor"]
    return [state for rollout in batch.rollouts for state in cut_states(rollout, tokenizer, config)]


def exact_traces(
    run: Run, stage: SftStage, states: list[State], context: traces.TraceContext
) -> list[Sample]:
    """The task's exact teacher on every state."""
    if run.task.teacher is None:
        raise InputError(
            f"the task {run.recipe.task.kind} has no exact teacher",
            where=f"stage {stage.name}, teacher.kind",
            way_out="use teacher.kind: self or endpoint",
        )
    chosen = stage.teacher
    return traces.exact_samples(states, run.task.teacher, context, chosen.p_bar_range, chosen.writes)


def own_traces(run: Run, stage: SftStage, states: list[State]) -> list[Sample]:
    """The critic's own judgements where they agree with Monte-Carlo values (rejection)."""
    mine = run.share(states)
    generator = actor_generator(run, stage, (run.recipe.seed, stage.name, "monte carlo"))
    outcomes = run.generating(lambda: continue_states(generator, mine, stage.teacher.continuations))
    values = [mean(o) for o in outcomes]
    judge = judge_for(run, stage.rollout.max_new_tokens, (run.recipe.seed, stage.name, "own"))

    async def judge_all() -> list[Judgement]:
        return list(await asyncio.gather(*(judge.judge(state) for state in mine)))

    judgements = run.generating(lambda: asyncio.run(judge_all()))
    run.spend("rollout", "actor")
    run.spend("judge", "critic")
    run.note(measure_judgements(run, judgements))
    kept = traces.accept(judgements, values, stage.teacher.tolerance)
    return run.gather(traces.own_samples(kept))


def jsonl_samples(run: Run, stage: SftStage) -> list[Sample]:
    """Conversations, one {"messages": [...]} a line; loss on the assistant's turns that the stage learns."""
    tokenizer, most = run.tokenizers[stage.role], run.roles[stage.role].shape.max_positions
    used, count = used_conversations(stage)
    samples: list[Sample] = []
    long: list[str] = []
    for chat in used:
        made = chat_samples(tokenizer, chat, stage)
        length = max((len(sample.tokens) for sample in made), default=0)
        if length > most:
            long.append(f"{chat.where}: {length} tokens, in {most} positions")
        else:
            samples += made
    check_chats(stage, long)
    turns = "" if stage.turns == "last" else f", {len(samples)} turns of the assistant's"
    left_out = f"; {len(long)} are too long and left out: {listed(long)}" if long else ""
    run.progress.note(f"[{stage.name}] {len(used)} of {count} conversations{turns}{left_out}")
    if not samples:
        raise InputError("no conversation is left to train on", where=f"stage {stage.name}")
    return samples
