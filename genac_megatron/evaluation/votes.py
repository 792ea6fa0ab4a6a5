"""What a critic is worth when the actor is trained: of several responses to a problem, which one is taken.

    best@k      the one that the critic values most
    maj@k       the answer that most of them give
    weighted@k  the answer whose responses' values sum to most

Pure but for `votes_of`, which asks a run's critic about a benchmark's samples (evaluation/trial.py):
OUT/BENCHMARK/values/ has its judgements, OUT/BENCHMARK/votes.json the figures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genac_megatron.critic.icc import IccState
from genac_megatron.evaluation.intervals import Resampled, plain
from genac_megatron.evaluation.parts import Parts, Row
from genac_megatron.evaluation.tables import table, with_interval
from genac_megatron.observe.runinfo import write_json_atomic
from genac_megatron.records import Prompt
from genac_megatron.tasks.answers import final_answer, last_tagged
from genac_megatron.tasks.base import Task
from genac_megatron.tasks.questions import QuestionTask
from genac_megatron.tasks.reasoning import opened_reasoning, usual

if TYPE_CHECKING:
    from genac_megatron.evaluation.trial import Trial
    from genac_megatron.recipe.schema import Recipe
    from genac_megatron.stages.runtime import Run

VOTES = "votes.json"


@dataclass(frozen=True)
class Ballot:
    """One response: its outcome, its final answer (None: it gives none), the critic's value in [0, 1]."""

    outcome: float
    answer: str | None
    value: float


def best(ballots: Sequence[Ballot]) -> float:
    """The outcome of the response with the highest value; of several, their mean."""
    top = max(ballot.value for ballot in ballots)
    return _mean([ballot.outcome for ballot in ballots if ballot.value >= top - 1e-9])


def majority(ballots: Sequence[Ballot]) -> float:
    """The outcome of the answer that most responses give; 0 where none gives one."""
    return _elected(ballots, lambda ballot: 1.0)


def weighted(ballots: Sequence[Ballot]) -> float:
    """The outcome of the answer whose responses' values sum to most."""
    return _elected(ballots, lambda ballot: ballot.value)


RULES: dict[str, Callable[[Sequence[Ballot]], float]] = {
    "best": best,
    "maj": majority,
    "weighted": weighted,
}


def _elected(ballots: Sequence[Ballot], weight: Callable[[Ballot], float]) -> float:
    """Answers count as the same where their text is. Of equal ones, and of several outcomes, the mean."""
    weights: dict[str, float] = defaultdict(float)
    outcomes: dict[str, list[float]] = defaultdict(list)
    for ballot in ballots:
        if ballot.answer is not None:
            weights[ballot.answer] += weight(ballot)
            outcomes[ballot.answer].append(ballot.outcome)
    if not weights:
        return 0.0
    top = max(weights.values())
    return _mean([_mean(outcomes[answer]) for answer, sum_ in weights.items() if sum_ >= top - 1e-9])


def figures(problems: Sequence[Sequence[Ballot]], k: int, draws: int) -> dict[str, Any]:
    """By rule and number of responses 1, 2, 4 .. k, over problems: its first j, its next j, and so on."""
    found = {}
    sample = Resampled(list(range(len(problems))), draws)
    for j in sorted({2**n for n in range(k.bit_length())} | {k}):
        for name, rule in RULES.items():
            means = [
                _mean([rule(ballots[at : at + j]) for at in range(0, len(ballots) - j + 1, j)])
                for ballots in problems
            ]
            found[f"{name}@{j}"] = plain(sample.mean(means))
    return found


def answer_of(task: Task, prompt: Prompt, text: str, ended: bool) -> str | None:
    """A response's final answer as text, as its task reads it; None where it gives none."""
    said = usual(text, task.reasoning_tags)
    opened = task.tokenizer is not None and opened_reasoning(task.tokenizer, prompt.ids, task.reasoning_tags)
    if isinstance(task, QuestionTask):
        found = final_answer(said, task.forms, ended, opened)
    else:
        found = last_tagged(said, opened)
    return None if found is None else " ".join(found.strip().strip("$*`").split()) or None


def vote_table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a benchmark, its figures at all its responses and the share of judgements that parse; then
    what was refused, and where none parses."""
    rows = [
        [
            name,
            str(report["k"]),
            *(with_interval(report[f"{rule}@{report['k']}"]) for rule in RULES),
            f"{report['parsed']:.3f}",
        ]
        for name, report in reports.items()
    ]
    shown = [table(["benchmark", "k", *(f"{rule}@k" for rule in RULES), "parsed"], rows)]
    for name, report in reports.items():
        if report.get("refused"):
            shown.append(f"{name}: of the judgements {report['refused']}")
        if not report["parsed"]:
            shown.append(
                f"{name}: no judgement parses, so best@k and weighted@k are no critic's: give --critic a run "
                "whose critic was trained, or change judging.max_new_tokens"
            )
    return "\n".join(shown)


def votes_plan(recipe: Recipe, samples: Row, critic: Row, told: IccState) -> Row:
    """What the judgements depend on. Raises InputError where the template cannot be read."""
    from genac_megatron.evaluation.session import judged_by

    return {
        "kind": "votes",
        "samples": samples,
        "critic": critic,
        "p_bar": told.p_bar,
        "step": told.step,
        "judging": judged_by(recipe.judging),
        "seed": recipe.seed,
    }


def votes_parts(benchmark: Path) -> Parts:
    """The judgements of a benchmark's samples, in its folder."""
    folder = benchmark / "values"
    return Parts(folder, "values.jsonl", ("state", "judgement"), f"remove {folder}: the samples stay")


def votes_of(run: Run, trial: Trial, told: IccState) -> dict[str, Any]:
    """Have the run's critic value every sample of a finished trial; figures by rule. Collective."""
    from genac_megatron.evaluation.score import judged_texts, mean_values, refused_of, text_row
    from genac_megatron.evaluation.session import identity
    from genac_megatron.training.agreement import from_first

    samples = from_first(lambda: trial.parts.read()[1])
    limit = int(trial.sampling["max_new_tokens"])
    rows = [
        text_row(place, trial.prompts[row["index"]], row["text"], row["tokens"], limit, told)
        for place, row in enumerate(samples)
    ]
    parts, critic = votes_parts(trial.parts.folder), identity(run, "critic")
    plan = run.together(lambda: votes_plan(run.recipe, trial.plan, critic, told))
    answers = judged_texts(run, parts, plan, rows, 1, f"{trial.name}, values")
    values = mean_values(answers)
    by_problem: dict[int, list[Ballot]] = defaultdict(list)
    for place, row in enumerate(samples):
        prompt = trial.prompts[row["index"]]
        answer = answer_of(trial.task, prompt, row["text"], row["finish"] == "stop")
        value = values.get(place)
        by_problem[row["index"]].append(
            Ballot(float(row["outcome"]), answer, told.p_bar if value is None else value)
        )
    problems = [by_problem[index] for index in sorted(by_problem)]
    found = figures(problems, trial.samples, trial.options.draws)
    report = {
        "k": trial.samples,
        "parsed": sum(place in values for place in range(len(rows))) / max(len(rows), 1),
        "refused": refused_of(answers),
        **found,
    }
    if run.world.rank == 0:
        write_json_atomic(trial.parts.folder / VOTES, {**report, "critic": critic})
    return report


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
