"""Chained arithmetic: one digit, carried through steps modulo 10. Whether a slip matters needs serial work.

    start : 7              the problem: a digit, and steps, each called by a letter
    q + 4
    c * 5
    m - 8

    start : 7              the response: each step again, and the digit after it
    q + 4 : 1
    c * 5 : 5
    m - 8 : 7
    answer : 7

Products by even numbers and by 5 forget part of what they are given: after a slip the answer may still come
out right, and only who goes on to the end knows.
Were steps numbered, small models would take sums' digits for numbers. Were letters the alphabet's first, a
model that is trained on short chains would forget the later ones; so they are any, and nothing is counted.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from genac_megatron.recipe.tasks import ChainedArithmeticTask
from genac_megatron.records import Prompt
from genac_megatron.tasks.base import GeneratedTask, Problem, Teacher, answer_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BASE = 10
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda value, operand: (value + operand) % BASE,
    "-": lambda value, operand: (value - operand) % BASE,
    "*": lambda value, operand: value * operand % BASE,
}
LETTERS = string.ascii_lowercase
_START = re.compile(r"start : (\d)")
_LINE = re.compile(r"([a-z]) [-+*] \d : (\d)")
_END = re.compile(r"answer : (\d)")

Step = tuple[str, int]  # operation and operand


@dataclass(frozen=True)
class Chain:
    """The parsed problem."""

    start: int
    steps: tuple[Step, ...]
    names: str = ""  # of the steps, a letter each; "": in the alphabet's order

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", self.names or LETTERS[: len(self.steps)])

    def text(self) -> str:
        steps = zip(self.names, self.steps, strict=True)
        lines = (f"{letter} {sign} {operand}" for letter, (sign, operand) in steps)
        return "\n".join((self.start_line(), *lines))

    def start_line(self) -> str:
        return f"start : {self.start}"

    def line(self, number: int, value: int) -> str:
        """A response's line of step `number`, from 1, with the digit that it says comes out."""
        sign, operand = self.steps[number - 1]
        return f"{self.names[number - 1]} {sign} {operand} : {value}"

    def after(self, number: int, value: int) -> int:
        """The digit after step `number`, from 1, of `value`."""
        sign, operand = self.steps[number - 1]
        return OPERATIONS[sign](value, operand)

    def values(self) -> list[int]:
        """The start, and the digit after each step."""
        found = [self.start]
        for number in range(1, len(self.steps) + 1):
            found.append(self.after(number, found[-1]))
        return found


def parse_chain(text: str) -> Chain:
    """The chain that `Chain.text` wrote."""
    start, *steps = text.splitlines()
    parts = [line.split() for line in steps]
    operations = tuple((sign, int(operand)) for _, sign, operand in parts)
    return Chain(int(start.split()[-1]), operations, "".join(letter for letter, _, _ in parts))


@dataclass(frozen=True)
class Standing:
    """How far a response is."""

    step: int  # steps that are done
    value: int  # the digit after them, as the response has it
    ended: bool = False  # its answer is written
    sound: bool = True  # all lines have the form of a response


def survey(chain: Chain, partial: str) -> Standing:
    """Where a response stands. A last line that is not whole is left out."""
    value, step, ended = chain.start, 0, False
    *whole, cut = partial.split("\n")
    if any(form.fullmatch(cut.strip()) for form in (_START, _LINE, _END)):
        whole.append(cut)
    for number, line in enumerate(text.strip() for text in whole):
        if number == 0:
            found = _START.fullmatch(line)
        elif number <= len(chain.steps):
            found = _LINE.fullmatch(line)
            if found and found[1] != chain.names[number - 1]:
                found = None
        else:
            found = None if ended else _END.fullmatch(line)
        if found is None:
            return Standing(step, value, ended, sound=False)
        value = int(found[found.lastindex or 1])
        step, ended = min(number, len(chain.steps)), number > len(chain.steps)
    return Standing(step, value, ended)


def chances(chain: Chain, sure: float) -> list[list[float]]:
    """[steps + 1][10]: the chance of the right answer after each step, from each digit.

    sure: that a line comes out right, and the answer is the last line's; what a slip makes of it is any
    other digit alike.
    """
    right = chain.values()[-1]
    found = [[float(value == right) for value in range(BASE)]]
    for number in range(len(chain.steps), 0, -1):
        later = found[0]
        missed = (1 - sure) / (BASE - 1)
        total = sum(later) * missed
        kept = [later[chain.after(number, value)] for value in range(BASE)]
        found.insert(0, [total + (sure - missed) * chance for chance in kept])
    return found


