"""Sequences packed without a gap into micro-batches: the tensors, and the way back.

A sample of n tokens takes n - 1 positions: inputs tokens[:-1], labels tokens[1:]. Position j of a
sample predicts its token j + 1, so everything that belongs to token t (loss mask, advantages, the
engine's log-probs, the log-probs read back) lies at position t - 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from genac_megatron.errors import InputError
from genac_megatron.models.context_parallel import share_of
from genac_megatron.models.packed_attention import TreeShape
from genac_megatron.records import Sample
from genac_megatron.training.plans import Row, round_up

Samples = Sequence[Sample] | Mapping[int, Sample]  # by their places in a batch

# How many rows an FP8 matrix needs a multiple of (Transformer Engine: 16 for a scale per tensor, a
# whole block for a scale per block).
_FP8_ROWS = {"off": 1, "delayed": 16, "tensorwise": 16, "mxfp8": 32, "blockwise": 128}
_FP8_BLOCKS = ("mxfp8", "blockwise")


def multiple_for(tp: int, cp: int, fp8: bool | str, *, sequence_parallel: bool | None = None) -> int:
    """What a pack's length must be a multiple of.

    Each context-parallel rank holds an even share (two half-chunks), which sequence parallelism
    splits over tp ranks and FP8 needs in whole rows. fp8 is the recipe's word, or whether it is on.
    A scale per block is taken before sequence parallelism gathers, so there each tp shard alone is
    made of whole blocks. sequence_parallel None: on where tp > 1.
    """
    word = fp8 if isinstance(fp8, str) else ("delayed" if fp8 else "off")
    if word not in _FP8_ROWS:
        raise InputError(f"fp8 {word!r} is none of {', '.join(_FP8_ROWS)}", where="multiple_for")
    shards = tp if (tp > 1 if sequence_parallel is None else sequence_parallel) else 1
    rows = shards * _FP8_ROWS[word] if word in _FP8_BLOCKS else math.lcm(shards, _FP8_ROWS[word])
    return cp * math.lcm(rows, 2 if cp > 1 else 1)


def sample_multiple_for(cp: int) -> int:
    """What each sample's span must be a multiple of: context parallelism cuts it in 2 cp chunks."""
    return 2 * cp if cp > 1 else 1


def pack_length(used: int, *, multiple: int = 1, pad_to: int | None = None) -> int:
    """Positions of a pack that holds `used` ones: at least pad_to and 1, a multiple of `multiple`."""
    return round_up(max(used, pad_to or 0, 1), multiple)


@dataclass(frozen=True)
class PackingStats:
    """How well a plan fills its packs."""

    microbatches: int  # on each rank
    tokens: int  # positions that belong to samples
    slots: int  # positions computed
    waste: float  # share of slots that is padding
    rank_imbalance: float  # fullest rank's slots over the mean rank's, less 1
    microbatch_imbalance: float  # longest pack's slots over the mean pack's, less 1


def packing_stats(
    lengths: Sequence[int],
    plan: Sequence[Row],
    *,
    multiple: int = 1,
    pad_to: int | None = None,
    sample_multiple: int = 1,
) -> PackingStats:
    """Padding waste and imbalance of `plan`, its packs built with the same arguments as here."""
    slots = [
        [
            pack_length(
                sum(round_up(lengths[i], sample_multiple) for i in pack), multiple=multiple, pad_to=pad_to
            )
            for pack in row
        ]
        for row in plan
    ]
    tokens = sum(lengths[i] for row in plan for pack in row for i in pack)
    total = sum(map(sum, slots))
    packs = sum(map(len, slots))
    return PackingStats(
        microbatches=len(slots[0]),
        tokens=tokens,
        slots=total,
        waste=1 - tokens / total,
        rank_imbalance=max(map(sum, slots)) * len(slots) / total - 1,
        microbatch_imbalance=max(map(max, slots)) * packs / total - 1,
    )


