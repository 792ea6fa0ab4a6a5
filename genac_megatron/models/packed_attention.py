"""Causal attention over packed sequences on torch's SDPA, fast for many short sequences too.

A pack's sequences are sorted by length and put in groups of like length. A group is gathered into a padded
batch [n, heads, longest, head_dim] and takes one causal SDPA call: right padding needs no mask, for a causal
query never sees a later key. All index tensors, and the rotary tables, are made once per pack and kept on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from genac_megatron.errors import InputError

# A group takes sequences down to this share of its longest, so that padding costs at most (1 / 0.7)^2 - 1 in
# attention scores, and any below SHORT tokens, where a call costs more than the padding.
SHARE, SHORT = 0.7, 48
_ATTRIBUTE = "genac_plan"


@dataclass
class _Group:
    """Sequences computed as one padded batch."""

    count: int
    longest: int
    gather: Tensor  # int64 [count * longest]: which pack position each slot reads; padding reads any
    slots: Tensor  # int64 [tokens]: which slot each real token is in ...
    tokens: Tensor  # int64 [tokens]: ... and its pack position


@dataclass
class PackPlan:
    """How a pack of T positions is computed."""

    groups: list[_Group]
    order: Tensor  # int64 [T]: where each pack position lies in the groups' tokens, one after the other
    positions: Tensor  # int64 [T]: position in its own sequence
    rope: tuple[Tensor, Tensor] | None = None  # cos, sin: fp32 [T, 1, head_dim]
    freqs: Tensor | None = None  # what they were made from

    def rotate(self, x_Thd: Tensor) -> Tensor:
        """Rotary embedding of queries or keys [T, heads, head_dim] (halves rotated, as Hugging Face does)."""
        if self.rope is None:
            return x_Thd
        cos, sin = (table.to(x_Thd.dtype) for table in self.rope)
        first, second = x_Thd.chunk(2, dim=-1)
        return x_Thd * cos + torch.cat((-second, first), dim=-1) * sin

    def set_rope(self, freqs: Tensor) -> None:
        """Keep the tables for angles freqs [longest, 1, 1, head_dim] (radians)."""
        if self.freqs is not freqs:
            self.freqs = freqs
            angles = freqs[:, 0].index_select(0, self.positions)
            self.rope = angles.cos(), angles.sin()


def plan_of(pack: PackedSeqParams, device: torch.device) -> PackPlan:
    """The plan of a pack, made at the first call and kept on `pack`."""
    plan = getattr(pack, _ATTRIBUTE, None)
    if plan is None:
        padded = pack.cu_seqlens_q_padded
        bounds = (pack.cu_seqlens_q if padded is None else padded).tolist()
        plan = make_plan(bounds, device)
        setattr(pack, _ATTRIBUTE, plan)
    return plan


def make_plan(bounds: Sequence[int], device: torch.device | str = "cpu") -> PackPlan:
    """The plan of sequences [bounds[i], bounds[i + 1])."""
    spans = sorted((b - a, a) for a, b in pairwise(bounds) if b > a)
    groups: list[_Group] = []
    while spans:
        longest = spans[-1][0]
        floor = 1 if longest <= SHORT else longest * SHARE
        members = []
        while spans and spans[-1][0] >= floor:
            members.append(spans.pop())
        groups.append(_group(members, longest))
    order = torch.empty(bounds[-1], dtype=torch.int64)
    order[torch.cat([g.tokens for g in groups])] = torch.arange(bounds[-1])
    starts = torch.tensor(bounds[:-1]).repeat_interleave(torch.tensor(bounds).diff())
    plan = PackPlan(groups, order.to(device), (torch.arange(bounds[-1]) - starts).to(device))
    for g in groups:
        g.gather, g.slots, g.tokens = (x.to(device) for x in (g.gather, g.slots, g.tokens))
    return plan


def _group(members: Sequence[tuple[int, int]], longest: int) -> _Group:
    """members: (length, start), the longest first."""
    lengths, starts = (torch.tensor(x)[:, None] for x in zip(*members, strict=True))
    column = torch.arange(longest)[None]
    real = column < lengths
    gather = starts + torch.where(real, column, 0)
    slots = real.flatten().nonzero().flatten()
    return _Group(len(members), longest, gather.flatten(), slots, gather[real])


class _Pad(torch.autograd.Function):
    """x [T, ...] -> its padded batch [slots, ...]. Padding has no gradient, so backward copies, not sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: _Group) -> Tensor:
        ctx.group, ctx.size = group, x.shape
        return x.index_select(0, group.gather)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        whole = grad.new_zeros(ctx.size)
        return whole.index_copy_(0, ctx.group.tokens, grad.index_select(0, ctx.group.slots)), None


class _Unpad(torch.autograd.Function):
    """Padded batches [slots, ...] of all groups -> the pack [T, ...]."""

    @staticmethod
    def forward(ctx: Any, plan: PackPlan, *padded: Tensor) -> Tensor:
        ctx.plan = plan
        real = [x.index_select(0, g.slots) for x, g in zip(padded, plan.groups, strict=True)]
        return torch.cat(real).index_select(0, plan.order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = []
        for g in ctx.plan.groups:
            padded = grad.new_zeros(g.count * g.longest, *grad.shape[1:])
            grads.append(padded.index_copy_(0, g.slots, grad.index_select(0, g.tokens)))
        return None, *grads


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, dropout: float) -> Tensor:
    """Causal attention on [b, heads, s, head_dim]; k and v may have fewer heads (GQA)."""
    return F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=q.size(1) != k.size(1)
    )


def packed_sdpa(
    q: Tensor, k: Tensor, v: Tensor, plan: PackPlan, *, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Causal attention within each sequence of a pack.

    q: [T, heads, head_dim]; k, v: [T, kv_heads, head_dim]. Returns [T, heads, head_dim]. Queries and keys are
    rotated first where the plan has rotary tables. Raises InputError where the sequences do not cover it all.
    """
    if q.size(0) != plan.positions.size(0):
        raise InputError(
            f"cu_seqlens end at {plan.positions.size(0)} and the pack has {q.size(0)} positions",
            where="packed attention",
            way_out="make the padding tail a sequence of its own",
        )
    q, k = plan.rotate(q), plan.rotate(k)
    outputs = []
    for g in plan.groups:
        batch = [_Pad.apply(x, g).unflatten(0, (g.count, g.longest)).transpose(1, 2) for x in (q, k, v)]
        outputs.append(sdpa(*batch, scale=scale, dropout=dropout).transpose(1, 2).flatten(0, 1))
    result: Tensor = _Unpad.apply(plan, *outputs)
    return result
