"""Rules for suites, the test and the best checkpoint: what can be told from the recipe alone. No torch."""

from __future__ import annotations

from genac_megatron.errors import InputError
from genac_megatron.recipe.judged import SuiteConfig
from genac_megatron.recipe.precision import Where
from genac_megatron.recipe.schema import Recipe, SftStage
from genac_megatron.recipe.task_rules import check_benchmarks, check_task
from genac_megatron.tasks.benchmarks import find_benchmark

# A critic's figures in a run's evaluations (docs/figures.md): those that are better when lower, those that
# only Monte-Carlo values give, and all of them.
ERRORS = ("brier", "brier_used", "mse", "ece", "value_error")
OF_MONTE_CARLO = ("mse", "mse_constant", "mse_pearson", "mse_spearman", "explained_variance_response")
CRITIC_FIGURES = (
    *ERRORS,
    *OF_MONTE_CARLO,
    *("brier_constant", "skill", "auc", "explained_variance", "explained_variance_prompt", "spearman"),
    *("ranking_between", "ranking_prompt", "parse_rate", "score_entropy", "value_mean", "outcome_mean"),
    *("tokens_per_state", "group_error", "group_distance"),
)

# Of a task that is trained on, and no suite's
TRAINED_ON = ("heldout_path", "heldout_split", "heldout_size", "order", "decontaminate")


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
        _check_read(suite, (*place, index, "task"), where)


def _check_read(suite: SuiteConfig, place: tuple[str | int, ...], where: Where) -> None:
    """Of a suite all rows are asked, but for those that filter.values leaves out."""
    task = suite.task
    assert task is not None
    for key in TRAINED_ON:
        field = type(task).model_fields.get(key)
        if field is not None and getattr(task, key) != field.get_default(call_default_factory=True):
            raise _unread(suite, key, where((*place, key)))
    for key in task.filter.model_fields_set - {"values"}:
        raise _unread(suite, f"filter.{key}", where((*place, "filter", key)))


def _unread(suite: SuiteConfig, key: str, place: str) -> InputError:
    return InputError(
        f"'{suite.name}' sets {key}, and all rows of a suite are asked, but for those that filter.values "
        "leaves out",
        where=place,
        way_out=f"take {key} out",
    )


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
    figure, key = best.figure, best.figure.removeprefix("eval/critic_")
    suites = _suite_figures(recipe)
    if figure.startswith("suite/") and figure not in suites:
        raise InputError(
            f"no suite gives the figure {figure}",
            where=where((*place, "figure")),
            way_out=f"one of: {', '.join(suites)}" if suites else "name it in evaluation.suites",
        )
    critic = key != figure and "critic" in recipe.roles and key in CRITIC_FIGURES
    if not critic and not figure.startswith(("suite/", "eval/accuracy", "eval/reward_")):
        raise InputError(
            f"no evaluation gives the figure {figure}",
            where=where((*place, "figure")),
            way_out="eval/accuracy, eval/critic_brier and its like, or suite/NAME (docs/figures.md)",
        )
    if critic and key in OF_MONTE_CARLO and not recipe.evaluation.mc_states:
        raise InputError(
            f"no evaluation gives the figure {figure}: no state's value is estimated by Monte Carlo",
            where=where((*place, "figure")),
            way_out="set evaluation.mc_states (such a value is taken at a stage's ends), or name another",
        )
    if critic and key in ERRORS and best.mode == "max":
        raise InputError(
            f"{figure} is an error: mode max would keep the worst critic",
            where=where((*place, "mode")),
            way_out="set checkpoint.best.mode: min",
        )


def _suite_figures(recipe: Recipe) -> list[str]:
    """What the run's suites give; a pass@k where a question is asked more than once."""
    found = []
    for suite in recipe.evaluation.suites:
        samples = suite.samples or (1 if suite.task is not None else find_benchmark(suite.name).samples)
        found += [f"suite/{suite.name}", *([f"suite/{suite.name}_pass"] if samples > 1 else [])]
    return found
