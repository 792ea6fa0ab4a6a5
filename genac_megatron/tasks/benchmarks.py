"""Named benchmarks: the table, and their problems as a task that is all held out.

Questions come by the dataset's name (`datasets`: its hub or its cache), or from a local file or folder in the
same form. Suites are of reasoning-gym's procedural tasks; `rg:NAME` is any one of them. The table's dataset
names and columns were read in public evaluation code; none could be downloaded where this was written.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from genac_megatron.errors import InputError
from genac_megatron.recipe.data import HELDOUT
from genac_megatron.recipe.data import MATHS as MATHS
from genac_megatron.recipe.tasks import DatasetTask, JsonlTask, OwnReward, ReasoningGymTask
from genac_megatron.records import Prompt
from genac_megatron.tasks.base import Problem, Split, Task
from genac_megatron.tasks.fields import MISSING, look_up, read_field
from genac_megatron.tasks.filters import kept_rows
from genac_megatron.tasks.hf_datasets import distinct_rows, load_rows
from genac_megatron.tasks.own_reward import OwnRewarded
from genac_megatron.tasks.questions import (
    QuestionTask,
    compiled,
    need_verifier,
    read_problems,
    without_conflicts,
)
from genac_megatron.tasks.reasoning_gym import ReasoningGym
from genac_megatron.tasks.rows import Row, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOXED = "Think step by step. Put the final answer in \\boxed{}."
GYM_PREFIX = "rg:"
GYM_SIZE = 30  # problems of each task of a suite; towers of Hanoi have 90 in all
GYM_POOL = 5000  # entries that may be drawn until so many differ
GYM_SEED = 0  # the same problems for everybody


@dataclass(frozen=True)
class Benchmark:
    """A row of the table. Of several keys the first that a row has is read."""

    title: str
    samples: int  # k of avg@k where the user names none
    dataset: str = ""
    config: str | None = None
    split: str = "test"
    question_keys: tuple[str, ...] = ("problem", "question")
    answer_keys: tuple[str, ...] = ("answer",)
    answer_pattern: str | None = None  # its group 1 is the reference
    verifier: str = "math"
    instruction: str = BOXED
    suite: tuple[str, ...] = ()  # reasoning-gym's tasks, instead of a dataset


BENCHMARKS = {
    "aime24": Benchmark("AIME 2024", 32, "HuggingFaceH4/aime_2024", split="train"),
    "aime25": Benchmark("AIME 2025", 32, "math-ai/aime25"),
    "amc23": Benchmark("AMC 2023", 32, "math-ai/amc23"),
    "math500": Benchmark("MATH-500", 4, "HuggingFaceH4/MATH-500"),
    "minerva": Benchmark("Minerva", 4, "math-ai/minervamath"),
    "olympiadbench": Benchmark(
        "OlympiadBench (text, English)", 4, "math-ai/olympiadbench", answer_keys=("final_answer", "answer")
    ),
    "gsm8k": Benchmark("GSM8K", 1, "openai/gsm8k", config="main", answer_pattern=r"####\s*(.+)"),
    "rg-arithmetic": Benchmark(
        "reasoning-gym: arithmetic", 4, suite=("chain_sum", "basic_arithmetic", "gcd", "lcm", "products")
    ),
    "rg-algorithmic": Benchmark(
        "reasoning-gym: algorithmic",
        4,
        suite=("letter_counting", "number_sorting", "spell_backward", "word_sorting", "base_conversion"),
    ),
    "rg-planning": Benchmark(
        "reasoning-gym: plans that are executed", 4, suite=("tower_of_hanoi", "rush_hour", "sokoban")
    ),
}


def benchmark_names(listed: str) -> list[str]:
    """The benchmarks of a comma-separated list; `maths` stands for the six maths sets.

    Raises InputError for an unknown one, naming the nearest.
    """
    given = [name.strip() for name in listed.split(",") if name.strip()]
    names = [each for name in given for each in (MATHS if name == "maths" else (name,))]
    for name in names:
        find_benchmark(name)
    return list(dict.fromkeys(names))


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of a name, or reasoning-gym's task after `rg:`. Raises InputError."""
    if name.startswith(GYM_PREFIX):
        task = name.removeprefix(GYM_PREFIX)
        return Benchmark(f"reasoning-gym: {task}", 4, suite=(task,))
    if name == HELDOUT:
        return Benchmark("the recipe's held-out prompts", 4)
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, n=1, cutoff=0.5)
        known = f"did you mean {near[0]}? " if near else ""
        raise InputError(
            f"no benchmark is called '{name}'",
            where="benchmark",
            way_out=f"{known}known: {', '.join(BENCHMARKS)}, maths (the six of it), {GYM_PREFIX}TASK",
        )
    return BENCHMARKS[name]


def make_benchmark(
    name: str,
    path: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    reasoning_tags: tuple[str, str] | None = None,
) -> Task:
    """The benchmark as a task without a training split. `path`: read questions there, not by name.
    reasoning_tags: the actor's own (tasks/reasoning.py).

    Raises InputError where the benchmark is unknown or its data is missing.
    """
    benchmark = find_benchmark(name)
    if name == HELDOUT:
        raise InputError(
            f"{HELDOUT} is a recipe's own held-out prompts: its actor alone is asked them, by a command",
            where="benchmark",
            way_out=f"genac evaluate task {HELDOUT} RECIPE; in a run every evaluation asks them",
        )
    if benchmark.suite:
        if path is not None:
            what = f"{name} is generated: it reads no path"
            raise InputError(what, where="benchmark", way_out="take the path out")
        return GymSuite(benchmark.suite, tokenizer, reasoning_tags)
    problems = _questions(name, benchmark, path)
    task = Questions([], problems, benchmark.verifier, tokenizer)
    task.reasoning_tags = reasoning_tags
    return task


