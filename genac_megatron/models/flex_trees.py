"""Attention over a pack of trees on any device: torch's FlexAttention, or merged calls, behind a layer's own.

Transformer Engine's attention has no mask for trees. So a layer's core attention gets a subclass
(`with_trees`) that takes packs of trees itself, and gives all others on. Which way it goes is
`training.tree_attention`: **flex**, FlexAttention with the blocks of the mask made from the tree, never from
[T, T]; **merged**, models/tree_kernels.py. Parameters and checkpoints are those of the layer's own attention.

On a GPU FlexAttention is compiled. On a CPU it has no backward pass: there the same mask, made dense, goes to
torch's SDPA, which is for tests. The mask, its blocks and the way through a role's model are one code for
both. Not run on a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from genac_megatron.errors import InputError
from genac_megatron.models.packed_attention import TreeShape, plan_of, tree_of
from genac_megatron.models.tree_kernels import HALF, Call, calls_of, merged_attention

How = Literal["flex", "merged"]
BLOCK = 128  # positions of a side of the mask's blocks
_MASK, _CALLS = "genac_flex_mask", "genac_calls"  # what is kept on a pack


@dataclass(frozen=True)
class Sight:
    """From where a key is seen, int32 [T] each: by positions itself to `own`, and `first` to `last`."""

    own: np.ndarray  # where its chain ends
    first: np.ndarray  # where the branches that leave its chain behind it begin
    last: np.ndarray  # and end

    def mask(self, device: torch.device | str) -> Any:
        """FlexAttention's mask: whether query q sees key k."""
        own, first, last = (torch.from_numpy(x).to(device) for x in (self.own, self.first, self.last))

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return ((k <= q) & (q < own[k])) | ((first[k] <= q) & (q < last[k]))

        return sees


def sight_of(tree: TreeShape) -> Sight:
    """The branches that see a key lie end to end (training/trees.py lays them out so)."""
    total = tree.bounds[-1]
    lengths = np.diff(tree.bounds)
    own = np.repeat(np.array(tree.bounds[1:]), lengths)
    first, last = np.full(total, total), np.zeros(total, dtype=np.int64)
    for a, b, c, d in tree.cuts:
        first[c:d] = np.minimum(first[c:d], a)
        last[c:d] = np.maximum(last[c:d], b)
    return Sight(*(x.astype(np.int32) for x in (own, first, last)))


def seen_pairs(tree: TreeShape, block: int = BLOCK) -> np.ndarray:
    """[B, B] int64: how many pairs of a query of a block of rows and a key of a block of columns are seen."""
    blocks = -(-tree.bounds[-1] // block)
    edges = np.arange(blocks + 1) * block
    found = np.zeros((blocks, blocks), dtype=np.int64)

    def overlap(a: int, b: int) -> np.ndarray:
        return np.clip(np.minimum(edges[1:], b) - np.maximum(edges[:-1], a), 0, None)

    for a, b in pairwise(tree.bounds):
        here = overlap(a, b)
        low, high = a // block, -(-b // block)
        part = here[low:high]
        found[low:high, low:high] += np.tril(np.outer(part, part), -1) + np.diag(part * (part + 1) // 2)
    for a, b, c, d in tree.cuts:
        rows, columns = slice(a // block, -(-b // block)), slice(c // block, -(-d // block))
        found[rows, columns] += np.outer(overlap(a, b)[rows], overlap(c, d)[columns])
    return found


def block_mask(tree: TreeShape, device: torch.device | str, block: int = BLOCK) -> BlockMask:
    """FlexAttention's mask of a pack: blocks of which all is seen, those of which some is."""
    pairs, total = seen_pairs(tree, block), tree.bounds[-1]
    whole = pairs == block * block
    some = (pairs > 0) & ~whole
    return BlockMask.from_kv_blocks(
        *_table(some, device),
        *_table(whole, device),
        BLOCK_SIZE=block,
        mask_mod=sight_of(tree).mask(device),
        seq_lengths=(total, total),
    )


def _table(which: np.ndarray, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """How many of the columns each row of blocks has, [1, 1, B], and which, these first: [1, 1, B, B]."""
    order = np.argsort(~which, axis=1, kind="stable")
    counts, columns = (
        torch.from_numpy(x.astype(np.int32))[None, None].to(device) for x in (which.sum(axis=1), order)
    )
    return counts, columns


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def flex_trees(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    """q: [T, heads, head_dim]; k, v: [T, kv_heads, head_dim], rotated. Returns [T, heads, head_dim]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    gqa = q.size(1) != k.size(1)
    if q.device.type == "cpu":
        dense = dense_mask(mask, q.size(2))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=dense, scale=scale, enable_gqa=gqa)
    else:
        out = _compiled()(q, k, v, block_mask=mask, scale=scale, enable_gqa=gqa)
    return out[0].transpose(0, 1)


def dense_mask(mask: BlockMask, total: int) -> Tensor:
    """[T, T] bool: whether query q sees key k."""
    at, none = torch.arange(total), torch.zeros((), dtype=torch.int64)
    seen: Tensor = mask.mask_mod(none, none, at[:, None], at[None])
    return seen


# --- in a layer ----------------------------------------------------------------------------------


def _kept(packed: Any, name: str, make: Any) -> Any:
    """What is made once of a pack."""
    found = getattr(packed, name, None)
    if found is None:
        found = make()
        setattr(packed, name, found)
    return found


def tree_core(
    q: Tensor, k: Tensor, v: Tensor, packed: Any, tree: TreeShape, how: How, scale: float | None
) -> Tensor:
    """Core attention of a pack of trees: q [T, heads, head_dim], not rotated -> [T, heads head_dim]."""
    plan = plan_of(packed, q.device)
    q, k = plan.rotate(q), plan.rotate(k)
    if how == "flex":
        mask: BlockMask = _kept(packed, _MASK, lambda: block_mask(tree, q.device))
        return flex_trees(q, k, v, mask, scale).flatten(1)
    if q.device.type != "cpu" and q.dtype not in HALF:
        raise InputError(
            f"merged calls take half precision, not {q.dtype}",
            where="training.tree_attention",
            way_out="set it to flex",
        )
    calls: list[Call] = _kept(packed, _CALLS, lambda: calls_of(tree, q.device))
    return merged_attention(q, k, v, calls, scale).flatten(1)


@functools.cache
def with_trees(base: type[nn.Module], how: How) -> type[nn.Module]:
    """A core attention's class that takes packs of trees itself."""

    class TreeAttention(base):  # type: ignore[valid-type, misc]
        def __init__(self, *args: Any, softmax_scale: float | None = None, **kwargs: Any) -> None:
            super().__init__(*args, softmax_scale=softmax_scale, **kwargs)
            self.tree_scale = softmax_scale

        def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            packed = kwargs.get("packed_seq_params")
            tree = tree_of(packed)
            if tree is None:
                return super().forward(query, key, value, *args, **kwargs)
            return tree_core(query, key, value, packed, tree, how, self.tree_scale)

    TreeAttention.__name__ = f"Tree{base.__name__}"
    return TreeAttention
