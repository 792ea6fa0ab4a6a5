"""The best weights of a run by a figure of its evaluations, kept apart in best/ (`checkpoint.best`).

Its folder is the truth: what is the best is read from the checkpoint that lies there, so a resumed run goes
on from it, whatever it resumes from. The retention of ordinary checkpoints does not touch it.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genac_megatron.observe.manifest import BEST
from genac_megatron.observe.runinfo import set_aside
from genac_megatron.recipe.schema import BestConfig, Recipe, StageConfig
from genac_megatron.stages.loop import run_state
from genac_megatron.stages.runtime import Run
from genac_megatron.training.agreement import from_first
from genac_megatron.training.checkpoint import Checkpoints


class Best:
    """The keeper of a run's best weights."""

    def __init__(self, config: BestConfig, folder: Path, others: Checkpoints, limit_s: float) -> None:
        """others: the run's ordinary checkpoints: one save at a time."""
        self.config, self.others = config, others
        self.kept = Checkpoints(folder / BEST, keep=1, asynchronous=False, limit_s=limit_s)
        self.value: float | None = None

    def begin(self, run: Run, *, fresh: bool) -> None:
        """Take over what lies there, or, where the run begins at its beginning, set it aside. Collective.

        It is not refused: a job that ended before its first checkpoint begins again by itself.
        """
        if fresh and (aside := from_first(self._set_aside)) is not None:
            run.progress.note(
                f"warning: {BEST}/ held the best weights of an earlier start of this run, which begins anew: "
                f"they are kept as {aside}"
            )
        found = from_first(self._there)
        if found is None:
            return
        if found.get("figure") != self.config.figure or found.get("mode") != self.config.mode:
            run.progress.note(
                f"best: what lies there is by {found.get('figure')} ({found.get('mode')}), not by "
                f"{self.config.figure} ({self.config.mode}): the next evaluation replaces it"
            )
            return
        self.value = float(found["value"])

    def _set_aside(self) -> Path | None:
        """Rename the folder of an earlier start to its name with the first free number."""
        folder, there = self.kept.folder, self.kept.survey()
        if there.whole or there.refused:
            return set_aside(folder)
        shutil.rmtree(folder, ignore_errors=True)  # nothing but a save that was not finished
        return None

    def _there(self) -> dict[str, Any] | None:
        newest = self.kept.newest()
        found: dict[str, Any] | None = None if newest is None else newest[1]["state"].get("best")
        return found

    def offer(self, run: Run, stage: StageConfig, step: int, figures: Mapping[str, float]) -> None:
        """Keep the weights that an evaluation has just looked at, where they are the best so far. Collective.

        Of equal ones the first stays. An evaluation without the figure is none.
        """
        value = figures.get(self.config.figure, math.nan)
        if self.config.stage not in (None, stage.name) or math.isnan(value):
            return
        best = self.value
        if best is not None and not (value > best if self.config.mode == "max" else value < best):
            return
        self.others.wait()
        with run.phase("checkpoint"):
            state = run_state(run, stage.name, step)
            state["best"] = {"figure": self.config.figure, "mode": self.config.mode, "value": value}
            frozen = {name for name, role in run.recipe.roles.items() if role.training.frozen}
            roles = {name: role for name, role in run.roles.items() if name not in frozen}
            self.kept.save(f"{stage.name}-{step:05d}", roles, state, optimizers=False)
        self.value = value
        was = "" if best is None else f", before {best:.4g}"
        run.progress.note(f"[{stage.name}] best so far, step {step}: {self.config.figure} {value:.4g}{was}")

    def end(self, run: Run) -> None:
        """Say so where nothing was kept."""
        if self.value is None:
            run.progress.note(
                f"warning: no evaluation of the run gave {self.config.figure}: no best checkpoint is kept"
            )


def best_of(recipe: Recipe, folder: Path, others: Checkpoints) -> Best | None:
    """The run's keeper; None where the recipe asks for none."""
    config = recipe.checkpoint.best
    return None if config is None else Best(config, folder, others, recipe.world.timeout_s)
