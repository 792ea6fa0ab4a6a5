"""A run: its recipe's stages one after another, from the beginning or from the newest checkpoint."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from genac_megatron import platform
from genac_megatron.errors import (
    EXIT_FAILED,
    EXIT_OK,
    GateFailed,
    GenacError,
    InputError,
    LeftBand,
    NotFinite,
    on_all_ranks,
)
from genac_megatron.observe.history import note_end, note_start, other_values
from genac_megatron.observe.lock import SILENT_S, FolderLock, run_lock
from genac_megatron.observe.manifest import read_manifest
from genac_megatron.observe.metrics import MetricsLog
from genac_megatron.observe.origin import Origin
from genac_megatron.observe.progress import Progress
from genac_megatron.observe.report import write_report
from genac_megatron.observe.runinfo import METRICS, RunFolder, run_path, set_aside, write_text_atomic
from genac_megatron.recipe.loader import dump_recipe
from genac_megatron.recipe.resume import check_resumable, to_train_on
from genac_megatron.recipe.schema import (
    PolicyStage,
    PpoStage,
    Recipe,
    ReinforceStage,
    SftStage,
    StageConfig,
    ValueStage,
)
from genac_megatron.stages.best import best_of
from genac_megatron.stages.fallback import trained_on
from genac_megatron.stages.loop import Loop, restore_engines, restore_state
from genac_megatron.stages.policy import policy
from genac_megatron.stages.ppo import joint_ppo
from genac_megatron.stages.reinforce import reinforce
from genac_megatron.stages.runtime import Run
from genac_megatron.stages.sft import sft
from genac_megatron.stages.sft_data import unmade
from genac_megatron.stages.stopping import StopFlag
from genac_megatron.stages.tested import ask_test, is_untested
from genac_megatron.stages.value import value
from genac_megatron.stages.values import is_scalar, need_same_tokens
from genac_megatron.training.agreement import agree, from_first
from genac_megatron.training.checkpoint import Checkpoints, in_background, load_checkpoint
from genac_megatron.training.layout import World

logger = logging.getLogger(__name__)

Found = tuple[Path, dict[str, Any]]  # a checkpoint and its manifest


def run_recipe(
    recipe: Recipe, world: World, stop: StopFlag, *, resume: bool, origin: Origin | None = None
) -> None:
    """Run every stage that is left, and write the report. The same call on every rank of the world.

    origin: what it was asked for, noted in the run folder, which rank 0 holds meanwhile. Raises InputError
    where another run holds it, GateFailed and StopRequested, from where --resume goes on, and any other
    GenacError of its stages.
    """
    folder = RunFolder(run_path(recipe))
    lock = run_lock(folder.path, min(SILENT_S, recipe.world.timeout_s / 2))
    from_first(lock.acquire)
    try:
        _run(recipe, world, stop, folder, lock, resume, origin or Origin(()))
    finally:
        lock.release()


def _run(
    recipe: Recipe,
    world: World,
    stop: StopFlag,
    folder: RunFolder,
    lock: FolderLock,
    resume: bool,
    origin: Origin,
) -> None:
    checkpoints = Checkpoints(
        folder.checkpoints,
        recipe.checkpoint.keep,
        in_background(recipe.checkpoint.asynchronous),
        recipe.world.timeout_s,
    )
    # By rank 0 for all: another rank's view of a shared file system may be older.
    begun = from_first(lambda: where_to_begin(recipe, checkpoints, resume))
    first = world.rank == 0
    over = begun is not None and begun[1]["state"]["at"]["stage"] >= len(recipe.stages)
    if begun is not None and over and not from_first(partial(_untested, recipe, folder, begun)):
        if first:
            _tell_finished(recipe, folder, begun[0])
        return
    at = begun[1]["state"]["at"] if begun is not None else None
    left = from_first(lambda: unmade(recipe, folder.path, at))
    log = agree(lambda: begin_logs(recipe, folder, begun, lock, origin) if first else None)
    names = [stage.name for stage in recipe.stages]
    with _reported(log, recipe.observe.plots), Progress(first, name=recipe.name, stages=names) as progress:
        run = Run(recipe, world, log, progress, stop, resuming=resume, unmade=left)
        try:
            if is_scalar(run):
                need_same_tokens(run)
            with saves_completed(checkpoints):
                _stages(run, checkpoints, begun)
        finally:
            run.close()


def _untested(recipe: Recipe, folder: RunFolder, begun: Found) -> bool:
    return is_untested(recipe, folder.path, begun[1]["state"])


def _tell_finished(recipe: Recipe, folder: RunFolder, newest: Path) -> None:
    last = recipe.stages[-1]
    more = "epochs" if isinstance(last, SftStage) else "steps"
    way_on = f"; --resume with more of stages.{last.name}.{more} trains those"
    if isinstance(last, SftStage) and last.phased:
        way_on = ""  # a curriculum has one pass
    print(f"the run {recipe.name} has finished ({newest.name}): nothing to do{way_on}", flush=True)
    if others := other_values(folder.resolved_recipe(), recipe.model_dump(mode="json")):
        print(f"  other values than it was run with, not used: {'; '.join(others)}", flush=True)
    page = _report(folder, recipe.observe.plots)
    print(f"  run folder: {folder.path}\n  report:     {page}", flush=True)


@contextmanager
def _reported(log: MetricsLog | None, plots: bool) -> Iterator[None]:
    """Rank 0, which has the log, notes how the run ends and writes its report, also where it ends with an
    error and has logged anything by then. What the launcher says last (observe/ending.py) goes by both.
    """
    try:
        yield
    except Exception as error:
        if log is not None:
            code = error.exit_code if isinstance(error, GenacError) else EXIT_FAILED
            _close(log.folder, code, str(error) or type(error).__name__, plots and log.rows > 0)
        if isinstance(error, GenacError) and error.agreed and dist.get_world_size() > 1:
            with suppress(RuntimeError):  # a rank that is lost; else the first to leave would end rank 0
                dist.barrier()
        raise
    if log is not None:
        note_end(log.folder, EXIT_OK)
        _report(log.folder, plots)


def _close(folder: RunFolder, code: int, told: str, plots: bool) -> None:
    """The same after an error, which is the one to tell."""
    try:
        note_end(folder, code, told)
        if folder.rows(METRICS)[0]:
            _report(folder, plots)
    except Exception as failed:
        why = (str(failed) or type(failed).__name__).splitlines()[0]
        logger.warning("genac: warning: the report could not be written: %s", why)


def _report(folder: RunFolder, plots: bool) -> Path:
    """Write the report; its page."""
    write_report(folder.path, draw=plots)
    return folder.report / "index.html"


def where_to_begin(recipe: Recipe, checkpoints: Checkpoints, resume: bool) -> Found | None:
    """The newest complete checkpoint and its manifest to resume from, or None to begin at the beginning.

    Raises InputError where there is none, where it is of another recipe, or where a run that begins
    would write over an earlier one's.
    """
    found = checkpoints.survey()
    newest, passed = found.newest, found.told()
    if not resume:
        if newest is not None or found.refused:
            raise InputError(
                "\n  ".join(["the run folder holds checkpoints of an earlier run", *passed]),
                where=str(checkpoints.folder),
                way_out="go on with --resume, give the run another name=..., or remove the folder",
            )
        return None
    if newest is None:
        raise InputError(
            "\n  ".join(["there is no complete checkpoint to resume from", *passed]),
            where=str(checkpoints.folder),
            way_out="remove what is damaged and run without --resume to begin at the beginning",
        )
    manifest = read_manifest(newest)
    state = manifest["state"]
    check_resumable(recipe, state, str(newest))
    more = to_train_on(recipe, state, str(newest))
    manifest["state"] = more or state
    if more is not None and state.get("went_back"):
        newest, manifest = trained_on(state, recipe.stages[-1].name, checkpoints.folder.parent, newest.name)
        check_resumable(recipe, manifest["state"], str(newest))
    for line in passed:
        logger.warning("genac: warning: checkpoint %s; going on from %s", line, newest.name)
    for path in found.unfinished:
        shutil.rmtree(path, ignore_errors=True)  # of an attempt that is over
    return newest, manifest


def begin_logs(
    recipe: Recipe, folder: RunFolder, begun: Found | None, lock: FolderLock, origin: Origin
) -> MetricsLog:
    """The run's logs, ending where training goes on; written to only while the folder is `lock`'s.

    What a resumed run has other values of than before is said, and the recipe of before is kept.
    """
    resume = begun[1]["state"]["log"] if begun is not None else None
    plain = recipe.model_dump(mode="json")
    log = MetricsLog(
        folder.path, recipe.observe, resume, name=recipe.name, recipe=recipe.model_dump(), guard=lock.check
    )
    others = other_values(folder.resolved_recipe(), plain)
    if others:
        kept = set_aside(folder.recipe)
    if others and begun is not None:
        logger.warning(
            "genac: goes on with other values than before (%s has those): %s", kept, "; ".join(others)
        )
    write_text_atomic(folder.recipe, dump_recipe(recipe))
    gpus = platform.gpu_names()
    at = None if begun is None else begun[0].name
    note_start(folder, origin, ranks=recipe.world.ranks, gpus=gpus, resumed_from=at, changed_values=others)
    return log


def _stages(run: Run, checkpoints: Checkpoints, begun: Found | None) -> None:
    resumed = None
    best = best_of(run.recipe, run.folder.path, checkpoints)
    if best is not None:
        best.begin(run, fresh=begun is None)
        run.evaluated = partial(best.offer, run)
    if begun is not None:
        resumed, manifest = begun
        load_checkpoint(resumed, run.roles)
        run.together(lambda: restore_state(run, manifest["state"]))
        restore_engines(run)
    for index in range(run.at.stage, len(run.recipe.stages)):
        stage = run.recipe.stages[index]
        loop = Loop(run, stage, checkpoints, resumed)
        run.progress.prepare(stage.name)
        with _diverged(stage, loop):
            try:
                _stage(run, stage, loop)
            except LeftBand:
                raise  # it is saved inside the stage
            except GateFailed:
                if loop.step:
                    _save_for_resume(run, stage, loop)
                else:  # an entry gate: nothing of the stage is trained
                    run.log_step(stage.name, stage.kind, 0, {}, step_done=False)  # what the judging took
                raise
            loop.end(index)
        resumed = None
    checkpoints.wait()
    if best is not None:
        best.end(run)
    newest = from_first(checkpoints.newest)
    assert newest is not None
    ask_test(run, best, newest[1]["state"]["position"])


@contextmanager
def saves_completed(checkpoints: Checkpoints) -> Iterator[None]:
    """Where all ranks end alike, a save under way in the background is completed first. Collective.

    A rank that ends by itself gives it up: its writer would keep it from ending, which the others wait for.
    """
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, GenacError) and error.agreed):
            checkpoints.give_up()
            raise
        try:
            checkpoints.wait()
        except GenacError as failure:
            error.add(f"also: {failure}")
        raise


@contextmanager
def _diverged(stage: StageConfig, loop: Loop) -> Iterator[None]:
    """Say of NaN at which step it came, and what stands: nothing of it is in a checkpoint. Collective."""
    try:
        yield
    except NotFinite as error:
        with suppress(GenacError):
            loop.checkpoints.wait()  # a save of before, still under way in the background
        newest = from_first(loop.checkpoints.newest)
        lower = "lower the learning rate"
        raise on_all_ranks(
            NotFinite(
                f"{error.what} at step {loop.step}; nothing of that step is saved",
                where=f"stage {stage.name}",
                way_out=f"{lower}; no checkpoint was made yet, so run it again without --resume"
                if newest is None
                else f"{lower}; --resume goes on from the checkpoint {newest[0].name}",
            )
        ) from error


def _save_for_resume(run: Run, stage: StageConfig, loop: Loop) -> None:
    """A checkpoint inside the stage, after its last step: resumed, it trains what steps the recipe has more
    by then, and is judged again. Raises GenacError where it cannot be written.
    """
    run.progress.note(f"[{stage.name}] its gate is not reached; saving what is trained")
    run.log_step(stage.name, stage.kind, run.at.step, {}, step_done=False)  # what the judging took
    loop.save_judged()
    loop.checkpoints.wait()


def _stage(run: Run, stage: StageConfig, loop: Loop) -> None:
    match stage:
        case SftStage():
            sft(run, stage, loop)
        case ReinforceStage():
            reinforce(run, stage, loop)
        case PpoStage():
            joint_ppo(run, stage, loop)
        case ValueStage():
            value(run, stage, loop)
        case PolicyStage():
            policy(run, stage, loop)
