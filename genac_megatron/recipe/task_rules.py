"""Rules of the task block: bounds, verifiers, forms of answers, files, the parts of a mixture. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from genac_megatron.errors import InputError
from genac_megatron.recipe.data import BenchmarkSource
from genac_megatron.recipe.own_rules import check_own
from genac_megatron.recipe.precision import Where
from genac_megatron.recipe.tasks import (
    BOXED,
    DatasetTask,
    JsonlTask,
    MixtureTask,
    PythonTask,
    QuestionsBlock,
    RubricTask,
    TaskConfig,
)
from genac_megatron.tasks.answers import EXACT, MARKED
from genac_megatron.tasks.benchmarks import find_benchmark
from genac_megatron.tasks.mixture import BLOCK
from genac_megatron.tasks.rows import READERS

ASKED_FOR = {"boxed": "\\boxed", "tag": "<answer>", "line": "Answer:", "hashes": "####"}  # by an instruction
RELATIVE = "a path that begins with ./ is relative to the recipe, others to the current directory"
VERIFIERS = {"math": "mathematical equality (math-verify)", "exact": "the same text, spaces apart"}


def check_task(task: TaskConfig, place: tuple[str | int, ...], where: Where) -> None:
    """What a task's keys must keep together. Raises InputError."""
    if isinstance(task, MixtureTask):
        _check_mixture(task, place, where)
        return
    for what in ("swaps", "steps", "length"):
        least, most = (getattr(task, f"{end}_{what}", 0) for end in ("min", "max"))
        if least > most:
            raise InputError(
                f"min_{what} {least} is above max_{what} {most}",
                where=where((*place, f"min_{what}")),
                way_out="lower the first, or raise the second",
            )
    if isinstance(task, JsonlTask | DatasetTask | PythonTask) and task.verifier is None:
        known = "; ".join(f"{name}: {what}" for name, what in VERIFIERS.items())
        raise InputError(
            f"the task '{task.kind}' has no verifier, so no answer can be graded",
            where=where(place),
            way_out=f"add verifier: one of {known}; or {{python: path/to/file.py:function}}",
        )
    check_own(task, place, where)
    if isinstance(task, QuestionsBlock):
        _check_filters(task, place, where)
    if isinstance(task, JsonlTask | DatasetTask) and isinstance(task.verifier, str):
        _check_forms(task, place, where)
    if isinstance(task, JsonlTask | RubricTask):
        check_file(task.path, (*place, "path"), where)
        if task.heldout_path is not None:
            check_file(task.heldout_path, (*place, "heldout_path"), where)
    if isinstance(task, DatasetTask):
        _check_source(task, place, where)


def _check_source(task: DatasetTask, place: tuple[str | int, ...], where: Where) -> None:
    """A path that is not there would be asked for on the hub, as a data set of that name."""
    key = "name" if task.path is None else "path"
    local = task.path is not None or _names_a_file(task.name)
    if local and not Path(task.source).expanduser().exists():
        what = f"there is no file or folder {task.source}"
        raise InputError(what, where=where((*place, key)), way_out=RELATIVE)


def _names_a_file(name: str) -> bool:
    """Whether a data set's name can only be a path of this machine."""
    return name.startswith(("/", "~")) or name.lower().removesuffix(".gz").endswith(READERS)


def _check_mixture(task: MixtureTask, place: tuple[str | int, ...], where: Where) -> None:
    for name, times in Counter(part.name for part in task.parts).items():
        if times > 1:
            raise InputError(
                f"{times} parts of the mixture are called '{name}'",
                where=where((*place, "parts")),
                way_out="give each a name of its own",
            )
    _check_phases(task, place, where)
    for index, part in enumerate(task.parts):
        check_task(part.task, (*place, "parts", index, "task"), where)


