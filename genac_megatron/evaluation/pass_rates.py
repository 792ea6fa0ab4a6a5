"""`genac evaluate pass-rates`: how often the recipe's actor solves each question that is trained on.

    OUT/
        pass_rates.jsonl   per question: its digest (`question`), its text, outcomes of its samples, their
                           mean (`pass_rate`), whose they are (`actor`, and the digest of its `weights`)
        manifest.json      what made it, and figures

`task.filter.pass_rates` and `task.order` read it. Every question that is done is kept: a command that was
killed goes on (evaluation/parts.py).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genac_megatron import __version__
from genac_megatron.errors import InputError, on_all_ranks
from genac_megatron.evaluation.parts import Parts, Row
from genac_megatron.evaluation.session import (
    answered_by,
    graded_by,
    identity,
    made_from,
    rollout_config,
    stop_if_asked,
    with_role,
)
from genac_megatron.recipe.data import FilterConfig
from genac_megatron.recipe.tasks import MixtureTask, QuestionsBlock, TaskConfig
from genac_megatron.records import Prompt
from genac_megatron.stages.rollouts import Generator
from genac_megatron.stages.session import session
from genac_megatron.tasks.filters import PASS_RATES, problem_digest
from genac_megatron.training.agreement import from_first

if TYPE_CHECKING:
    from genac_megatron.recipe.schema import Recipe, RolloutConfig
    from genac_megatron.stages.runtime import Run
    from genac_megatron.stages.stopping import StopFlag
    from genac_megatron.training.layout import World

SHOWN_TEXT = 200  # characters of a question, for people


@dataclass(frozen=True)
class RateOptions:
    """What is measured. None: the recipe's own."""

    out: Path
    checkpoint: str | None = None
    samples: int = 8
    prompts: int | None = None  # the first so many
    max_new_tokens: int | None = None
    temperature: float | None = None
    chunk: int = 32  # questions of a rank at a time, and lost where it is killed


def unfiltered(task: TaskConfig) -> TaskConfig:
    """The task with all its questions, whatever pass rates it has had so far."""
    if isinstance(task, MixtureTask):
        parts = [part.model_copy(update={"task": unfiltered(part.task)}) for part in task.parts]
        return task.model_copy(update={"parts": parts})
    if not isinstance(task, QuestionsBlock):
        return task
    rates = {key: FilterConfig.model_fields[key].default for key in ("pass_rate", "pass_rates")}
    changed = {"filter": task.filter.model_copy(update=rates), "order": "shuffled"}
    return task.model_copy(update=changed)  # type: ignore[return-value]


def sampling_of(recipe: Recipe, options: RateOptions) -> RolloutConfig:
    """How responses are drawn: as the last stage draws those that it trains on, which rates choose."""
    config = rollout_config(recipe, options.max_new_tokens)
    temperature = options.temperature
    if temperature is None:
        temperature = recipe.stages[-1].rollout.temperature
    return config.model_copy(update={"temperature": temperature})


def measure(recipe: Recipe, world: World, stop: StopFlag, options: RateOptions, folder: Path) -> None:
    """Sample every training question, and keep how often it is solved. Collective.

    Raises InputError where the task has no training questions, StopRequested where it was asked to stop.
    """
    recipe = with_role(recipe, "actor", options.checkpoint)
    recipe = recipe.model_copy(update={"task": unfiltered(recipe.task)})
    config = sampling_of(recipe, options)
    with session(recipe, world, stop, "pass-rates", folder, trains=True) as run:
        if not run.task.train_size:
            what, way_out = (
                "the task has no questions that are trained on",
                "give a task with a training split",
            )
            raise on_all_ranks(InputError(what, where="task", way_out=way_out))
        run.publish("actor")
        count = min(options.prompts or run.task.train_size, run.task.train_size)
        prompts = run.together(lambda: [run.task.prompt("train", index) for index in range(count)])
        parts = Parts(options.out, PASS_RATES, ("index",))
        model = identity(run, "actor")
        plan = plan_of(recipe, prompts, options.samples, config, model)
        _sample(run, parts, plan, prompts, config, options, model["weights"])
        if world.rank == 0:
            rows = parts.whole(plan, [(index,) for index in range(count)])
            made = {"plan": plan, "made_from": made_from(recipe, "actor"), "version": __version__}
            if not parts.complete:
                parts.finish(rows, {**made, "figures": figures_of(rows)})
            print(told(rows, options.out), flush=True)


