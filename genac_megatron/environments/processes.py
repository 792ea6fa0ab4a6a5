"""Environments beside generation, in processes that can be ended.

A process has many episodes and works on one step at a time. One that takes too long, or dies, is ended, and
that step's episode fails; the others are brought back in a fresh process by their turns (host.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from genac_megatron.environments.host import Answer, Host, Job, digest
from genac_megatron.errors import InputError
from genac_megatron.records import Prompt
from genac_megatron.tasks.workers import START_LIMIT_S, Pool

if TYPE_CHECKING:
    from genac_megatron.recipe.environments import EnvironmentConfig

CHARS_PER_TOKEN = 16  # of what an environment shows, a message may have at most as many
ANY_TURN = "?"
BEGINS = "reset takes (prompt, seed), and gives messages, or None for the prompt's"
TOLD = 5  # failures of which the log has the words
logger = logging.getLogger(__name__)


def cannot_again(answer: Answer, what: str) -> InputError:
    """What is said where an episode could not be brought back."""
    return InputError(
        f"{what} brings conversations back by their turns, and the environment {answer.failure}",
        where="environment",
        way_out="make it depend on its prompt, its seed and the turns alone, or leave that out",
    )


def _failed(why: str) -> Answer:
    return Answer(failure=why)


class _Steps(Pool[Answer]):
    """One process; whoever gets a failure tells of it."""


class Environments:
    """A recipe's environment on this rank: its processes, started at first use."""

    def __init__(
        self, make: Callable[[int], Host], config: EnvironmentConfig, start_s: float = START_LIMIT_S
    ) -> None:
        """make: from the most characters of a message to what answers in a process; it crosses by pickle.
        start_s: for a process to be ready.
        """
        self.config, self.failures = config, 0
        self._brought_back = False  # it was seen to
        made = partial(make, CHARS_PER_TOKEN * config.observation_tokens)
        self._pools = [
            _Steps(made, _failed, 1, config.step_s, "the environment", start_s)
            for _ in range(config.processes)
        ]
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="environment") for _ in self._pools]
        self._at: dict[str, int] = {}  # the process of each episode
        self._load = [0] * config.processes

    async def ask(self, job: Job) -> Answer:
        """The answer to a job, from the process that has the episode."""
        place = self._at.get(job.key)
        if place is None:
            place = self._at[job.key] = self._load.index(min(self._load))
            self._load[place] += 1
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(self._threads[place], self._answer, place, job)
        if answer.failure:
            self._tell(job, answer.failure)
        return answer

    def _answer(self, place: int, job: Job) -> Answer:
        try:
            return self._pools[place].run([job])[0]
        except RuntimeError as error:  # a process that did not start costs the episode, not the run
            return Answer(failure=str(error))

    async def end(self, key: str, prompt: Prompt) -> None:
        """An episode is over: its process lets go of it."""
        place = self._at.pop(key, None)
        if place is not None:
            self._load[place] -= 1
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(
                self._threads[place], self._answer, place, Job(key, prompt, 0, over=True)
            )

    def check(self, jobs: list[Job], way_out: str = BEGINS) -> None:
        """Begin some episodes before time is spent. Raises InputError where one fails."""
        try:
            for job, answer in zip(jobs, self._pools[0].run(jobs), strict=True):
                if answer.failure:
                    raise InputError(
                        f"the environment {answer.failure}",
                        where=f"environment, prompt {job.prompt.id}",
                        way_out=way_out,
                    )
                self._pools[0].run([Job(job.key, job.prompt, 0, over=True)])
        except RuntimeError as error:
            raise InputError(
                "the environment's process did not start: importing it ends the process, or takes too long",
                where="environment",
                way_out="put what its file does when it is run under if __name__ == '__main__':",
            ) from error

    def try_out(self, job: Job, way_out: str) -> None:
        """Play an episode to its end by turns without meaning, before time is spent: so its reward is seen.
        Raises InputError where it fails. job: of an episode's beginning.
        """
        answer = self._asked(job)
        job, seen = replace(job, opening=digest(answer.opening)), list[str]()
        while not answer.failure and len(seen) < self.config.turns:
            job = replace(job, turns=(*job.turns, ANY_TURN), seen=tuple(seen))
            answer = self._asked(job)
            if answer.step is None or answer.step.done:
                break
            seen.append(digest(answer.step.messages))
        self._asked(replace(job, over=True))
        if answer.failure:
            raise InputError(f"the environment {answer.failure}", where="task", way_out=way_out)

    def need_again(self, job: Job, what: str) -> None:
        """Raise InputError where an episode cannot be brought back by its turns, as `what` would; looked at
        once. job: of an episode's beginning.

        A turn without meaning is taken, and the episode then brought back by it. What is told apart by other
        turns alone is found where that happens (`cannot_again`).
        """
        if self._brought_back:
            return
        opening = self._asked(job)
        first = replace(job, turns=(ANY_TURN,), opening=digest(opening.opening))
        answer = self._asked(first)
        if answer.step is not None:
            seen = (digest(answer.step.messages),)
            again = replace(first, key=f"{job.key} again", turns=(ANY_TURN, ANY_TURN), seen=seen)
            answer = self._asked(again)
            self._asked(replace(again, over=True))
        self._asked(replace(job, over=True))
        if answer.not_again:
            raise cannot_again(answer, what)
        self._brought_back = True

    def _asked(self, job: Job) -> Answer:
        """From the first process, by the one thread that speaks to it."""
        return self._threads[0].submit(self._answer, 0, job).result()

    def _tell(self, job: Job, why: str) -> None:
        self.failures += 1
        if self.failures <= TOLD:
            more = ": further ones are counted (environment/failed)" if self.failures == TOLD else ""
            logger.warning("the environment %s, in turn %d of %s%s", why, len(job.turns), job.key, more)

    def close(self) -> None:
        """End the processes, whatever they are at."""
        for pool in self._pools:
            pool.end_now()
        for thread in self._threads:
            thread.shutdown(wait=True, cancel_futures=True)
        for pool in self._pools:
            pool.close()
