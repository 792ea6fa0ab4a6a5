"""Megatron's distributed optimizer in a checkpoint: each rank writes and reads its own share, in any layout.

Megatron-core's `fully_reshardable` (0.16.1, 0.19.2) stores an optimizer state under its parameter's name and
in its shape, so that every layout loads it. But each data-parallel rank gathers all shares before it saves,
and reads all of them when it loads: 12 bytes per parameter, whatever dp is. Its `dp_reshardable` gathers
nothing, and what it stores fits no other tensor or pipeline parallelism.

A rank's share of a parameter is a range of its elements, and such a range is a few boxes of the stored tensor
(`boxes`), which torch's checkpoint takes and gives as they are. So what is stored is `fully_reshardable`'s,
cut otherwise: either form loads what the other has saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from genac_megatron.platform.without_te import repair_optimizer

PREFIX = "optimizer.state"  # as Megatron's own, before the state's and the parameter's name
STEP = "step"  # of torch's Adam: kept with the parameter groups
MOMENTS = {"exp_avg", "exp_avg_sq"}  # of Adam, in a parameter's state
REPLACED: dict[str, Callable[..., Any]] = {}  # Megatron's own methods, once `install` was called


def install() -> None:
    """Have every distributed optimizer save and load its states by share, over torch's Adam too; any number
    of times.
    """
    if REPLACED:
        return
    repair_optimizer()
    for name, own in OWN.items():
        REPLACED[name] = getattr(DistributedOptimizer, name)
        setattr(DistributedOptimizer, name, own)


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cover elements [start, stop) of a row-major tensor: (offset, size) of boxes, in order of elements.

    At most 2n - 1 of them for n axes: parts of rows at both ends, whole rows between.
    """
    if not shape:
        if start < stop:
            yield (), ()
        return
    inner = math.prod(shape[1:])
    while start < stop:
        row, at = divmod(start, inner)
        if at == 0 and stop - start >= inner:
            rows = (stop - start) // inner
            yield (row, *(0 for _ in shape[1:])), (rows, *shape[1:])
            start += rows * inner
        else:
            end = min(stop, (row + 1) * inner)
            for offset, size in boxes(shape[1:], at, end - row * inner):
                yield (row, *offset), (1, *size)
            start = end


def pieces(stored: ShardedTensor | ShardedTensorFactory) -> list[tuple[int, ShardedTensor]]:
    """The tensors that a parameter is stored as, with the index of each one's first element in the parameter.

    A factory cuts its parameter, such as the gate and up halves of an MLP's first layer. Raises
    NotImplementedError where it does anything else to it.
    """
    if isinstance(stored, ShardedTensor):
        return [(0, stored)]
    whole = torch.empty(stored.data.shape, device="meta")
    parts = list(nested_values(replace(stored, data=whole).build()))
    found = [(int(part.data.storage_offset()), part) for part in parts]
    end, cut = 0, True
    for begin, part in sorted(found, key=lambda one: one[0]):
        cut = cut and part.data._base is whole and part.data.is_contiguous() and begin == end
        end += part.data.numel()
    if not cut or end != whole.numel():
        raise NotImplementedError(f"{stored.key} is stored otherwise than cut along its first axis")
    return found


def shards(
    stored: ShardedTensor | ShardedTensorFactory, key: str, flat: Tensor, start: int
) -> list[ShardedTensor]:
    """Elements [start, start + len(flat)) of a parameter's state as boxes of the tensors it is stored as.

    flat: [elements], whose memory the boxes are views of: what is loaded into them is in place. key: put
    before the stored tensors' names.
    """
    found = []
    stop = start + flat.numel()
    for begin, piece in pieces(stored):
        shape = (*(1 for _ in range(piece.prepend_axis_num)), *piece.local_shape)
        low, high = max(start, begin), min(stop, begin + math.prod(shape))
        at = low - start
        for offset, size in boxes(shape, low - begin, high - begin):
            data = flat[at : at + math.prod(size)].view(size)
            at += data.numel()
            found.append(
                ShardedTensor(
                    f"{key}.{piece.key}",
                    data,
                    data.dtype,
                    size,
                    piece.global_shape,
                    tuple(a + b for a, b in zip(piece.global_offset, offset, strict=True)),
                    None,  # no regular grid
                    replica_id=_without_dp(piece),
                    allow_shape_mismatch=piece.allow_shape_mismatch,
                )
            )
    return found


