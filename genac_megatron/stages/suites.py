"""Benchmarks, and rows of one's own, that a run asks its actor beside training (`evaluation.suites`, `test`).

The same engines as rollouts generate; seeds are functions of the suite, the question and the sample, so that
nothing that training draws is another for it, and evaluations of different weights are paired.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from genac_megatron import metrics
from genac_megatron.errors import InputError, on_all_ranks
from genac_megatron.recipe.schema import Recipe, RolloutConfig, StageConfig
from genac_megatron.stages.rollouts import Generator, generate
from genac_megatron.tasks.base import Problem, Split
from genac_megatron.tasks.clean import told_overlap
from genac_megatron.tasks.overlap import Found, Looked
from genac_megatron.tasks.suite import Suite, make_suite

if TYPE_CHECKING:
    from genac_megatron.stages.runtime import Run

NGRAM, OVERLAP = 8, 0.5  # as task.decontaminate has them by default
LOOK_S = 20.0  # seconds that a rank looks at what a generator makes to train on
SPLITS: tuple[Split, ...] = ("heldout", "train")
WHOLE_STAGE = ("start", "end", "fallback")  # evaluations at a stage's ends


@dataclass(frozen=True)
class Suites:
    """A run's suites, those that it is watched by and those that test it at its end."""

    watched: list[Suite]
    tested: list[Suite]

    def close(self) -> None:
        """End what their tasks have started."""
        for suite in (*self.watched, *self.tested):
            suite.task.close()


def begun_suites(run: Run, positions: Mapping[str, int]) -> Suites:
    """The recipe's suites, held to the actor's model and to the data. Collective.

    Raises InputError where one has no room, or where a test's question is trained on or has chosen weights.
    """
    config = run.recipe.evaluation
    if not config.suites and not config.test:
        return Suites([], [])
    tags = run.recipe.roles["actor"].model.reasoning_tags
    make = partial(make_suite, tokenizer=run.tokenizers["actor"], tags=tags)
    suites = run.together(
        lambda: Suites([make(one) for one in config.suites], [make(one) for one in config.test])
    )
    for suite in (*suites.watched, *suites.tested):
        run.together(partial(_need_room, run.recipe, suite, positions["actor"]))
        count = f"{len(suite.prompts):,} questions x {suite.samples} samples"
        run.progress.note(f"suite {suite.name}: {count}")
        for note in suite.task.notes:
            run.progress.note(f"suite {suite.name}: {note}")
    _keep_apart(run, suites)
    return suites


def _need_room(recipe: Recipe, suite: Suite, most: int) -> None:
    new = max(suite.sampled(recipe, stage).max_new_tokens for stage in recipe.stages)
    longest = max(suite.prompts, key=lambda prompt: len(prompt.ids))
    if len(longest.ids) + new > most:
        raise InputError(
            f"suite {suite.name}: the actor reads {len(longest.ids)} tokens and may write {new}, in {most} "
            f"positions ({longest.where or longest.id})",
            where="evaluation",
            way_out="set max_new_tokens of the suite, or use a model with more positions (max_positions)",
        )


def _keep_apart(run: Run, suites: Suites) -> None:
    """Refuse a test whose questions are trained on, held out, or a suite's; warn of suites that are trained
    on, and of what is nearly a test's. Collective.
    """
    watched = [(s.name, [p.problem for p in s.prompts]) for s in suites.watched]
    tested = [(s.name, [p.problem for p in s.prompts]) for s in suites.tested]
    looked = Looked([*tested, *watched], NGRAM, OVERLAP)
    tests = {name for name, _ in tested}
    found = run.gather(run.together(lambda: list(_overlaps(run, looked))))
    same = [(p, f) for p, f, whole in found if whole and f.name in tests]
    only_tests = Looked(tested, NGRAM, OVERLAP)
    for name, texts in watched:
        same += [(Problem(text, "", where=name), f) for text in texts if (f := only_tests.same(text))]
    if same:
        total = run.task.train_size + run.task.heldout_size
        raise on_all_ranks(
            InputError(
                f"the test is no test: {told_overlap(same, total)}",
                where="evaluation.test",
                way_out="keep them out of the task (task.decontaminate), take the suite that has them out, "
                "or name another test",
            )
        )
    if near := [(p, f) for p, f, _ in found]:
        run.progress.note(
            f"warning: suites: {told_overlap(near, run.task.train_size + run.task.heldout_size)}"
        )


