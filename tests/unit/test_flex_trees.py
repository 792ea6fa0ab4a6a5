"""Attention over trees in a GPU's ways, on a CPU: masks, calls, and results beside the packed attention's."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from genac_megatron.models.flex_trees import block_mask, flex_trees, seen_pairs, sight_of
from genac_megatron.models.packed_attention import TreeShape, make_tree_plan, packed_sdpa
from genac_megatron.models.tree_kernels import calls_of, levels, merged_attention
from genac_megatron.records import Sample
from tests.unit.test_trees import batches, seen, tree_pack

# fp32: other orders of sums, relative to values of about 1.
FP32 = 2e-6


def shape_in(samples: list[Sample], multiple: int = 1) -> tuple[TreeShape, Tensor]:
    pack = tree_pack(samples, multiple=multiple)
    assert pack.tree is not None
    return pack.tree, seen(pack)


@given(batches(), st.integers(1, 5), st.sampled_from([1, 3, 4, 128]))
def test_a_mask_lets_each_token_see_its_path_alone(samples: list[Sample], multiple: int, block: int) -> None:
    tree, wanted = shape_in(samples, multiple)
    total = len(wanted)
    q, k = torch.arange(total)[:, None], torch.arange(total)[None]
    none = torch.zeros((), dtype=torch.int64)
    assert torch.equal(sight_of(tree).mask("cpu")(none, none, q, k), wanted)
    blocks = -(-total // block)
    padded = torch.zeros(blocks * block, blocks * block, dtype=torch.int64)
    padded[:total, :total] = wanted
    counts = padded.view(blocks, block, blocks, block).sum(dim=(1, 3))
    assert torch.equal(torch.from_numpy(seen_pairs(tree, block)), counts)


@given(batches(), st.sampled_from([2, 4]))
@settings(max_examples=30, deadline=None)
def test_blocks_are_left_out_where_nothing_is_seen(samples: list[Sample], block: int) -> None:
    tree, _ = shape_in(samples)
    pairs = torch.from_numpy(seen_pairs(tree, block))
    mask = block_mask(tree, "cpu", block)
    assert torch.equal(mask.to_dense()[0, 0].bool(), pairs > 0)
    assert int(mask.full_kv_num_blocks.sum()) == int((pairs == block * block).sum())


@given(batches())
def test_a_levels_branches_are_apart(samples: list[Sample]) -> None:
    tree, _ = shape_in(samples)
    made = levels(tree.cuts)
    assert sorted(itertools.chain.from_iterable(made)) == sorted(tree.cuts)
    for level in made:
        for (a, b, _, _), (c, d, _, _) in itertools.combinations(level, 2):
            assert b <= c or d <= a
    deepest = max((sum(a <= t < b for a, b, _, _ in tree.cuts) for t in range(tree.bounds[-1])), default=0)
    assert len(made) == deepest, "no more calls than a path has branching points above it"


def drawn(total: int, heads: int, kv_heads: int, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(total, n, 8).requires_grad_() for n in (heads, kv_heads, kv_heads)]


def with_gradients(attend: Any, inputs: list[Tensor]) -> list[Tensor]:
    out = attend(*inputs)
    return [
        out.detach(),
        *torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), inputs),
    ]


@pytest.mark.parametrize("how", ["flex", "merged"])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@settings(max_examples=12, deadline=None)
@given(batches(), st.integers(0, 99))
def test_results_are_the_packed_attentions(
    how: str, heads: tuple[int, int], samples: list[Sample], seed: int
) -> None:
    tree, _ = shape_in(samples, 3)
    inputs = drawn(tree.bounds[-1], *heads, seed)
    if how == "flex":
        mask = block_mask(tree, "cpu")
        found = with_gradients(lambda q, k, v: flex_trees(q, k, v, mask, 0.4), inputs)
    else:
        calls = calls_of(tree, "cpu")
        found = with_gradients(lambda q, k, v: merged_attention(q, k, v, calls, 0.4), inputs)
    plan = make_tree_plan(tree)
    wanted = with_gradients(lambda q, k, v: packed_sdpa(q, k, v, plan, scale=0.4), inputs)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=FP32 * 10, rtol=FP32)


def test_a_long_tree_has_whole_blocks_and_the_same_results() -> None:
    """Blocks of 128: a trunk that three branches see, one of which branches again."""
    rng = random.Random(3)
    trunk = [rng.randrange(90) for _ in range(300)]
    middle = [rng.randrange(90) for _ in range(140)]
    rows = [[*trunk, *(rng.randrange(90) for _ in range(n))] for n in (150, 170)]
    rows += [[*trunk[:260], *middle, *(rng.randrange(90) for _ in range(n))] for n in (40, 60)]
    samples = [Sample(ids, len(ids) - 1, {"advantages": [1.0]}) for ids in rows]
    tree, _ = shape_in(samples)
    mask = block_mask(tree, "cpu")
    assert int(mask.full_kv_num_blocks.sum()) > 2
    assert len(calls_of(tree, "cpu")) == 3
    inputs = drawn(tree.bounds[-1], 2, 2, 5)
    plan = make_tree_plan(tree)
    wanted = with_gradients(lambda q, k, v: packed_sdpa(q, k, v, plan), inputs)
    for found in (
        with_gradients(lambda q, k, v: flex_trees(q, k, v, mask, None), inputs),
        with_gradients(lambda q, k, v: merged_attention(q, k, v, calls_of(tree, "cpu"), None), inputs),
    ):
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-5)
    with torch.no_grad():  # on a CPU FlexAttention itself has a forward pass alone
        q, k, v = (x.detach().transpose(0, 1)[None] for x in inputs)
        itself = flex_attention(q, k, v, block_mask=mask)[0].transpose(0, 1)
    torch.testing.assert_close(itself, wanted[0], atol=1e-5, rtol=1e-5)