def _without_dp(piece: ShardedTensor) -> tuple[int, ...]:
    """(PP, TP, DP) of a parameter's replica; its states are on one data-parallel rank alone."""
    replica = piece.replica_id
    if not isinstance(replica, tuple) or len(replica) != 3:
        raise NotImplementedError(f"{piece.key}: a replica of another form than (PP, TP, DP): {replica}")
    return (*replica[:2], 0)


def _ranges(optimizer: Any) -> Iterator[tuple[Any, int]]:
    """The parameters that this rank has states of, each with the index of its first element here."""
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start


def _states(optimizer: Any, parameter: Any) -> dict[str, Tensor]:
    """A parameter's fp32 master and Adam's moments on this rank, each [elements].

    They are the optimizer's own memory; copies, on the CPU, where it keeps them in another form.
    """
    held = optimizer._get_main_param_and_optimizer_states(parameter)
    tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
    if optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
        return {name: value.detach().cpu() for name, value in tensors.items()}
    return {name: value.detach() for name, value in tensors.items()}


@torch.no_grad()
def begin_anew(optimizer: Any, parameters: Collection[Any]) -> None:
    """Have these parameters of the model, which were written from outside, as if they had never been trained:
    masters at their weights, moments 0. The count of steps goes on, and other parameters keep what they have.

    So a first update after it is (1 - beta1) / sqrt(1 - beta2) of Adam's usual one. Not collective.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not isinstance(part, DistributedOptimizer):
            for one in parameters:
                master = getattr(one, "main_param", one)
                _set_anew(one.detach(), {"param": master.detach(), **part.optimizer.state.get(master, {})})
            continue
        for one, start in _ranges(part):
            if one in parameters:
                states = _states(part, one)
                _set_anew(one.detach().flatten()[start:][: states["param"].numel()], states)
                part._set_main_param_and_optimizer_states(one, states)
        _sync_offloaded(part)


def _set_anew(weight: Tensor, states: dict[str, Tensor]) -> None:
    states["param"].copy_(weight)
    for name in MOMENTS & states.keys():
        states[name].zero_()


def _sync_offloaded(optimizer: Any) -> None:
    """Tell Megatron's offloading optimizer's parts what was put into its states."""
    if hasattr(optimizer.optimizer, "_sync_hdo_state_to_sub_optimizers"):
        optimizer.optimizer._sync_hdo_state_to_sub_optimizers()


def sharded_states(
    self: Any, model_sharded_state_dict: Any, is_loading: bool = False, metadata: Any = None
) -> dict[int, dict[str, dict[int, ShardedTensor]]]:
    """In the place of DistributedOptimizer's `sharded_param_state_fully_reshardable`. Not collective."""
    tensors, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    stored = {one.data: one for one in nested_values(tensors)}
    found: dict[int, dict[str, dict[int, ShardedTensor]]] = {}
    for index, (parameter, start) in enumerate(_ranges(self)):
        found[index] = {
            name: dict(enumerate(shards(stored[parameter], f"{PREFIX}.{name}", flat, start)))
            for name, flat in _states(self, parameter).items()
            if name != STEP
        }
    return found


@torch.no_grad()
def load_states(self: Any, state_dict: dict[int, dict[str, dict[int, Tensor]]]) -> None:
    """In the place of DistributedOptimizer's `load_parameter_state_from_fully_reshardable`."""
    for index, (parameter, _) in enumerate(_ranges(self)):
        states = _states(self, parameter)
        for name, loaded in state_dict[index].items():
            at = 0
            for _, box in sorted(loaded.items()):
                target = states[name][at : at + box.numel()]
                if target.data_ptr() != box.data_ptr():  # else it was loaded in place
                    target.copy_(box.flatten())
                at += box.numel()
        self._set_main_param_and_optimizer_states(parameter, states)
    _sync_offloaded(self)


OWN: dict[str, Callable[..., Any]] = {
    "sharded_param_state_fully_reshardable": sharded_states,
    "load_parameter_state_from_fully_reshardable": load_states,
}
