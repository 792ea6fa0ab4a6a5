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
from torch.autograd.function import once_differentiable

from genac_megatron.errors import InputError

# A group takes sequences down to this share of its longest, so that padding costs at most (1 / 0.7)^2 - 1 in
# attention scores, and any below SHORT tokens, where a call costs more than the padding.
SHARE, SHORT = 0.7, 48
# Of a pack of trees, those above LONG down to this share: a group's responses are about as long as each
# other, but the one that the prompt lies with is longer.
TREE_SHARE, LONG = 0.97, 256
_ATTRIBUTE, _TREE, _ROWS = "genac_plan", "genac_tree", "genac_rows"
Cut = tuple[int, int, int, int]


@dataclass(frozen=True)
class TreeShape:
    """How the sequences of a pack of trees hang together. A flat pack has no cuts."""

    bounds: tuple[int, ...]  # chain i is positions [bounds[i], bounds[i + 1])
    firsts: tuple[int, ...]  # how many tokens are above chain i on its path
    cuts: tuple[Cut, ...]  # (q, q end, k, k end): positions [q, q end) also see all of [k, k end)


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
    cuts: tuple[Cut, ...] = ()  # of a pack of trees

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
        tree = getattr(pack, _TREE, None)
        padded = pack.cu_seqlens_q_padded
        if tree is not None:
            plan = make_tree_plan(tree, device)
        else:
            plan = make_plan((pack.cu_seqlens_q if padded is None else padded).tolist(), device)
        setattr(pack, _ATTRIBUTE, plan)
    return plan


def attach_tree(pack: PackedSeqParams, tree: TreeShape | None, rows_E: Tensor | None) -> PackedSeqParams:
    """`pack` as one of trees, whose labels are predicted at positions rows_E; None: a flat pack."""
    if tree is not None:
        setattr(pack, _TREE, tree)
        setattr(pack, _ROWS, rows_E)
    return pack


def rows_of(pack: PackedSeqParams | None) -> Tensor | None:
    """Where the labels of a pack of trees are predicted, [E]; None: each at its own position."""
    return getattr(pack, _ROWS, None)


def tree_of(pack: PackedSeqParams | None) -> TreeShape | None:
    """How a pack of trees hangs together; None: a flat one."""
    return getattr(pack, _TREE, None)


def make_tree_plan(tree: TreeShape, device: torch.device | str = "cpu") -> PackPlan:
    """The plan of chains that see the tokens above them too."""
    plan = make_plan(tree.bounds, device, TREE_SHARE)
    lengths = torch.tensor(tree.bounds).diff()
    above = torch.tensor(tree.firsts).repeat_interleave(lengths)
    plan.positions, plan.cuts = plan.positions + above.to(device), tree.cuts
    return plan


def make_plan(
    bounds: Sequence[int], device: torch.device | str = "cpu", share_of_long: float = SHARE
) -> PackPlan:
    """The plan of sequences [bounds[i], bounds[i + 1]). share_of_long: in the place of SHARE above LONG."""
    spans = sorted((b - a, a) for a, b in pairwise(bounds) if b > a)
    groups: list[_Group] = []
    while spans:
        longest = spans[-1][0]
        floor = 1 if longest <= SHORT else longest * (share_of_long if longest > LONG else SHARE)
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
    """Causal attention within each sequence of a pack; of a pack of trees along each path.

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
    if plan.cuts:
        return tree_attention(q, k, v, plan, scale=scale, dropout=dropout)
    outputs = []
    for g in plan.groups:
        batch = [_Pad.apply(x, g).unflatten(0, (g.count, g.longest)).transpose(1, 2) for x in (q, k, v)]
        outputs.append(sdpa(*batch, scale=scale, dropout=dropout).transpose(1, 2).flatten(0, 1))
    result: Tensor = _Unpad.apply(plan, *outputs)
    return result


# --- trees ---------------------------------------------------------------------------------------

# torch's attention on a CPU with the log-sum-exp that merging needs, and its backward pass.
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_NEVER = 1e30  # a log-sum-exp that makes a padding row's probabilities 0


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: PackPlan, *, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Attention of each token to those above it on its path and, causally, to its own chain.

    Shapes as in `packed_sdpa`, queries and keys already rotated. Each chain by itself takes the flat pack's
    padded groups; each cut is one call without a mask; both are merged by their log-sum-exps. With merged
    outputs and log-sum-exps the backward pass of each call is its part of the whole gradient. On a CPU alone.
    Raises InputError where dropout is on.
    """
    if dropout:
        raise InputError(f"dropout {dropout} in a pack of trees", where="packed attention")
    result: Tensor = _TreeAttention.apply(q, k, v, plan, scale)
    return result


