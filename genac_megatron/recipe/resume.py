"""What a resumed run must have in common with the one that stopped, and what is left to do. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from genac_megatron.errors import InputError
from genac_megatron.observe.runinfo import METRICS
from genac_megatron.recipe.schema import JudgingConfig, Recipe, SftStage, StageConfig
from genac_megatron.recipe.tasks import TaskConfig

State = Mapping[str, Any]  # a run's small state, as a checkpoint's manifest has it


def fingerprint(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe must stay as it was for a resumed run to be the same run."""
    plain = recipe.model_dump(mode="json")
    stages = [f"{stage.kind} {stage.name}" for stage in recipe.stages]
    # An optimizer has states of what is trained alone.
    frozen = sorted(name for name, role in recipe.roles.items() if role.training.frozen_attention)
    return {
        "seed": recipe.seed,
        "task": plain["task"],
        "judging": plain["judging"],
        "stages": stages,
        "roles with frozen_attention": frozen,
        "adapters": {
            name: {"rank": found.rank, "alpha": found.alpha, "targets": sorted(found.targets)}
            for name, role in recipe.roles.items()
            if (found := role.training.adapter) is not None
        },
    }


def lengths(recipe: Recipe) -> dict[str, int]:
    """By stage, how long the recipe has it train: `_unit`s."""
    return {
        stage.name: stage.epochs if isinstance(stage, SftStage) else stage.steps for stage in recipe.stages
    }


def _unit(stage: StageConfig) -> str:
    return "epochs" if isinstance(stage, SftStage) else "steps"


def check_resumable(recipe: Recipe, state: State, where: str) -> None:
    """Raise InputError where a checkpoint's run is not the recipe's."""
    wanted = fingerprint(recipe)
    for key, saved in state["recipe"].items():
        if _with_defaults(key, saved) != wanted[key]:
            raise InputError(
                f"the checkpoint was made with {key} {saved}, the recipe says {wanted[key]}",
                where=where,
                way_out="resume with the recipe that made it (recipe.yaml in the run folder)",
            )
    at = state.get("at") or {}
    index, step = at.get("stage", 0), at.get("step", 0)
    _check_lengths(recipe, state, index, step, where)
    if index < len(recipe.stages) and step:
        _check_heldout(recipe.stages[index], at.get("heldout"), where)


def _with_defaults(key: str, saved: Any) -> Any:
    """What a checkpoint of before says of a block, with the defaults of keys that are new since."""
    blocks: dict[str, Any] = {"task": TypeAdapter(TaskConfig), "judging": TypeAdapter(JudgingConfig)}
    if key not in blocks:
        return saved
    try:
        return blocks[key].dump_python(blocks[key].validate_python(saved), mode="json")
    except ValidationError:
        return saved  # it has a key that is no more


def _check_lengths(recipe: Recipe, state: State, index: int, step: int, where: str) -> None:
    """A stage that is over, and that others stand on, is as long as it was; none has done too many steps."""
    saved, wanted = state.get("lengths") or {}, lengths(recipe)
    last = recipe.stages[-1]
    for stage in recipe.stages[:index]:
        done, asked = saved.get(stage.name), wanted[stage.name]
        if done is None or done == asked or (stage is last and asked > done):
            continue
        raise InputError(
            f"stage {stage.name} is over, after {_unit(stage)} {done}; the recipe says {asked}",
            where=where,
            way_out=f"set stages.{stage.name}.{_unit(stage)}={done} again, or begin a new run (name=...)",
        )
    if index < len(recipe.stages) and not isinstance(recipe.stages[index], SftStage):
        check_steps(recipe.stages[index], step, wanted[recipe.stages[index].name], where)


def check_steps(stage: StageConfig, done: int, total: int, where: str) -> None:
    """Raise InputError where a stage has done more steps than it is to have."""
    if done > total:
        raise InputError(
            f"stage {stage.name} has done {done} steps, and the recipe has {total}",
            where=where,
            way_out=f"give it at least {done} steps, or move checkpoints away to resume from an earlier one",
        )


def _check_heldout(stage: StageConfig, seen: Mapping[str, Any] | None, where: str) -> None:
    """Inside an SFT stage the samples that are held out stay the same: others were trained on."""
    if not isinstance(stage, SftStage) or (seen is not None and "size" not in seen):
        return  # of an earlier version, which did not keep it
    asked = stage.heldout
    for key in ("size", "metric"):
        was, now = (seen or {}).get(key), getattr(asked, key, None)
        if was != now:
            raise InputError(
                f"stage {stage.name} was begun with {_shown(key, was)}, the recipe says {_shown(key, now)}: "
                + ("trained samples would be held out" if key == "size" else "its best figure was another's"),
                where=where,
                way_out="resume with the recipe that made it, or begin a new run (name=...)",
            )


def _shown(key: str, value: object) -> str:
    return "nothing held out" if value is None else f"heldout.{key} {value}"


def to_train_on(recipe: Recipe, state: State, where: str) -> State | None:
    """The state inside the last stage of a finished run that the recipe has train more of it; None where
    the run is not finished, or the recipe asks for no more. The state as it is, where a critic had gone back
    to earlier weights and that one is kept elsewhere. Raises InputError where it cannot go on.
    """
    if (state.get("at") or {}).get("stage", 0) < len(recipe.stages):
        return None
    last = recipe.stages[-1]
    asked, done = lengths(recipe)[last.name], (state.get("lengths") or {}).get(last.name)
    if done is None and not isinstance(last, SftStage):  # of an earlier version
        done = state["position"][1]
    if done is None or asked == done:
        return None
    if state.get("went_back"):
        return state  # stages/fallback.py: trained_on
    if "inside" not in state:
        raise InputError(
            f"the run has finished after {_unit(last)} {done}, the recipe says {asked}; what an earlier "
            "version saved at its end has no optimizer to go on with",
            where=where,
            way_out="move that checkpoint away to go on from the one before, or begin a new run (name=...)",
        )
    return {**state, **state["inside"]}


def finished(recipe: Recipe, state: State, where: str) -> bool:
    """Whether a checkpoint leaves nothing to do. Raises InputError as `to_train_on` does."""
    over = bool((state.get("at") or {}).get("stage", 0) >= len(recipe.stages))
    return over and to_train_on(recipe, state, where) is None


def before_judging(state: State, mark: Mapping[str, Any], stage: int, step: int) -> dict[str, Any]:
    """`state` as it was after a stage's last step: a run that is resumed there judges what it has trained
    again. mark: what that judging has changed. What it took stays in the metrics.
    """
    judged = {key: mark[key] for key in ("explained_variance", "measured") if key in mark}
    at = {**state["at"], "stage": stage, "step": step, **judged}
    log = state["log"]
    rows = None if log is None else {**mark["rows"], METRICS: log["rows"][METRICS]}
    return {"at": at, "log": None if log is None else {**log, "rows": rows}}
