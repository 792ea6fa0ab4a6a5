"""Which stored pieces of a tensor a rank reads, in time that grows with their number alone.

Torch (2.13) goes along a tensor's longest axis, through what a rank wants and what is stored side by side.
Of a mixture of experts that axis is not cut, so each wanted piece is compared with all that are stored, in
Python: of 94 layers of 128 experts on 128 ranks 26 s of each rank's processor at a resume. Here a wanted
piece is compared with all stored ones at once, in less than 2 s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.distributed.checkpoint import planner_helpers
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.resharding import _shards_get_overlap_region_wrt_saved_tensor

from genac_megatron.platform.plan_check import Ints

NAME = "create_read_items_for_chunk_list"
REPLACED: list[Any] = []  # torch's own function, once `install` was called


def install() -> None:
    """Have torch's planner find what it reads so; any number of times."""
    if not REPLACED:
        REPLACED.append(vars(planner_helpers)[NAME])
        vars(planner_helpers)[NAME] = items


def items(fqn: str, stored: TensorStorageMetadata, wanted: Sequence[ChunkStorageMetadata]) -> list[ReadItem]:
    """What is read for some pieces of a tensor: an item for each stored piece that one of them meets."""
    found = []
    starts, ends = _edges(stored.chunks, len(stored.size))
    for at, (piece, start, end) in enumerate(zip(wanted, *_edges(wanted, len(stored.size)), strict=True)):
        for k in np.flatnonzero(((starts < end) & (start < ends)).all(1)).tolist():
            chunk = stored.chunks[k]
            met = _shards_get_overlap_region_wrt_saved_tensor(saved_shard=chunk, current_shard=piece)
            found.append(
                planner_helpers._create_read_item_for_tensor(
                    dest_index=MetadataIndex(fqn, piece.offsets, at),
                    dest_offsets=[here for _, _, here, _ in met],
                    storage_index=MetadataIndex(fqn, chunk.offsets, k),
                    storage_offsets=[there for _, there, _, _ in met],
                    lengths=[length for *_, length in met],
                )
            )
    return found


def _edges(pieces: Sequence[ChunkStorageMetadata], axes: int) -> tuple[Ints, Ints]:
    """Where each begins and ends, [pieces, axes]."""
    starts = np.array([piece.offsets for piece in pieces], np.int64).reshape(len(pieces), axes)
    return starts, starts + np.array([piece.sizes for piece in pieces], np.int64).reshape(len(pieces), axes)
