"""Packed attention in padded groups against each sequence by itself, gradients included."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from genac_megatron.errors import InputError
from genac_megatron.models.packed_attention import SHARE, SHORT, make_plan, packed_sdpa, sdpa


def one_by_one(q: Tensor, k: Tensor, v: Tensor, bounds: list[int]) -> Tensor:
    parts = []
    for a, b in pairwise(bounds):
        batch = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
        parts.append(sdpa(*batch, scale=None, dropout=0.0)[0].transpose(0, 1))
    return torch.cat(parts)


def to_bounds(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


@given(st.lists(st.integers(0, 90), min_size=1, max_size=12).filter(any), st.sampled_from([(1, 1), (4, 2)]))
@settings(max_examples=40)
def test_groups_give_what_single_sequences_give(lengths: list[int], heads: tuple[int, int]) -> None:
    bounds = to_bounds(lengths)
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(bounds[-1], h, 8, generator=g, dtype=torch.float64) for h in (heads[0], *[heads[1]] * 2)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    upstream = torch.randn(q.shape, generator=g, dtype=torch.float64)
    ours, alone = packed_sdpa(q, k, v, make_plan(bounds)), one_by_one(q, k, v, bounds)
    torch.testing.assert_close(ours, alone)
    grads = [torch.autograd.grad((x * upstream).sum(), inputs) for x in (ours, alone)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=60))
def test_padding_is_bounded_and_every_token_is_computed_once(lengths: list[int]) -> None:
    plan = make_plan(to_bounds(lengths))
    assert sum(group.count for group in plan.groups) == len(lengths)
    assert torch.equal(torch.cat([g.tokens for g in plan.groups]).sort().values, torch.arange(sum(lengths)))
    for group in plan.groups:
        real = group.tokens.numel()
        assert group.longest <= SHORT or real >= SHARE * group.count * group.longest
    assert torch.equal(plan.positions, torch.cat([torch.arange(n) for n in lengths]))


def test_sequences_that_do_not_cover_the_pack_are_refused() -> None:
    x = torch.randn(8, 1, 4)
    with pytest.raises(InputError, match="cu_seqlens end at 6 and the pack has 8"):
        packed_sdpa(x, x, x, make_plan([0, 6]))
