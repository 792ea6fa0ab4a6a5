"""No checkpoint holds NaN or infinity: looked at before it is written, and after it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase

from genac_megatron.errors import InputError, NotFinite
from genac_megatron.training.role import Role


def need_finite(sharded: Mapping[str, Any]) -> None:
    """Raises NotFinite naming the first tensor of a sharded state on this rank that holds NaN or infinity."""
    found = [(key, tensor.isfinite().all()) for key, tensor in _tensors(sharded)]
    bad = next((key for key, flag in found if not flag), None)  # read once all are under way
    if bad is not None:
        raise NotFinite(f"{bad} holds numbers that are not finite")


def _tensors(state: Any, key: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Its floating-point tensors, by their keys."""
    if isinstance(state, Mapping):
        for name, part in state.items():
            yield from _tensors(part, str(name))
    elif isinstance(state, (list, tuple)):
        for part in state:
            yield from _tensors(part, key)
    elif isinstance(state, ShardedBase):
        yield from _tensors(state.data, state.key)
    elif isinstance(state, torch.Tensor) and state.is_floating_point() and state.numel():
        yield key, state


def need_sound(
    path: Path, roles: Mapping[str, Role], way_out: str = "remove this checkpoint to use the one before"
) -> None:
    """Raises InputError where a weight that was loaded from `path` is not finite."""
    for role in roles.values():
        for model in role.models if role.active else ():
            for name, parameter in model.named_parameters():
                if not bool(parameter.detach().isfinite().all()):
                    raise InputError(
                        f"its {role.name} holds numbers that are not finite: {name}",
                        where=str(path),
                        way_out=way_out,
                    )
