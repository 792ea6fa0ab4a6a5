"""Torch's own way to find the stored pieces that a rank reads, and ours beside it."""

from __future__ import annotations

from itertools import product
from unittest import mock

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import planner_helpers
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from genac_megatron.models import build  # noqa: F401  (Megatron's hook before its first import)
from genac_megatron.platform import read_plan
from tests.unit.test_plan_check import Box, cut, stored

torchs = read_plan.REPLACED[0] if read_plan.REPLACED else vars(planner_helpers)[read_plan.NAME]


def tensor(size: tuple[int, ...], pieces: list[Box]) -> TensorStorageMetadata:
    found = stored(size, pieces).state_dict_metadata["weight"]
    assert isinstance(found, TensorStorageMetadata)
    return found


def chunks(pieces: list[Box]) -> list[ChunkStorageMetadata]:
    return [ChunkStorageMetadata(torch.Size(at), torch.Size(long)) for at, long in pieces]


def told(items: list[ReadItem]) -> list[object]:
    """In one order, hints too, which no comparison of torch's looks at."""
    return sorted((repr(item) for item in items), key=str)


@given(
    size=st.lists(st.integers(1, 5), max_size=4).map(tuple),
    saved=st.lists(st.integers(0, 600), max_size=8),
    wanted=st.lists(st.integers(0, 600), max_size=8),
    part=st.integers(1, 9),
)
def test_it_finds_what_torch_finds(
    size: tuple[int, ...], saved: list[int], wanted: list[int], part: int
) -> None:
    kept, mine = tensor(size, cut(size, saved)), chunks(cut(size, wanted)[:part])
    assert told(read_plan.items("weight", kept, mine)) == told(torchs("weight", kept, mine))


def test_torch_still_compares_all_pieces_where_the_longest_axis_is_whole() -> None:
    """Else read_plan.py has no use any more."""
    pieces = [((layer, expert, 0), (1, 1, 64)) for layer, expert in product(range(6), range(8))]
    real = planner_helpers._check_shard_metadata_pair_overlap
    with mock.patch.object(planner_helpers, "_check_shard_metadata_pair_overlap", wraps=real) as compared:
        assert len(torchs("weight", tensor((6, 8, 64), pieces), chunks(pieces[:10]))) == 10
    assert compared.call_count == len(pieces) * 10
