"""Which rows and prompts of a task stay (`task.filter`). Everything that is left out is counted and told."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from genac_megatron.errors import InputError
from genac_megatron.recipe.data import FilterConfig
from genac_megatron.recipe.tasks import QuestionsBlock
from genac_megatron.tasks.base import FixedTask, Problem, Split
from genac_megatron.tasks.fields import MISSING, look_up, text_of
from genac_megatron.tasks.rows import Located, read_rows

if TYPE_CHECKING:
    from genac_megatron.tasks.questions import QuestionTask

PASS_RATES = "pass_rates.jsonl"
SPLITS: tuple[Split, ...] = ("train", "heldout")
SHOWN = 3
# A run lets such questions go only after their rates are asked for (stages/room.py, tasks/mixture.py).
NEVER = (
    "leave them out (filter.unmeasured: drop): rows without room (task.overlong: drop), and what another "
    "part of a mixture holds out, are never measured"
)
REMEDY = "measure them: genac evaluate pass-rates RECIPE task.filter.pass_rate=null --out FOLDER"


def kept_rows(rows: Sequence[Located], config: QuestionsBlock, notes: list[str]) -> Sequence[Located]:
    """The rows whose fields have values that `filter.values` names; what is left out is told in `notes`.

    Raises InputError where none is left, or where no row has such a key.
    """
    for key, wanted in config.filter.values.items():
        found = [_value(row, key) for _, row in rows]
        kept = [row for row, value in zip(rows, found, strict=True) if value in wanted]
        there = Counter(value for value in found if value is not None)
        if rows and not kept:
            shown = ", ".join(value for value, _ in there.most_common(10))
            raise InputError(
                f"no row has {key} {' or '.join(wanted)}",
                where="task.filter.values",
                way_out=f"there are: {shown}" if shown else f"no row has the key {key!r}",
            )
        if len(kept) < len(rows):
            left = Counter("(none)" if value is None else value for value in found if value not in wanted)
            shown = ", ".join(f"{value}: {count:,}" for value, count in left.most_common(10))
            out = len(rows) - len(kept)
            notes.append(f"{out:,} of {len(rows):,} rows are left out by filter.values, {key} being {shown}")
        rows = kept
    return rows


def _value(row: object, key: str) -> str | None:
    value = look_up(row, key)
    try:
        return None if value is MISSING else text_of(value)
    except ValueError:
        return None


def keep_lengths(task: FixedTask, bounds: tuple[int, int] | None) -> None:
    """Leave out the prompts, of both splits, whose tokens are not within bounds, both included. In the task's
    notes it says how many. Without a tokenizer nothing is counted. Raises InputError where none is left.
    """
    if bounds is None or task.tokenizer is None:
        return
    least, most = bounds
    for split in SPLITS:
        size = task.train_size if split == "train" else task.heldout_size
        lengths = [len(task.prompt(split, index).ids) for index in range(size)]
        out = [index for index, length in enumerate(lengths) if not least <= length <= most]
        if size and len(out) == size:
            raise InputError(
                f"none of the {size} {split} prompts has {least} to {most} tokens: they have {min(lengths)} "
                f"to {max(lengths)}",
                where="task.filter.prompt_tokens",
                way_out="widen it (the chat template and the instruction count)",
            )
        if out:
            short = sum(lengths[index] < least for index in out)
            task.notes.append(
                f"{len(out):,} of {size:,} {split} prompts are left out by filter.prompt_tokens: {short:,} "
                f"below {least}, {len(out) - short:,} above {most} tokens (the longest has {max(lengths):,})"
            )
            task.leave_out(split, out)


def problem_digest(problem: str) -> str:
    """What a question goes by in a file of pass rates: its text, whatever its white space."""
    return hashlib.sha256(" ".join(problem.split()).encode("utf-8", "surrogatepass")).hexdigest()[:24]


def read_pass_rates(path: str) -> tuple[dict[str, float], str]:
    """(pass rates by `problem_digest`, whose they are, in words), from a folder of
    `genac evaluate pass-rates` or its file. Raises InputError where it is none, is unfinished,
    or has rates of several actors.
    """
    place = Path(path).expanduser()
    file = place / PASS_RATES if place.is_dir() else place
    if not file.is_file():
        begun = place.is_dir() and (place / "plan.json").is_file()
        raise InputError(
            "the pass rates are unfinished" if begun else f"there are no pass rates in {path}",
            where="task.filter.pass_rates",
            way_out="the command that began them goes on" if begun else REMEDY,
        )
    rates: dict[str, float] = {}
    actors: dict[tuple[str, str], None] = {}
    for where, row in read_rows(file):
        rate = row.get("pass_rate")
        if (
            not isinstance(row.get("question"), str)
            or not isinstance(rate, int | float)
            or not 0 <= rate <= 1
        ):
            what = "no row of pass rates: it needs a question (its digest) and a pass_rate from 0 to 1"
            raise InputError(what, where=where, way_out=REMEDY)
        rates[row["question"]] = float(rate)
        actors[str(row.get("actor")), str(row.get("weights"))] = None
    if len(actors) > 1:
        names = ", ".join(f"{name} ({digest:.12})" for name, digest in actors)
        raise InputError(f"pass rates of several actors: {names}", where=str(file), way_out=REMEDY)
    whose = next((f"{name} ({digest:.12})" for name, digest in actors), "nobody")
    return rates, whose


def known_rates(task: QuestionTask, config: FilterConfig) -> dict[str, float]:
    """Pass rates of the training questions, by digest; {} where the recipe names none."""
    if config.pass_rates is None:
        return {}
    rates, whose = read_pass_rates(config.pass_rates)
    digests = [problem_digest(problem.text) for problem in task.problems("train")]
    missing = [index for index, digest in enumerate(digests) if digest not in rates]
    if len(missing) == len(digests) or (missing and config.unmeasured == "error"):
        first = "; ".join(shown(task.problems("train")[index]) for index in missing[:SHOWN])
        raise InputError(
            f"{len(missing):,} of {len(digests):,} training questions have no pass rate in "
            f"{config.pass_rates}: {first}",
            where="task.filter.pass_rates",
            way_out=REMEDY if len(missing) == len(digests) else f"{NEVER}; others can be: {REMEDY}",
        )
    if missing:
        what = "left out" if config.unmeasured == "drop" else "kept"
        task.notes.append(
            f"{len(missing):,} of {len(digests):,} training questions have no pass rate and are {what} "
            f"(filter.unmeasured: {config.unmeasured})"
        )
        if config.unmeasured == "drop":
            task.leave_out("train", missing)
    found = [rates[digest] for digest in digests if digest in rates]
    mean = sum(found) / len(found)
    task.notes.append(f"pass rates of {whose}: {len(found):,} training questions, mean {mean:.3f}")
    return rates


def keep_pass_rates(task: QuestionTask, config: FilterConfig, rates: Mapping[str, float]) -> None:
    """Leave out training questions whose rate is not within `filter.pass_rate`, both ends included.

    Raises InputError where none is left.
    """
    if config.pass_rate is None:
        return
    least, most = config.pass_rate
    problems = task.problems("train")
    found = [rates.get(problem_digest(problem.text)) for problem in problems]
    low = [index for index, rate in enumerate(found) if rate is not None and rate < least]
    high = [index for index, rate in enumerate(found) if rate is not None and rate > most]
    if len(low) + len(high) == len(problems):
        raise InputError(
            f"none of the {len(problems)} training questions has a pass rate from {least:g} to {most:g}: "
            f"{len(low)} are below, {len(high)} above",
            where="task.filter.pass_rate",
            way_out="widen it, or give data that the actor solves now and then",
        )
    if low or high:
        task.notes.append(
            f"{len(low) + len(high):,} of {len(problems):,} training questions are left out by "
            f"filter.pass_rate: {len(low):,} below {least:g}, {len(high):,} above {most:g}"
        )
        task.leave_out("train", [*low, *high])


def rank_by(order: str, rates: Mapping[str, float]) -> Callable[[Problem], float] | None:
    """What `task.order` sorts questions by, lowest first; None: by nothing. Without a rate they come last."""
    if order == "short_first":
        return lambda problem: float(len(problem.text))
    sign = {"easy_first": -1.0, "hard_first": 1.0}.get(order)
    if sign is None:
        return None

    def rank(problem: Problem) -> float:
        rate = rates.get(problem_digest(problem.text))
        return math.inf if rate is None else sign * rate

    return rank


def shown(problem: Problem) -> str:
    """A problem in a message: where it stands, and how it begins."""
    text = " ".join(problem.text.split())
    return f"{problem.where + ': ' if problem.where else ''}{text[:70]!r}"
