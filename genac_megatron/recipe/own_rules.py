"""Rules for what a recipe takes from its user: functions, and templates for a privileged critic. No torch."""

from __future__ import annotations

from pathlib import Path

from genac_megatron.errors import InputError
from genac_megatron.recipe.own_code import check_named, parse_named
from genac_megatron.recipe.precision import Where
from genac_megatron.recipe.schema import JudgingConfig
from genac_megatron.recipe.tasks import OwnReward, PythonTask, TaskConfig

PRIVILEGED = ("reference", "rubric")  # placeholders of critic templates


def check_own(task: TaskConfig, place: tuple[str | int, ...], where: Where) -> None:
    """The functions that a task names are there. Their files are read, not run. Raises InputError."""
    if isinstance(own := getattr(task, "verifier", None), OwnReward):
        _check_reward(own, (*place, "verifier"), where)
    if isinstance(task, PythonTask):
        here = where((*place, "prompts"))
        check_named(parse_named(f"{task.path}:{task.prompts}", here), here)


def _check_reward(reward: OwnReward, place: tuple[str | int, ...], where: Where) -> None:
    here = where((*place, "python"))
    check_named(parse_named(reward.python, here), here)
    if reward.parts and not any(reward.parts.values()):
        raise InputError(
            "every part of the reward has the weight 0",
            where=where((*place, "parts")),
            way_out="give one that counts a weight above 0",
        )


def check_privileged(judging: JudgingConfig, where: Where) -> None:
    """A template of the user's own shows what only a privileged critic may see where the recipe says so."""
    text = Path(judging.template).expanduser().read_text(encoding="utf-8", errors="replace")
    shown = [braced for name in PRIVILEGED if (braced := f"{{{name}}}") in text]
    if shown and not judging.privileged:
        raise InputError(
            f"the critic template shows {' and '.join(shown)}, which is for a privileged critic",
            where=where(("judging", "template")),
            way_out=f"set judging.privileged: true, or take {' and '.join(shown)} out",
        )
    if judging.privileged and not shown:
        raise InputError(
            "the critic is to be privileged, and its template shows nothing more",
            where=where(("judging", "privileged")),
            way_out="add {reference} or {rubric} before {partial}, or take judging.privileged out",
        )
