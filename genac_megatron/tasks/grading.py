"""Graders: does a response's final answer agree with the reference?

`exact` compares text. `math` asks math-verify in processes that can be ended (workers.py): its own time
limits need a main thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Protocol

from genac_megatron.tasks.workers import TIME_LIMIT_S, Workers

LONGEST_ANSWER = 20_000  # characters of a response's end that are read; answers stand there
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOXED = "\\boxed{"
_E_NUMBER = r"([+-]?(?:\d+(?:\.\d+)?|\.\d+))[eE]([+-]?\d{1,6})"  # 3.83e35
_E_REFERENCE = re.compile(_E_NUMBER)
_E_ANSWER = re.compile(rf"(?<![\w.\\]){_E_NUMBER}(?!\w|\.\d)")
_EULER = re.compile(r"(?<![a-zA-Z\\])e(?![a-zA-Z])|\\mathrm\{e\}")

Pair = tuple[str, str]  # (reference, response text)


class Grader(Protocol):
    """Outcomes of (reference, response text) pairs, in order, each 0.0 or 1.0."""

    @property
    def late(self) -> int: ...

    def grade(self, pairs: Sequence[Pair]) -> list[float]: ...


def last_boxed(text: str) -> str | None:
    """What the last complete \\boxed{...} of `text` holds, braces balanced; None where there is none."""
    at = text.rfind(_BOXED)
    while at >= 0:
        depth = 1
        for end in range(at + len(_BOXED), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[at + len(_BOXED) : end]
        at = text.rfind(_BOXED, 0, at)
    return None


def last_tagged(text: str) -> str | None:
    """What the last <answer>...</answer> of `text` holds; None where there is none."""
    found = _TAG.findall(text)
    return found[-1] if found else None


def final_answer(text: str) -> str:
    """The last boxed answer, else the last tagged one, else the last line that is not blank."""
    for found in (last_boxed(text), last_tagged(text)):
        if found is not None:
            return found.strip()
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


class ExactGrader:
    """Compares final answer and reference as text, white space aside."""

    late = 0

    def grade(self, pairs: Sequence[Pair]) -> list[float]:
        return [float(final_answer(text).split() == reference.split()) for reference, text in pairs]


def _agrees(reference: str, text: str) -> bool:
    """math-verify's verdict, without its own time limits: those work in a main thread alone."""
    from math_verify import parse, verify

    reference, text = _in_powers(reference, text)
    gold = parse(f"\\boxed{{{reference}}}", parsing_timeout=None)
    answer = parse(text, parsing_timeout=None)
    return bool(gold) and bool(answer) and bool(verify(gold, answer, timeout_seconds=None))


def _in_powers(reference: str, text: str) -> Pair:
    r"""The pair with numbers such as 3.83e35 as 3.83 \times 10^{35}: math-verify's e is Euler's.

    A reference is rewritten where it is such a number as a whole, answers where the reference has no e.
    """
    if (found := _E_REFERENCE.fullmatch(reference.strip().strip("$"))) is not None:
        reference = _power(found)
    if _EULER.search(reference):
        return reference, text
    return reference, _E_ANSWER.sub(_power, text)


def _power(number: re.Match[str]) -> str:
    return f"{number[1]} \\times 10^{{{int(number[2])}}}"


def _math() -> Callable[[Pair], float]:
    """In a worker's process: math-verify's verdict on a pair."""
    import math_verify  # noqa: F401  imported before the first pair, so that none pays for it

    return lambda pair: float(_agrees(*pair))


class MathGrader:
    """Grades with math-verify in `workers` processes; a pair above the time limit counts as 0."""

    def __init__(self, workers: int = 1, limit_s: float = TIME_LIMIT_S) -> None:
        self.workers = Workers(_math, workers, limit_s, "math-verify")

    @property
    def late(self) -> int:
        """Pairs that were ended by the time limit so far."""
        return self.workers.late

    def grade(self, pairs: Sequence[Pair]) -> list[float]:
        """Outcomes in order. Raises RuntimeError where a grading process does not start."""
        return self.workers.run([(reference, text[-LONGEST_ANSWER:]) for reference, text in pairs])

    def close(self) -> None:
        """End the processes. They also end with this process."""
        self.workers.close()


def make_grader(verifier: str) -> Grader:
    """The grader that a recipe's `verifier` names: math or exact."""
    return MathGrader() if verifier == "math" else ExactGrader()