def make_rows(
    config: JsonlTask | DatasetTask,
    tokenizer: PreTrainedTokenizerBase | None,
    reasoning_tags: tuple[str, str] | None = None,
) -> Task:
    """All rows of a block as a task without a training split, each question once. Raises InputError."""
    notes: list[str] = []
    if isinstance(config, DatasetTask):
        rows = distinct_rows(config, config.split, notes)
    else:
        rows = read_rows(config.path)
    problems = read_problems(kept_rows(rows, config, notes), config, by_split="no")[0]
    if not problems:
        raise InputError("no row in it", where=config.path or "task", way_out="see that it is the right file")
    problems, told = without_conflicts(problems, config)
    unique = {problem.key: problem for problem in reversed(problems)}
    own = config.verifier
    grader = "exact" if isinstance(own, OwnReward) else need_verifier(config)  # an own one is asked instead
    task: Task = Questions([], list(reversed(unique.values())), grader, tokenizer, config.answer_forms)
    task.notes = [*notes, *([told] if told else [])]
    task.success, task.reasoning_tags = config.success, reasoning_tags
    if isinstance(own, OwnReward):
        task = OwnRewarded(task, own)
        task.reasoning_tags = reasoning_tags
    return task


class Questions(QuestionTask):
    """A benchmark's questions, in its own order, repeats kept."""

    def train_index(self, seed: int, cursor: int) -> int:
        raise _no_training()


class GymSuite(Task):
    """Problems of several reasoning-gym tasks, one task after another."""

    def __init__(
        self,
        names: Sequence[str],
        tokenizer: PreTrainedTokenizerBase | None,
        reasoning_tags: tuple[str, str] | None = None,
    ) -> None:
        super().__init__(tokenizer, 0, GYM_SIZE * len(names))
        self.reasoning_tags = reasoning_tags
        self.names = list(names)
        self._tasks = [
            ReasoningGym(
                ReasoningGymTask(kind="reasoning_gym", name=name, train_size=GYM_POOL, heldout_size=GYM_SIZE),
                tokenizer,
                GYM_SEED,
            )
            for name in names
        ]
        for task in self._tasks:
            task.reasoning_tags = reasoning_tags

    def _problem(self, split: Split, index: int) -> Problem:
        which, number = divmod(index, GYM_SIZE)
        return self._tasks[which]._problem("heldout", number)

    def part(self, index: int) -> str:
        """The task that problem `index` is of."""
        return self.names[index // GYM_SIZE]

    @property
    def late(self) -> int:
        return sum(task.late for task in self._tasks)

    def verify(self, prompt: Prompt, text: str) -> float:
        index = int(prompt.id.rpartition("/")[2])
        return self._tasks[index // GYM_SIZE].verify(prompt, text)

    def train_index(self, seed: int, cursor: int) -> int:
        raise _no_training()


def _no_training() -> InputError:
    return InputError(
        "a benchmark is never trained on", where="task", way_out="name another task, or evaluate only"
    )


def _questions(name: str, benchmark: Benchmark, path: str | None) -> list[Problem]:
    config = DatasetTask(
        kind="datasets",
        name=benchmark.dataset,
        path=path,
        config=benchmark.config,
        split=benchmark.split,
    )
    try:
        rows = load_rows(config, benchmark.split)
    except InputError as error:
        if path is not None:
            raise
        keys = f"{' or '.join(benchmark.question_keys)}, and {' or '.join(benchmark.answer_keys)}"
        raise InputError(
            f"the dataset {benchmark.dataset} is neither reachable nor in the cache ({error.what})",
            where=f"benchmark {name}",
            way_out=f"give a local file: --path {name}=FILE.jsonl, with {keys} in each line (in a "
            f"recipe: {{name: {name}, path: FILE.jsonl}}); or fetch the dataset once on a machine "
            "with a network and point HF_HOME at its cache",
        ) from error
    pattern = None if benchmark.answer_pattern is None else compiled(benchmark.answer_pattern)
    problems = []
    for where, row in rows:
        answer = _field(row, benchmark.answer_keys, where)
        if pattern is not None and (match := pattern.search(answer)) is not None:
            answer = match.group(1).strip()  # a local file may hold the bare answer
        text = _field(row, benchmark.question_keys, where)
        problems.append(Problem(text, answer, benchmark.instruction, where=where))
    if not problems:
        raise InputError(
            "no problem in it", where=str(Path(config.source)), way_out="give a file with a problem a line"
        )
    return problems


def _field(row: Row, keys: Sequence[str], where: str) -> str:
    """The text under the first key that the row has, in whatever case; the parts of a list are joined by
    commas.
    """
    names = {name.lower(): name for name in reversed(row)}
    known = [names.get(key, key) for key in keys]
    key = next((key for key in known if look_up(row, key) not in (MISSING, None)), known[0])
    value = look_up(row, key)
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        row = {**row, key: ", ".join(value)}
    return read_field(row, key, where, f"its keys are {' or '.join(keys)}")
