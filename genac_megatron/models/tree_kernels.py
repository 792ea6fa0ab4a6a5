"""Attention over a pack of trees as calls of a variable-length flash kernel, merged by log-sum-exp.

One causal call for all chains; then, level by level, one call without a mask for all branches of the level,
each to what it sees of the chains above. A level's branches are apart as queries, so a pack takes as many
calls as a path has branching points above it, and one. With merged outputs and log-sum-exps the backward pass
of each call is its part of the whole gradient.

The kernel is torch's own flash attention (`aten::_flash_attention_forward`, as torch.nn.attention.varlen
calls it; half precision alone): no further package. On a CPU the same calls are made of torch's kernel there,
sequence by sequence: that is for tests, models/packed_attention.py is faster. Not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from genac_megatron.models.packed_attention import Cut, TreeShape, _heads_first, _merge
from genac_megatron.models.packed_attention import _backward as _cpu_backward
from genac_megatron.models.packed_attention import _forward as _cpu_forward

HALF = (torch.float16, torch.bfloat16)  # what the flash kernel takes


@dataclass(frozen=True)
class Call:
    """A call of the kernel: sequence i has queries cu_q[i] to cu_q[i + 1], likewise keys."""

    cu_q: Tensor  # int32 [N + 1]
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool
    rows_q: Tensor | None = None  # int64: which positions of the pack the queries are; None: all, in order
    rows_k: Tensor | None = None


def calls_of(tree: TreeShape, device: torch.device | str) -> list[Call]:
    """The calls that a pack takes, the chains' own first."""
    bounds = _ints(tree.bounds, device)
    longest = max(b - a for a, b in pairwise(tree.bounds))
    own = Call(bounds, bounds, longest, longest, causal=True)
    return [own, *(_level(cuts, device) for cuts in levels(tree.cuts))]


def levels(cuts: Sequence[Cut]) -> list[list[Cut]]:
    """Cuts whose queries are apart, together: each as early as it can be."""
    made: list[list[Cut]] = []
    for cut in sorted(cuts):
        for level in made:
            if all(cut[1] <= a or b <= cut[0] for a, b, _, _ in level):
                level.append(cut)
                break
        else:
            made.append([cut])
    return made


def _level(cuts: Sequence[Cut], device: torch.device | str) -> Call:
    counts_q, counts_k = [b - a for a, b, _, _ in cuts], [d - c for _, _, c, d in cuts]
    rows_q = torch.cat([torch.arange(a, b) for a, b, _, _ in cuts]).to(device)
    rows_k = torch.cat([torch.arange(c, d) for _, _, c, d in cuts]).to(device)
    cu_q, cu_k = (_ints([0, *accumulate(counts)], device) for counts in (counts_q, counts_k))
    return Call(cu_q, cu_k, max(counts_q), max(counts_k), False, rows_q, rows_k)


def _ints(values: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def merged_attention(q: Tensor, k: Tensor, v: Tensor, calls: Sequence[Call], scale: float | None) -> Tensor:
    """Attention of each token to those above it on its path and, causally, to its own chain.

    q: [T, heads, head_dim]; k, v: [T, kv_heads, head_dim], rotated. Returns [T, heads, head_dim].
    """
    result: Tensor = _Merged.apply(q, k, v, calls, scale)
    return result


def _taken(x: Tensor, rows: Tensor | None) -> Tensor:
    return x.contiguous() if rows is None else x.index_select(0, rows)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, calls: Sequence[Call], scale: float | None
    ) -> Tensor:
        own, *above = calls
        out, lse_hT = _forward(q, k, v, own, scale)
        out_Thd, lse_Th = out.to(_wide(q)), lse_hT.T.to(_wide(q))
        for call in above:
            assert call.rows_q is not None
            out, lse_hQ = _forward(q, k, v, call, scale)
            part, lse = out_Thd.index_select(0, call.rows_q), lse_Th.index_select(0, call.rows_q)
            _merge(part, lse, out, lse_hQ.T.to(lse.dtype))
            out_Thd, lse_Th = (
                whole.index_copy(0, call.rows_q, new) for whole, new in ((out_Thd, part), (lse_Th, lse))
            )
        out_Thd = out_Thd.to(q.dtype)
        ctx.save_for_backward(q, k, v, out_Thd, lse_Th)
        ctx.calls, ctx.scale = calls, scale
        return out_Thd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse_Th = ctx.saved_tensors
        sums = [torch.zeros_like(x, dtype=_wide(x)) for x in (q, k, v)]
        for call in ctx.calls:
            parts = _backward(grad, q, k, v, out, lse_Th, call, ctx.scale)
            for whole, part, rows in zip(sums, parts, (call.rows_q, call.rows_k, call.rows_k), strict=True):
                if rows is None:
                    whole += part
                else:
                    whole.index_add_(0, rows, part.to(whole.dtype))
        return *(x.to(q.dtype) for x in sums), None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _forward(q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float | None) -> tuple[Tensor, Tensor]:
    """Output [Q, heads, d] and log-sum-exp [heads, Q] of one call."""
    q, k, v = _taken(q, call.rows_q), _taken(k, call.rows_k), _taken(v, call.rows_k)
    if q.device.type == "cpu":
        return _forward_on_cpu(q, k, v, call, scale)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, call.cu_q, call.cu_k, call.max_q, call.max_k, 0.0, call.causal, False, scale=scale
    )
    return out, lse


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse_Th: Tensor,
    call: Call,
    scale: float | None,
) -> Sequence[Tensor]:
    """The call's part of the gradients of its queries, keys and values. out, lse_Th: the merged ones."""
    grad, q, out = (_taken(x, call.rows_q) for x in (grad, q, out))
    k, v = _taken(k, call.rows_k), _taken(v, call.rows_k)
    lse = _taken(lse_Th, call.rows_q).T.contiguous()
    if q.device.type == "cpu":
        return _backward_on_cpu(grad, q, k, v, out, lse, call, scale)
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, of which there is none
    found: Sequence[Tensor] = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, call.cu_q, call.cu_k, call.max_q, call.max_k, 0.0, call.causal, unused,
        unused, scale=scale,
    )  # fmt: skip
    return found


# --- the same on a CPU ---------------------------------------------------------------------------


def _sequences(call: Call) -> list[tuple[slice, slice]]:
    ends = zip(pairwise(call.cu_q.tolist()), pairwise(call.cu_k.tolist()), strict=True)
    return [(slice(*of_q), slice(*of_k)) for of_q, of_k in ends]


def _forward_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float | None
) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for at_q, at_k in _sequences(call):
        each = (_heads_first(x) for x in (q[at_q], k[at_k], v[at_k]))
        out, lse = _cpu_forward(*each, 0.0, call.causal, scale=scale)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


def _backward_on_cpu(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call, scale: float | None
) -> list[Tensor]:
    found: tuple[list[Tensor], ...] = ([], [], [])
    for at_q, at_k in _sequences(call):
        each = (_heads_first(x) for x in (grad[at_q], q[at_q], k[at_k], v[at_k], out[at_q]))
        parts = _cpu_backward(*each, lse[None, :, at_q], 0.0, call.causal, scale=scale)
        for one, part in zip(found, parts, strict=True):
            one.append(part[0].transpose(0, 1))
    return [torch.cat(one) for one in found]
