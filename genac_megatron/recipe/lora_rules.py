"""Rules of servers that load adapters (`engine.enable_lora`), and of two roles on one fleet. No torch."""

from __future__ import annotations

from genac_megatron.errors import InputError
from genac_megatron.recipe.precision import Where
from genac_megatron.recipe.schema import EngineConfig, Recipe, RoleConfig

BASE = ("hf", "family", "shape", "base", "init_seed")  # of a role's model: what its adapter is beside


def check_lora(recipe: Recipe, name: str, role: RoleConfig, where: Where) -> None:
    """Raise InputError where a role's servers cannot load its adapters, or cannot be another's too."""
    if role.engine.share is not None:
        _check_share(recipe, name, role, role.engine.share, where)
    if role.engine.enable_lora:
        _check_servers(name, role, where)


def _check_servers(name: str, role: RoleConfig, where: Where) -> None:
    engine = role.engine

    def refuse(what: str, way_out: str) -> InputError:
        return InputError(
            f"'{name}' has enable_lora, {what}", where=where(("roles", name, "engine")), way_out=way_out
        )

    if role.training.adapter is None:
        raise refuse("and is trained whole", "take enable_lora out, or give the role a training.adapter")
    if engine.kind != "sglang":
        raise refuse(
            f"and its engine is {engine.kind}, which is given the merged weights",
            "take enable_lora out, or set kind: sglang",
        )
    if engine.quantization != "off":
        raise refuse(
            f"which is not built beside quantization: {engine.quantization}",
            "set quantization: off, or take enable_lora out: the merged weights are quantized then",
        )
    if engine.release == "all":
        raise refuse(
            "whose servers are given the base once, and release: all has them give it back",
            "set release: kv_cache, or take enable_lora out",
        )


def _check_share(recipe: Recipe, name: str, role: RoleConfig, owner: str, where: Where) -> None:
    place = ("roles", name, "engine", "share")

    def refuse(what: str, way_out: str) -> InputError:
        return InputError(
            f"'{name}' shares the servers of '{owner}', {what}", where=where(place), way_out=way_out
        )

    lent = recipe.roles.get(owner)
    if lent is None or owner == name:
        others = [other for other in recipe.roles if other != name]
        raise refuse("which is no other role", f"name one of {', '.join(others) or 'several roles'}")
    if lent.engine.share is not None:
        raise refuse(f"which shares those of '{lent.engine.share}'", f"set share: {lent.engine.share}")
    if not (role.served and lent.served):
        who = name if not role.served else owner
        raise refuse(f"and nothing is generated with '{who}'", "take share out")
    if not lent.engine.enable_lora:
        raise refuse(
            "which hold whole weights",
            f"give both roles a training.adapter, and set roles.{owner}.engine.enable_lora: true",
        )
    mine, theirs = role.engine, lent.engine
    other = [k for k in EngineConfig.model_fields if k != "share" and getattr(mine, k) != getattr(theirs, k)]
    if other:
        raise refuse(
            f"and says otherwise of them: {', '.join(other)}",
            f"take {', '.join(other)} out of roles.{name}.engine, or change roles.{owner}.engine",
        )
    models = role.model, lent.model
    unlike = [key for key in BASE if getattr(models[0], key) != getattr(models[1], key)]
    if unlike and getattr(role.model, "share", None) != owner:
        raise refuse(
            f"and its adapter is beside another base: model.{', model.'.join(unlike)}",
            f"give both roles the same model, or '{name}' servers of its own",
        )
    if role.training.dtype != lent.training.dtype:
        raise refuse(
            f"and its base is in {role.training.dtype}, theirs in {lent.training.dtype}",
            "set the same training.dtype",
        )