def _check_phases(task: MixtureTask, place: tuple[str | int, ...], where: Where) -> None:
    names, before = {part.name for part in task.parts}, 0
    for index, phase in enumerate(task.phases):
        here = (*place, "phases", index)
        if set(phase.weights) != names or not any(phase.weights.values()):
            raise InputError(
                f"a phase of the mixture has weights of {', '.join(sorted(phase.weights)) or 'nothing'}, "
                f"and its parts are {', '.join(sorted(names))}",
                where=where((*here, "weights")),
                way_out="give each part a weight, 0 where none of it is to be drawn, and not 0 to all",
            )
        last = index == len(task.phases) - 1
        if (phase.until is None) != last:
            raise InputError(
                "the last phase of a mixture has no end" if last else "a phase before the last has no end",
                where=where((*here, "until")),
                way_out="take until out" if last else "say until how many prompts it lasts",
            )
        if phase.until is not None and (phase.until <= before or phase.until % BLOCK):
            raise InputError(
                f"a phase lasts until {phase.until} prompts, the one before until {before}",
                where=where((*here, "until")),
                way_out=f"give multiples of {BLOCK}, each above the last one (a step draws rollout.prompts)",
            )
        before = phase.until or before


def _check_filters(task: QuestionsBlock, place: tuple[str | int, ...], where: Where) -> None:
    """What a task leaves out can be told from what the recipe says."""
    chosen = task.filter
    for key in ("prompt_tokens", "pass_rate"):
        bounds = getattr(chosen, key)
        if bounds is not None and bounds[0] > bounds[1]:
            raise InputError(
                f"filter.{key} goes from {bounds[0]:g} to {bounds[1]:g}",
                where=where((*place, "filter", key)),
                way_out="give the least, then the most; both ends stay",
            )
    if chosen.pass_rate is not None and chosen.pass_rates is None:
        raise InputError(
            "filter.pass_rate has no pass rates to go by",
            where=where((*place, "filter", "pass_rate")),
            way_out="measure them by genac evaluate pass-rates, and name the folder: filter.pass_rates",
        )
    if chosen.pass_rates is not None and not Path(chosen.pass_rates).expanduser().exists():
        raise InputError(
            f"there are no pass rates in {chosen.pass_rates}",
            where=where((*place, "filter", "pass_rates")),
            way_out="make them first: genac evaluate pass-rates RECIPE task.filter.pass_rate=null "
            "task.filter.pass_rates=null task.order=shuffled --out FOLDER",
        )
    if task.order in ("easy_first", "hard_first") and chosen.pass_rates is None:
        raise InputError(
            f"order: {task.order} has no pass rates to go by",
            where=where((*place, "order")),
            way_out="measure them by genac evaluate pass-rates, and name the folder: filter.pass_rates",
        )
    if task.decontaminate is not None:
        check_benchmarks(task.decontaminate.against, (*place, "decontaminate", "against"), where)


def check_benchmarks(sources: Sequence[BenchmarkSource], place: tuple[str | int, ...], where: Where) -> None:
    """Benchmarks that recipes name are known, each named once, and their files are there."""
    for name, times in Counter(source.name for source in sources).items():
        try:
            benchmark = find_benchmark(name)
        except InputError as error:
            raise InputError(error.what, where=where(place), way_out=error.way_out) from None
        if times > 1:
            raise InputError(f"{name} is named {times} times", where=where(place), way_out="name it once")
        path = next(source.path for source in sources if source.name == name)
        if path is not None and benchmark.suite:
            what = f"{name} is generated: it reads no path"
            raise InputError(what, where=where(place), way_out="take the path out")
        if path is not None and not Path(path).expanduser().exists():
            raise InputError(f"there is no file or folder {path}", where=where(place), way_out=RELATIVE)


def _check_forms(task: JsonlTask | DatasetTask, place: tuple[str | int, ...], where: Where) -> None:
    """An answer in the form that the instruction asks for must count."""
    instruction = BOXED if task.instruction is None else task.instruction
    forms = task.answer_forms or (EXACT if task.verifier == "exact" else MARKED)
    for form, sign in ASKED_FOR.items():
        if sign in instruction and form not in forms:
            raise InputError(
                f"the instruction asks for '{sign}', and answer_forms ({', '.join(forms)}) do not read it: "
                "no response that obeys would be rewarded",
                where=where((*place, "answer_forms" if task.answer_forms else "instruction")),
                way_out=f"add {form} to task.answer_forms, or change task.instruction",
            )


def check_file(path: str, location: Sequence[str | int], where: Where) -> None:
    """Raise InputError where there is no such file."""
    if not Path(path).expanduser().is_file():
        raise InputError(
            f"there is no file {path}",
            where=where(location),
            way_out=RELATIVE,
        )
