"""A value head taught by a generative critic: its judgements of kept states, at the price of a forward pass.

A state is one sequence, of the prompt and the prefix, with one trained place behind it. Those of a response
nest, and so are computed once (training.share_prefixes).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import partial

from genac_megatron import metrics
from genac_megatron.algorithms.losses import make_value_loss
from genac_megatron.critic.judged import JudgedState, read_judged
from genac_megatron.errors import InputError
from genac_megatron.recipe.stages import DistilConfig, ValueStage
from genac_megatron.records import Prompt, Sample
from genac_megatron.stages.heldout import evaluate
from genac_megatron.stages.loop import Loop
from genac_megatron.stages.minibatches import pop_tokens
from genac_megatron.stages.runtime import Run, mean
from genac_megatron.stages.seeds import seed_for
from genac_megatron.tasks.base import Split, Task
from genac_megatron.training.agreement import from_first


@dataclass(frozen=True)
class Lessons:
    """Kept states as sequences, by what they are for; their last place alone is asked about."""

    trained: list[tuple[Sample, JudgedState]]
    heldout: list[tuple[Sample, JudgedState]]


def distil(run: Run, stage: ValueStage, config: DistilConfig, loop: Loop) -> None:
    """Train on `config.batch` states a step. The caller begins and judges the stage. Collective."""
    lessons = read_lessons(run, stage, config)
    if loop.fresh:
        run.progress.note(
            f"[{stage.name}] {len(lessons.trained)} judged states to learn, {len(lessons.heldout)} held out"
        )
    loss = make_value_loss(None, logit=run.critic.shape.logit)
    for step in loop.steps(stage.steps):
        samples = _batch(lessons, config.batch, step, (run.recipe.seed, stage.name))
        with run.phase("critic_train"):
            stats = dict(run.critic.train_step(samples, loss).stats)
        tokens = pop_tokens("critic", stats)
        figures = {**{f"critic/{key}": value for key, value in stats.items()}, **tokens}
        due = stage.eval_every and step % stage.eval_every == 0 and step < stage.steps
        look = partial(_look, run, stage, lessons, step) if due else None
        loop.done(step, figures, look)
    run.note(compare(run, stage, lessons))


def _look(run: Run, stage: ValueStage, lessons: Lessons, step: int) -> dict[str, float]:
    return {**evaluate(run, stage, f"step {step}", step), **compare(run, stage, lessons)}


def _batch(lessons: Lessons, size: int, step: int, seed: tuple[object, ...]) -> list[Sample]:
    """The step's states of passes over all of them, each in an order of its own; weights that sum to 1."""
    count = len(lessons.trained)
    orders: dict[int, list[int]] = {}
    chosen = []
    for at in range((step - 1) * size, step * size):
        turn, place = divmod(at, count)
        if turn not in orders:
            orders[turn] = random.Random(seed_for(*seed, "order", turn)).sample(range(count), count)
        chosen.append(lessons.trained[orders[turn][place]])
    return [_taught(sample, state.value, 1.0 / len(chosen)) for sample, state in chosen]


def _taught(sample: Sample, value: float, weight: float) -> Sample:
    before = [0.0] * (sample.trained - 1)
    fields = {"weights": [*before, weight], "targets": [*before, value], "old": [*before, value]}
    return Sample(sample.tokens, sample.start, {**fields})


def compare(run: Run, stage: ValueStage, lessons: Lessons) -> dict[str, float]:
    """On held-out states: the head against its teacher, and both against the truth where it is known.

    Truth is fresh continuations, their noise taken off; constants are the best ones in hindsight. Collective.
    """
    samples = [sample for sample, _ in lessons.heldout]
    counted = run.count_sequences("value", samples)
    found = run.critic.values(samples, counted=counted)
    own = [min(max(values[-1], 0.0), 1.0) for values in found]
    taught = [state.value for _, state in lessons.heldout]
    centre = mean(taught)
    figures = {
        "distil/mse": mean((a - b) ** 2 for a, b in zip(own, taught, strict=True)),
        "distil/mse_constant": mean((value - centre) ** 2 for value in taught),
    }
    told = f"MSE to the critic {figures['distil/mse']:.4f} (constant {figures['distil/mse_constant']:.4f})"
    known = [place for place, (_, state) in enumerate(lessons.heldout) if len(state.outcomes) > 1]
    if len(known) > 1:
        draws = [list(lessons.heldout[place][1].outcomes) for place in known]
        figures |= {
            "distil/truth_mse": metrics.mse_monte_carlo([own[place] for place in known], draws),
            "distil/truth_mse_teacher": metrics.mse_monte_carlo([taught[place] for place in known], draws),
            "distil/truth_mse_constant": metrics.mse_monte_carlo_constant(draws),
        }
        told += (
            f"; to the truth {figures['distil/truth_mse']:.4f}, the critic's own "
            f"{figures['distil/truth_mse_teacher']:.4f} (constant {figures['distil/truth_mse_constant']:.4f})"
        )
    run.progress.note(f"[{stage.name}] value head on {len(own)} held-out states: {told}")
    return figures


