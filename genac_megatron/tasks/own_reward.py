"""A reward of the user's own: a Python function, sync or async, in processes beside generation.

It gives a number in [0, 1], or a dict of named parts, each in [0, 1], whose weighted mean the outcome is.
What it gives is checked, on a few samples before training begins and on every one after. Later failures (it
raises, takes too long, gives something else) have the outcome `verifier.failed_outcome`, are counted (`late`)
and told; `verifier.give_up` of them in a row end the run.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from genac_megatron.errors import InputError
from genac_megatron.recipe.own_code import parse_named
from genac_megatron.records import Prompt
from genac_megatron.tasks.base import FixedTask, Problem, Scored, Split, Task
from genac_megatron.tasks.own_code import Called, OwnCodeError, run_jobs
from genac_megatron.tasks.workers import Pool

if TYPE_CHECKING:
    from genac_megatron.recipe.tasks import OwnReward

ARGUMENTS = ("response", "reference", "problem", "messages", "key")
OTHER_NAMES = {  # what public trainers call them
    "completion": "response",
    "solution_str": "response",
    "ground_truth": "reference",
    "question": "problem",
}
CHECKED = 2  # prompts of each split whose responses are scored before training
ROUNDING = 1e-6  # beyond [0, 1], of a sum of floats
SHOWN = 100  # characters of a wrong result that a message shows
SUCCESS = "a reward function scores the finished response from 0 to 1; estimate the score that it will get"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What became of a response in the function's process."""

    outcome: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    failure: str = ""  # why there is no outcome; "": there is


class OwnRewarded(Task):
    """A task whose responses a user's function scores, in place of the task's own verifier."""

    def __init__(self, inner: Task, config: OwnReward) -> None:
        """Has the function score a few samples. Raises InputError where it fails on one."""
        super().__init__(inner.tokenizer, inner.train_size, inner.heldout_size)
        self.inner, self.teacher, self.digest = inner, inner.teacher, inner.digest
        inner.success = self.success = inner.success or SUCCESS
        self._reward = PythonReward(config)
        try:
            self._reward.check(self._samples())
        except BaseException:
            self._reward.close()
            raise

    def _samples(self) -> list[tuple[Prompt, str]]:
        """A few prompts, each with its reference as the response; and one with an empty response."""
        sizes: tuple[tuple[Split, int], ...] = (("train", self.train_size), ("heldout", self.heldout_size))
        prompts = [self.prompt(split, n) for split, size in sizes for n in range(min(size, CHECKED))]
        return [(prompt, str(prompt.reference)) for prompt in prompts] + [(prompts[0], "")]

    def _problem(self, split: Split, index: int) -> Problem:
        return self.inner._problem(split, index)

    def prompt(self, split: Split, index: int) -> Prompt:
        return self.inner.prompt(split, index)

    def train_index(self, seed: int, cursor: int) -> int:
        return self.inner.train_index(seed, cursor)

    @property
    def fixed(self) -> FixedTask | None:
        return self.inner.fixed

    def resized(self) -> None:
        self.train_size, self.heldout_size = self.inner.train_size, self.inner.heldout_size

    @property
    def late(self) -> int:
        return self._reward.failed

    def verify(self, prompt: Prompt, text: str) -> float:
        """The outcome in [0, 1]. Raises InputError after `give_up` failures in a row."""
        return self._reward.score(prompt, text).outcome

    async def score_beside(self, prompt: Prompt, text: str, cut_off: bool = False) -> Scored:
        return await self._reward.score_beside(prompt, text)

    async def verify_beside(self, prompt: Prompt, text: str, cut_off: bool = False) -> float:
        return (await self._reward.score_beside(prompt, text)).outcome

    def verify_many(self, pairs: Sequence[tuple[Prompt, str]], cut_off: Collection[int] = ()) -> list[float]:
        return [scored.outcome for scored in self._reward.score_many(pairs)]

    def close(self) -> None:
        """End the processes."""
        self._reward.close()
        self.inner.close()


