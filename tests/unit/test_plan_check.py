"""Torch's check of a checkpoint's pieces, and ours beside it."""

from __future__ import annotations

from itertools import pairwise, product
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan

from genac_megatron.models import build  # noqa: F401  (Megatron's hook before its first import)
from genac_megatron.platform import plan_check
from genac_megatron.platform.optimizer_shards import boxes

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset, size
PLANS = [SavePlan([]), SavePlan([])]
torchs = plan_check.REPLACED[0] if plan_check.REPLACED else default_planner._validate_global_plan


def stored(size: tuple[int, ...], pieces: list[Box]) -> Metadata:
    chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(long)) for at, long in pieces]
    kept = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(size), chunks)
    return Metadata({"weight": kept})


def cut(size: tuple[int, ...], places: list[int]) -> list[Box]:
    """A tensor in ranges of its elements, each in boxes: as an optimizer's states are stored."""
    count = 1
    for side in size:
        count *= side
    edges = [0, *sorted({place % count for place in places} - {0}), count]
    return [box for begin, end in pairwise(edges) for box in boxes(size, begin, end)]


@given(
    size=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    places=st.lists(st.integers(0, 600), max_size=8),
    wrong=st.sampled_from(["nothing", "doubled", "missing", "moved", "longer"]),
    which=st.integers(0, 99),
    axis=st.integers(0, 3),
)
def test_it_finds_what_torch_finds(
    size: tuple[int, ...], places: list[int], wrong: str, which: int, axis: int
) -> None:
    pieces = cut(size, places)
    (offset, length), axis = pieces[which % len(pieces)], axis % len(size)
    if wrong == "doubled":
        pieces.append((offset, length))
    elif wrong == "missing" and len(pieces) > 1:
        pieces.pop(which % len(pieces))
    elif wrong == "moved":
        moved = tuple(x - (k == axis) for k, x in enumerate(offset))
        pieces[which % len(pieces)] = (tuple(max(0, x) for x in moved), length)
    elif wrong == "longer":
        pieces[which % len(pieces)] = (offset, tuple(x + (k == axis) for k, x in enumerate(length)))
    theirs, ours = (check(PLANS, stored(size, pieces)) for check in (torchs, plan_check.faults))
    kinds = ("out of bounds", "overlapping", "invalid fill")
    assert [any(kind in text for text in ours) for kind in kinds] == [
        any(kind in text for text in theirs) for kind in kinds
    ]
    assert bool(ours) == bool(theirs)


def test_the_words_are_torchs() -> None:
    metadata = stored((4, 4), [((0, 0), (2, 4)), ((1, 0), (4, 4))])
    assert plan_check.faults(PLANS, metadata) == torchs(PLANS, metadata)


def test_torch_still_compares_all_pieces_where_the_longest_axis_is_whole() -> None:
    """Else plan_check.py has no use any more."""
    pieces = [((layer, expert, 0), (1, 1, 64)) for layer, expert in product(range(6), range(8))]
    real = default_planner._check_box_overlap
    with mock.patch.object(default_planner, "_check_box_overlap", wraps=real) as compared:
        assert torchs(PLANS, stored((6, 8, 64), pieces)) == []
    assert compared.call_count == len(pieces) * (len(pieces) - 1) // 2


@pytest.mark.parametrize("wrong", [False, True])
def test_a_large_mixture_of_experts_is_looked_through(wrong: bool) -> None:
    """24,064 pieces, of which torch would compare 290 million pairs."""
    grid = product(range(94), range(128), range(2))
    pieces: list[Box] = [((a, b, 1536 * c, 0), (1, 1, 1536, 4096)) for a, b, c in grid]
    if wrong:
        pieces[20_000] = pieces[20_001]
    found = plan_check.faults(PLANS, stored((94, 128, 3072, 4096), pieces))
    assert len(found) == wrong
    assert all("overlapping" in text for text in found)
