"""What a publication sends: which pipeline stage holds which tensors, in buckets of bounded size.

A plan is a pure function of shape and layout, computed once and equal on every rank; it knows nothing of
how bytes travel (transports do) nor of which role it serves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from genac_megatron.errors import InputError
from genac_megatron.models.families.base import Rule, Shape
from genac_megatron.models.registry import rules
from genac_megatron.models.sizes import Size, hf_size, local_size
from genac_megatron.training.layout import Layout

BUCKET_BYTES = 512 << 20  # unless a single tensor is larger: an embedding may be


@dataclass(frozen=True)
class Item:
    """One Megatron parameter: where it is, and the Hugging Face tensors made of it."""

    rule: Rule
    layer: int | None  # global
    chunk: int  # index among the stage's model chunks
    local: int | None  # layer index in the chunk
    shard_size: Size  # on each tensor-parallel rank
    hf: tuple[tuple[str, Size], ...]

    @property
    def shard_numel(self) -> int:
        return math.prod(self.shard_size)

    @property
    def numel(self) -> int:
        """Elements of its Hugging Face tensors together."""
        return sum(math.prod(size) for _, size in self.hf)


@dataclass(frozen=True)
class Bucket:
    """Items of one pipeline stage that travel together."""

    stage: int
    items: tuple[Item, ...]

    @property
    def numel(self) -> int:
        return sum(item.numel for item in self.items)

    @property
    def tensors(self) -> tuple[tuple[str, Size], ...]:
        """Name and size of every Hugging Face tensor, in the order in which they travel."""
        return tuple(pair for item in self.items for pair in item.hf)


def make_plan(
    shape: Shape, layout: Layout, bytes_per_element: int, bucket_bytes: int | None = None
) -> list[Bucket]:
    """Every tensor of the model once (a tied output layer not at all), bucket by bucket.

    bucket_bytes: the most that a bucket holds; None: BUCKET_BYTES, or the largest parameter where that is
    more. Raises InputError where a parameter does not fit in the bucket that was asked for.
    """
    buckets: list[Bucket] = []
    if bucket_bytes is None:
        items = (item for stage in range(layout.pp) for item in _stage_items(shape, layout, stage))
        bucket_bytes = max(BUCKET_BYTES, *(item.numel * bytes_per_element for item in items))
    for stage in range(layout.pp):
        pending: list[Item] = []
        size = 0
        for item in _stage_items(shape, layout, stage):
            bytes_ = item.numel * bytes_per_element
            if bytes_ > bucket_bytes:
                names = " + ".join(name for name, _ in item.hf)  # fused ones travel together
                raise InputError(
                    f"{names} has {bytes_:,} bytes, a bucket {bucket_bytes:,}",
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
        if rule.room == "embedding" and first:
            yield _item(shape, layout, rule, None, 0, None)
        elif last and (rule.room == "decoder" or (rule.room == "output_layer" and not shape.tie)):
            yield _item(shape, layout, rule, None, layout.vpp - 1, None)


def _item(shape: Shape, layout: Layout, rule: Rule, layer: int | None, chunk: int, local: int | None) -> Item:
    names = rule.hf_names(layer)
    sizes = tuple((name, hf_size(name, shape)) for name in names)
    return Item(rule, layer, chunk, local, local_size(rule, shape, layout.tp), sizes)
