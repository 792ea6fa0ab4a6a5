"""The procedural tasks of reasoning-gym, by name. Each has its own generator and its own scorer."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from genac_megatron.errors import InputError
from genac_megatron.recipe.tasks import ReasoningGymTask
from genac_megatron.records import Prompt
from genac_megatron.tasks.answers import last_tagged
from genac_megatron.tasks.base import GeneratedTask, Problem
from genac_megatron.tasks.hanoi import HanoiTeacher
from genac_megatron.tasks.reasoning import opened_reasoning, usual
from genac_megatron.tasks.workers import TIME_LIMIT_S, Shared, Workers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ReasoningGym(GeneratedTask):
    """One reasoning-gym task; `reference` is its whole entry, which its scorer needs."""

    def __init__(
        self,
        config: ReasoningGymTask,
        tokenizer: PreTrainedTokenizerBase | None,
        seed: int,
        limit_s: float = TIME_LIMIT_S,
    ) -> None:
        """`limit_s`: seconds that scoring a response may take.

        Raises InputError for an unknown name (naming the nearest) or options that it does not take."""
        self._config = config
        self._pool_size = config.train_size + config.heldout_size
        self._pool = _make_pool(config, seed, self._pool_size)
        make = partial(_scorer, config, seed, self._pool_size)
        self._scorer = Shared(partial(Workers, make, 1, limit_s, config.name))
        super().__init__(tokenizer, config.train_size, config.heldout_size)
        self.teacher = HanoiTeacher() if config.name == "tower_of_hanoi" else None

    def draw(self, number: int) -> Problem:
        entry = self._pool[number % self._pool_size]
        return Problem(str(entry["question"]).strip(), reference=entry, instruction=self._config.instruction)

    def reveal(self, problem: Problem) -> dict[str, str]:
        """The entry's answer; some tasks, where many answers are right, have none."""
        answer = problem.reference.get("answer")
        return {} if answer is None else {"reference": str(answer)}

    @property
    def late(self) -> int:
        return self._scorer.late

    def verify(self, prompt: Prompt, text: str) -> float:
        """reasoning-gym's score of the last <answer>; 0 or 1 by `pass_score` where `binary` is on."""
        opened = self.tokenizer is not None and opened_reasoning(
            self.tokenizer, prompt.ids, self.reasoning_tags
        )
        answer = last_tagged(usual(text, self.reasoning_tags), opened)
        if answer is None:
            return 0.0
        (score,) = self._scorer.run([(answer.strip(), prompt.reference)])
        if self._config.binary:
            return float(score >= self._config.pass_score)
        return min(max(score, 0.0), 1.0)


def _scorer(config: ReasoningGymTask, seed: int, size: int) -> Callable[[tuple[str, Any]], float]:
    """In a worker's process: reasoning-gym's score of (answer, entry)."""
    pool = _make_pool(config, seed, size)

    def score(job: tuple[str, Any]) -> float:
        with contextlib.redirect_stdout(None):  # some scorers print what they do not like
            return float(pool.score_answer(job[0], entry=job[1]))

    return score


def _make_pool(config: ReasoningGymTask, seed: int, size: int) -> Any:
    """reasoning-gym's dataset: entries by index, each generated when it is asked for."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if config.name not in DATASETS:
        nearest = difflib.get_close_matches(config.name, DATASETS, n=3, cutoff=0.0)
        raise InputError(
            f"reasoning-gym has no task {config.name!r}",
            where="task.name",
            way_out=f"the nearest: {', '.join(nearest)}",
        )
    try:
        pool = reasoning_gym.create_dataset(config.name, seed=seed, size=size, **config.options)
        pool[0]
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(
            f"reasoning-gym's {config.name} refuses these options or this size ({size}): {error}",
            where="task.options",
            way_out="use the option names and ranges of its config class; lower task.train_size",
        ) from error
    return pool
