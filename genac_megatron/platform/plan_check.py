"""Whether the pieces of a checkpoint cover every tensor once, in time that grows with their number alone.

Torch (2.13) looks for pieces that overlap from one end of a tensor's longest axis to the other. Of a mixture
of experts that axis is not cut, so all pieces are compared with all: of 94 layers of 128 experts 1.5 billion
pairs at each save, by one rank, while the others wait. Here pieces that share no interval of one axis are
never compared on the next.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

Ints = NDArray[np.int64]
REPLACED: list[Any] = []  # torch's own function, once `install` was called


def install() -> None:
    """Have torch's planner check its plans so; any number of times."""
    if not REPLACED:
        REPLACED.append(default_planner._validate_global_plan)
        vars(default_planner)["_validate_global_plan"] = faults


def faults(plans: Any, metadata: Metadata) -> list[str]:
    """What is wrong with the pieces of each tensor, in torch's words; [] of a plan that is right."""
    found: list[str] = []
    for key, value in metadata.state_dict_metadata.items():
        if isinstance(value, BytesStorageMetadata) or not value.size:
            continue
        chunks = value.chunks
        starts = np.array([chunk.offsets for chunk in chunks], np.int64).reshape(len(chunks), -1)
        sizes = np.array([chunk.sizes for chunk in chunks], np.int64).reshape(len(chunks), -1)
        outside = ((starts < 0) | (sizes < 0) | (starts + sizes > np.array(value.size))).any(1)
        found += [
            f"key:{key} has out of bounds chunk: tensor-size:{value.size} chunk: {chunks[i]}"
            for i in np.flatnonzero(outside).tolist()
        ]
        pair = overlapping(starts, starts + sizes)
        if pair is not None:
            found.append(f"key:{key} has overlapping chunks: {chunks[pair[1]]} {chunks[pair[0]]}")
        volume, whole = int(sizes.prod(1).sum()), math.prod(value.size)
        if len(plans) > 1 and volume != whole:
            found.append(f"key:{key} invalid fill tensor-volume: {whole} chunks-volume: {volume}")
    return found


def overlapping(starts: Ints, ends: Ints) -> tuple[int, int] | None:
    """Two of n boxes [n, axes] that share an element, or None."""
    filled = np.flatnonzero((ends > starts).all(1))
    return _within(filled, 0, starts, ends)


def _within(boxes: Ints, axis: int, starts: Ints, ends: Ints) -> tuple[int, int] | None:
    """Among boxes that are alike on all axes before this one."""
    if len(boxes) < 2:
        return None
    if axis == starts.shape[1]:
        return int(boxes[0]), int(boxes[1])
    boxes = boxes[np.lexsort((ends[boxes, axis], starts[boxes, axis]))]
    first, last = starts[boxes, axis], ends[boxes, axis]
    cuts = np.flatnonzero((first[1:] != first[:-1]) | (last[1:] != last[:-1])) + 1
    if (first[cuts] < last[cuts - 1]).any():  # intervals that overlap and are not alike
        return _among(boxes, starts, ends)
    for part in np.split(boxes, cuts):
        pair = _within(part, axis + 1, starts, ends)
        if pair is not None:
            return pair
    return None


def _among(boxes: Ints, starts: Ints, ends: Ints) -> tuple[int, int] | None:
    """Each compared with all after it."""
    for at, box in enumerate(boxes):
        others = boxes[at + 1 :]
        meet = ((starts[others] < ends[box]) & (starts[box] < ends[others])).all(1)
        if meet.any():
            return int(box), int(others[meet.argmax()])
    return None
