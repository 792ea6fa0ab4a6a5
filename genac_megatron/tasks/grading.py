"""Graders: does a response's final answer agree with the reference?

`exact` compares text. `math` asks math-verify, in processes of our own: sympy can run for minutes on
a hostile answer and math-verify's own time limits need a main thread, so a late process is ended and
its answer counts as wrong.
"""

from __future__ import annotations

import multiprocessing
import re
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Protocol

TIME_LIMIT_S = 5.0
START_LIMIT_S = 120.0  # a fresh process imports sympy first, on a machine that may be busy
LONGEST_ANSWER = 20_000  # characters of a response's end that are read; answers stand there
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOXED = "\\boxed{"

Pair = tuple[str, str]  # (reference, response text)


class Grader(Protocol):
    """Outcomes of (reference, response text) pairs, in order, each 0.0 or 1.0."""

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

    def grade(self, pairs: Sequence[Pair]) -> list[float]:
        return [float(final_answer(text).split() == reference.split()) for reference, text in pairs]


def _agrees(reference: str, text: str) -> bool:
    """math-verify's verdict, without its own time limits: those work in a main thread alone."""
    from math_verify import parse, verify

    gold = parse(f"\\boxed{{{reference}}}", parsing_timeout=None)
    answer = parse(text, parsing_timeout=None)
    return bool(gold) and bool(answer) and bool(verify(gold, answer, timeout_seconds=None))


def _serve(pipe: Connection) -> None:
    """A grading process: says it is ready, then answers pairs until its pipe closes."""
    import math_verify  # noqa: F401  imported before "ready", so that no pair pays for it

    pipe.send(True)
    while True:
        try:
            reference, text = pipe.recv()
        except EOFError:
            return
        try:
            verdict = _agrees(reference, text)
        except Exception:  # whatever a hostile answer makes sympy raise, it is not a right answer
            verdict = False
        pipe.send(verdict)


class _Worker:
    """One grading process, what it works on, and until when it may."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # fork would copy the caller's threads' locks
        self.pipe, far = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(far,), daemon=True)
        self.process.start()
        far.close()
        self.job: int | None = None
        self.ready = False
        self.deadline = time.monotonic() + START_LIMIT_S

    def give(self, job: int, pair: Pair, limit_s: float) -> None:
        self.job, self.deadline = job, time.monotonic() + limit_s
        self.pipe.send(pair)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class MathGrader:
    """Grades with math-verify in `workers` processes, started at first use and kept.

    A pair that takes longer than `limit_s`, or that kills its process, counts as 0.
    """

    def __init__(self, workers: int = 1, limit_s: float = TIME_LIMIT_S) -> None:
        self.limit_s = limit_s
        self._count = workers
        self._workers: list[_Worker] = []

    def grade(self, pairs: Sequence[Pair]) -> list[float]:
        """Outcomes in order. Raises RuntimeError where a grading process does not start."""
        results = [0.0] * len(pairs)
        waiting = deque(range(len(pairs)))
        while waiting or any(worker.job is not None for worker in self._workers):
            while waiting and len(self._workers) < min(self._count, len(pairs)):
                self._workers.append(_Worker())
            for worker in self._workers:
                if worker.ready and worker.job is None and waiting:
                    job = waiting.popleft()
                    reference, text = pairs[job]
                    worker.give(job, (reference, text[-LONGEST_ANSWER:]), self.limit_s)
            self._collect(results)
        return results

    def close(self) -> None:
        """End the processes. They also end with this process."""
        while self._workers:
            self._workers.pop().end()

    def _collect(self, results: list[float]) -> None:
        """Wait for an answer or the next deadline; take answers in, end what is late or lost."""
        busy = [worker for worker in self._workers if worker.job is not None or not worker.ready]
        first_deadline = min(worker.deadline for worker in busy)
        wait([worker.pipe for worker in busy], timeout=max(0.0, first_deadline - time.monotonic()))
        for worker in busy:
            try:
                if worker.pipe.poll():
                    verdict = worker.pipe.recv()
                    if worker.job is not None:
                        results[worker.job] = float(verdict)
                    worker.ready, worker.job = True, None
                    continue
                lost = False
            except (EOFError, OSError):
                lost = True
            if lost or time.monotonic() >= worker.deadline:
                worker.end()
                self._workers.remove(worker)
                if not worker.ready:
                    self.close()
                    raise RuntimeError(
                        "a math-verify grading process did not start: is math-verify installed?"
                    )


def make_grader(verifier: str) -> Grader:
    """The grader that a recipe's `verifier` names: math or exact."""
    return MathGrader() if verifier == "math" else ExactGrader()
