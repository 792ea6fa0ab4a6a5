"""A role's state in shards, as Megatron's distributed checkpointing takes and gives it, and who moves which.

An optimizer's states lie on one data-parallel rank each, which writes and reads its own
(platform/optimizer_shards.py). Weights lie on all of them: Megatron's fully parallel wrappers deal them out,
for writing and for reading, here in the groups of each role.

What is told of a stored tensor is this rank's pieces (`by_itself`). By itself Megatron (0.16.1, 0.19.2) tells
torch of the whole grid that a weight is a piece of, and torch compares all pieces of it: of 94 layers of 128
experts 110 s of a rank's processor, at every save and load (benchmarks/scale_checkpoint.py plans both).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_inplace,
    dict_list_map_outplace,
    extract_matching_values,
    merge,
)
from megatron.core.dist_checkpointing.exchange_utils import (
    determine_main_replica_uniform_distribution,
    exchange_by_distribution,
)
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from torch.distributed.checkpoint.api import CheckpointException

from genac_megatron.errors import GenacError
from genac_megatron.models.mapping import ADAPTERS, beside_base
from genac_megatron.platform import optimizer_shards, plan_check, read_plan
from genac_megatron.training.agreement import agree, lost_peer
from genac_megatron.training.role import Role

Sharded = dict[str, Any]

ROLES = "roles"  # of what is saved and loaded: {ROLES: {a role's name: role_state}}
OPTIMIZER = "optimizer"  # in a role's state, beside its models


def role_state(
    role: Role,
    *,
    optimizer: bool,
    loading: bool = False,
    head: bool = True,
    saved_as: str | None = None,
    base: bool = False,
    with_base: bool = False,
) -> Sharded:
    """The sharded state of a role on this rank, with its output layer or without; empty outside its block.

    saved_as: the role's name in the checkpoint; None: its own. Of an adapter it is what stands beside its
    base, `with_base` that model too, or, asked for the `base`, it alone.
    Its tensors are views of the role's own, so that what is loaded into them is in place. Not collective.
    """
    if not role.active:
        return {}
    optimizer_shards.install()
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": role.groups.dp_cp}
    models: Sharded = {}
    for index, model in enumerate(role.models):
        state = model.sharded_state_dict(metadata=dict(metadata))
        kept = {key: value for key, value in state.items() if head or not key.startswith("output_layer.")}
        if base:
            kept = {key: value for key, value in kept.items() if not key.startswith(ADAPTERS)}
        elif role.config.training.adapter is not None and not with_base:
            kept = {key: value for key, value in kept.items() if beside_base(key, role.shape)}
        models[f"model{index}"] = kept
        add_prefix_for_sharding(models[f"model{index}"], f"{saved_as or role.name}.")
    if not optimizer or role.optimizer is None:
        return models
    merged: Sharded = {}
    for model in models.values():
        merged |= model
    state = models if len(models) > 1 else merged
    return {
        **models,
        OPTIMIZER: role.optimizer.sharded_state_dict(state, is_loading=loading, metadata=dict(metadata)),
    }


def _dealt(roles: Mapping[str, Role], state: Sharded) -> Iterator[tuple[str, Any, Sharded]]:
    """Per role whose weights lie on several ranks: its name, these ranks' group, its weights in `state`.

    Of an optimizer's states each rank has its own. The same roles on every rank of a group.
    """
    for name, role in roles.items():
        held = state.get(ROLES, {}).get(name, {})
        weights = {key: part for key, part in held.items() if key != OPTIMIZER}
        if weights and role.groups.dp_cp.size() > 1:
            yield name, role.groups.dp_cp, weights


class _Saving(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Without every rank's plan in the metadata, where Megatron keeps them for a cache that is not used here:
    each rank reads the metadata at a resume.
    """

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *more: Any) -> Any:
        _, metadata, _ = planned
        if metadata is not None:  # on the rank that writes it
            vars(metadata).pop("all_local_plans", None)
        return super()._get_save_and_finalize_callbacks(writer, planned, *more)


class SharedWriting(FullyParallelSaveStrategyWrapper):  # type: ignore[misc]
    """A save in which each data-parallel rank writes about as much of its role's weights as the others."""

    def __init__(self, roles: Mapping[str, Role]) -> None:
        plan_check.install()
        super().__init__(_Saving("torch_dist", 1))
        self.roles = roles

    def apply_saving_parallelization(self, sharded_state_dict: Sharded) -> None:
        """Say of each weight on this rank whether it is the one that writes it, and of each piece where it is
        stored. Collective in the groups.
        """
        for _, group, weights in _dealt(self.roles, sharded_state_dict):
            plan = determine_main_replica_uniform_distribution(weights, group)
            distribute_main_replicas_with_precomputed_distribution(weights, group, plan)
        dict_list_map_inplace(by_itself, sharded_state_dict)


