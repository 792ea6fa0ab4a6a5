"""Rules for suites, the test and the best checkpoint: what can be told from the recipe alone. No torch."""

from __future__ import annotations

from genac_megatron.errors import InputError
from genac_megatron.recipe.judged import SuiteConfig
from genac_megatron.recipe.precision import Where
from genac_megatron.recipe.schema import Recipe, SftStage
from genac_megatron.recipe.task_rules import check_benchmarks, check_task


def check_judged(recipe: Recipe, where: Where) -> None:
    """Raise InputError where `evaluation` or `checkpoint.best` asks for what no run of the recipe gives."""
    config = recipe.evaluation
    for key in ("suites", "test"):
        _check_suites(recipe, getattr(config, key), ("evaluation", key), where)
    chosen = {suite.name for suite in config.suites}
    both = [suite.name for suite in config.test if suite.name in chosen]
    if both:
        raise InputError(
            f"{both[0]} is asked during the run (evaluation.suites) and is to be its test: a test has chosen "
            "nothing",
            where=where(("evaluation", "test")),
            way_out="take it out of one of the two",
        )
    _check_every(recipe, where)
    _check_best(recipe, where)


def _check_suites(
    recipe: Recipe, suites: list[SuiteConfig], place: tuple[str | int, ...], where: Where
) -> None:
    if suites and "actor" not in recipe.roles:
        raise InputError(
            f"{place[-1]} are asked of the actor, and there is none",
            where=where(place),
            way_out="name a role actor, or take them out",
        )
    check_benchmarks([suite for suite in suites if suite.task is None], place, where)
    for index, suite in enumerate(suites):
        if sum(other.name == suite.name for other in suites) > 1:
            raise InputError(
                f"two of {place[-1]} are called '{suite.name}'", where=where(place), way_out="rename one"
            )
        if suite.task is None:
            continue
        if suite.path is not None:
            raise InputError(
                f"'{suite.name}' has rows of its own (task) and a path",
                where=where((*place, index, "path")),
                way_out="name the file in task",
            )
        check_task(suite.task, (*place, index, "task"), where)


def _check_every(recipe: Recipe, where: Where) -> None:
    every = recipe.evaluation.suites_every
    if every is None:
        return
    for stage in recipe.stages:
        if not isinstance(stage, SftStage) and stage.eval_every and every % stage.eval_every:
            raise InputError(
                f"suites are to be asked every {every} steps, and stage '{stage.name}' evaluates every "
                f"{stage.eval_every}",
                where=where(("evaluation", "suites_every")),
                way_out=f"give a multiple of {stage.eval_every}, or change eval_every",
            )


def _check_best(recipe: Recipe, where: Where) -> None:
    best = recipe.checkpoint.best
    if best is None:
        return
    place = ("checkpoint", "best")
    names = [stage.name for stage in recipe.stages]
    if best.stage is not None and best.stage not in names:
        raise InputError(
            f"there is no stage '{best.stage}'",
            where=where((*place, "stage")),
            way_out=f"one of: {', '.join(names)}",
        )
    group, _, name = best.figure.partition("/")
    suites = [suite.name for suite in recipe.evaluation.suites]
    known = [f"suite/{one}{end}" for one in suites for end in ("", "_pass")]
    if group == "suite" and best.figure not in known:
        raise InputError(
            f"no suite gives the figure {best.figure}",
            where=where((*place, "figure")),
            way_out=f"one of: {', '.join(known)}" if known else "name it in evaluation.suites",
        )
    heads = ("accuracy", "reward_", *(("critic_",) if "critic" in recipe.roles else ()))
    if group != "suite" and not (group == "eval" and name.startswith(heads)):
        raise InputError(
            f"no evaluation gives the figure {best.figure}",
            where=where((*place, "figure")),
            way_out="eval/accuracy, eval/critic_brier and its like, or suite/NAME (docs/figures.md)",
        )
