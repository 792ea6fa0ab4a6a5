"""Gates: what a stage must have reached before the next one may build on it (method §4)."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from genac_megatron.errors import GateFailed
from genac_megatron.observe.report_gates import JudgedStage, Missed, missed, ways_on
from genac_megatron.recipe.schema import PpoStage, Recipe, ReinforceStage, SftStage, ValueStage
from genac_megatron.recipe.stages import entry_action

logger = logging.getLogger(__name__)


def check_sft_gate(stage: SftStage, figures: Mapping[str, float]) -> None:
    """The critic must write scores that parse; held-out samples must be as good as their target.

    figures: of the evaluation at the stage's end, with `heldout/<metric>` where there is a target.
    Raises GateFailed.
    """
    _settle(stage, missed(stage, figures), stage.gate.action)


def check_critic_gate(stage: ReinforceStage | ValueStage, figures: Mapping[str, float]) -> bool:
    """Whether it is reached: the critic must beat the constant predictor, tell right from wrong, and rank
    within a prompt.

    Raises GateFailed.
    """
    found = missed(stage, figures)
    _settle(stage, found, stage.gate.action)
    return not found


def check_entry_gate(recipe: Recipe, stage: PpoStage, figures: Mapping[str, float]) -> None:
    """A critic by whose values an actor is to be trained must write scores, and be what the gate asks for.

    figures: of the evaluation that the stage begins with. Raises GateFailed.
    """
    _settle(stage, missed(stage, figures), entry_action(recipe.stages, stage))


def _settle(stage: JudgedStage, found: list[Missed], action: str) -> None:
    if not found or action == "off":
        return
    if action != "stop":
        told = "; ".join(f"{one.what} ({one.means})" for one in found)
        if os.environ.get("RANK", "0") == "0":  # all ranks judge the same figures
            logger.warning("stage %s: gate not reached: %s", stage.name, told)
        return
    told = "".join(f"\n  {one.what}\n    means: {one.means}\n    helps: {one.helps}" for one in found)
    ways = "".join(f"\n    {override}\n      {does}" for override, does in ways_on(stage, found))
    how = (
        "nothing of this stage is trained yet, and what was before it is saved; change something, and run it "
        "again, with --resume where the run has a checkpoint"
        if isinstance(stage, PpoStage)
        else "what is trained is saved; change something, and the same command with --resume goes on from "
        "there"
    )
    raise GateFailed(
        f"not reached{told}",
        where=f"gate of stage {stage.name}",
        way_out=f"{how}, for example with{ways}",
    )
