"""Arrays between ranks as they are: no object is pickled, whatever their sizes.

Sizes are told first where a receiver cannot know them. Arrays come from host memory and go back there; on a
GPU they travel over NCCL (not run on a GPU), on a CPU over gloo.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from genac_megatron import platform

Bytes = NDArray[np.uint8]
Number = TypeVar("Number", bound=np.generic)


def gathered_rows(mine: NDArray[Number], group: Any = None) -> list[NDArray[Number]]:
    """`mine`, [n, ...], of every rank of the group in its order; n may differ, the rest not. Collective.

    group None: the world.
    """
    size = dist.get_world_size(group)
    if size == 1:
        return [mine]
    device = platform.device()
    counts = torch.empty(size, dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, torch.tensor([len(mine)], dtype=torch.int64, device=device), group)
    sizes = counts.tolist()
    wide = np.zeros((max(*sizes, 1), *mine.shape[1:]), mine.dtype)
    wide[: len(mine)] = mine
    given = torch.from_numpy(wide).to(device)
    found = torch.empty((size * len(wide), *wide.shape[1:]), dtype=given.dtype, device=device)
    dist.all_gather_into_tensor(found, given, group)
    rows = found.cpu().numpy().reshape(size, *wide.shape)
    return [rows[rank, :count] for rank, count in enumerate(sizes)]


def exchanged(parts: Sequence[Bytes], sizes: Sequence[int], group: Any = None) -> list[Bytes]:
    """What every rank of the group has for this one, in its order: parts[r] goes to the group's rank r.

    sizes: of what comes, in bytes, which both sides know. Collective over the group; None: the world.
    """
    if len(parts) == 1:
        return list(parts)
    device = platform.device()
    given = torch.from_numpy(np.concatenate(parts)).to(device)
    found = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    dist.all_to_all_single(found, given, list(sizes), [len(part) for part in parts], group)
    return np.split(found.cpu().numpy(), np.cumsum(sizes)[:-1])


def spread_from(source: int, array: NDArray[Number], group: Any = None) -> NDArray[Number]:
    """`array` of a global rank, on every rank of the group; elsewhere `array` tells its size alone.

    Collective over the group; None: the world.
    """
    if dist.get_world_size(group) == 1 or not array.size:
        return array
    box = torch.from_numpy(np.ascontiguousarray(array)).to(platform.device())
    dist.broadcast(box, source, group)
    return box.cpu().numpy()  # type: ignore[no-any-return]


def summed(mine: NDArray[Number], group: Any = None) -> NDArray[Number]:
    """The sum of every rank's array. Collective over the group; None: the world."""
    if dist.get_world_size(group) == 1:
        return mine
    box = torch.from_numpy(mine.copy()).to(platform.device())
    dist.all_reduce(box, group=group)
    return box.cpu().numpy()  # type: ignore[no-any-return]