class SharedReading(FullyParallelLoadStrategyWrapper):  # type: ignore[misc]
    """A load in which each data-parallel rank reads a share of its role's weights and sends it to others."""

    def __init__(self, roles: Mapping[str, Role], explain: Callable[[BaseException], GenacError]) -> None:
        read_plan.install()
        super().__init__(TorchDistLoadShardedStrategy())
        self.roles, self.explain = roles, explain

    def load(self, sharded_state_dict: Sharded, checkpoint_dir: Path, *options: Any) -> Sharded:
        """The state with every tensor loaded. Collective over the world.

        What cannot be read on one rank is raised on all, as `explain` words it.
        """
        dealt = list(_dealt(self.roles, sharded_state_dict))
        plans, tensors, mine, others = {}, {}, {}, {}
        request = {ROLES: dict(sharded_state_dict.get(ROLES, {}))}
        for name, group, weights in dealt:
            plans[name] = determine_main_replica_uniform_distribution(weights, group, True)
            distribute_main_replicas_with_precomputed_distribution(weights, group, plans[name])
            tensors[name], _, mine[name], others[name] = self._defer_loading_sharded_tensors(weights)
            request[ROLES][name] = _without_tensors(request[ROLES][name])
        request[ROLES] = {name: rest for name, rest in request[ROLES].items() if rest}
        read = {name: weights for name, weights in mine.items() if weights}
        wanted = {key: part for key, part in ((ROLES, request[ROLES]), ("read", read)) if part}
        loaded = agree(lambda: self._read(wanted, checkpoint_dir, *options))
        state: Sharded = {ROLES: loaded.get(ROLES, {})}
        for name, group, _ in dealt:
            whole = exchange_by_distribution(
                loaded.get("read", {}).get(name, {}), others[name], plans[name], group, self.exchange_algo
            )
            self.fill_in_deferred_sharded_tensors(tensors[name], whole)
            state[ROLES][name] = merge(state[ROLES].get(name, {}), tensors[name])
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # for broadcasts that are under way
        return state

    def _read(self, wanted: Sharded, *place: Any) -> Sharded:
        """What this rank reads itself: in 0.16 still collective, from 0.17 on each rank by itself."""
        try:
            pieces = dict_list_map_outplace(by_itself, wanted)
            loaded: Sharded = self.base_strategy.load(pieces, *place)
        except (Exception, CheckpointException) as error:  # torch's is no Exception
            if lost_peer(error):
                raise
            raise self.explain(error) from error
        return _shaped_as(wanted, loaded)


def by_itself(value: Any) -> Any:
    """A weight's piece as a box of the stored tensor, without the grid that it is of; anything else as it is.

    Its tensor is a view where that is contiguous: what is loaded into it is in place.
    """
    if not isinstance(value, ShardedTensor) or not value.prepend_axis_num:
        return value
    shape = (*(1 for _ in range(value.prepend_axis_num)), *value.local_shape)
    data = None if value.data is None else value.data.contiguous().view(shape)
    return replace(value, data=data, local_shape=shape, prepend_axis_num=0, axis_fragmentations=None)


def _shaped_as(wanted: Any, loaded: Any) -> Any:
    """What `by_itself` was loaded into, in the shapes that were asked for."""
    if isinstance(wanted, dict):
        return {key: _shaped_as(one, loaded[key]) for key, one in wanted.items()}
    if isinstance(wanted, list):
        return [_shaped_as(*pair) for pair in zip(wanted, loaded, strict=True)]
    if isinstance(wanted, ShardedTensor) and wanted.prepend_axis_num:
        return loaded.view(wanted.local_shape)
    return loaded


def _without_tensors(role: Sharded) -> Sharded:
    """What of a role's state is not dealt out: an optimizer's states, and objects."""
    rest: Sharded = {}
    for key, part in role.items():
        kept = part if key == OPTIMIZER else extract_matching_values(part, _is_tensor)[1]
        if kept:
            rest[key] = kept
    return rest


def _is_tensor(value: Any) -> bool:
    return isinstance(value, ShardedTensor)