def _overlaps(run: Run, looked: Looked) -> Iterable[tuple[Problem, Found, bool]]:
    """This rank's share of the questions that are a suite's: which, whose, and whether word for word. Those
    of a test are looked for in both splits, others in what is trained on. What a generator makes, as much of
    it as some seconds give, is compared word for word: its questions share their words anyway. All of what is
    held out is looked at, however long that takes: the best weights are chosen by it.
    """
    tests = {suite.name for suite in run.recipe.evaluation.test}
    for part in run.task.parts:
        for split in SPLITS:
            begun = time.monotonic()
            size = part.train_size if split == "train" else part.heldout_size
            for index in range(run.world.rank, size, run.world.size):
                drawn = split == "train" and part.fixed is None
                if drawn and time.monotonic() - begun > LOOK_S:
                    break
                problem = part._problem(split, index)
                same = looked.same(problem.text)
                found = same or (looked.find(problem.text) if part.fixed is not None else None)
                if found is not None and (split == "train" or found.name in tests):
                    yield problem, found, same is not None


# --- asking ------------------------------------------------------------------------------------


def is_due(recipe: Recipe, name: str, step: int) -> bool:
    """Whether suites are asked at an evaluation of this name, after this step of its stage."""
    every = recipe.evaluation.suites_every
    return every is None or name in WHOLE_STAGE or step % every == 0


def ask(run: Run, stage: StageConfig, suites: Sequence[Suite]) -> dict[str, dict[str, Any]]:
    """What the current actor makes of suites, by name; the same on every rank. Collective.

    Weights that were asked before, in the same way, are not asked again.
    """
    found = {}
    for suite in suites:
        config = suite.sampled(run.recipe, stage)
        key = (run.at.versions["actor"], config.model_dump_json())
        known = run.heldout_cache.get(f"suite {suite.name}")
        if known is None or known[0] != key:
            known = key, _asked(run, suite, config)
            run.heldout_cache[f"suite {suite.name}"] = known
        found[suite.name] = known[1]
    return found


def _asked(run: Run, suite: Suite, config: RolloutConfig) -> dict[str, Any]:
    seed = (run.recipe.seed, "suite", suite.name)
    generator = Generator.of_actor(run, config, seed, suite.task, environment=run.environment)
    late = suite.task.late
    mine, places = run.share(suite.prompts), run.places(len(suite.prompts))
    groups = run.generating(lambda: generate(generator, mine, suite.samples, places=places))
    run.spend("suites", "actor")
    run.count({"verify/late": float(suite.task.late - late)})
    rollouts = [(group.prompt.id, r) for group in groups for r in group.rollouts]
    rows = run.gather([(p, r.outcome, r.truncated, r.completion.written) for p, r in rollouts])
    outcomes: dict[str, list[float]] = {}
    for prompt, outcome, _, _ in sorted(rows, key=lambda row: int(row[0].rpartition("/")[2])):
        outcomes.setdefault(prompt, []).append(outcome)
    count = len(rows)
    return {
        "average": metrics.avg_at_k(outcomes),
        "pass": metrics.pass_at_k(outcomes, suite.samples),
        "truncated": sum(cut for _, _, cut, _ in rows) / count,
        "tokens": sum(length for *_, length in rows) / count,
        "samples": suite.samples,
        "temperature": config.temperature,
        "max_new_tokens": config.max_new_tokens,
        "outcomes": outcomes,
    }


def suite_figures(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The flat figures of what suites gave."""
    figures: dict[str, float] = {}
    for name, row in found.items():
        figures |= {f"suite/{name}": row["average"], f"suite/{name}_truncated": row["truncated"]}
        if row["samples"] > 1:
            figures[f"suite/{name}_pass"] = row["pass"]
    return figures
