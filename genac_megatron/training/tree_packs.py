"""A micro-batch whose samples' common beginnings are there once: the tensors of a forest (training/trees.py).

A row at a branch predicts the next token of several samples, and two samples may train the same token. So
what belongs to a trained token (label, loss mask, fields, log-probs) lies not at its row but at an edge: a
sample's edges follow each other, samples in the pack's order, and `rows_E` says which row predicts each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genac_megatron.errors import InputError
from genac_megatron.models.packed_attention import TreeShape
from genac_megatron.records import Sample
from genac_megatron.training.packing import Pack, Samples, check_positions, figures_of, pack_length
from genac_megatron.training.trees import Forest


def build_tree_pack(
    samples: Samples,
    indices: Sequence[int],
    forest: Forest,
    *,
    multiple: int = 1,
    pad_to: int | None = None,
    field_names: Sequence[str] = (),
) -> Pack:
    """`build_pack` of samples[i], i in indices, laid out as `forest` says.

    Per sample it gives what the flat pack gives: `unpack` reads both. Padding is a chain of its own.
    """
    for i in indices:
        check_positions(samples[i], i)
    length = pack_length(forest.size, multiple=multiple, pad_to=pad_to)
    tokens_T, positions_T = torch.zeros(length, dtype=torch.int64), torch.zeros(length, dtype=torch.int64)
    for chain in forest.chains:
        span = slice(chain.begin, chain.begin + chain.length)
        ids = samples[chain.sample].tokens[chain.first : chain.first + chain.length]
        tokens_T[span] = torch.tensor(ids, dtype=torch.int64)
        positions_T[span] = torch.arange(chain.first, chain.first + chain.length)
    spare = length - forest.size
    positions_T[forest.size :] = torch.arange(spare)
    begins = [*(chain.begin for chain in forest.chains), *([forest.size] if spare else []), length]
    firsts = [*(chain.first for chain in forest.chains), *([0] if spare else [])]
    trained = [samples[i] for i in indices]
    rows = [_rows(forest, samples[i], i) for i in indices]
    labels_E = _joined([s.tokens[begin:end] for s in trained for begin, end in s.ranges], torch.int64)
    members, at = [], 0
    for i in indices:
        members.append((i, at, samples[i].trained))
        at += samples[i].trained
    fields = {
        name: _joined([figures_of(samples[i], name, i) for i in indices], torch.float32)
        for name in field_names
    }
    return Pack(
        tokens_T=tokens_T,
        labels_T=labels_E,
        positions_T=positions_T,
        cu_seqlens=torch.tensor(begins, dtype=torch.int32),
        max_seqlen=max(forest.deepest, spare),
        loss_mask_T=torch.ones(len(labels_E), dtype=torch.bool),
        fields=fields,
        members=members,
        experts_TLK=_experts(samples, forest, length),
        rows_E=torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64),
        tree=TreeShape(tuple(begins), tuple(firsts), tuple(forest.cuts())),
        used=forest.size,
    )


def _rows(forest: Forest, sample: Sample, index: int) -> Tensor:
    """The row that predicts each trained token of a sample, int64."""
    rows = torch.from_numpy(forest.rows(index, sample.start - 1))
    if not sample.spans:
        return rows
    return torch.cat([rows[begin - sample.start : end - sample.start] for begin, end in sample.spans])


def _joined(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=dtype), *(torch.tensor(row, dtype=dtype) for row in rows)])


def _experts(samples: Samples, forest: Forest, length: int) -> Tensor | None:
    """The experts that engines chose, at each chain's rows; None where no sample has any."""
    experts_TLK: Tensor | None = None
    for chain in forest.chains:
        given = samples[chain.sample].experts
        if given is None:
            continue
        if len(given) != len(samples[chain.sample].tokens) - 1:
            raise InputError(
                f"experts of sample {chain.sample} are of {len(given)} tokens, not "
                f"{len(samples[chain.sample].tokens) - 1}",
                where="build_tree_pack",
            )
        if experts_TLK is None:
            experts_TLK = torch.full((length, *given.shape[1:]), -1, dtype=torch.int16)
        here = given[chain.first : chain.first + chain.length].astype("int16")
        experts_TLK[chain.begin : chain.begin + chain.length] = torch.from_numpy(here)
    return experts_TLK
