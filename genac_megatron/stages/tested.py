"""The test at a run's end (`evaluation.test`): what has chosen nothing, asked once of each set of weights.

Of the final weights and, where one is kept (`checkpoint.best`), of the best. It lies in test.json; a run that
is stopped before it is resumed for it alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genac_megatron.observe.runinfo import TEST, read_json, write_json_atomic
from genac_megatron.recipe.resume import State
from genac_megatron.recipe.schema import Recipe
from genac_megatron.stages.best import Best
from genac_megatron.stages.runtime import Run
from genac_megatron.stages.suites import ask
from genac_megatron.training.agreement import from_first
from genac_megatron.training.checkpoint import load_checkpoint
from genac_megatron.training.role import Role


def is_untested(recipe: Recipe, folder: Path, state: State) -> bool:
    """Whether a finished run, with this small state, has not been tested as the recipe says."""
    if not recipe.evaluation.test:
        return False
    there = read_json(folder / TEST) or {}
    return there.get("position") != state["position"] or set(there.get("final") or {}) != _names(recipe)


def _names(recipe: Recipe) -> set[str]:
    return {suite.name for suite in recipe.evaluation.test}


def beside_actor(roles: Mapping[str, Role], manifest: Mapping[str, Any]) -> dict[str, Role]:
    """Of the roles that a checkpoint holds, the actor and those on one base with it: where that has moved, it
    is its owner's to load.
    """
    memory = roles["actor"].memory
    return {n: role for n, role in roles.items() if role.memory is memory and n in manifest["roles"]}


def ask_test(run: Run, best: Best | None, position: list[Any]) -> None:
    """Ask the test, log it, and keep it. The run's last act: it leaves the actor with the best weights.
    Collective.

    position: (stage, steps) of the final weights.
    """
    suites = run.suites.tested
    if not suites:
        return
    stage = run.recipe.stages[-1]
    with run.phase("suites"):
        row: dict[str, Any] = {"position": position, "final": ask(run, stage, suites), "best": None}
    found = None if best is None else from_first(best.kept.newest)
    if found is not None:
        path, manifest = found
        row["of"] = {**manifest["state"]["best"], "checkpoint": path.name}
        same = manifest["state"]["position"] == position
        if not same:
            load_checkpoint(path, beside_actor(run.roles, manifest))
            run.publish("actor")
        with run.phase("suites"):
            row["best"] = row["final"] if same else ask(run, stage, suites)
    figures = {}
    for which in ("final", "best"):
        for name, one in (row[which] or {}).items():
            figures[f"test/{name}_{which}"] = one["average"]
    run.together(lambda: write_json_atomic(run.folder.path / TEST, row) if run.log is not None else None)
    run.log_step(stage.name, stage.kind, int(position[1]), figures, step_done=False)
    told = ", ".join(f"{key.removeprefix('test/')} {value:.3f}" for key, value in figures.items())
    run.progress.note(f"test, asked once: {told}")
