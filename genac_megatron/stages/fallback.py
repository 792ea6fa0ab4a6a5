"""What a critic goes back to where REINFORCE fails its gate: weights that are kept, without an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genac_megatron.errors import InputError, on_all_ranks
from genac_megatron.observe.manifest import read_manifest, survey
from genac_megatron.recipe.schema import ReinforceStage, SftStage, StageConfig
from genac_megatron.stages.loop import Loop, run_state
from genac_megatron.training.agreement import from_first
from genac_megatron.training.checkpoint import Checkpoints, load_checkpoint

if TYPE_CHECKING:
    from genac_megatron.stages.runtime import Run

CRITIC = "critic"


def keep_weights(run: Run, stage: StageConfig, loop: Loop, step: int) -> None:
    """Keep the critic's weights where a gate may go back to them: at the end of an SFT stage that one names,
    at the beginning of a REINFORCE stage that names none. Collective.
    """
    if not _wanted(run, stage):
        return
    with run.phase("checkpoint"):
        loop.checkpoints.wait()  # one save at a time
        state = run_state(run, stage.name, step)
        roles = {CRITIC: run.roles[CRITIC]}
        _kept(run, stage.name).save(f"{stage.name}-{step:05d}", roles, state, optimizers=False)


def _wanted(run: Run, stage: StageConfig) -> bool:
    if isinstance(stage, ReinforceStage):
        return stage.gate.action == "fallback" and stage.gate.fallback is None
    later = run.recipe.stages[run.at.stage + 1 :]
    return isinstance(stage, SftStage) and any(
        isinstance(other, ReinforceStage)
        and other.gate.action == "fallback"
        and other.gate.fallback == stage.name
        for other in later
    )


def find_weights(run: Run, stage: ReinforceStage) -> Path | None:
    """Where the weights lie that the stage's gate would go back to; None where it would not. Collective.

    Raises InputError where they are gone: before the stage is trained, not after.
    """
    if stage.gate.action != "fallback":
        return None
    name = stage.gate.fallback or stage.name
    checkpoints = _kept(run, name)
    newest = from_first(checkpoints.newest)
    if newest is None:
        error = InputError(
            f"the weights of the stage '{name}' that its gate would go back to are gone or damaged: "
            f"{checkpoints.folder}",
            where=f"gate of stage {stage.name}",
            way_out="restore that folder; or set another action "
            f"(stages.{stage.name}.gate.action=stop, and fallback=null where it names a stage)",
        )
        raise on_all_ranks(error)
    return newest[0]


def keep_trained(run: Run, stage: ReinforceStage, loop: Loop) -> None:
    """Before the critic goes back: keep the run as the stage has trained it, with optimizers, where it may be
    asked for more steps, as the run's last. They go on from there, and not from other weights with these
    optimizers. Collective.
    """
    if run.at.stage + 1 < len(run.recipe.stages):
        return  # it keeps its length, as others stand on it
    run.log_step(stage.name, stage.kind, run.at.step, {}, step_done=False)  # what the judging took
    loop.checkpoints.wait()  # one save at a time
    folder = trained_folder(run.folder.path, stage.name)
    limit_s = run.recipe.world.timeout_s
    loop.keep_judged(Checkpoints(folder, keep=1, asynchronous=False, limit_s=limit_s))


def trained_folder(run: Path, stage: str) -> Path:
    """In a run's folder, where `keep_trained` keeps it."""
    return run / "trained" / stage


def trained_on(state: Mapping[str, Any], stage: str, folder: Path, where: str) -> tuple[Path, dict[str, Any]]:
    """What a finished run goes on from that is to have more steps, and whose critic had gone back: (the
    checkpoint that `keep_trained` made, its manifest). Raises InputError where it is gone or of another time.
    """
    kept = survey(trained_folder(folder, stage)).newest
    manifest = read_manifest(kept) if kept is not None else None
    if kept is None or manifest is None or manifest["state"]["position"] != state["position"]:
        raise InputError(
            f"the critic had gone back to earlier weights when stage {stage} was over; what it had trained "
            "until then, which more steps would go on from, is gone or damaged",
            where=str(trained_folder(folder, stage)),
            way_out=f"restore that folder; or move the checkpoint {where} away to go on from the one before, "
            "or begin a new run (name=...)",
        )
    return kept, manifest


def go_back(run: Run, stage: ReinforceStage, path: Path) -> None:
    """Give the critic those weights, in the trainer and its engines. Collective."""
    load_checkpoint(path, {CRITIC: run.roles[CRITIC]})
    run.publish(CRITIC)
    run.note({"critic/fallback": 1.0})
    to = stage.gate.fallback
    what = f"of the stage {to}" if to else "that the stage began with"
    run.progress.note(f"[{stage.name}] its gate is not reached: the critic goes back to the weights {what}")


def _kept(run: Run, name: str) -> Checkpoints:
    folder = run.folder.path / "fallback" / name
    return Checkpoints(folder, keep=1, asynchronous=False, limit_s=run.recipe.world.timeout_s)
