"""Off policy by a bounded number of steps: batches are generated while the trainer works on earlier ones.

With `overlap: k` the batches of the k steps after a step are begun before its own is waited for, and each
is taken in its turn (stages/queue.py). A batch is begun with the prompts and seeds of its step, and with
p_bar as it is then. What is under way goes on over publications: so a token is at most k publications of its
role older than in the synchronous order, and its version says so. The log-probs are those of the engine:
PPO's ratio and truncated importance sampling correct for the gap.

A checkpoint waits for what is under way and holds it (stages/kept_groups.py); the resumed run trains on it.
"""

from __future__ import annotations

import copy
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genac_megatron.errors import PeerLost
from genac_megatron.recipe.schema import PolicyStage, PpoStage
from genac_megatron.stages.batch import (
    Batch,
    generator_for,
    is_judged,
    judged_responses,
    next_batch,
    next_prompts,
    played_batch,
    shared_out,
    train_prompts,
)
from genac_megatron.stages.figures import batch_figures
from genac_megatron.stages.kept_groups import group_of, keep_groups, kept_groups
from genac_megatron.stages.loop import Loop
from genac_megatron.stages.queue import Begun, Queue
from genac_megatron.stages.rollouts import Asked, Generator, Group, Lot, groups_of
from genac_megatron.stages.runtime import Run


@dataclass
class Plan:
    """What a step's batch is played with on this rank."""

    step: int
    generator: Generator
    prompts: Asked  # of all ranks
    lot: Lot
    restarts: int  # of servers, before it was begun


Groups = list[Group]


class Batches:
    """A stage's batches in order: played when asked for or, with `overlap`, begun some steps ahead."""

    def __init__(self, run: Run, stage: PpoStage | PolicyStage, loop: Loop) -> None:
        self.run, self.stage, self.loop = run, stage, loop
        self._cursor = run.at.cursor  # behind the prompts of what is begun
        # Of the task's count of late verifications, up to which they are counted; None: to be read
        self._mark: int | None = None
        self._queue = Queue(int(stage.overlap), self._plan, self._play)
        if stage.overlap:
            run.serving.settle = self._settle
            loop.beside = self._keep
        if loop.resumed is not None:
            self._restore(loop.resumed)

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        """End what is under way."""
        self._queue.close()
        self.run.serving.settle, self.loop.beside = None, None

    def next(self, step: int) -> tuple[Batch, dict[str, float]]:
        """The batch of `step` and its figures; with `overlap` those after it are begun. Collective."""
        if not self.stage.overlap:
            return next_batch(self.run, self.stage, step)
        if self._mark is None:  # evaluations, which count their own, were after the last one
            self._mark = self.run.task.late
        begun = self._queue.next(step, self.stage.steps)
        self.run.count(self._lengths())
        mine = self._take(begun)
        next_prompts(self.run, len(begun.work.prompts))  # the cursor counts what was trained on
        self._queue.taken()
        batch = played_batch(self.run, mine)
        return batch, batch_figures(self.run, batch)

    def _take(self, begun: Begun[Plan, Groups]) -> Groups:
        """Wait for a batch. Where servers were lost it is generated anew, and others that failed with it."""
        run = self.run

        def result() -> Groups:
            self._renew()  # a publication or an evaluation may have replaced the server
            try:
                return begun.future.result()
            except PeerLost:
                if not self._renew():
                    raise
            return begun.future.result()

        with run.phase("wait"):
            mine = run.generating(result)
        self._queue.call(self._tally)
        return mine

    def _renew(self) -> bool:
        """Begin again what failed with servers that have been replaced since; whether there was any."""
        restarts, found = self.run.serving.restarts(), False
        for begun in self._queue:
            failed = begun.future.done() and isinstance(begun.future.exception(), PeerLost)
            if failed and begun.work.restarts != restarts:
                begun.work.restarts, found = restarts, True
                self._queue.again(begun)
        return found

    def _lengths(self) -> dict[str, float]:
        """How many of this rank's groups are done, and wait for their turn, and how many are not."""
        lots = [begun.work.lot for begun in self._queue]
        ready = sum(lot.done for lot in lots)
        return {
            "queue/ready": float(ready),
            "queue/under_way": float(sum(len(lot.prompts) for lot in lots) - ready),
        }

    def _tally(self) -> None:
        """Count what batches have cost so far, before anybody else asks the engines."""
        for role, phase in (("actor", "rollout"), ("critic", "judge")):
            if role in self.run.engines:
                self.run.spend(phase, role)
        if self._mark is not None:
            self.run.count({"verify/late": float(self.run.task.late - self._mark)})
            self._mark = self.run.task.late

    def _settle(self) -> None:
        """Wait for all that is under way; nothing more is begun before the next batch is asked for."""
        self._queue.settle()
        self._queue.call(self._tally)
        self._mark = None

    def _plan(self, step: int) -> Plan:
        run, stage = self.run, self.stage
        prompts = train_prompts(run, self._cursor, stage.rollout.prompts)
        self._cursor += len(prompts)
        seed = (run.recipe.seed, stage.name, step)
        which = judged_responses(run, stage)
        generator = generator_for(run, stage.rollout, seed, judged=is_judged(stage), **which)
        generator.tag = f" of step {step}"
        if generator.judge is not None:
            generator.judge.icc = copy.copy(generator.judge.icc)  # the run's moves on meanwhile
        share, turns, places = shared_out(run, prompts)
        lot = Lot(share, stage.rollout.samples, turns, places)
        return Plan(step, generator, prompts, lot, run.serving.restarts())

    def _play(self, plan: Plan) -> Coroutine[Any, Any, Groups]:
        others = [begun.work.lot for begun in self._queue if begun.work is not plan]
        return groups_of(plan.generator, plan.lot, others)

    # --- checkpoints ---------------------------------------------------------------------------------

    def _keep(self, folder: Path) -> None:
        """Wait for what is under way and write it into a checkpoint; what failed is begun again then."""
        self._settle()
        done = {}
        for begun in self._queue:
            if begun.future.exception() is not None:
                break  # with those behind it: they are taken in order
            done[begun.step] = begun.future.result()
        keep_groups(folder, self.run.world, done, self.run.spent)

    def _restore(self, checkpoint: Path) -> None:
        """Take over what a checkpoint holds, in whatever world it was made. Collective.

        With `overlap` off it is nothing, which is said.
        """
        run, rollout = self.run, self.stage.rollout
        steps, spent = run.together(lambda: kept_groups(checkpoint, run.world))
        for step, rows in sorted(steps.items()):
            sizes = {len(row["rollouts"]) for row in rows.values()}
            same = len(rows) == rollout.prompts and sizes == {rollout.samples}
            if not self.stage.overlap or not same or step > self.stage.steps:
                break  # a rank lacked it, or the recipe is another now: it is begun again
            plan = self._plan(step)
            mine = run.share([rows[place] for place in sorted(rows)])
            groups = [group_of(row, prompt) for row, prompt in zip(mine, plan.lot.prompts, strict=True)]
            plan.lot.done = len(groups)
            self._queue.put(step, plan, groups)
        run.count(spent)
        if steps:
            taken = len(list(self._queue))
            rest = "" if taken == len(steps) else "; the others are generated again"
            why = "" if self.stage.overlap else ", as overlap is off now"
            run.progress.note(
                f"[{self.stage.name}] {taken} of the {len(steps)} batches that were generated ahead are "
                f"taken over from the checkpoint{rest}{why}"
            )