def plan_of(
    recipe: Recipe, prompts: Sequence[Prompt], samples: int, config: RolloutConfig, model: Row
) -> dict[str, Any]:
    """What the work is: the same plan goes on with it."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.messages}{prompt.reference}{prompt.ids}".encode("utf-8", "surrogatepass"))
    return {
        "kind": "pass rates",
        "questions": len(prompts),
        "texts": digest.hexdigest(),
        "samples": samples,
        "sampling": {
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "truncated_outcome": config.truncated_outcome,
        },
        "seed": recipe.seed,
        "actor": recipe.judging.actor_name,
        "model": model,
        **answered_by(recipe),
        **graded_by(recipe, own=True),
    }


def _sample(
    run: Run,
    parts: Parts,
    plan: dict[str, Any],
    prompts: Sequence[Prompt],
    config: RolloutConfig,
    options: RateOptions,
    weights: str,
) -> None:
    generator = Generator.of_actor(run, config, (run.recipe.seed, "pass-rates"), environment=run.environment)

    async def sampled(indices: Sequence[int]) -> list[Row]:
        groups = await asyncio.gather(
            *(generator.group(prompts[index], range(options.samples)) for index in indices)
        )
        outcomes = [[rollout.outcome for rollout in group.rollouts] for group in groups]
        return [
            rate_row(index, prompts[index], found, run.recipe.judging.actor_name, weights)
            for index, found in zip(indices, outcomes, strict=True)
        ]

    known = set(from_first(lambda: sorted(parts.begin(plan))))
    left = [index for index in range(len(prompts)) if (index,) not in known]
    run.progress.stage("pass-rates", len(prompts), len(prompts) - len(left))
    size = options.chunk * run.world.size
    for at in range(0, len(left), size):
        mine = run.share(left[at : at + size])
        with run.phase("sample"):
            rows = run.generating(lambda mine=mine: asyncio.run(sampled(mine)))  # type: ignore[misc]
        run.together(partial(parts.append, rows, run.world.rank))
        done = len(prompts) - len(left) + min(at + size, len(left))
        run.progress.step(done, {})
        stop_if_asked(run, f"{done} of {len(prompts)} questions")


def rate_row(index: int, prompt: Prompt, outcomes: Sequence[float], actor: str, weights: str) -> Row:
    """A question's row."""
    return {
        "index": index,
        "prompt": prompt.id,
        "question": problem_digest(prompt.problem),
        "problem": prompt.problem[:SHOWN_TEXT],
        "pass_rate": sum(outcomes) / len(outcomes),
        "samples": len(outcomes),
        "outcomes": list(outcomes),
        "actor": actor,
        "weights": weights,
    }


def figures_of(rows: Sequence[Row]) -> dict[str, float]:
    """The mean rate, and the shares of questions that are never and always solved."""
    rates = [float(row["pass_rate"]) for row in rows]
    return {
        "mean": sum(rates) / len(rates),
        "never": sum(rate == 0.0 for rate in rates) / len(rates),
        "always": sum(rate == 1.0 for rate in rates) / len(rates),
    }


def told(rows: Sequence[Row], out: Path) -> str:
    """What was found, and how a recipe uses it."""
    found = figures_of(rows)
    tenths = [0] * 10
    for row in rows:
        tenths[min(int(row["pass_rate"] * 10), 9)] += 1
    return (
        f"{len(rows):,} questions, {rows[0]['samples']} samples each: mean {found['mean']:.3f}; "
        f"{found['never']:.1%} never, {found['always']:.1%} always\n"
        f"questions by tenths of the pass rate, from 0 up: {' '.join(map(str, tenths))}\n"
        f"to train on those between: task.filter={{pass_rate: [0.1, 0.9], pass_rates: {out}}}"
    )