# --- the tensors ---------------------------------------------------------------------------------


@dataclass
class Pack:
    """One micro-batch of T positions. Sequences lie end to end; the tail is padding.

    A pack of trees (training/tree_packs.py) has `tree` and `rows_E`: its sequences are chains, and labels,
    loss mask and fields are of E edges, one per sample and trained token, in place of the T positions.
    """

    tokens_T: Tensor  # int64
    labels_T: Tensor  # int64: the next token; 0 on padding
    positions_T: Tensor  # int64: from 0 in each sequence
    cu_seqlens: Tensor  # int32 [n + 1]: where sequences begin and end, the padding tail's included
    max_seqlen: int  # of the longest sequence, the padding tail included
    loss_mask_T: Tensor  # bool: positions whose label carries loss
    fields: dict[str, Tensor]  # fp32 [T] each; 0 where loss_mask_T is False
    # (sample index, its first loss position, trained tokens), of each of a sample's spans
    members: list[tuple[int, int, int]]
    experts_TLK: Tensor | None = None  # int16, to be replayed; -1 where a router is to choose
    rows_E: Tensor | None = None  # int64: the position that predicts each edge's label
    tree: TreeShape | None = None
    used: int = 0  # positions that are no padding
    prefixes_T: Tensor | None = None  # int64: of each token with those before it, for adapters that drop
    share: Tensor | None = None  # int64: which positions of the pack are here, one cp rank's; None: all

    def cut(self, cp: int, rank: int) -> Pack:
        """What context-parallel rank `rank` holds of a flat pack; cu_seqlens and members stay the whole's."""
        if cp == 1:
            return self
        share = share_of(self.cu_seqlens.tolist(), cp, rank)
        names = ("tokens_T", "labels_T", "positions_T", "loss_mask_T", "experts_TLK", "prefixes_T")
        cut: dict[str, Any] = {
            name: x.index_select(0, share) for name in names if (x := getattr(self, name)) is not None
        }
        fields = {name: x_T.index_select(0, share) for name, x_T in self.fields.items()}
        return replace(self, **cut, fields=fields, share=share)

    def to(self, device: torch.device | str) -> Pack:
        """The same pack with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved, fields={name: x_T.to(device) for name, x_T in self.fields.items()})


def build_pack(
    samples: Samples,
    indices: Sequence[int],
    *,
    multiple: int = 1,
    pad_to: int | None = None,
    field_names: Sequence[str] = (),
    sample_multiple: int = 1,
) -> Pack:
    """Lay samples[i], i in indices, end to end in one pack of pack_length(...) positions.

    A span is filled up to sample_multiple with padding of its own, which causal attention keeps
    from the sample; the tail that fills the pack is a sequence of its own. Padding has token and
    label 0, no loss, fields 0. `fields` holds field_names, of samples' figures for trained tokens.
    No indices: all padding. Tensors are on the CPU. Raises InputError for a sample that is too
    short, whose start is not in 1..n, whose spans are not in order, or whose field is missing or not one
    figure per trained token.
    """
    spans = [round_up(check_positions(samples[i], i), sample_multiple) for i in indices]
    used = sum(spans)
    length = pack_length(used, multiple=multiple, pad_to=pad_to)
    bounds = [0]
    for span in [*spans, length - used] if length > used else spans:
        bounds.append(bounds[-1] + span)

    tokens_T, labels_T, positions_T = (torch.zeros(length, dtype=torch.int64) for _ in range(3))
    loss_mask_T = torch.zeros(length, dtype=torch.bool)
    fields = {name: torch.zeros(length) for name in field_names}
    members: list[tuple[int, int, int]] = []
    for i, begin in zip(indices, bounds, strict=False):
        sample = samples[i]
        ids = torch.tensor(sample.tokens, dtype=torch.int64)
        tokens_T[begin : begin + len(ids) - 1] = ids[:-1]
        labels_T[begin : begin + len(ids) - 1] = ids[1:]
        figures = {name: torch.tensor(figures_of(sample, name, i)) for name in fields}
        done = 0
        for first, end in sample.ranges:
            loss = slice(begin + first - 1, begin + end - 1)
            loss_mask_T[loss] = True
            for name, field_T in fields.items():
                field_T[loss] = figures[name][done : done + end - first]
            members.append((i, loss.start, end - first))
            done += end - first
    for begin, end in pairwise(bounds):
        positions_T[begin:end] = torch.arange(end - begin)
    return Pack(
        tokens_T=tokens_T,
        labels_T=labels_T,
        positions_T=positions_T,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=max(b - a for a, b in pairwise(bounds)),
        loss_mask_T=loss_mask_T,
        fields=fields,
        members=members,
        experts_TLK=_experts(samples, indices, bounds),
        used=sum(len(samples[i].tokens) - 1 for i in indices),
    )


def _experts(samples: Samples, indices: Sequence[int], bounds: Sequence[int]) -> Tensor | None:
    """The experts that engines chose, at their positions; None where no sample has any."""
    experts_TLK: Tensor | None = None
    for i, begin in zip(indices, bounds, strict=False):
        given = samples[i].experts
        if given is None:
            continue
        if experts_TLK is None:
            experts_TLK = torch.full((bounds[-1], *given.shape[1:]), -1, dtype=torch.int16)
        wanted = (len(samples[i].tokens) - 1, *experts_TLK.shape[1:])
        if given.shape != wanted:
            raise InputError(
                f"experts of sample {i} have shape {given.shape}, not {wanted}", where="build_pack"
            )
        experts_TLK[begin : begin + wanted[0]] = torch.from_numpy(given.astype("int16"))
    return experts_TLK


def check_positions(sample: Sample, index: int) -> int:
    """Input positions of a sample. Raises InputError where it cannot be laid out."""
    n = len(sample.tokens)
    if n < 2 or not 1 <= sample.start <= n:
        raise InputError(
            f"sample {index} has {n} tokens and start {sample.start}",
            where="build_pack",
            way_out="a sample has at least 2 tokens, and its first is never predicted: 1 <= start <= n",
        )
    edges = [sample.start, *(edge for span in sample.ranges for edge in span), n]
    if edges[0] != edges[1] or any(a > b for a, b in pairwise(edges)):
        raise InputError(
            f"sample {index} has spans {list(sample.spans)}, start {sample.start} and {n} tokens",
            where="build_pack",
            way_out="spans are ranges of tokens in order that do not overlap, the first from start on",
        )
    return n - 1


def figures_of(sample: Sample, name: str, index: int) -> Sequence[float]:
    """A sample's field `name`. Raises InputError where it is not one figure per trained token."""
    figures = sample.fields.get(name)
    if figures is None or len(figures) != sample.trained:
        found = "is missing" if figures is None else f"has {len(figures)} figures"
        raise InputError(
            f"field {name!r} of sample {index} {found}, where {sample.trained} tokens are trained",
            where="build_pack",
        )
    return figures


def unpack(pack: Pack, values_T: Tensor) -> dict[int, Tensor]:
    """Per sample index, the values [trained] of its trained tokens, in order. Views of values_T, unless a
    sample has several spans there.

    values_T: of the whole pack's positions, or of its trees' edges.
    """
    count = len(pack.labels_T) if pack.share is None else int(pack.cu_seqlens[-1])
    if values_T.shape != (count,):
        raise InputError(
            f"values of shape {tuple(values_T.shape)} for a pack of {count} positions",
            where="unpack",
        )
    found: dict[int, list[Tensor]] = {}
    for index, first, count in pack.members:
        found.setdefault(index, []).append(values_T[first : first + count])
    return {index: parts[0] if len(parts) == 1 else torch.cat(parts) for index, parts in found.items()}
