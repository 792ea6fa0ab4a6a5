"""A role's state in shards, as Megatron's distributed checkpointing takes and gives it."""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

from genac_megatron.training.role import Role

Sharded = dict[str, Any]


def role_state(role: Role, *, optimizer: bool, loading: bool = False, head: bool = True) -> Sharded:
    """The sharded state of a role on this rank, with its output layer or without; empty outside its block."""
    if not role.active:
        return {}
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": role.groups.dp_cp}
    models: Sharded = {}
    for index, model in enumerate(role.models):
        state = model.sharded_state_dict(metadata=dict(metadata))
        kept = {key: value for key, value in state.items() if head or not key.startswith("output_layer.")}
        models[f"model{index}"] = kept
        add_prefix_for_sharding(models[f"model{index}"], f"{role.name}.")
    if not optimizer or role.optimizer is None:
        return models
    merged: Sharded = {}
    for model in models.values():
        merged |= model
    state = models if len(models) > 1 else merged
    return {
        **models,
        "optimizer": role.optimizer.sharded_state_dict(state, is_loading=loading, metadata=dict(metadata)),
    }
