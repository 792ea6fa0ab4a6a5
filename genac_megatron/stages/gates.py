"""Gates: what a stage must have reached before the next one may build on it (method §4)."""

from __future__ import annotations

import logging

from genac_megatron.errors import GateFailed
from genac_megatron.recipe.schema import Gate, ReinforceStage, SftStage, ValueStage

logger = logging.getLogger(__name__)


def check_sft_gate(stage: SftStage, figures: dict[str, float]) -> None:
    """The critic must write scores that parse."""
    rate = figures.get("eval/critic_parse_rate", float("nan"))
    failures = []
    if not rate >= stage.gate.parse_rate:
        failures.append(f"parse rate {rate:.3f} is below {stage.gate.parse_rate}")
    _settle(stage.name, stage.gate.action, failures)


def check_critic_gate(stage: ReinforceStage | ValueStage, figures: dict[str, float]) -> None:
    """The critic must beat the constant predictor, tell right from wrong, and rank within a prompt."""
    names = ("brier", "brier_constant", "auc", "ranking_prompt")
    brier, constant, auc, ranking = (figures.get(f"eval/critic_{name}", float("nan")) for name in names)
    failures = []
    if stage.gate.brier_below_constant and not brier < constant:
        failures.append(f"Brier {brier:.4f} is not below the constant predictor's {constant:.4f}")
    if not auc > stage.gate.auc:
        failures.append(f"AUC {auc:.3f} is not above {stage.gate.auc}")
    if not ranking > stage.gate.ranking:
        failures.append(f"ranking accuracy within a prompt {ranking:.3f} is not above {stage.gate.ranking}")
    _settle(stage.name, stage.gate.action, failures)


def _settle(stage: str, action: Gate, failures: list[str]) -> None:
    if not failures or action == "off":
        return
    if action == "warn":
        logger.warning("stage %s: gate not reached: %s", stage, "; ".join(failures))
        return
    raise GateFailed(
        "; ".join(failures),
        where=f"gate of stage {stage}",
        way_out=f"train the stage longer, or set stages.{stage}.gate.action: warn to go on all the same",
    )
