"""Context parallelism over packed sequences: which positions a rank holds, and attention over all of them.

Each sequence of a pack is cut in 2 cp chunks, and rank r holds chunks r and 2 cp - 1 - r, so that causal
attention costs all ranks the same: Transformer Engine's cut of packed sequences, whose ring attention takes
it as it is. Torch's attention, on CPUs, swaps positions for heads (DeepSpeed-Ulysses, arXiv 2309.14509):
each rank has all positions of its share of the heads while it attends. Gathered keys and values, the other
way, would need a mask, and more memory than no context parallelism at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from genac_megatron.models.packed_attention import packed_sdpa, plan_of

_SHARES = "genac_shares"


def share_of(bounds: Sequence[int], cp: int, rank: int) -> Tensor:
    """Positions [T / cp] int64, ascending, of a pack of T that context-parallel rank `rank` holds.

    Sequence i is positions [bounds[i], bounds[i + 1]), a multiple of 2 cp of them.
    """
    parts = [torch.zeros(0, dtype=torch.int64)]
    for begin, end in pairwise(bounds):
        size = (end - begin) // (2 * cp)
        parts += [torch.arange(begin + c * size, begin + (c + 1) * size) for c in (rank, 2 * cp - 1 - rank)]
    return torch.cat(parts)


def _shares_of(packed: PackedSeqParams, cp: int, device: torch.device) -> Tensor:
    """[T] int64: the positions that the ranks hold, one rank after the other. Kept on the pack."""
    shares: Tensor | None = getattr(packed, _SHARES, None)
    if shares is None:
        bounds = packed.cu_seqlens_q.tolist()
        shares = torch.cat([share_of(bounds, cp, rank) for rank in range(cp)]).to(device)
        setattr(packed, _SHARES, shares)
    return shares


def whole_of(values_T: Tensor, share: Tensor | None, total: int, group: dist.ProcessGroup) -> Tensor:
    """A pack's values [total] from the parts that ranks hold; share None: values_T is the whole.

    Collective over the group where share is not None.
    """
    if share is None:
        return values_T
    whole = values_T.new_zeros(total).index_copy_(0, share, values_T)
    dist.all_reduce(whole, group=group)
    return whole


class _Exchange(torch.autograd.Function):
    """A rank's positions of all heads, [T / cp, heads, d], to all positions of its heads, or back.

    A permutation over the group, so the gradient goes the same way back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: Tensor, group: dist.ProcessGroup, whole: bool) -> Tensor:
        ctx.settings = shares, group, not whole
        cp = group.size()
        if whole:
            sent = x.unflatten(1, (cp, -1)).transpose(0, 1).contiguous()
        else:
            sent = x.index_select(0, shares).unflatten(0, (cp, -1))
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent, group=group)
        if not whole:
            return got.transpose(0, 1).flatten(1, 2)
        flat = got.flatten(0, 1)
        return torch.empty_like(flat).index_copy_(0, shares, flat)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Exchange.apply(grad, *ctx.settings), None, None, None


def exchanged_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: PackedSeqParams,
    group: dist.ProcessGroup,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`packed_sdpa` where each rank of a context-parallel group holds its share of the pack's positions.

    q: [T / cp, heads, head_dim]; k, v: [T / cp, kv_heads, head_dim]. Returns [T / cp, heads, head_dim].
    `packed` has the whole pack's cu_seqlens. heads is a multiple of cp; fewer key and value heads are
    repeated. Collective over the group.
    """
    cp = group.size()
    times = cp // math.gcd(k.size(1), cp)
    if times > 1:
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    shares = _shares_of(packed, cp, q.device)
    q, k, v = (_Exchange.apply(x, shares, group, True) for x in (q, k, v))
    whole = packed_sdpa(q, k, v, plan_of(packed, q.device), scale=scale, dropout=dropout)
    result: Tensor = _Exchange.apply(whole, shares, group, False)
    return result
