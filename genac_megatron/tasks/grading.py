"""Graders: does a response's final answer (answers.py) agree with the reference?

`exact` compares text. `math` asks equality.py, and so math-verify, in processes that can be ended.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

from genac_megatron.tasks.answers import EXACT, MARKED, final_answer, referred
from genac_megatron.tasks.workers import BESIDE, TIME_LIMIT_S, Shared, Workers

if TYPE_CHECKING:
    from genac_megatron.recipe.tasks import AnswerForm

LONGEST_ANSWER = 20_000  # characters; a final answer that is longer is none

Pair = tuple[str, str]  # (reference, response text)


class Grader(Protocol):
    """Outcomes of (reference, response text) pairs, in order, each 0.0 or 1.0."""

    forms: Sequence[AnswerForm]

    @property
    def late(self) -> int: ...

    def grade(self, pairs: Sequence[Pair]) -> list[float]:
        """Of responses that ended by themselves: the outcome of each one's final answer."""

    def grade_answers(self, pairs: Sequence[tuple[str, str | None]]) -> list[float]:
        """Of (reference, final answer): None where a response has none."""


class ExactGrader:
    """Compares final answer and reference as text, white space aside."""

    late = 0

    def __init__(self, forms: Sequence[AnswerForm] = EXACT) -> None:
        self.forms = forms

    def grade(self, pairs: Sequence[Pair]) -> list[float]:
        return self.grade_answers([(reference, final_answer(text, self.forms)) for reference, text in pairs])

    def grade_answers(self, pairs: Sequence[tuple[str, str | None]]) -> list[float]:
        return [float(given is not None and _same(reference, given)) for reference, given in pairs]


def _same(reference: str, given: str) -> bool:
    return any(_same_text(said, given) for said in (reference, referred(reference)))


def _same_text(reference: str, given: str) -> bool:
    return reference.split() in (given.split(), given.strip("*` ").removesuffix(".").split())


def _math() -> Callable[[Pair], float]:
    """In a worker's process: the verdict on (reference, final answer)."""
    from genac_megatron.tasks.equality import agrees

    # It would say on the terminal that it has no time limit of its own: Workers have one.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    agrees("x^2+2x+1", "(x+1)^2")  # imports, parser tables, simplification: no pair's limit pays for them
    return lambda pair: float(agrees(*pair))


class MathGrader:
    """Grades with math-verify in `workers` processes, one for each thread that asks; a pair above the time
    limit counts as 0."""

    def __init__(
        self, workers: int = BESIDE, limit_s: float = TIME_LIMIT_S, forms: Sequence[AnswerForm] = MARKED
    ) -> None:
        self.forms = forms
        self.workers = Shared(partial(Workers, _math, 1, limit_s, "math-verify"), workers)

    @property
    def late(self) -> int:
        """Pairs that were ended by the time limit so far."""
        return self.workers.late

    def grade(self, pairs: Sequence[Pair]) -> list[float]:
        """Outcomes in order. Raises RuntimeError where a grading process does not start."""
        return self.grade_answers([(reference, final_answer(text, self.forms)) for reference, text in pairs])

    def grade_answers(self, pairs: Sequence[tuple[str, str | None]]) -> list[float]:
        """Outcomes in order; a response without a final answer asks no process."""
        asked = [
            (place, (reference, given))
            for place, (reference, given) in enumerate(pairs)
            if given is not None and len(given) <= LONGEST_ANSWER
        ]
        outcomes = [0.0] * len(pairs)
        scores = self.workers.run([pair for _, pair in asked])
        for (place, _), score in zip(asked, scores, strict=True):
            outcomes[place] = score
        return outcomes

    def close(self) -> None:
        """End the processes. They also end with this process."""
        self.workers.close()


def make_grader(verifier: str, forms: Sequence[AnswerForm] | None = None) -> Grader:
    """The grader that a recipe's `verifier` names, math or exact; `forms` None: the verifier's own."""
    if verifier == "math":
        return MathGrader(forms=forms or MARKED)
    return ExactGrader(forms or EXACT)
