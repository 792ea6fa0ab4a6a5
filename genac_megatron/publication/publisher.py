"""Bring a role's weights from any training layout to everything that needs them whole.

Per bucket: the owning pipeline stage gathers its tensor-parallel shards on its first rank, which joins
them to Hugging Face tensors and broadcasts one flat buffer to the world; every sink there loads it.
This is the in-process transport; the plan it follows is apart from it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from genac_megatron import platform
from genac_megatron.dtypes import DTYPES
from genac_megatron.models.mapping import load_hf_into, param_rules, unshard
from genac_megatron.publication.plan import Bucket, Item, make_plan
from genac_megatron.training.layout import Coords
from genac_megatron.training.role import Role

Named = tuple[str, Tensor]


class Sink(Protocol):
    """Whatever takes a full set of Hugging Face tensors under a version: an engine, another role."""

    def load_weights(self, version: int, tensors: Iterable[Named], *, final: bool = True) -> None: ...


class Publisher:
    """A role's weights to the sinks of this rank. Collective over the world."""

    def __init__(self, role: Role, sinks: Sequence[Sink], bucket_bytes: int | None = None) -> None:
        self.role, self.sinks = role, list(sinks)
        self.dtype = DTYPES[role.config.training.dtype]
        self.plan = make_plan(role.shape, role.layout, self.dtype.itemsize, bucket_bytes)
        self._parameters: dict[tuple[int, str, int | None], Tensor] = {}
        for index, model in enumerate(role.models if role.active else []):
            stage = role.groups.pp.rank()
            offset = role.layout.chunk_layers(role.shape.layers, stage, index).start
            for found in param_rules(model, offset, role.shape):
                self._parameters[index, found.rule.name, found.layer] = found.parameter

    def publish(self, version: int) -> dict[str, float]:
        """Load the current weights into every sink as `version`; bytes sent and seconds."""
        began = time.perf_counter()
        sent = 0
        for index, bucket in enumerate(self.plan):
            tensors = self.bucket(bucket)
            sent += bucket.numel * self.dtype.itemsize
            for sink in self.sinks:
                sink.load_weights(version, tensors, final=index == len(self.plan) - 1)
        return {"bytes": float(sent), "seconds": time.perf_counter() - began}

    @torch.no_grad()
    def bucket(self, bucket: Bucket) -> list[Named]:
        """The bucket's Hugging Face tensors, on every rank."""
        layout = self.role.layout
        source = layout.rank_of(Coords(0, 0, 0, bucket.stage))
        mine = layout.contains(dist.get_rank()) and layout.coords(dist.get_rank())
        flat = torch.empty(0)
        if mine and mine.pp == bucket.stage and mine.dp == 0 and mine.cp == 0:
            flat = self._joined(bucket)
        if dist.get_world_size() > 1:
            if dist.get_rank() != source:
                flat = torch.empty(bucket.numel, dtype=self.dtype, device=platform.device())
            dist.broadcast(flat, src=source)
        return list(_named(bucket, flat))

    def _joined(self, bucket: Bucket) -> Tensor:
        """On the stage's first rank: the bucket's tensors as one flat buffer, in the plan's order."""
        tp = self.role.layout.tp
        local = torch.cat([self._shard(item).detach().reshape(-1) for item in bucket.items])
        parts = [local]
        if tp > 1:
            first = self.role.groups.tp.rank() == 0
            parts = [torch.empty_like(local) for _ in range(tp)] if first else []
            dist.gather(local, parts if first else None, group=self.role.groups.tp, group_dst=0)
            if not first:
                return torch.empty(0)
        pieces: list[Tensor] = []
        at = 0
        for item in bucket.items:
            shards = [part[at : at + item.shard_numel].view(item.shard_size) for part in parts]
            at += item.shard_numel
            whole = unshard(item.rule, shards, self.role.shape, item.layer)
            pieces += [whole[name].reshape(-1) for name, _ in item.hf]
        return torch.cat(pieces)

    def _shard(self, item: Item) -> Tensor:
        return self._parameters[item.chunk, item.rule.name, item.layer]


def _named(bucket: Bucket, flat: Tensor) -> Iterator[Named]:
    at = 0
    for item in bucket.items:
        for name, size in item.hf:
            count = math.prod(size)
            yield name, flat[at : at + count].view(size)
            at += count


class RoleSink:
    """Loads published tensors into another role of the same shape: a start from a copy."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self._held: dict[str, Tensor] = {}

    def load_weights(self, version: int, tensors: Iterable[Named], *, final: bool = True) -> None:
        """Hold the tensors until the set is whole, then cut this rank's slices from them."""
        if not self.role.active:
            self.role.serial += int(final)
            return
        self._held |= {name: tensor.clone() for name, tensor in tensors}
        if final:
            role = self.role
            load_hf_into(role.models, role.layout, role.shape, self._held.__getitem__)
            role.refresh_master()
            self._held = {}