def _heads_first(x: Tensor) -> Tensor:
    """[n, heads, d] -> [1, heads, n, d], a view."""
    return x.transpose(0, 1)[None]


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: PackPlan, scale: float | None) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out_Thd, lse_Th = q.new_empty(q.shape, dtype=wide), q.new_empty(q.shape[:2], dtype=wide)
        for g in plan.groups:
            batch = [x.index_select(0, g.gather).unflatten(0, (g.count, g.longest)) for x in (q, k, v)]
            out, lse = _forward(*(x.transpose(1, 2) for x in batch), 0.0, True, scale=scale)
            own = out.transpose(1, 2).flatten(0, 1).index_select(0, g.slots)
            out_Thd.index_copy_(0, g.tokens, own.to(wide))
            lse_Th.index_copy_(0, g.tokens, lse.transpose(1, 2).flatten(0, 1).index_select(0, g.slots))
        for a, b, c, d in plan.cuts:
            out, lse = _forward(*(_heads_first(x) for x in (q[a:b], k[c:d], v[c:d])), 0.0, False, scale=scale)
            _merge(out_Thd[a:b], lse_Th[a:b], out[0].transpose(0, 1), lse[0].T)
        out_Thd = out_Thd.to(q.dtype)
        ctx.save_for_backward(q, k, v, out_Thd, lse_Th)
        ctx.plan, ctx.scale = plan, scale
        return out_Thd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse_Th = ctx.saved_tensors
        wide = lse_Th.dtype
        grads = [torch.zeros_like(x, dtype=wide) for x in (q, k, v)]
        for g in ctx.plan.groups:
            shape = (g.count, g.longest)
            batch = [x.index_select(0, g.gather).unflatten(0, shape) for x in (q, k, v, out)]
            padded = grad.new_zeros(len(g.gather), *grad.shape[1:])
            padded.index_copy_(0, g.slots, grad.index_select(0, g.tokens))
            lse = lse_Th.new_full((len(g.gather), lse_Th.size(1)), _NEVER)
            lse.index_copy_(0, g.slots, lse_Th.index_select(0, g.tokens))
            parts = _backward(
                padded.unflatten(0, shape).transpose(1, 2),
                *(x.transpose(1, 2) for x in batch),
                lse.unflatten(0, shape).transpose(1, 2),
                0.0,
                True,
                scale=ctx.scale,
            )
            for whole, part in zip(grads, parts, strict=True):
                own = part.transpose(1, 2).flatten(0, 1).index_select(0, g.slots)
                whole.index_add_(0, g.tokens, own.to(wide))
        for a, b, c, d in ctx.plan.cuts:
            ranges = (slice(a, b), slice(c, d), slice(c, d))
            parts = _backward(
                _heads_first(grad[a:b]),
                *(_heads_first(x[r]) for x, r in zip((q, k, v), ranges, strict=True)),
                _heads_first(out[a:b]),
                lse_Th[a:b].T[None],
                0.0,
                False,
                scale=ctx.scale,
            )
            for whole, part, r in zip(grads, parts, ranges, strict=True):
                whole[r] += part[0].transpose(0, 1)
        return *(x.to(q.dtype) for x in grads), None, None


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Two attentions of the same queries over apart keys become one, in place: out [n, h, d], lse [n, h]."""
    both = torch.logaddexp(lse, more_lse)
    out.mul_((lse - both).exp_()[..., None]).addcmul_(more.to(out.dtype), (more_lse - both).exp_()[..., None])
    lse.copy_(both)
