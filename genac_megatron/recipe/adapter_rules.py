"""Rules of a role that is trained as adapters: what they cannot go beside, and where it begins. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from genac_megatron.errors import InputError
from genac_megatron.models.families.base import Shape
from genac_megatron.recipe.precision import Where
from genac_megatron.recipe.schema import RoleConfig


def check_adapter(name: str, role: RoleConfig, shape: Shape, where: Where) -> None:
    """Raise InputError where a role's adapter cannot be, or a key beside it says nothing."""
    training, adapter = role.training, role.training.adapter
    if adapter is None and role.model.base is not None:
        raise InputError(
            f"'{name}' names a base, which is an adapter's",
            where=where(("roles", name, "model", "base")),
            way_out="call it checkpoint, or give the role a training.adapter",
        )
    if adapter is None:
        return
    place = ("roles", name, "training")

    def refuse(key: str, what: str, way_out: str, *within: str) -> InputError:
        return InputError(f"'{name}' {what}", where=where((*place, key, *within)), way_out=way_out)

    if shape.experts is not None:
        raise refuse(
            "adapter",
            f"is a mixture of {shape.experts} experts ({shape.family}), whose layers have no adapters here",
            "take adapter out, or use a dense model",
        )
    if training.frozen:
        raise refuse("frozen", "is frozen and has an adapter to train", "take one of them out")
    if training.frozen_attention:
        raise refuse(
            "frozen_attention",
            "has an adapter, beside which the whole model is frozen, attention too",
            "take frozen_attention out; targets says which projections have an adapter",
        )
    twice = [target for target, times in Counter(adapter.targets).items() if times > 1]
    if twice:
        raise refuse("adapter", f"names {twice[0]} twice", "name each projection once", "targets")
    if adapter.dropout:
        raise refuse(
            "adapter",
            f"asks for dropout {adapter.dropout:g}, which is not built: what it trains would be another "
            "model than the one that generated",
            "take dropout out",
            "dropout",
        )


def check_begins(name: str, role: RoleConfig, who: str, place: Sequence[str | int], where: Where) -> None:
    """A role that takes another's weights has none that stand still. Raises InputError for an adapter's."""
    if role.training.adapter is not None:
        raise InputError(
            f"{who} has '{name}' start from another role's weights, and '{name}' is an adapter: a resumed "
            "run finds its base by the recipe alone",
            where=where(place),
            way_out=f"take start_from out, and name the weights in roles.{name}.model (hf or base)",
        )
