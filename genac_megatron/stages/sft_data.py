"""What an SFT stage trains on: samples made once, of one source or several, and kept in the run folder."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from genac_megatron.critic import traces
from genac_megatron.critic.balance import balance, scarce_part, shortest_and_longest
from genac_megatron.critic.states import cut_states
from genac_megatron.critic.trace_rows import file_samples, read_traces
from genac_megatron.errors import InputError, on_all_ranks
from genac_megatron.observe.runinfo import write_text_atomic
from genac_megatron.recipe.schema import Recipe, ReinforceStage, SftStage, StageConfig
from genac_megatron.recipe.source_rules import replayed
from genac_megatron.recipe.stages import named_sources
from genac_megatron.records import Sample, State
from genac_megatron.stages.batch import Batch, gathered_batch, play
from genac_megatron.stages.monte_carlo import monte_carlo_values, own_traces
from genac_megatron.stages.played import Player, played_samples
from genac_megatron.stages.room import ROUNDS, SPARE, check_chats, listed
from genac_megatron.stages.runtime import Run
from genac_megatron.stages.seeds import seed_for
from genac_megatron.stages.sft_chats import chat_samples, used_conversations
from genac_megatron.stages.sft_orders import WHOLE, Order, order_prompts, orders
from genac_megatron.stages.sft_pool import MAKING, compacted, forget, held_once
from genac_megatron.stages.strengths import Cast
from genac_megatron.tasks.base import Teacher
from genac_megatron.tasks.conversations import Conversation
from genac_megatron.tasks.tokenizer import chat_ids
from genac_megatron.training.agreement import from_first


def kept_data(run: Run, stage: SftStage, *, fresh: bool) -> list[Sample]:
    """The stage's samples, made once and kept in the run folder: a resume trains on the same ones.

    A teacher asked again would answer otherwise, a critic that is trained by now judge otherwise.
    """
    path = kept_path(run.folder.path, stage)
    if not fresh:
        kept = run.together(lambda: _read_samples(path) if run.world.rank == 0 else None)
        if from_first(lambda: kept is not None):
            return held_once(run, kept or [], stage.name)
        run.progress.note(f"[{stage.name}] warning: {path} is gone: its samples are made again")
    samples = make_data(run, stage)
    run.together(lambda: _write_samples(path, samples) if run.world.rank == 0 else None)
    held = held_once(run, samples if run.world.rank == 0 else [], stage.name)
    forget(run, stage.name)
    return held


def kept_path(folder: Path, stage: SftStage) -> Path:
    """Where a stage's samples are kept in a run's folder."""
    return folder / "data" / f"{stage.name}.jsonl"


def unmade(recipe: Recipe, folder: Path, at: Mapping[str, Any] | None) -> list[StageConfig]:
    """The stages whose SFT samples, or those for their replay, a run still has to make that goes on from `at`
    (a checkpoint's; None: from the beginning). Inside a stage they are made again where they are gone.
    """
    if at is None:
        return recipe.stages
    left = recipe.stages[at["stage"] :]
    if left and at["step"]:
        first = left[0]
        made = replayed(first) if isinstance(first, ReinforceStage) and first.replay is not None else first
        if not isinstance(made, SftStage) or kept_path(folder, made).exists():
            return left[1:]
    return left


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


def pass_order(
    samples: Sequence[Sample], phases: Mapping[str, tuple[float, float]], seed: int
) -> list[Sample]:
    """Samples in the order of one pass: shuffled; those of a source with a phase lie evenly over its part of
    a line from 0 to 1, along which the pass goes.
    """
    rng = random.Random(seed)
    shuffled = rng.sample(list(samples), len(samples))
    if all(phase == WHOLE for phase in phases.values()):
        return shuffled
    placed = []
    for sample in shuffled:
        begin, end = phases.get(sample.part, WHOLE)
        placed.append((begin + (end - begin) * rng.random(), sample))
    return [sample for _, sample in sorted(placed, key=lambda both: both[0])]


def phases_of(stage: SftStage) -> dict[str, tuple[float, float]]:
    """By source, its part of the pass."""
    return {name: source.phase for name, source in named_sources(stage.sources)}


# --- in the run folder ---------------------------------------------------------------------------


def _read_samples(path: Path) -> list[Sample] | None:
    """Raises InputError where the file is not whole: a copy that was cut short."""
    if not path.exists():
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        rows = [json.loads(line) for line in lines]
        samples = [_sample(row) for row in rows]
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


def _sample(row: dict[str, Any]) -> Sample:
    """Raises ValueError where a row's fields are not one figure per trained token."""
    given = row.get("fields", {}).items()
    fields: dict[str, Sequence[float]] = {name: [float(value) for value in values] for name, values in given}
    spans = tuple((int(begin), int(end)) for begin, end in row.get("spans", ()))
    sample = Sample(row["tokens"], row["start"], fields, spans=spans)
    if any(len(values) != sample.trained for values in fields.values()):
        raise ValueError("fields")
    sample.source, sample.part = str(row.get("source", "")), str(row.get("part", ""))
    sample.problem = str(row.get("problem", ""))  # earlier versions did not keep it, and held out by source
    return sample


def _write_samples(path: Path, samples: list[Sample]) -> None:
    rows = []
    for sample in samples:
        row: dict[str, object] = {"tokens": list(sample.tokens), "start": sample.start}
        row["source"] = sample.source
        if sample.spans:
            row["spans"] = sample.spans
        if sample.fields:
            row["fields"] = {name: list(values) for name, values in sample.fields.items()}
        if sample.part:
            row["part"] = sample.part
        if sample.problem:
            row["problem"] = sample.problem
        rows.append(row)
    rows[0]["of"] = len(rows)
    write_text_atomic(path, "".join(f"{json.dumps(row)}\n" for row in rows))


# --- made ----------------------------------------------------------------------------------------


def make_data(run: Run, stage: SftStage) -> list[Sample]:
    """The stage's samples, the same on every rank."""
    if stage.data == "jsonl":
        return jsonl_samples(run, stage)
    samples: list[Sample] = []
    for order in orders(run, stage):
        made = demonstrations(run, order) if order.data == "demonstrations" else critic_traces(run, order)
        if order.name and len(made) < order.size:
            run.progress.note(
                f"[{order.label}] {len(made)} of {order.size} samples: its share is smaller than asked for"
            )
        samples += order.marked(made, run.tokenizers[stage.role])
    return samples


def demonstrations(run: Run, order: Order) -> list[Sample]:
    """The exact teacher's responses to training prompts, as the role reads them."""
    teacher = order.task.teacher
    if teacher is None:
        error = InputError(
            f"the task {order.kind} has no teacher that writes demonstrations",
            where=order.where,
            way_out="give data: jsonl with a path, or start from a model that can already do the task",
        )
        raise on_all_ranks(error)
    tokenizer, alike = run.tokenizers[order.role], reads_alike(run.recipe, order.role)
    if teacher.plays:
        return dealt(run, order, order.size, partial(_played, run, order, teacher, alike))

    def write(places: range) -> list[Sample]:
        samples = []
        for place, prompt in zip(*order_prompts(run, order, places), strict=True):
            rng = random.Random(seed_for(*order.seed, "demonstration", place))
            ids = prompt.ids
            if not alike:
                ids = chat_ids(tokenizer, prompt.messages, prompt.tools, where=prompt.where)
            samples.append(traces.to_sample(tokenizer, ids, teacher.demonstrate(prompt, rng), prompt))
        return samples

    return dealt(run, order, order.size, write)


def _played(run: Run, order: Order, teacher: Teacher, alike: bool, places: range) -> list[Sample]:
    """Conversations of the teacher's with the recipe's environment."""
    if run.environment is None or not alike:
        raise InputError(
            f"{order.role} reads chats otherwise than the actor, in whose ids conversations are made",
            where=order.where,
            way_out="give both the same tokenizer and chat template, or start from the actor (start_from)",
        )
    player = Player(run.tokenizers[order.role], order.task, order.rollout, order.seed, teacher)
    return played_samples(
        player, run.environment, [*zip(*order_prompts(run, order, places), strict=True)], order.where
    )


def dealt(run: Run, order: Order, count: int, make: Callable[[range], list[Sample]]) -> list[Sample]:
    """Samples that each rank makes a part of, by number and in that order on all. Collective."""
    return held_once(run, run.together(lambda: make(run.places(count))), order.file)


def reads_alike(recipe: Recipe, role: str) -> bool:
    """Whether a role reads chats as the actor does, whose ids prompts have."""
    speaker = recipe.roles.get("actor") or next(iter(recipe.roles.values()))
    mine, its = (
        (model.tokenizer or model.hf, model.chat_template_kwargs, model.chat_template)
        for model in (recipe.roles[role].model, speaker.model)
    )
    return mine == its


def critic_traces(run: Run, order: Order) -> list[Sample]:
    """Traces over states of the current actor, balanced by outcome and position; of each of the stage's
    actors as many, where it has some.
    """
    if not order.actors or order.teacher.kind == "file":
        return _of_actor(run, order)
    assert order.played_in is not None
    cast = Cast(run, order.played_in, order.actors)
    samples: list[Sample] = []
    for place, actor in enumerate(order.actors):
        size = (place + 1) * order.size // len(order.actors) - place * order.size // len(order.actors)
        if size:
            part = replace(order, size=size, seed=(*order.seed, actor.name), actors=())
            with cast.playing(actor):
                samples += _of_actor(run, part)
    return samples


def _of_actor(run: Run, order: Order) -> list[Sample]:
    assert run.icc is not None
    context = traces.TraceContext(
        tokenizer=run.tokenizers[order.role],
        actor_tokenizer=run.tokenizers["actor"],
        judging=run.recipe.judging,
        icc=run.icc,
        limit=order.rollout.max_new_tokens,
        # Prompts of two sources may have the same ids.
        seed="/".join(map(str, order.seed)) if order.name else run.recipe.seed,
    )
    teacher = order.teacher
    if teacher.kind == "file":
        return of_file(run, order)
    if teacher.kind == "self":
        drawn = Drawn(run, order)
        samples = own_traces(run, order, drawn.next)
        drawn.tell_lengths(drawn.asked, drawn.span)
        told = drawn.responses
    else:
        states, told = drawn_states(run, order)
        samples = taught(run, order, states, context)
    if not samples:
        what = f"the {teacher.kind} teacher gave no usable trace"
        way_out = ""
        if teacher.kind == "self":
            way_out = (
                "more states (rollout.prompts, teacher.rounds), longer judgements (judging.max_new_tokens); "
                "a model that cannot judge needs another teacher (docs/traces.md)"
            )
        raise on_all_ranks(InputError(what, where=order.where, way_out=way_out))
    run.progress.note(f"[{order.label}] {len(samples)} traces from {told} responses")
    return samples


def of_file(run: Run, order: Order) -> list[Sample]:
    """The first `order.size` traces that `genac traces` has written into a file. Collective; raises
    InputError.
    """
    path = str(order.teacher.path)
    rows = run.together(lambda: read_traces(path))

    def write(places: range) -> list[Sample]:
        mine = rows[places.start : places.stop]
        return file_samples(mine, run.tokenizers[order.role], run.recipe.judging, order.teacher)

    made = dealt(run, order, min(order.size, len(rows)), write)
    if not made:
        error = InputError(
            "no trace in it parses and fits into judging.max_new_tokens",
            where=path,
            way_out="raise judging.max_new_tokens, or ask for other traces (docs/traces.md)",
        )
        raise on_all_ranks(error)
    run.progress.note(f"[{order.label}] {len(made)} of {len(rows)} traces of {path} (size {order.size})")
    return made


def taught(run: Run, order: Order, states: list[State], context: traces.TraceContext) -> list[Sample]:
    """The samples of a teacher who is asked once about each state. Collective."""
    chosen = order.teacher
    if chosen.kind == "endpoint":
        mine = run.together(lambda: traces.endpoint_samples(run.share(states), chosen, context))
        return run.gather(compacted(mine))
    teacher = order.task.teacher
    if chosen.kind == "monte_carlo":
        values = run.gather(monte_carlo_values(run, order, run.share(states)))
        reasoner = None if chosen.writes == "score" else teacher

        def of_values(places: range) -> list[Sample]:
            at = slice(places.start, places.stop)
            return traces.monte_carlo_samples(states[at], values[at], reasoner, context)

        return dealt(run, order, len(states), of_values)
    if teacher is None:
        error = InputError(
            f"the task {order.kind} has no exact teacher",
            where=f"{order.where}, teacher.kind",
            way_out="use teacher.kind: self, monte_carlo or endpoint",
        )
        raise on_all_ranks(error)

    def write(places: range) -> list[Sample]:
        mine = states[places.start : places.stop]
        return traces.exact_samples(mine, teacher, context, chosen.p_bar_range, chosen.writes)

    return dealt(run, order, len(states), write)


def drawn_states(run: Run, order: Order) -> tuple[list[State], int]:
    """(at most `order.size` balanced states of the actor, from how many responses).

    Of a source whose responses are shorter than was reckoned, more are drawn: its share is to be what the
    recipe says.
    """
    drawn = Drawn(run, order)
    pool = drawn.pool(order.size)
    chosen = drawn.balanced(pool, order.size)
    for _ in range(ROUNDS - 1 if order.name else 0):
        if len(chosen) >= order.size:
            break
        pool += drawn.pool(order.size - len(chosen))
        chosen = drawn.balanced(pool, order.size)
    drawn.tell_lengths(chosen, shortest_and_longest(pool))
    return chosen, drawn.responses


class Drawn:
    """States of the actor's responses to an order's prompts, one batch of them after another. Collective."""

    def __init__(self, run: Run, order: Order) -> None:
        self.run, self.order = run, order
        self.responses, self.prompts = 0, 0
        self.asked, self.span = list[State](), (0, 0)  # what `next` gave, and the lengths that it was from

    def pool(self, wanted: int) -> list[State]:
        """All states of as many responses as should give `wanted` and some to spare."""
        run, order, states = self.run, self.order, self.run.recipe.judging.states
        per_prompt = order.rollout.samples * (states.max_states - 1) + 1
        count = math.ceil(SPARE * wanted / per_prompt)
        places = range(self.prompts, self.prompts + count)
        prompts = run.together(lambda: order_prompts(run, order, places)[1])
        # Prompts that come again, in a later batch, are played with other seeds.
        seed = (*order.seed, "states") if self.prompts == 0 else (*order.seed, "states", self.prompts)
        self.prompts += count
        batch = gathered_batch(run, play(run, prompts, order.rollout, seed, judged=False))
        self.responses += len(batch.rollouts)
        return run.together(lambda: batch_states(run, batch))

    def balanced(self, pool: list[State], wanted: int) -> list[State]:
        """At most `wanted` of them, balanced."""
        order, seed = self.order, self.run.recipe.seed
        return self.run.together(lambda: balance(pool, wanted, seed, order.length_buckets))

    def next(self, wanted: int) -> list[State]:
        """At most `wanted` balanced states of further responses."""
        pool = self.pool(wanted)
        shortest, longest = shortest_and_longest(pool)
        self.span = min(self.span[0] or shortest, shortest), max(self.span[1], longest)
        chosen = self.balanced(pool, wanted)
        self.asked += chosen
        return chosen

    def tell_lengths(self, chosen: Sequence[State], span: tuple[int, int]) -> None:
        """Say where states of a part of the lengths are too few, and others have their places."""
        buckets = self.order.length_buckets
        found = scarce_part(chosen, span, buckets)
        if found is not None:
            part, (shortest, longest), count = found
            self.run.progress.note(
                f"[{self.order.label}] {count} of {len(chosen)} states are of {shortest} to {longest} "
                f"tokens, part {part} of {buckets} (length_buckets), where an even share is "
                f"{len(chosen) // buckets}: there are no more, others have their places"
            )


def batch_states(run: Run, batch: Batch) -> list[State]:
    """Every state of every rollout of a batch."""
    config, tokenizer = run.recipe.judging.states, run.tokenizers["actor"]
    return [state for rollout in batch.rollouts for state in cut_states(rollout, tokenizer, config)]


def jsonl_samples(run: Run, stage: SftStage) -> list[Sample]:
    """Conversations, one {"messages": [...]} a line; loss on the assistant's turns that the stage learns.

    Each rank makes tokens of its share. Collective.
    """
    used, count = run.together(lambda: used_conversations(stage))
    mine = [used[place] for place in run.places(len(used))]
    made, told = run.together(lambda: _made_of(run, stage, mine))
    samples = held_once(run, made, f"{MAKING}{stage.name}-chats")
    long = [words for part in run.gather([told]) for words in part]
    run.together(lambda: check_chats(stage, long))
    turns = "" if stage.turns == "last" else f", {len(samples)} turns of the assistant's"
    left_out = f"; {len(long)} are too long and left out: {listed(long)}" if long else ""
    run.progress.note(f"[{stage.name}] {len(used)} of {count} conversations{turns}{left_out}")
    if not samples:
        error = InputError(
            "no conversation is left to train on",
            where=f"stage {stage.name}",
            way_out="give a longer file, shorter conversations, or a model with more positions",
        )
        raise on_all_ranks(error)
    return samples


def _made_of(run: Run, stage: SftStage, chats: Sequence[Conversation]) -> tuple[list[Sample], list[str]]:
    """(samples of conversations, words about those that are too long)."""
    tokenizer, most = run.tokenizers[stage.role], run.roles[stage.role].shape.max_positions
    samples: list[Sample] = []
    long: list[str] = []
    for chat in chats:
        made = chat_samples(tokenizer, chat, stage)
        length = max((len(sample.tokens) for sample in made), default=0)
        if length > most:
            long.append(f"{chat.where}: {length} tokens, in {most} positions")
        else:
            samples += compacted(made)
    return samples, long