class ChainedArithmeticTeacher(Teacher):
    """Solves and checks by computing.

    `slip_rate` is the chance that a line of a demonstration has another digit than the right one; what
    follows goes on from it.
    """

    mean_length: float

    def __init__(self, slip_rate: float, mean_steps: float) -> None:
        self.slip_rate, self.mean_length = slip_rate, mean_steps

    def demonstrate(self, prompt: Prompt, rng: random.Random) -> str:
        chain = parse_chain(prompt.problem)
        value, lines = chain.start, [chain.start_line()]
        for number in range(1, len(chain.steps) + 1):
            value = chain.after(number, value)
            if rng.random() < self.slip_rate:
                value = (value + rng.randint(1, BASE - 1)) % BASE
            lines.append(chain.line(number, value))
        return "\n".join((*lines, f"answer : {value}", ""))

    def trace(self, prompt: Prompt, partial: str, p_bar: float, rng: random.Random) -> tuple[str, int]:
        """Where the response is, the right lines up to there, how far off its digit is, and a verdict.

            step q value 3
            start : 7
            q + 4 : 1
            value - 3 : 8 bad
            c * 5 : 0 ok
            left c m

        A difference is carried on to the end, or to where a product has forgotten it: sums leave it as it is,
        which is written as a sum with 0. Every line is one that who can answer can compute, and what is
        right is a digit's being 0: to see that two digits are the same would be a new thing to learn, and
        was not learnt from 8,000 traces. The score is the chance of the right answer where each line comes
        out right with the chance that gives a chain of average length p_bar.
        """
        chain = parse_chain(prompt.problem)
        at, right, count = survey(chain, partial), chain.values(), len(chain.steps)
        place = f"step {chain.names[at.step - 1]}" if at.step else "start"
        lines = [f"{place} value {at.value}"]
        if not at.sound:
            return "\n".join((*lines, "part bad")), 0
        lines += [chain.start_line(), *(chain.line(n, right[n]) for n in range(1, at.step + 1))]
        lines += _differences(chain, at.step, (right[at.step] - at.value) % BASE, at.value)
        if lines[-1].endswith("ok"):
            lines.append(" ".join(("left", *(chain.names[at.step :] or "-"))))
        if at.ended:
            return "\n".join(lines), 10 if at.value == right[count] else 0
        return "\n".join(lines), round(10 * self._chance(chain, at, p_bar))

    def value(self, prompt: Prompt, partial: str, p_bar: float) -> float:
        chain = parse_chain(prompt.problem)
        at = survey(chain, partial)
        if not at.sound:
            return 0.0
        if at.ended:
            return float(at.value == chain.values()[-1])
        return self._chance(chain, at, p_bar)

    def _chance(self, chain: Chain, at: Standing, p_bar: float) -> float:
        """Of the right answer from there."""
        sure = p_bar ** (1 / self.mean_length)
        return chances(chain, sure)[at.step][at.value]


def _differences(chain: Chain, step: int, off: int, value: int) -> list[str]:
    """The right digit less `value`, then what is left of that difference after each step after `step`."""
    lines = [f"value - {value} : {off}"]
    for letter, (sign, operand) in zip(chain.names[step:], chain.steps[step:], strict=True):
        if off == 0:
            break
        lines[-1] += " bad"
        operand = operand if sign == "*" else 0
        off = OPERATIONS[sign](off, operand)
        lines.append(f"{letter} {sign} {operand} : {off}")
    lines[-1] += " bad" if off else " ok"
    return lines


class ChainedArithmetic(GeneratedTask):
    """The task of this module; `reference` is the last digit as text."""

    def __init__(
        self, config: ChainedArithmeticTask, tokenizer: PreTrainedTokenizerBase | None, seed: int
    ) -> None:
        self._config, self._seed = config, seed
        super().__init__(tokenizer, config.train_size, config.heldout_size)
        mean_steps = (config.min_steps + config.max_steps) / 2
        self.teacher: ChainedArithmeticTeacher = ChainedArithmeticTeacher(config.slip_rate, mean_steps)

    def draw(self, number: int) -> Problem:
        rng, config = random.Random(f"problem/{self._seed}/{number}"), self._config
        count = rng.randint(config.min_steps, config.max_steps)
        steps = tuple((rng.choice(config.operations), rng.randrange(BASE)) for _ in range(count))
        chain = Chain(rng.randrange(BASE), steps, "".join(rng.sample(LETTERS, count)))
        return Problem(chain.text(), reference=str(chain.values()[-1]))

    def verify(self, prompt: Prompt, text: str) -> float:
        """1.0 where the last answer line holds the last digit, else 0.0."""
        return float(answer_line(text) == prompt.reference)