def read_lessons(run: Run, stage: ValueStage, config: DistilConfig) -> Lessons:
    """The file's states, those of some problems apart, and of all that the task holds out. Collective.

    Raises InputError where a state is of no prompt of the task, or nothing is left to learn or to look at.
    """
    states = from_first(lambda: read_judged(config.path))
    return run.together(lambda: _lessons(run, stage, config, states))


def _lessons(run: Run, stage: ValueStage, config: DistilConfig, states: list[JudgedState]) -> Lessons:
    prompts = find_prompts(run.task, states)
    tokenizer, after = run.tokenizers["actor"], run.stop_ids("actor")[0]
    ids = sorted({prompt.id for prompt in prompts if _is_training(prompt)})
    random.Random(seed_for(run.recipe.seed, stage.name, "heldout")).shuffle(ids)
    apart = set(ids[: math.ceil(config.heldout * len(ids))])
    found = Lessons([], [])
    for state, prompt in zip(states, prompts, strict=True):
        prefix = state.ids
        if prefix is None:
            prefix = tuple(tokenizer(state.partial, add_special_tokens=False)["input_ids"])
        # Place j has the value of what stands before it: a token behind the prefix is there for its place.
        sample = Sample([*prompt.ids, *prefix, after], len(prompt.ids))
        kept = prompt.id in apart or not _is_training(prompt)
        (found.heldout if kept else found.trained).append((sample, state))
    if not found.trained or not found.heldout:
        raise InputError(
            f"{len(found.trained)} states to learn and {len(found.heldout)} held out, of {len(ids)} training "
            "problems",
            where=config.path,
            way_out="ask about more problems, or change distil.heldout",
        )
    return found


def find_prompts(task: Task, states: list[JudgedState]) -> list[Prompt]:
    """Each state's prompt in the task, by its id, else by its problem's text. Raises InputError."""
    by_id: dict[str, Prompt] = {}
    by_text: dict[str, Prompt] = {}
    wanted = {state.problem for state in states if state.prompt_id is None}
    if wanted:
        _search(task, wanted, by_text)
    found = []
    for state in states:
        prompt = by_text.get(state.problem)
        if state.prompt_id is not None:
            if state.prompt_id not in by_id:
                by_id[state.prompt_id] = _named(task, state)
            prompt = by_id[state.prompt_id]
        if prompt is None or prompt.problem != state.problem:
            raise InputError(
                f"it is about no problem of the task: {state.problem[:60]!r}",
                where=state.where,
                way_out="train with the task, its settings and the seed that it was made with",
            )
        found.append(prompt)
    return found


def _is_training(prompt: Prompt) -> bool:
    return prompt.id.split("/")[-2] == "train"  # of a mixture the part's name comes before


def _named(task: Task, state: JudgedState) -> Prompt:
    try:
        return task.named(str(state.prompt_id))
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(
            f"the task has no prompt {state.prompt_id!r}",
            where=state.where,
            way_out="train with the task, its settings and the seed that it was made with",
        ) from error


def _search(task: Task, wanted: set[str], found: dict[str, Prompt]) -> None:
    """Prompts by their problem, held-out ones first, until all wanted are there."""
    splits: tuple[tuple[Split, int], ...] = (("heldout", task.heldout_size), ("train", task.train_size))
    for split, size in splits:
        for index in range(size):
            if len(found) == len(wanted):
                return
            prompt = task.prompt(split, index)
            if prompt.problem in wanted:
                found.setdefault(prompt.problem, prompt)
