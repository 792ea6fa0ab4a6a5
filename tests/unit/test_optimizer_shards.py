"""A range of a parameter's elements as boxes, and what a parameter is stored as."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron.platform.megatron import install

install()

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory  # noqa: E402
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory  # noqa: E402

from genac_megatron.platform.optimizer_shards import boxes, pieces, shards  # noqa: E402

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


@given(SHAPES, st.data())
def test_boxes_are_the_range_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    tensor = torch.arange(numel).view(shape)
    found = list(boxes(shape, start, stop))
    cut = [tensor[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))].flatten() for box in found]
    assert torch.equal(torch.cat(cut) if cut else torch.arange(0), torch.arange(start, stop))
    assert len(found) <= max(2 * len(shape) - 1, 1)


@given(st.integers(1, 40), st.integers(1, 8), st.integers(2, 9))
def test_shares_of_all_ranks_cover_a_tensor_once(rows: int, columns: int, ranks: int) -> None:
    """A data-parallel cut at any element, as of a padded buffer."""
    held = torch.zeros(rows, columns)
    each = math.ceil(rows * columns / ranks)
    for rank in range(ranks):
        for offset, size in boxes((rows, columns), rank * each, min((rank + 1) * each, rows * columns)):
            held[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))] += 1
    assert bool((held == 1).all())


def stored(
    rows: int, columns: int, layer: int = 0, layers: int = 1, tp: int = 0, tps: int = 1
) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(
        "actor.w", torch.arange(rows * columns, dtype=torch.float32).view(rows, columns),
        (0, layer, layers), (1, tp, tps), replica_id=(0, 0, 3), prepend_axis_num=1,
    )  # fmt: skip


def test_shards_lie_where_the_parameter_is_stored() -> None:
    """The second of three layers, the second tensor-parallel half; elements 3 to 16 of 5 rows of 4."""
    flat = torch.arange(3.0, 17.0)
    found = shards(stored(5, 4, 1, 3, 1, 2), "optimizer.state.exp_avg", flat, 3)
    assert [(one.global_offset, one.local_shape) for one in found] == [
        ((1, 5, 3), (1, 1, 1)),
        ((1, 6, 0), (1, 3, 4)),
        ((1, 9, 0), (1, 1, 1)),
    ]
    assert {one.key for one in found} == {"optimizer.state.exp_avg.actor.w"}
    assert {one.global_shape for one in found} == {(3, 10, 4)}
    assert {one.replica_id for one in found} == {(0, 0, 0)}, "each rank's share is its own"
    assert not any(one.has_regular_grid for one in found)
    assert torch.equal(torch.cat([one.data.flatten() for one in found]), flat)
    found[1].data.zero_()
    assert flat[1:13].eq(0).all(), "what is loaded into a box is in the state"


def test_gate_and_up_lie_apart_in_what_is_stored() -> None:
    """Of the first of two tensor-parallel ranks: the other's gate rows are stored between its two halves."""
    factory = apply_swiglu_sharded_factory(stored(6, 2, 0, 1, 0, 2), ((0, 0, 1),))
    assert isinstance(factory, ShardedTensorFactory)
    halves = [(begin, piece.global_offset) for begin, piece in pieces(factory)]
    assert halves == [(0, (0, 0, 0)), (6, (0, 6, 0))]
    found = shards(factory, "s", torch.arange(3.0, 9.0), 3)
    assert [(one.global_offset, one.data.flatten().tolist()) for one in found] == [
        ((0, 1, 1), [3.0]),
        ((0, 2, 0), [4.0, 5.0]),
        ((0, 6, 0), [6.0, 7.0]),
        ((0, 7, 0), [8.0]),
    ]


def test_no_element_of_a_parameter_is_nothing() -> None:
    assert shards(stored(5, 4), "s", torch.empty(0), 7) == []


@pytest.mark.parametrize("how", ["turned", "copied", "tail", "head"])
def test_a_parameter_that_is_stored_otherwise_is_refused_by_name(how: str) -> None:
    """Silently it would be stored in the wrong places."""

    def build(key: str, tensor: torch.Tensor, replica: object, flattened: object) -> list[ShardedTensor]:
        others = {"turned": tensor.t(), "copied": tensor.clone(), "tail": tensor[1:], "head": tensor[:1]}
        made = others[how]
        return [ShardedTensor.from_rank_offsets(key, made, replica_id=replica)]

    factory = ShardedTensorFactory("actor.odd", torch.zeros(4, 3), build, torch.cat, (0, 0, 0))
    with pytest.raises(NotImplementedError, match=r"actor\.odd"):
        pieces(factory)


def test_a_replica_without_a_data_parallel_place_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"actor\.w"):
        shards(replace(stored(2, 2), replica_id=1), "s", torch.zeros(4), 0)
