"""Dropout of adapters' inputs, by a hash: what is dropped depends on no generator's state and no layout.

Whether an input is dropped depends on the token with all that stand before it, the projection's layer, the
feature and the step. So recomputation drops the same again, ranks of any layout drop the same, a beginning
that samples share is dropped alike whether it is computed once or for each, and a resumed run goes on alike.
Where Megatron forks its random-state tracker, nothing has to be kept here.

Sequence parallelism gives a layer its rank's tokens, tensor parallelism its rank's features: both know which.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from genac_megatron.models.packed_attention import TreeShape

_ATTRIBUTE = "genac_dropout"
PRIME = 0x100000001B3  # odd, so its powers never vanish mod 2^64
# Of mixes of 64 and of 32 bits (Steele et al. 2014, splitmix64; Wellons 2018, lowbias32), as signed numbers.
MIX_64 = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))
MIX_32 = ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32)))


def prefixes_of(tokens_T: Tensor, positions_T: Tensor, bounds: Tensor, tree: TreeShape | None) -> Tensor:
    """int64 [T]: a hash of each token of a pack with all that stand before it in its sequence.

    bounds: int [n + 1], where sequences, or a forest's chains, begin and end. positions_T: in the sequence,
    of a chain's those above it counted.
    """
    powers = torch.full((int(positions_T.max()) + 1,), PRIME, dtype=torch.int64)
    parts_T = _mixed_64(tokens_T + 1) * powers.cumprod(0)[positions_T]
    ends_T = parts_T.cumsum(0)
    before = (ends_T - parts_T)[bounds[:-1].long().clamp(max=len(tokens_T) - 1)]
    prefixes_T = ends_T - before.repeat_interleave(bounds.diff().long())
    for q, q_end, k, k_end in tree.cuts if tree is not None else ():
        prefixes_T[q:q_end] += parts_T[k:k_end].sum()
    return prefixes_T


def token_keys(prefixes_T: Tensor, step: int) -> Tensor:
    """int32 [T]: `prefixes_of` at an optimizer's step."""
    mixed_T = _mixed_64(prefixes_T + _mixed_64(torch.tensor(step + 1)).item())
    return (mixed_T & 0xFFFFFFFF).to(torch.int32)  # the lower half, as it is


def attach_keys(packed: PackedSeqParams, keys_T: Tensor) -> None:
    """Give `packed` its tokens' keys, for layers that drop."""
    setattr(packed, _ATTRIBUTE, keys_T)


def install(layer: Any, drops: list[Dropout]) -> None:
    """Let a layer's dropouts know the keys of the pack before every pass of it, recomputed ones too."""
    layer.register_forward_pre_hook(partial(_tell, drops), with_kwargs=True)


def _tell(drops: list[Dropout], _layer: Any, _args: Any, kwargs: Mapping[str, Any]) -> None:
    for drop in drops:
        drop.keys_T = getattr(kwargs.get("packed_seq_params"), _ATTRIBUTE, None)


class Dropout:
    """Of the input of one linear layer's adapters.

    probability: of an input to be dropped; those that stay are scaled by 1 / (1 - probability). salt: says
    which layer it is. first: this rank's first feature. share: (this rank's place, ranks) where each has a
    part of the tokens.
    """

    def __init__(self, probability: float, salt: str, first: int, share: tuple[int, int]) -> None:
        self.probability, self.first, self.share = probability, first, share
        self.salt = int.from_bytes(hashlib.sha256(salt.encode()).digest()[:4], "little") >> 1
        self.keys_T: Tensor | None = None  # of the pack that is computed

    def __call__(self, x: Tensor) -> Tensor:
        """[T, 1, features] with some of them 0."""
        if self.keys_T is None:
            raise RuntimeError(
                "an adapter's dropout was not told its tokens (models/dropout.py: attach_keys)"
            )
        place, ranks = self.share
        keys_T = self.keys_T.chunk(ranks)[place]
        features = torch.arange(self.first, self.first + x.size(-1), dtype=torch.int32, device=x.device)
        hashed_TF = _mixed_32(keys_T[:, None] ^ _mixed_32(features + self.salt))
        dropped_TF = (hashed_TF & 0x7FFFFFFF) < int(self.probability * (1 << 31))
        return x.masked_fill(dropped_TF.view(x.shape), 0.0) / (1.0 - self.probability)


def _mixed_64(x: Tensor) -> Tensor:
    for shift, factor in MIX_64:
        x = (x ^ (x >> shift & (1 << (64 - shift)) - 1)) * factor
    return x ^ (x >> 31 & (1 << 33) - 1)


def _mixed_32(x: Tensor) -> Tensor:
    for shift, factor in MIX_32:
        x = (x ^ (x >> shift & (1 << (32 - shift)) - 1)) * factor
    return x ^ (x >> 16 & (1 << 16) - 1)
