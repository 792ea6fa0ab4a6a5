"""State tracking: follow swaps of k objects in a row. The answer needs serial work, each line is easy.

    start c a d b          the problem: the row, and numbered swaps of two objects
    swaps 2
    1 ac
    2 bd

    1 ac : a c d b         the response: each swap again, and the row after it
    2 bd : a c b d
    answer a c b d

Numbers are there to find a swap by, and a pair is one word, so that a small model learns it soon.
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
        return "\n".join((f"start {' '.join(self.start)}", f"swaps {len(self.swaps)}", *steps))

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
    return Puzzle(tuple(start.split()[1:]), tuple(swaps))


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
        row, lines = puzzle.start, []
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
    rows = puzzle.rows()
    rights = [write_line(step, *both) for step, both in enumerate(zip(puzzle.swaps, rows, strict=True), 1)]
    rights.append(f"answer {' '.join(rows[-1])}")
    verdicts: list[str] = []
    lines = partial.rstrip("\n").split("\n") if partial.strip() else []
    for place, line in enumerate(lines):
        step = len(verdicts)
        if step == len(rights):
            return [*verdicts, "bad"], None  # it goes on after the answer
        cut = place == len(lines) - 1 and not partial.endswith("\n")
        agrees = parse_answer(line) == rows[-1] if step == len(rows) else _row_of(line, step + 1) == rows[step]
        if cut and not agrees and rights[step].startswith(line):
            break  # cut within a line that is right so far: it is still to be written
        verdicts.append(f"{rights[step]} {'ok' if agrees else 'bad'}")
        if not agrees:
            return verdicts, None
    return verdicts, max(0, len(rows) - len(verdicts))


def _row_of(line: str, number: int) -> Row | None:
    """The row on a response's line `number`; None where it isn't that line."""
    step, colon, row = line.partition(":")
    return tuple(row.split()) if colon and step.split()[:1] == [str(number)] else None


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
