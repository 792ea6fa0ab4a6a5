"""Layouts: who is where, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron.errors import InputError
from genac_megatron.recipe.schema import LayoutConfig
from genac_megatron.training.layout import Coords, Layout

small = st.integers(1, 3)


@given(st.tuples(small, small, small, small), st.integers(0, 5))
def test_coordinates_and_ranks_are_inverse(sizes: tuple[int, int, int, int], first: int) -> None:
    tp, cp, dp, pp = sizes
    layout = Layout("role", first, tp * cp * dp * pp, tp=tp, cp=cp, pp=pp)
    assert layout.dp == dp
    at = [layout.coords(rank) for rank in layout.ranks]
    assert sorted(at, key=lambda c: (c.pp, c.dp, c.cp, c.tp)) == at  # tp fastest, then cp, dp, pp
    assert [layout.rank_of(c) for c in at] == list(layout.ranks)
    assert layout.leaders == [
        r for r in layout.ranks if layout.coords(r)[:2] == (0, 0) and layout.coords(r).pp == 0
    ]
    assert layout.coords(layout.output_rank) == Coords(0, 0, 0, pp - 1)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_chunks_cover_the_layers_in_the_order_of_the_pipeline(pp: int, vpp: int, each: int) -> None:
    layout = Layout("role", 0, pp, pp=pp, vpp=vpp if pp > 1 else 1)
    layers = pp * layout.vpp * each
    order = [layout.chunk_layers(layers, stage, chunk) for chunk in range(layout.vpp) for stage in range(pp)]
    assert [layer for chunk in order for layer in chunk] == list(range(layers))


def test_a_config_fills_the_world_from_its_first_rank() -> None:
    layout = Layout.from_config("role", LayoutConfig(first_rank=2, tp=2), 8)
    assert (layout.count, layout.dp, layout.sequence_parallel) == (6, 3, True)
    assert not layout.contains(1)
    assert layout.contains(2)
    assert not layout.contains(8)
    assert not Layout.from_config("role", LayoutConfig(tp=2, sequence_parallel=False), 2).sequence_parallel


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"count": 3, "tp": 2}, "3 ranks cannot be divided by tp 2"),
        ({"first_rank": 2, "count": 3}, "ranks 2 to 4 of a world of 4"),
        ({"first_rank": 4}, "ranks 4 to 3 of a world of 4"),
        ({"vpp": 2}, "vpp needs pp > 1"),
        ({"sequence_parallel": True}, "sequence_parallel needs tp > 1"),
        ({"ep": 3}, "ep 3 does not divide"),
    ],
)
def test_what_does_not_fit_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Layout.from_config("role", LayoutConfig(**config), 4)
