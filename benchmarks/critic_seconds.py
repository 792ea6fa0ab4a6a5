"""Processor seconds of a step of a study's cells, over those of one of them.

Each cell's run is made again from the study's base runs, once with few steps and once with more, cells taking
turns; the difference is the steps', without what a run does at its start and end. Processor seconds of the
whole process tree, which other programs on the machine disturb little.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, checked
from genac_megatron.studies.places import Places
from genac_megatron.studies.runner import all_tasks
from genac_megatron.studies.schema import read_study

FEW = 2
# Over all that the study sets: the stage's steps alone, and as little else as may be.
SHORT = ["stages.0.eval_every=0", "evaluation={prompts: 2, samples: 2}", "world.ranks=1", "world.threads=1"]


def step_seconds(
    study: Path, work: Path, cells: Sequence[str], over: str, *, seed: int, steps: int, rounds: int
) -> list[dict[str, Any]]:
    """A row per cell, whose first stage is what is timed: processor seconds a step, over those of `over`.

    work: what `genac study --work` was given, with the base runs of that seed. steps: of the longer runs.
    SystemExit where a base run is not there.
    """
    tasks = {task.key: task for task in all_tasks(Places(read_study(study), study, work, work), [seed])}
    spent: dict[str, list[dict[int, float]]] = {cell: [] for cell in cells}
    with tempfile.TemporaryDirectory(prefix="genac-") as scratch:
        for turn in range(rounds):
            for cell in cells:
                task = tasks[f"{cell}, seed {seed}"]
                if missing := [path for path in task.needs if not path.exists()]:
                    raise SystemExit(
                        f"no {missing[0]}: run the study first (genac study {study} --work {work})"
                    )
                runs: dict[int, float] = {}
                for count in (FEW, steps):
                    folder = Path(scratch) / f"{cell}-{turn}-{count}"
                    words = [*task.command, *SHORT, f"stages.0.steps={count}", f"runs={folder}", "name=run"]
                    _, runs[count] = checked(
                        [sys.executable, "-W", "ignore", "-m", "genac_megatron", *words], ROOT
                    )
                spent[cell].append(runs)
    return _rows(spent, over, steps)


def _rows(spent: dict[str, list[dict[int, float]]], over: str, steps: int) -> list[dict[str, Any]]:
    per_step = {
        cell: [(runs[steps] - runs[FEW]) / (steps - FEW) for runs in turns] for cell, turns in spent.items()
    }
    ratios = {
        cell: [one / other for one, other in zip(found, per_step[over], strict=True)]
        for cell, found in per_step.items()
    }
    return [
        {
            "cell": cell,
            "over": over,
            "processor s a step": round(statistics.mean(found), 3),
            "seconds": round(statistics.mean(ratios[cell]), 2),
            "seconds, least": round(min(ratios[cell]), 2),
            "seconds, most": round(max(ratios[cell]), 2),
        }
        for cell, found in per_step.items()
    ]
