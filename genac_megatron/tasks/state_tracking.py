"""State tracking: follow swaps of k objects in a row. The answer needs serial work, each line is easy.

    start : c a d b        the problem: the row, and numbered swaps of two objects
    swaps 2
    1 ac
    2 bd

    start : c a d b        the response: the row, then each swap again and the row after it
    1 ac : a c d b
    2 bd : a c b d
    answer : a c b d

The form is one that a small model learns soon: a number to find a swap by, a pair that is one word,
each row at the same distance from the row that it comes from.

With `fillers` each line has as many words behind its pair ("1 ac the in : a c d b"), which say nothing, each
drawn from eight: tokens that an actor is unsure of and that do not matter, as many of a language model's are.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from genac_megatron.recipe.tasks import StateTrackingTask
from genac_megatron.records import Prompt
from genac_megatron.tasks.base import GeneratedTask, Problem, Teacher, answer_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = "abcdefgh"
FILLERS = ("the", "is", "to", "and", "in", "of", "used", "line")  # each one token of the tiny tokenizer
SURE = 0.98  # p_bar is kept within [1 - SURE, SURE] before roots are taken of it

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
    answer = answer_line(text)
    return None if answer is None else tuple(answer.split())


def write_line(number: int, swap: Swap, row: Row, fillers: Sequence[str] = ()) -> str:
    """One line of a response: the step's number, its swap, words that do not matter, the row after it."""
    return f"{' '.join((str(number), swap[0] + swap[1], *fillers))} : {' '.join(row)}"


class StateTrackingTeacher(Teacher):
    """Solves and checks by simulation.

    `slip_rate` is the chance that a line of a demonstration writes one object of its pair over the other,
    which is then lost; what follows goes on from that row, so that the answer is wrong. `fillers`: the words
    in each of its lines that do not matter.
    """

    mean_length: float

    def __init__(self, slip_rate: float, mean_swaps: float, fillers: int = 0) -> None:
        self.slip_rate, self.mean_length, self.fillers = slip_rate, mean_swaps, fillers

    def demonstrate(self, prompt: Prompt, rng: random.Random) -> str:
        puzzle = parse_puzzle(prompt.problem)
        row, lines = puzzle.start, [puzzle.start_line()]
        for number, swap in enumerate(puzzle.swaps, 1):
            slips = rng.random() < self.slip_rate
            row = (
                overwrite(row, swap if rng.random() < 0.5 else swap[::-1]) if slips else apply_swap(row, swap)
            )
            lines.append(write_line(number, swap, row, rng.choices(FILLERS, k=self.fillers)))
        return "\n".join((*lines, f"answer : {' '.join(row)}", ""))

    def trace(self, prompt: Prompt, partial: str, p_bar: float, rng: random.Random) -> tuple[str, int]:
        """How far the response is, the row it has got to, a roll call of the objects, a verdict.

            step 3 of 5 row b a c a
            has a + b + c + d - bad

        The verdict is exact: ok where every whole line is right. From a wrong row the answer is wrong,
        score 0. Else each line left succeeds with the chance that gives a response of average length p_bar.
        """
        puzzle = parse_puzzle(prompt.problem)
        step, row, right = _survey(puzzle, partial)
        swaps = len(puzzle.swaps)
        call = " ".join(f"{name} {'+' if name in row else '-'}" for name in sorted(puzzle.start))
        words = f"step {step} of {swaps} row {' '.join(row) or 'part'}\nhas {call}"
        if not right:
            return f"{words} bad", 0
        return f"{words} ok\nleft {swaps - step}", round(10 * self._chance(swaps - step, p_bar))

    def value(self, prompt: Prompt, partial: str, p_bar: float) -> float:
        puzzle = parse_puzzle(prompt.problem)
        step, _, right = _survey(puzzle, partial)
        return self._chance(len(puzzle.swaps) - step, p_bar) if right else 0.0

    def _chance(self, left: int, p_bar: float) -> float:
        """That this many lines come out right."""
        per_line = min(max(p_bar, 1 - SURE), SURE) ** (1 / self.mean_length)
        return float(per_line**left)


def overwrite(row: Row, swap: Swap) -> Row:
    """The slip: the row with the second object of `swap` also where the first was."""
    return tuple(swap[1] if name == swap[0] else name for name in row)


def _survey(puzzle: Puzzle, partial: str) -> tuple[int, Row, bool]:
    """(swaps that are done, the objects named by the last whole line, whether all lines are right).

    A last line that is cut is not looked at while it is right so far.
    """
    rows = [puzzle.start, *puzzle.rows()]
    steps = (write_line(step, *both) for step, both in enumerate(zip(puzzle.swaps, rows[1:], strict=True), 1))
    rights = [puzzle.start_line(), *steps, f"answer : {' '.join(rows[-1])}"]
    lines = partial.rstrip("\n").split("\n") if partial.strip() else []
    at_end = len(lines) - 1
    if lines and not partial.endswith("\n") and at_end < len(rights):
        head, colon, row = lines[-1].partition(":")
        cut = " ".join(word for word in head.split(" ") if word not in FILLERS) + colon + row
        if rights[at_end].startswith(cut) and not _agrees(cut, rights[at_end]):
            lines.pop()
    if not lines:
        return 0, puzzle.start, True
    right = len(lines) <= len(rights) and all(_agrees(*both) for both in zip(lines, rights, strict=False))
    named = [word for word in lines[-1].split() if word in puzzle.start]
    return min(len(lines) - 1, len(puzzle.swaps)), tuple(named[: len(puzzle.start)]), right


def _agrees(line: str, right: str) -> bool:
    """Whether a line is of the same step and has the same row; which pair it names does not matter."""
    if right.startswith("answer"):
        return parse_answer(line) == parse_answer(right)
    (step, _, row), (right_step, _, right_row) = line.partition(":"), right.partition(":")
    return step.split()[:1] == right_step.split()[:1] and row.split() == right_row.split()


class StateTracking(GeneratedTask):
    """The task of this module; `reference` is the final row as text."""

    def __init__(self, config: StateTrackingTask, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self._config, self._seed = config, seed
        super().__init__(tokenizer, config.train_size, config.heldout_size)
        mean_swaps = (config.min_swaps + config.max_swaps) / 2
        self.teacher: StateTrackingTeacher = StateTrackingTeacher(
            config.slip_rate, mean_swaps, config.fillers
        )

    def draw(self, number: int) -> Problem:
        rng, config = random.Random(f"problem/{self._seed}/{number}"), self._config
        names = NAMES[: config.objects]
        start = tuple(rng.sample(names, len(names)))
        pairs = list(combinations(names, 2))
        swaps = tuple(rng.choices(pairs, k=rng.randint(config.min_swaps, config.max_swaps)))
        puzzle = Puzzle(start, swaps)
        return Problem(puzzle.text(), reference=" ".join(puzzle.rows()[-1]))

    def verify(self, prompt: Prompt, text: str) -> float:
        """1.0 where the last answer line holds the whole final row, else 0.0."""
        return float(parse_answer(text) == tuple(prompt.reference.split()))
