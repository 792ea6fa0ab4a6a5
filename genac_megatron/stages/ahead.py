"""One step off policy: the next batch is generated while the trainer works on the last.

A batch is begun with the prompts and seeds of its step, and with p_bar as it was one step earlier; it is
taken one step later: its tokens are at most one publication per role older than they would be in the
synchronous order, and their versions say so.
The log-probs are those of the engine, so PPO's ratio and truncated importance sampling correct for the gap.
A resumed run generates the batch that was under way anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from genac_megatron.errors import PeerLost
from genac_megatron.recipe.schema import PolicyStage, PpoStage
from genac_megatron.records import Prompt
from genac_megatron.stages.batch import (
    Batch,
    generator_for,
    is_judged,
    judged_responses,
    next_batch,
    next_prompts,
    played_batch,
    train_prompts,
)
from genac_megatron.stages.figures import batch_figures
from genac_megatron.stages.rollouts import Generator, Group, generate, groups_of, repeats
from genac_megatron.stages.runtime import Run


@dataclass
class Begun:
    """A step's batch under way on this rank."""

    step: int
    generator: Generator
    prompts: Sequence[Prompt]  # of all ranks
    future: Future[list[Group]]
    restarts: int  # of servers, so far


class Batches:
    """A stage's batches in order: played when asked for or, with `overlap`, one step ahead."""

    def __init__(self, run: Run, stage: PpoStage | PolicyStage) -> None:
        self.run, self.stage = run, stage
        self._begun: Begun | None = None
        self._late = 0  # verifications of the batch that were ended by their limit
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        """End what is under way."""
        loop, self._loop = self._loop, None
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # it ended just now
                loop.call_soon_threadsafe(_cancel_all, loop)
        self._pool.shutdown(wait=True)
        self.run.serving.settle = None

    def next(self, step: int) -> tuple[Batch, dict[str, float]]:
        """The batch of `step` and its figures; with `overlap` the one after it is begun. Collective."""
        if not self.stage.overlap:
            return next_batch(self.run, self.stage, step)
        begun = self._begun or self._begin(step)
        assert begun.step == step
        mine = self._take(begun)
        next_prompts(self.run, len(begun.prompts))  # the cursor counts what was trained on
        self._begun = self._begin(step + 1) if step < self.stage.steps else None
        batch = played_batch(self.run, mine)
        return batch, batch_figures(self.run, batch)

    def _take(self, begun: Begun) -> list[Group]:
        """Wait for a batch. Where servers were lost it is generated anew, as in the synchronous order."""
        run, stage = self.run, self.stage
        futures = [begun.future]

        def result() -> list[Group]:
            if futures:
                try:
                    return futures.pop().result()
                except PeerLost:
                    if run.serving.restarts() == begun.restarts:
                        raise  # otherwise a publication or an evaluation has replaced the server since
            turns = run.share(repeats(begun.prompts))
            share, places = run.share(begun.prompts), run.places(len(begun.prompts))
            late = run.task.late
            groups = generate(begun.generator, share, stage.rollout.samples, turns, places)
            self._late += run.task.late - late
            return groups

        with run.phase("wait"):
            mine = run.generating(result)
        self._spend()
        run.count({"verify/late": float(self._late)})
        self._late = 0
        return mine

    def _spend(self) -> None:
        """Count what the batch has cost, before anybody else asks the engines."""
        for role, phase in (("actor", "rollout"), ("critic", "judge")):
            if role in self.run.engines:
                self.run.spend(phase, role)

    def _begin(self, step: int) -> Begun:
        run, stage = self.run, self.stage
        prompts = train_prompts(run, run.at.cursor, stage.rollout.prompts)
        seed = (run.recipe.seed, stage.name, step)
        which = judged_responses(run, stage)
        generator = generator_for(run, stage.rollout, seed, judged=is_judged(stage), **which)
        if generator.judge is not None:
            generator.judge.icc = copy.copy(generator.judge.icc)  # the run's moves on meanwhile
        share, turns, places = run.share(prompts), run.share(repeats(prompts)), run.places(len(prompts))
        future = self._pool.submit(self._work, generator, share, turns, places)

        def settle() -> None:
            wait([future])
            self._spend()

        run.serving.settle = settle
        return Begun(step, generator, prompts, future, run.serving.restarts())

    def _work(
        self, generator: Generator, prompts: Sequence[Prompt], turns: Sequence[int], places: Sequence[int]
    ) -> list[Group]:
        late = self.run.task.late  # evaluations, which count their own, wait for this to end
        with asyncio.Runner() as runner:
            self._loop = runner.get_loop()
            groups = runner.run(groups_of(generator, prompts, self.stage.rollout.samples, turns, places))
        self._late += self.run.task.late - late
        return groups


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel()
