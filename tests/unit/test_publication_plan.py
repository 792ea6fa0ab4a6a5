"""A plan sends every tensor once, from the stage that has it, in buckets that are full but not too full."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron.errors import InputError
from genac_megatron.models.families.base import Shape
from genac_megatron.models.registry import FAMILIES, family
from genac_megatron.models.sizes import hf_names, padded_vocab
from genac_megatron.publication.plan import BUCKET_BYTES, Item, make_plan
from genac_megatron.training.layout import Layout

TINY = Shape(
    family="qwen3", layers=2, hidden=12, ffn=8, heads=4, kv_heads=2, head_dim=6, vocab=23, tie=False,
    rope_theta=1e4, norm_eps=1e-6, max_positions=64, init_std=0.02, qk_norm=True,
)  # fmt: skip


@st.composite
def shaped_layouts(draw: st.DrawFn) -> tuple[Shape, Layout]:
    """A shape of any family, and a layout that can cut it."""
    tp, pp, dp = (draw(st.integers(1, 3)) for _ in range(3))
    vpp = draw(st.integers(1, 3)) if pp > 1 else 1
    kv_heads = tp * draw(st.integers(1, 2))
    name = draw(st.sampled_from(sorted(FAMILIES)))
    shape = dataclasses.replace(
        TINY,
        family=name,
        layers=pp * vpp * draw(st.integers(1, 2)),
        hidden=draw(st.integers(1, 9)),
        ffn=tp * draw(st.integers(1, 4)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 3)),
        vocab=draw(st.integers(1, 30)),
        tie=draw(st.booleans()),
        qk_norm=family(name).qk_norm,
        qkv_bias=family(name).qkv_bias,
    )
    first = draw(st.integers(0, 3))
    return shape, Layout("role", first, tp * pp * dp, tp=tp, pp=pp, vpp=vpp)


def items_of(shape: Shape, layout: Layout) -> list[tuple[int, Item]]:
    return [(bucket.stage, item) for bucket in make_plan(shape, layout, 2) for item in bucket.items]


@given(shaped_layouts(), st.sampled_from([2, 4]), st.floats(1.0, 5.0))
def test_every_tensor_once_in_bounded_buckets(made: tuple[Shape, Layout], width: int, slack: float) -> None:
    shape, layout = made
    largest = max(item.numel for _, item in items_of(shape, layout)) * width
    bound = int(largest * slack)
    plan = make_plan(shape, layout, width, bound)
    sent = [pair for bucket in plan for item in bucket.items for pair in item.hf]
    assert Counter(name for name, _ in sent) == Counter(hf_names(shape).keys())
    assert dict(sent) == hf_names(shape)
    assert ("lm_head.weight" in dict(sent)) is not shape.tie
    assert all(0 < bucket.numel * width <= bound for bucket in plan)
    assert [bucket.stage for bucket in plan] == sorted(bucket.stage for bucket in plan)
    for bucket, following in pairwise(plan):  # no bucket is cut short
        if bucket.stage == following.stage:
            assert (bucket.numel + following.items[0].numel) * width > bound


@given(shaped_layouts())
def test_a_tensor_comes_from_the_stage_that_has_it(made: tuple[Shape, Layout]) -> None:
    shape, layout = made
    for stage, item in items_of(shape, layout):
        if item.layer is not None:
            assert item.local is not None
            assert layout.chunk_layers(shape.layers, stage, item.chunk)[item.local] == item.layer
            assert all(f".layers.{item.layer}." in name for name, _ in item.hf)
        elif item.rule.name.startswith("embedding"):
            assert (stage, item.chunk) == (0, 0)
        else:  # the final norm and the output layer
            assert (stage, item.chunk) == (layout.pp - 1, layout.vpp - 1)


@given(shaped_layouts())
def test_shards_make_up_the_tensors(made: tuple[Shape, Layout]) -> None:
    """A cut parameter's shards hold its tensors and the vocabulary's padding, no more."""
    shape, layout = made
    for _, item in items_of(shape, layout):
        padding = (padded_vocab(shape, layout.tp) - shape.vocab) * shape.hidden if item.rule.padded else 0
        copies = layout.tp if item.rule.tp_axis is not None else 1
        assert item.shard_numel * copies == item.numel + padding


@given(shaped_layouts())
def test_a_parameter_that_does_not_fit_is_named(made: tuple[Shape, Layout]) -> None:
    shape, layout = made
    items = [item for _, item in items_of(shape, layout)]
    largest = max(item.numel for item in items)
    names = [" + ".join(n for n, _ in item.hf) for item in items if item.numel == largest]
    with pytest.raises(InputError) as caught:
        make_plan(shape, layout, 2, 2 * largest - 1)
    assert any(name in str(caught.value) for name in names)


def test_by_default_the_largest_parameter_fits() -> None:
    """An embedding of 152k rows has more than the usual bucket; it goes alone, the rest as usual."""
    shape = dataclasses.replace(
        TINY, layers=8, hidden=3584, ffn=18944, heads=28, kv_heads=4, head_dim=128, vocab=152_064
    )
    plan = make_plan(shape, Layout("role", 0, 8, tp=4, pp=2), 2)
    embedding = 152_064 * 3584 * 2
    assert embedding > BUCKET_BYTES
    assert max(bucket.numel * 2 for bucket in plan) == embedding
    small = dataclasses.replace(shape, vocab=1000)
    assert max(b.numel * 2 for b in make_plan(small, Layout("role", 0, 8, tp=4, pp=2), 2)) <= BUCKET_BYTES
