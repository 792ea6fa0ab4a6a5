"""State tracking: follow swaps of k objects in a row. The answer needs serial work, each line is easy.

    start : c a d b        the problem: the row, and numbered swaps of two objects
    swaps 2
    1 ac
    2 bd

    start : c a d b        the response: the row, then each swap again and the row after it
    1 ac : a c d b
    2 bd : a c b d
    answer a c b d

The form is one that a small model learns soon: a number to find a swap by, a pair that is one word,
each row at the same distance from the row that it comes from.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from genac_megatron.records import Prompt
from genac_megatron.recipe.schema import StateTrackingTask
from genac_megatron.tasks.base import GeneratedProblems, Problem, Split, Task, Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = "abcdefgh"
SURE = 0.98  # p_bar is kept within [1 - SURE, SURE] before roots are taken of it
_ANSWER = re.compile(r"^[ \t]*answer\b[ \t:]*(.*)$", re.MULTILINE)

Row = tuple[str, ...]
Swap = tuple[str, str]  # in alphabetical order


@dataclass(frozen=True)
class Puzzle:
    """The parsed problem: where the objects start, and which two change places in each step."""

    start: Row
    swaps: tuple[Swap, ...]

    def text(self) -> str:
        steps = (f"{number} {first}{second}" for number, (first, second) in enumerate(self.swaps, 1))
        return "\n".join((self.start_line(), f"swaps {len(self.swaps)}", *steps))

    def start_line(self) -> str:
        return f"start : {' '.join(self.start)}"

    def rows(self) -> list[Row]:
        """The row after each swap, in order."""
        rows, row = [], self.start
        for swap in self.swaps:
            row = apply_swap(row, swap)
            rows.append(row)
        return rows


def apply_swap(row: Row, swap: Swap) -> Row:
    """The row with the two objects of `swap` in each other's place."""
    places = {swap[0]: swap[1], swap[1]: swap[0]}
    return tuple(places.get(name, name) for name in row)


def parse_puzzle(text: str) -> Puzzle:
    """The puzzle that `Puzzle.text` wrote."""
    start, _, *steps = text.splitlines()
    swaps = ((pair[0], pair[1]) for _, pair in (step.split() for step in steps))
    return Puzzle(tuple(start.split()[2:]), tuple(swaps))


def parse_answer(text: str) -> Row | None:
    """The row on the last line of `text` that starts with "answer"; None where no line does."""
    lines = _ANSWER.findall(text)
    return tuple(lines[-1].split()) if lines else None


def write_line(number: int, swap: Swap, row: Row) -> str:
    """One line of a response: the step's number, its swap, the row after it."""
    return f"{number} {swap[0]}{swap[1]} : {' '.join(row)}"


class StateTrackingTeacher(Teacher):
    """Solves and checks by simulation.

    `slip_rate` is the chance that a line of a demonstration swaps another pair than it names; what
    follows goes on from the wrong row, so that the answer is wrong.
    """

    def __init__(self, slip_rate: float, mean_swaps: float) -> None:
        self.slip_rate, self.mean_swaps = slip_rate, mean_swaps

    def demonstrate(self, prompt: Prompt, rng: random.Random) -> str:
        puzzle = parse_puzzle(prompt.problem)
        row, lines = puzzle.start, [puzzle.start_line()]
        for number, swap in enumerate(puzzle.swaps, 1):
            done = _other_swap(swap, puzzle.start, rng) if rng.random() < self.slip_rate else swap
            row = apply_swap(row, done)
            lines.append(write_line(number, swap, row))
        return "\n".join((*lines, f"answer {' '.join(row)}"))

    def trace(self, prompt: Prompt, partial: str, p_bar: float, rng: random.Random) -> tuple[str, int]:
        """The right row of each line that `partial` has, whether the line agrees, how many are left.

        The checking stops at the first bad line: from a wrong row the answer is wrong, score 0. Else
        each line left succeeds with the chance that gives a response of average length p_bar.
        """
        puzzle = parse_puzzle(prompt.problem)
        words, left = _check(puzzle, partial)
        if left is None:
            return "\n".join(words), 0
        words.append(f"left {left}")
        per_line = min(max(p_bar, 1 - SURE), SURE) ** (1 / self.mean_swaps)
        return "\n".join(words), round(10 * per_line**left)


def _other_swap(swap: Swap, row: Row, rng: random.Random) -> Swap:
    """A pair of the row's objects that is not `swap`; `swap` itself where there is no other."""
    pairs = [pair for pair in combinations(sorted(row), 2) if pair != swap]
    return rng.choice(pairs) if pairs else swap


def _check(puzzle: Puzzle, partial: str) -> tuple[list[str], int | None]:
    """(one verdict per line of `partial`, number of swaps left); None left where a line is bad.

    A verdict writes the line as it should be, then ok or bad: the critic does the step again by what
    the actor knows already, and compares.
    """
    rows = [puzzle.start, *puzzle.rows()]
    steps = (write_line(step, *both) for step, both in enumerate(zip(puzzle.swaps, rows[1:], strict=True), 1))
    rights = [puzzle.start_line(), *steps, f"answer {' '.join(rows[-1])}"]
    verdicts: list[str] = []
    lines = partial.rstrip("\n").split("\n") if partial.strip() else []
    for place, line in enumerate(lines):
        step = len(verdicts)
        if step == len(rights):
            return [*verdicts, "bad"], None  # it goes on after the answer
        cut = place == len(lines) - 1 and not partial.endswith("\n")
        agrees = _agrees(line, rights[step])
        if cut and not agrees and rights[step].startswith(line):
            break  # cut within a line that is right so far: it is still to be written
        verdicts.append(f"{rights[step]} {'ok' if agrees else 'bad'}")
        if not agrees:
            return verdicts, None
    return verdicts, len(puzzle.swaps) - min(max(len(verdicts) - 1, 0), len(puzzle.swaps))


def _agrees(line: str, right: str) -> bool:
    """Whether a line is of the same step and has the same row; which pair it names does not matter."""
    if right.startswith("answer"):
        return parse_answer(line) == parse_answer(right)
    (step, _, row), (right_step, _, right_row) = line.partition(":"), right.partition(":")
    return step.split()[:1] == right_step.split()[:1] and row.split() == right_row.split()


class StateTracking(Task):
    """The task of this module; `reference` is the final row as text."""

    def __init__(self, config: StateTrackingTask, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        super().__init__(tokenizer, config.train_size, config.heldout_size)
        self._config, self._seed = config, seed
        self._problems = GeneratedProblems(self._draw, config.train_size, config.heldout_size)
        mean_swaps = (config.min_swaps + config.max_swaps) / 2
        self.teacher: StateTrackingTeacher = StateTrackingTeacher(config.slip_rate, mean_swaps)

    def _draw(self, number: int) -> Problem:
        rng, config = random.Random(f"problem/{self._seed}/{number}"), self._config
        names = NAMES[: config.objects]
        start = tuple(rng.sample(names, len(names)))
        pairs = list(combinations(names, 2))
        swaps = tuple(rng.choices(pairs, k=rng.randint(config.min_swaps, config.max_swaps)))
        puzzle = Puzzle(start, swaps)
        return Problem(puzzle.text(), reference=" ".join(puzzle.rows()[-1]))

    def _problem(self, split: Split, index: int) -> Problem:
        return self._problems.train(index) if split == "train" else self._problems.heldout[index]

    def verify(self, prompt: Prompt, text: str) -> float:
        """1.0 where the last answer line holds the whole final row, else 0.0."""
        return float(parse_answer(text) == tuple(prompt.reference.split()))
