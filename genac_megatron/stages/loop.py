"""The loop around a stage's steps: resume, logging, evaluation, checkpoints, stopping."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from genac_megatron.critic.icc import IccState
from genac_megatron.errors import GenacError, InputError, StopRequested
from genac_megatron.recipe.schema import PpoStage, ReinforceStage, SftStage
from genac_megatron.stages.runtime import Progression, Run
from genac_megatron.training.checkpoint import Checkpoints, load_checkpoint

Stage = SftStage | ReinforceStage | PpoStage


class Loop:
    """One stage's steps, from where the run stands."""

    def __init__(self, run: Run, stage: Stage, checkpoints: Checkpoints, resumed: Path | None) -> None:
        self.run, self.stage, self.checkpoints = run, stage, checkpoints
        self._resumed = resumed  # the checkpoint that this stage goes on from, inside the stage
        self._total = 0

    @property
    def fresh(self) -> bool:
        """Whether the stage begins at its beginning."""
        return self.run.at.step == 0

    def restore_optimizers(self) -> None:
        """After `begin_stage`: load what the checkpoint holds, and give engines the weights again."""
        if self._resumed is not None and not self.fresh:
            load_checkpoint(self._resumed, self.run.roles, optimizers=True)

    def steps(self, total: int) -> Iterator[int]:
        """The steps left, counted from 1."""
        self._total = total
        self.run.progress.stage(self.stage.name, total, self.run.at.step)
        yield from range(self.run.at.step + 1, total + 1)

    def done(
        self, step: int, figures: dict[str, float], evaluate: Callable[[], dict[str, float]] | None
    ) -> None:
        """Log a step; evaluate, save and stop where due."""
        run = self.run
        _check_finite(self.stage.name, step, figures)
        if evaluate is not None:
            figures = {**figures, **evaluate()}
        run.at.step = step
        run.log_step(self.stage.name, self.stage.kind, step, self._total, figures)
        self.checkpoints.poll()
        stop = run.stop_requested()
        every = run.recipe.checkpoint.every
        if stop or (every and step % every == 0 and step < self._total):
            self.save()
        if stop:
            self.checkpoints.wait()
            raise StopRequested(
                f"stopped as asked after step {step} of {self._total} of stage {self.stage.name}; "
                "everything is saved",
                way_out="the same command with --resume goes on from here",
            )

    def save(self) -> None:
        """A checkpoint inside the stage."""
        self._write(f"{self.stage.name}-{self.run.at.step:05d}", self.run.at.step)

    def end(self, index: int) -> None:
        """The stage is over: a checkpoint from which the next one begins."""
        run = self.run
        for role in run.roles.values():
            role.end_stage()
        run.at = dataclasses.replace(run.at, stage=index + 1, step=0)
        self._write(f"{self.stage.name}-end", self._total)

    def _write(self, name: str, steps: int) -> None:
        with self.run.phase("checkpoint"):
            state = run_state(self.run, self.stage.name, steps)
            self.checkpoints.save(name, self.run.roles, state)


def run_state(run: Run, stage: str, steps: int) -> dict[str, Any]:
    """The run's small state as plain data; its logs end at step `steps` of `stage`."""
    at = dataclasses.asdict(run.at)
    at["icc"] = run.icc.state_dict() if run.icc is not None else None
    log = run.gather([run.log.state_dict() if run.log is not None else None])[0]
    return {"at": at, "position": [stage, steps], "log": log, "seed": run.recipe.seed}


def restore_state(run: Run, state: dict[str, Any]) -> None:
    """Take over `run_state`. Raises InputError where the recipe is another one's."""
    if state["seed"] != run.recipe.seed:
        raise InputError(
            f"the checkpoint was made with seed {state['seed']}, the recipe says {run.recipe.seed}",
            where=str(run.folder.checkpoints),
            way_out="resume with the recipe in the run folder",
        )
    run.at = Progression(**state["at"])
    if run.at.icc is not None:
        run.icc = IccState(0.0)
        run.icc.load_state_dict(run.at.icc)
    if run.log is not None:
        run.log.load(state["log"])


def _check_finite(stage: str, step: int, figures: dict[str, float]) -> None:
    for key in ("actor/loss", "actor/grad_norm", "critic/loss", "critic/grad_norm"):
        if key in figures and not math.isfinite(figures[key]):
            raise GenacError(
                f"{key} is {figures[key]} at step {step}",
                where=f"stage {stage}",
                way_out="lower the learning rate; --resume goes on from the last checkpoint, which is intact",
            )
