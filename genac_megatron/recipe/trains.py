"""What of each role trains, in words, by a run's resolved recipe: for its status and its report. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from genac_megatron.errors import InputError
from genac_megatron.models.families.base import Shape
from genac_megatron.models.sizes import attention_parameters, parameters
from genac_megatron.recipe.estimate import adapter_told, count_told
from genac_megatron.recipe.rules import read_shape
from genac_megatron.recipe.schema import RoleConfig


def trains(resolved: Mapping[str, Any]) -> dict[str, str]:
    """By role. A role of another version's recipe is left out; what a model's folder would have to say, where
    it is not here, too.
    """
    found = {}
    for name, plain in (resolved.get("roles") or {}).items():
        try:
            role = RoleConfig.model_validate(plain)
        except ValidationError:
            continue
        try:
            shape: Shape | None = read_shape(role.model)
        except (InputError, OSError):
            shape = None
        found[name] = _told(role, shape, resolved["roles"].get(role.model.share or name))
    return found


def _told(role: RoleConfig, shape: Shape | None, owner: Any) -> str:
    """owner: of its base, as plain data."""
    training = role.training
    if training.adapter is not None:
        try:
            base = RoleConfig.model_validate(owner).training.adapter
        except ValidationError:
            base = None
        moves = base.merge_every if base is not None else None
        return adapter_told(training.adapter, shape, role.model.share, moves)
    if training.frozen:
        return "nothing trains: it is frozen"
    if shape is None:
        return "all but its attention trains" if training.frozen_attention else "all of its parameters train"
    count = parameters(shape)
    if training.frozen_attention:
        left = count_told(count - attention_parameters(shape, 1, shape.layers))
        return f"all but its attention: {left} of its {count_told(count)} parameters train"
    return f"all of its {count_told(count)} parameters train"
