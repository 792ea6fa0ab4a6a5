"""Adapters in checkpoints: those alone are in one, and the digest of the base that they stand beside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genac_megatron.errors import InputError
from genac_megatron.models.sizes import adapter_parameters, parameters
from genac_megatron.training.role import Role

OF_BASE = ("base", "dtype")


def adapted(role: Role) -> dict[str, Any] | None:
    """What a manifest says of a role's adapter, None where it has none. Raises ValueError without a base."""
    adapter = role.config.training.adapter
    if adapter is None:
        return None
    if not role.base:
        raise ValueError(f"{role.name}: the digest of its base is not known (publication/digest.py)")
    kept = {"rank": adapter.rank, "alpha": adapter.alpha, "targets": sorted(adapter.targets)}
    return {**kept, "base": role.base, "dtype": role.config.training.dtype}


def saved_parameters(role: Role) -> int:
    """How many numbers of a role's weights a checkpoint holds."""
    adapter = role.config.training.adapter
    return (
        parameters(role.shape)
        if adapter is None
        else adapter_parameters(role.shape, adapter, 1, role.shape.layers)
    )


def check_adapter(path: Path, name: str, saved: Mapping[str, Any] | None, role: Role, *, base: bool) -> None:
    """Raise InputError where what a checkpoint holds of a role is not what the recipe's role takes from it.

    saved: of its manifest, None of a whole model. base: it is to be what an adapter stands beside.
    """

    def refuse(what: str, way_out: str) -> InputError:
        return InputError(f"its {name} {what}", where=str(path), way_out=way_out)

    whole = base or role.config.training.adapter is None
    if whole and saved is not None:
        raise refuse(
            f"is an adapter of rank {saved['rank']} beside a base, and no whole model",
            f"merge them (genac convert to-hf --merge) and name that folder in roles.{role.name}.model.hf"
            + ("" if base else f", or give roles.{role.name}.training.adapter what it was trained with"),
        )
    if whole:
        return
    if saved is None:
        raise refuse(
            "is a whole model, and the recipe's an adapter beside one",
            f"name it in roles.{role.name}.model.base, or take roles.{role.name}.training.adapter out",
        )
    wanted = adapted(role) or {}
    different = [f"{key} {saved.get(key)} (the recipe: {wanted[key]})" for key in wanted if key not in OF_BASE
                 and saved.get(key) != wanted[key]]  # fmt: skip
    if different:
        raise refuse(
            f"is another adapter: {', '.join(different)}", f"set roles.{role.name}.training.adapter to those"
        )
    if saved["base"] != wanted["base"]:
        raise refuse(
            "is an adapter beside another base: {base:.12} in {dtype}".format(**saved)
            + ", and the recipe's model is {base:.12} in {dtype}".format(**wanted),
            f"name in roles.{role.name}.model (hf, base or init_seed) the model that it was trained beside, "
            "in the same training.dtype",
        )
