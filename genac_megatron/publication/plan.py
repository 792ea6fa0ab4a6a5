"""What a publication sends: which pipeline stage holds which tensors, in buckets of bounded size.

A plan is a pure function of shape and layout, computed once and equal on every rank; it knows nothing of
how bytes travel (transports do) nor of which role it serves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from genac_megatron.errors import InputError
from genac_megatron.models.blockwise import SCALE_BYTES, in_blocks, scale_name, scale_size
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

    @property
    def in_blocks(self) -> bool:
        """Whether it travels in FP8, where a bucket does."""
        return in_blocks(self.hf[0][0])

    def nbytes(self, width: int, fp8: bool) -> int:
        """Bytes that travel. width: of an element that is not in FP8."""
        if not (fp8 and self.in_blocks):
            return self.numel * width
        return self.numel + SCALE_BYTES * sum(math.prod(scale_size(size)) for _, size in self.hf)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its bucket's buffer; `start` counts bytes."""

    size: Size
    dtype: torch.dtype
    start: int


@dataclass(frozen=True)
class Bucket:
    """Items of one pipeline stage that travel together. fp8: weights in blocks, with their scales."""

    stage: int
    items: tuple[Item, ...]
    fp8: bool = False

    @property
    def numel(self) -> int:
        """Elements of its Hugging Face tensors, scales apart."""
        return sum(item.numel for item in self.items)

    def nbytes(self, width: int) -> int:
        """Bytes that travel. width: of an element that is not in FP8."""
        return sum(item.nbytes(width, self.fp8) for item in self.items)

    @property
    def tensors(self) -> tuple[tuple[str, Size], ...]:
        """Name and size of every tensor, in the order in which they travel.

        Of an FP8 bucket: scales, then what stays as it is, then weights, so that each begins at a multiple
        of its element's size without gaps, which SGLang's flat buckets do not have.
        """
        plain = tuple(pair for item in self.items if not (self.fp8 and item.in_blocks) for pair in item.hf)
        blocks = tuple(pair for item in self.items if self.fp8 and item.in_blocks for pair in item.hf)
        scales = tuple((scale_name(name), scale_size(size)) for name, size in blocks)
        return (*scales, *plain, *blocks)

    def dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        """Of every tensor. dtype: of those that are not in FP8."""
        blocks = sum(len(item.hf) for item in self.items if self.fp8 and item.in_blocks)
        plain = sum(len(item.hf) for item in self.items) - blocks
        return (torch.float32,) * blocks + (dtype,) * plain + (torch.float8_e4m3fn,) * blocks

    def places(self, dtype: torch.dtype) -> dict[str, Place]:
        """Where every tensor lies, by name, in the order in which they travel."""
        places: dict[str, Place] = {}
        at = 0
        for (name, size), its in zip(self.tensors, self.dtypes(dtype), strict=True):
            places[name] = Place(size, its, at)
            at += math.prod(size) * its.itemsize
        return places


def make_plan(
    shape: Shape,
    layout: Layout,
    bytes_per_element: int,
    bucket_bytes: int | None = None,
    *,
    fp8: bool = False,
) -> list[Bucket]:
    """Every tensor of the model once (a tied output layer not at all), bucket by bucket.

    fp8: projections in blocks of FP8 with their scales (models/blockwise.py). bucket_bytes: the most that a
    bucket holds; None: BUCKET_BYTES, or the largest parameter where that is more. Raises InputError where a
    parameter does not fit in the bucket that was asked for.
    """
    buckets: list[Bucket] = []
    if bucket_bytes is None:
        items = (item for stage in range(layout.pp) for item in _stage_items(shape, layout, stage))
        bucket_bytes = max(BUCKET_BYTES, *(item.nbytes(bytes_per_element, fp8) for item in items))
    for stage in range(layout.pp):
        pending: list[Item] = []
        size = 0
        for item in _stage_items(shape, layout, stage):
            bytes_ = item.nbytes(bytes_per_element, fp8)
            if bytes_ > bucket_bytes:
                names = " + ".join(name for name, _ in item.hf)  # fused ones travel together
                raise InputError(
                    f"{names} has {bytes_:,} bytes, a bucket {bucket_bytes:,}",
                    where="publication",
                    way_out="allow larger buckets",
                )
            if pending and size + bytes_ > bucket_bytes:
                buckets.append(Bucket(stage, tuple(pending), fp8))
                pending, size = [], 0
            pending.append(item)
            size += bytes_
        if pending:
            buckets.append(Bucket(stage, tuple(pending), fp8))
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
