"""What a recipe names outside of itself, looked at before any rank starts: the run folder, what it resumes,
the critic's template, checkpoints to begin with. No torch. (Data: stages/look.py and stages/room.py.)
"""

from __future__ import annotations

import os
from pathlib import Path

from genac_megatron.critic.prompt import load_template
from genac_megatron.errors import InputError
from genac_megatron.observe.manifest import BEST, find_checkpoint, read_manifest, survey
from genac_megatron.observe.runinfo import RunFolder, run_path
from genac_megatron.recipe.resume import finished
from genac_megatron.recipe.schema import Recipe, ValueStage
from genac_megatron.stages.endpoints import need_endpoints


def need_inputs(recipe: Recipe, *, resume: bool, planning: bool, ask: bool = False) -> None:
    """Raise InputError at the first that is not there, or cannot be used.

    planning: checkpoints may be still to come, as those of a job before. ask: judges, teachers and servers
    are asked whether they are there.
    """
    path = run_path(recipe)
    _need_folder(path)
    if resume and not planning:
        _need_a_run(path)
    critic = recipe.roles.get("critic")
    if critic is not None and critic.served:
        load_template(recipe.judging.template, recipe.judging.privileged)
    if not planning:
        _need_judged(recipe)
    if not resume and not planning:
        _need_checkpoints(recipe)
    if ask and not (resume and _is_over(recipe, path)):
        need_endpoints(recipe, teachers=not resume)  # of a resumed run, their answers may all be there


def need_places(out: str, *checkpoints: str | None) -> None:
    """Raise InputError where a checkpoint that a command names is not there, or `out` is a file."""
    for named in checkpoints:
        if named is not None:
            find_checkpoint(Path(named).expanduser())
    if Path(out).is_file():
        raise InputError("a file, and no folder", where=out, way_out="name another with --out")


def _need_folder(path: Path) -> None:
    """A folder that is there, or can be made, and written to."""
    there = next(one for one in (path, *path.absolute().parents) if one.exists() or one.is_symlink())
    what = ""
    if not there.is_dir():
        what = "a file, and no folder" if there.exists() else "a link to nothing"
    elif not os.access(there, os.W_OK | os.X_OK):
        what = "not to be written to"
    if what:
        raise InputError(
            f"{there} is {what}: no run folder can be made",
            where=str(path),
            way_out="name another folder with runs=..., or another run with name=...",
        )


def _need_a_run(path: Path) -> None:
    """Something to resume; what is damaged of it is the run's to say."""
    checkpoints = RunFolder(path).checkpoints
    if checkpoints.is_dir() and any(checkpoints.iterdir()):
        return
    begun = path.is_dir()
    raise InputError(
        f"there is {'no checkpoint yet' if begun else 'no such run'}, so nothing to resume",
        where=str(path),
        way_out="run it without --resume"
        + ("" if begun else ", or name the run that you mean (name=..., runs=...)"),
    )


def _need_judged(recipe: Recipe) -> None:
    """A generative critic's judgements, which a value head is to learn."""
    for stage in recipe.stages:
        if (
            isinstance(stage, ValueStage)
            and stage.distil is not None
            and not Path(stage.distil.path).is_file()
        ):
            raise InputError(
                f"there is no file {stage.distil.path}",
                where=f"stages.{stage.name}.distil.path",
                way_out="`genac traces ask` leaves judged.jsonl in its folder (docs/traces.md)",
            )


def _is_over(recipe: Recipe, path: Path) -> bool:
    newest = survey(RunFolder(path).checkpoints).newest
    return newest is not None and finished(recipe, read_manifest(newest)["state"], str(newest))


def _need_checkpoints(recipe: Recipe) -> None:
    for name, role in recipe.roles.items():
        for key in ("checkpoint", "base"):
            named = getattr(role.model, key)
            if named is None:
                continue
            try:
                find_checkpoint(Path(named).expanduser())
            except InputError as error:
                where = f"roles.{name}.model.{key}, {error.where}"
                raise InputError(error.what, where=where, way_out=error.way_out) from None
            own = (run_path(recipe) / BEST).resolve()
            if recipe.checkpoint.best and Path(named).expanduser().resolve().is_relative_to(own):
                raise InputError(
                    f"{named} is the run's own: it is to begin with what its first evaluation replaces",
                    where=f"roles.{name}.model.{key}",
                    way_out="give the run another name=...",
                )
