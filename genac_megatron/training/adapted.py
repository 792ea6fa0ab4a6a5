"""Adapters in checkpoints: those alone are in one, and the digest of the base that they stand beside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genac_megatron.errors import InputError
from genac_megatron.models.sizes import adapter_parameters, parameters
from genac_megatron.training.role import Role

OF_BASE = ("base", "dtype", "moved", "merges", "base_in")


def adapted(role: Role, roles: Mapping[str, Role]) -> dict[str, Any] | None:
    """What a manifest says of a role's adapter, None where it has none. roles: all that are saved, by name.

    base: the recipe's; moved, merges: what has become of it since, where one of its roles merges; base_in:
    the role whose weights in the checkpoint it is. Raises ValueError without a base.
    """
    adapter = role.config.training.adapter
    if adapter is None:
        return None
    if not role.base:
        raise ValueError(f"{role.name}: the digest of its base is not known (publication/digest.py)")
    kept = {"rank": adapter.rank, "alpha": adapter.alpha, "targets": sorted(adapter.targets)}
    said = {**kept, "base": role.base, "dtype": role.config.training.dtype}
    holder = next((n for n, r in roles.items() if r.memory is role.memory and r.keeps_base), None)
    if holder is not None or role.memory.merges:
        said |= {"moved": role.memory.moved, "merges": role.memory.merges, "base_in": holder}
    return said


def brings_base(said: Mapping[str, Any], role: Role, roles: Mapping[str, Role]) -> bool:
    """Whether a checkpoint has the base of an adapter in it, and the role takes it, by itself or with the one
    whose base it stands on. said: of its manifest. roles: all that are loaded, by their names there.
    """
    holder = said.get("base_in")
    owner = roles.get(holder or "")
    return holder is not None and (
        role.owns_base or (owner is not None and owner.owns_base and owner.memory is role.memory)
    )


def saved_parameters(role: Role) -> int:
    """How many numbers of a role's weights a checkpoint holds."""
    adapter = role.config.training.adapter
    if adapter is None:
        return parameters(role.shape)
    own = adapter_parameters(role.shape, adapter, 1, role.shape.layers)
    return own + parameters(role.shape) if role.keeps_base else own


def check_adapter(
    path: Path,
    name: str,
    saved: Mapping[str, Any] | None,
    role: Role,
    roles: Mapping[str, Role],
    *,
    base: bool,
) -> None:
    """Raise InputError where what a checkpoint holds of a role is not what the recipe's role takes from it.

    saved: of its manifest, None of a whole model. roles: all that are loaded, by their names there. base: it
    is to be what an adapter stands beside.
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
    wanted = adapted(role, {}) or {}
    different = [f"{key} {saved.get(key)} (the recipe: {wanted[key]})" for key in wanted if key not in OF_BASE
                 and saved.get(key) != wanted[key]]  # fmt: skip
    if different:
        raise refuse(
            f"is another adapter: {', '.join(different)}", f"set roles.{role.name}.training.adapter to those"
        )
    if saved["base"] not in (wanted["base"], role.base_and_head):
        raise refuse(
            "is an adapter beside another base: {base:.12} in {dtype}".format(**saved)
            + ", and the recipe's model is {base:.12} in {dtype}".format(**wanted),
            f"name in roles.{role.name}.model (hf, base or init_seed) the model that it was trained beside, "
            "in the same training.dtype",
        )
    if not brings_base(saved, role, roles) and saved.get("moved", "") != role.memory.moved:
        raise refuse(
            "is an adapter beside a base that has moved {} times, and this one has moved {} times".format(
                saved.get("merges", 0), role.memory.merges
            ),
            "take both roles from one checkpoint of the run in which the base moved (adapter.merge_every)",
        )
