"""What a publication sends: which pipeline stage holds which tensors, in buckets of bounded size.

A plan is a pure function of shape and layout, computed once and equal on every rank; it knows nothing of
how bytes travel (transports do) nor of which role it serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from genac_megatron.errors import InputError
from genac_megatron.models.families.base import Rule, Shape
from genac_megatron.models.mapping import hf_size, local_size
from genac_megatron.models.registry import rules
from genac_megatron.training.layout import Layout

BUCKET_BYTES = 512 << 20


@dataclass(frozen=True)
class Item:
    """One Megatron parameter: where it is, and the Hugging Face tensors made of it."""

    rule: Rule
    layer: int | None  # global
    chunk: int  # index among the stage's model chunks
    local: int | None  # layer index in the chunk
    shard_size: torch.Size  # on each tensor-parallel rank
    hf: tuple[tuple[str, torch.Size], ...]

    @property
    def shard_numel(self) -> int:
        return self.shard_size.numel()

    @property
    def numel(self) -> int:
        """Elements of its Hugging Face tensors together."""
        return sum(size.numel() for _, size in self.hf)


@dataclass(frozen=True)
class Bucket:
    """Items of one pipeline stage that travel together."""

    stage: int
    items: tuple[Item, ...]

    @property
    def numel(self) -> int:
        return sum(item.numel for item in self.items)


def make_plan(shape: Shape, layout: Layout, bytes_per_element: int, bucket_bytes: int = BUCKET_BYTES) -> list[Bucket]:
    """Every tensor of the model once (a tied output layer not at all), bucket by bucket.

    Raises InputError where a single tensor does not fit in a bucket.
    """
    buckets: list[Bucket] = []
    for stage in range(layout.pp):
        pending: list[Item] = []
        size = 0
        for item in _stage_items(shape, layout, stage):
            bytes_ = item.numel * bytes_per_element
            if bytes_ > bucket_bytes:
                raise InputError(
                    f"{item.hf[0][0]} has {bytes_ / 2**20:.0f} MiB, a bucket {bucket_bytes / 2**20:.0f} MiB",
                    where="publication",
                    way_out="allow larger buckets",
                )
            if pending and size + bytes_ > bucket_bytes:
                buckets.append(Bucket(stage, tuple(pending)))
                pending, size = [], 0
            pending.append(item)
            size += bytes_
        if pending:
            buckets.append(Bucket(stage, tuple(pending)))
    return buckets


def _stage_items(shape: Shape, layout: Layout, stage: int) -> Iterator[Item]:
    first, last = stage == 0, stage == layout.pp - 1
    for chunk in range(layout.vpp):
        for local, layer in enumerate(layout.chunk_layers(shape.layers, stage, chunk)):
            for rule in rules(shape):
                if rule.per_layer:
                    yield _item(shape, layout, rule, layer, chunk, local)
    for rule in rules(shape):
        if rule.per_layer:
            continue
        room = rule.name.split(".")[0]
        if room == "embedding" and first:
            yield _item(shape, layout, rule, None, 0, None)
        elif room == "decoder" and last:
            yield _item(shape, layout, rule, None, layout.vpp - 1, None)
        elif room == "output_layer" and last and not shape.tie:
            yield _item(shape, layout, rule, None, layout.vpp - 1, None)


def _item(
    shape: Shape, layout: Layout, rule: Rule, layer: int | None, chunk: int, local: int | None
) -> Item:
    names = rule.hf_names(layer)
    sizes = tuple((name, hf_size(name, shape)) for name in names)
    return Item(rule, layer, chunk, local, local_size(rule, shape, layout.tp), sizes)