class PythonReward:
    """The function in `workers` processes, started at first use; a thread each waits for them."""

    def __init__(self, config: OwnReward) -> None:
        self.config = config
        self.named = parse_named(config.python, "task.verifier.python")
        self.failed = 0
        self._in_a_row = 0
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(config.workers, thread_name_prefix="reward")
        make = partial(_scorer, config.python, config.parts)
        pools = [Pool(make, _failed, 1, config.timeout_s, str(self.named)) for _ in range(config.workers)]
        self._pools = pools
        self._free: SimpleQueue[Pool[Result]] = SimpleQueue()
        for pool in pools:
            self._free.put(pool)

    def check(self, samples: Sequence[tuple[Prompt, str]]) -> None:
        """Score samples. Raises InputError at the first that the function fails on."""
        for (prompt, text), result in zip(samples, self._threads.map(self._ask, samples), strict=True):
            if result.failure:
                shown = "an empty response" if not text else "its reference as the response"
                raise InputError(
                    f"{result.failure}, on {prompt.id} with {shown}",
                    where=str(self.named),
                    way_out="a reward takes any response and gives a number in [0, 1], or a dict of the "
                    "parts that task.verifier.parts names (docs/tasks.md)",
                )

    def score(self, prompt: Prompt, text: str) -> Scored:
        """The outcome and its parts. Raises InputError after `give_up` failures in a row."""
        return self._counted(self._ask((prompt, text)), prompt)

    async def score_beside(self, prompt: Prompt, text: str) -> Scored:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.score, prompt, text)

    def score_many(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Scored]:
        return list(self._threads.map(lambda pair: self.score(*pair), pairs))

    def close(self) -> None:
        """End the processes, whatever they are at, and the threads."""
        for pool in self._pools:
            pool.end_now()
        self._threads.shutdown(cancel_futures=True)
        for _ in self._pools:
            pool = self._free.get()  # once nobody is at it
            pool.close()
            self._free.put(pool)

    def _ask(self, sample: tuple[Prompt, str]) -> Result:
        prompt, text = sample
        job = {
            "response": text,
            "reference": prompt.reference,
            "problem": prompt.problem,
            "messages": [dict(message) for message in prompt.messages],
            "key": prompt.id,
        }
        pool = self._free.get()
        try:
            return run_jobs(pool, [job], self.named)[0]
        finally:
            self._free.put(pool)

    def _counted(self, result: Result, prompt: Prompt) -> Scored:
        with self._lock:
            self._in_a_row = self._in_a_row + 1 if result.failure else 0
            self.failed += bool(result.failure)
            row = self._in_a_row
        if not result.failure:
            return Scored(result.outcome, result.parts)
        outcome = self.config.failed_outcome
        logger.warning("%s %s, on %s: it counts as %g", self.named, result.failure, prompt.id, outcome)
        if row < self.config.give_up:
            return Scored(outcome)
        raise InputError(
            f"failed on {row} responses in a row; the last, on {prompt.id}: {result.failure}",
            where=str(self.named),
            way_out="mend the function; raise task.verifier.timeout_s where it is slow, give_up where such "
            "failures are to be borne",
        )


def _failed(why: str) -> Result:
    return Result(failure=why)


def _scorer(python: str, weights: Mapping[str, float]) -> Callable[[Mapping[str, Any]], Result]:
    """In a worker's process: the user's function, what it gives read. Why it cannot be used is every
    job's failure."""
    try:
        called = Called(parse_named(python), ARGUMENTS, OTHER_NAMES)
    except OwnCodeError as error:
        why = str(error)
        return lambda job: _failed(why)

    def score(job: Mapping[str, Any]) -> Result:
        try:
            return read_result(called(job), weights)
        except OwnCodeError as error:
            return _failed(str(error))

    return score


def read_result(given: Any, weights: Mapping[str, float]) -> Result:
    """The outcome of what a reward returned: a number, or parts by name and their weighted mean.

    Raises OwnCodeError where it is neither, outside [0, 1], or has other parts than `weights`.
    """
    if not weights:
        if isinstance(given, Mapping):
            names = ", ".join(f"{name}: 1" for name in given)
            raise OwnCodeError(
                f"returned parts ({_shown(given)}), and the recipe gives none a weight: set "
                f"task.verifier.parts to {{{names}}}"
            )
        return Result(_number(given, "returned"))
    if not isinstance(given, Mapping):
        raise OwnCodeError(
            f"returned {_shown(given)} ({type(given).__name__}), not a dict of the parts {', '.join(weights)}"
        )
    if missing := [name for name in weights if name not in given]:
        raise OwnCodeError(f"returned no part {', '.join(missing)} ({_shown(given)})")
    if more := [str(name) for name in given if name not in weights]:
        raise OwnCodeError(
            f"returned the part {', '.join(more)}, which task.verifier.parts does not name (with a weight of "
            "0 it is logged and does not count)"
        )
    parts = {name: _number(given[name], f"returned for the part {name}") for name in weights}
    largest = max(weights.values())  # shares of it: the least weights' products would be 0
    shares = {name: weight / largest for name, weight in weights.items()}
    outcome = math.fsum(shares[name] * value for name, value in parts.items()) / math.fsum(shares.values())
    return Result(min(outcome, 1.0), parts)


def _number(given: Any, what: str) -> float:
    """A number in [0, 1]; truth values and numpy's or torch's scalars are numbers."""
    value = given
    if not isinstance(value, Real) and getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, Real):
        raise OwnCodeError(f"{what} {_shown(given)} ({type(given).__name__}), not a number")
    number = float(value)
    if not -ROUNDING <= number <= 1.0 + ROUNDING:  # NaN is not
        raise OwnCodeError(f"{what} {_shown(given)}, not a number in [0, 1]")
    return min(max(number, 0.0), 1.0)


def _shown(given: Any) -> str:
    try:
        text = repr(given)
    except Exception as error:
        text = f"something whose repr raises {type(error).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
