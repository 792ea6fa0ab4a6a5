"""Which stage's teacher `genac traces ask` asks. No torch."""

from __future__ import annotations

from genac_megatron.errors import InputError
from genac_megatron.recipe.schema import Recipe, SftStage

TEACHERS = ("endpoint", "self", "exact")


def traces_stage(recipe: Recipe, name: str | None) -> SftStage:
    """The stage that says what is asked of whom. Raises InputError."""
    known = [
        one
        for one in recipe.stages
        if isinstance(one, SftStage) and one.role == "critic" and one.data == "traces"
    ]
    found = [one for one in known if name is None or one.name == name]
    names = ", ".join(one.name for one in known) or "none"
    if not found:
        raise InputError(
            "no such SFT stage of the critic with data: traces",
            where=f"stage {name}" if name else f"recipe {recipe.name}",
            way_out=f"there are: {names}",
        )
    stage = found[0]
    if stage.sources:
        raise InputError(
            "a stage with sources asks several teachers, and this command one",
            where=f"stage {stage.name}",
            way_out="give a stage a teacher of its own, and name it (--stage); its result may be a source's "
            "teacher: {kind: file, path: OUT/traces.jsonl}",
        )
    if stage.teacher.kind not in TEACHERS:
        raise InputError(
            f"the teacher {stage.teacher.kind} writes no judgements that could be kept",
            where=f"stage {stage.name}, teacher.kind",
            way_out=f"set stages.{stage.name}.teacher.kind to one of: {', '.join(TEACHERS)}",
        )
    return stage
