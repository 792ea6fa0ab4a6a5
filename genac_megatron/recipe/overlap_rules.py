"""Rules of stages that generate while they train (`overlap`). No torch."""

from __future__ import annotations

from genac_megatron.errors import InputError
from genac_megatron.recipe.precision import Where
from genac_megatron.recipe.schema import PolicyStage, PpoStage, Recipe, RoleConfig


def check_overlap(
    recipe: Recipe, stage: PpoStage | PolicyStage, place: tuple[str | int, ...], where: Where
) -> None:
    """What a stage whose batches are begun ahead must keep. Raises InputError."""
    if not stage.overlap:
        return
    asked = ("actor", "critic") if isinstance(stage, PpoStage) and not recipe.judging.teacher else ("actor",)
    for role in asked:
        engine = recipe.roles[role].engine
        if engine.kind != "sglang":
            raise InputError(
                f"the stage '{stage.name}' overlaps generation with training; the {role}'s engine computes "
                "in the ranks that train",
                where=where((*place, "overlap")),
                way_out=f"set roles.{role}.engine.kind: sglang, or take overlap out",
            )
        if engine.release != "off":
            raise InputError(
                f"the {role}'s engine gives memory back while the trainer computes, and the stage "
                f"'{stage.name}' has it generate then",
                where=where(("roles", role, "engine", "release")),
                way_out="set release: off, or take overlap out",
            )
        config = recipe.roles[role]
        trained = role == "actor" or (isinstance(stage, PpoStage) and stage.train_critic)
        if stage.overlap > 1 and trained:
            _check_ahead(role, config, stage, where)
    for role, config in recipe.roles.items():
        if config.training.offload:
            raise InputError(
                f"'{role}' rests in host memory while engines generate, and the stage '{stage.name}' has it "
                "train then",
                where=where(("roles", role, "training", "offload")),
                way_out="take offload out, or overlap",
            )


def _check_ahead(role: str, config: RoleConfig, stage: PpoStage | PolicyStage, where: Where) -> None:
    """What is generated over several publications must not have to end for one."""
    who = f"the stage '{stage.name}' begins {stage.overlap} batches ahead (overlap), and"
    if config.engine.enable_lora:
        raise InputError(
            f"{who} servers hold two versions of the {role}'s adapter",
            where=where(("roles", role, "engine", "enable_lora")),
            way_out="set overlap: 1, or take enable_lora out",
        )
    if config.publication.mode == "drain":
        raise InputError(
            f"{who} a publication of the {role} waits for all that is under way",
            where=where(("roles", role, "publication", "mode")),
            way_out="set publication.mode: in_flight, or overlap: 1",
        )
