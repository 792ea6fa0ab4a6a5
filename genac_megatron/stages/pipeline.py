"""A run: its recipe's stages one after another, from the beginning or from the newest checkpoint."""

from __future__ import annotations

from pathlib import Path

from genac_megatron.errors import InputError
from genac_megatron.observe.metrics import MetricsLog
from genac_megatron.observe.progress import Progress
from genac_megatron.observe.report import write_report
from genac_megatron.observe.runinfo import RunFolder, write_text_atomic
from genac_megatron.recipe.loader import dump_recipe
from genac_megatron.recipe.schema import PpoStage, Recipe, ReinforceStage, SftStage
from genac_megatron.stages.loop import Loop, Stage, check_resumable, restore_state
from genac_megatron.stages.ppo import joint_ppo
from genac_megatron.stages.reinforce import reinforce
from genac_megatron.stages.runtime import Run
from genac_megatron.stages.sft import sft
from genac_megatron.stages.stopping import StopFlag
from genac_megatron.training.checkpoint import Checkpoints, load_checkpoint, read_manifest
from genac_megatron.training.layout import World


def run_recipe(recipe: Recipe, world: World, stop: StopFlag, *, resume: bool) -> None:
    """Run every stage that is left. The same call on every rank of the world."""
    folder = RunFolder(Path(recipe.runs) / recipe.name)
    checkpoints = Checkpoints(folder.checkpoints, recipe.checkpoint.keep, recipe.checkpoint.asynchronous)
    newest = checkpoints.newest() if resume else None
    if resume and newest is None:
        raise InputError(
            "there is no complete checkpoint to resume from",
            where=str(folder.checkpoints),
            way_out="run without --resume to begin at the beginning",
        )
    if not resume and checkpoints.newest() is not None:
        raise InputError(
            "the run folder holds checkpoints of an earlier run",
            where=str(folder.checkpoints),
            way_out="go on with --resume, give the run another name=..., or remove the folder",
        )
    position = None
    if newest is not None:
        check_resumable(recipe, newest[1]["state"], str(newest[0]))
        stage, steps = newest[1]["state"]["position"]
        position = (stage, steps)
    first = world.rank == 0
    log = None
    if first:
        log = MetricsLog(folder.path, recipe.observe, position, name=recipe.name, recipe=recipe.model_dump())
        write_text_atomic(folder.recipe, dump_recipe(recipe))
    with Progress(first, name=recipe.name, stages=[s.name for s in recipe.stages]) as progress:
        run = Run(recipe, world, log, progress, stop, resuming=resume)
        try:
            _stages(run, checkpoints, newest[0] if newest else None)
        finally:
            run.close()
    if first:
        write_report(folder.path)


def _stages(run: Run, checkpoints: Checkpoints, resumed: Path | None) -> None:
    if resumed is not None:
        load_checkpoint(resumed, run.roles)
        restore_state(run, read_manifest(resumed)["state"])
        run.publish(*run.roles, advance=False)
    for index in range(run.at.stage, len(run.recipe.stages)):
        stage = run.recipe.stages[index]
        loop = Loop(run, stage, checkpoints, resumed)
        _stage(run, stage, loop)
        loop.end(index)
        resumed = None
    checkpoints.wait()


def _stage(run: Run, stage: Stage, loop: Loop) -> None:
    match stage:
        case SftStage():
            sft(run, stage, loop)
        case ReinforceStage():
            reinforce(run, stage, loop)
        case PpoStage():
            joint_ppo(run, stage, loop)
