"""From a role's adapter shards to PEFT's tensors, whole, in one flat buffer on the role's first rank.

The work of the first data-parallel replica. Of a pipeline stage each tensor-parallel rank sends what it holds
of cut parameters to the stage's first rank in one piece; that one joins them and sends its part to the role's
first rank. An adapter is small: there are no buckets, and no more bytes move than it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from genac_megatron import platform
from genac_megatron.models.adapters import LowRank
from genac_megatron.models.peft import peft_names, peft_sizes
from genac_megatron.models.sizes import Size
from genac_megatron.publication.fleet import wire_dtype
from genac_megatron.publication.groups import group_of
from genac_megatron.training.layout import Coords
from genac_megatron.training.role import Role

Sized = tuple[str, Size]


class AdapterJoiner:
    """Joins a role's adapters. `tensors`: names and sizes, in the order in which they lie in the buffer."""

    def __init__(self, role: Role) -> None:
        adapter = role.config.training.adapter
        assert adapter is not None
        self.role, self.dtype = role, wire_dtype(role)
        layout = role.layout
        self._stages: list[list[Sized]] = []
        for stage in range(layout.pp):
            chunks = (layout.chunk_layers(role.shape.layers, stage, chunk) for chunk in range(layout.vpp))
            layers = [layer for chunk in chunks for layer in chunk]
            self._stages.append(list(peft_sizes(role.shape, adapter, layers)))
        self.tensors = [sized for stage in self._stages for sized in stage]
        self.numel = numel(self.tensors)
        self._sources = [layout.rank_of(Coords(0, 0, 0, stage)) for stage in range(layout.pp)]
        self._parts: list[LowRank] = [p for m in role.models if m.adapters for p in m.adapters.parts]
        self._room: list[Tensor] = []

    @property
    def first(self) -> int:
        """The global rank that has them in the end."""
        return self._sources[0]

    def connect(self) -> None:
        """The groups that stages send over. Collective over the world."""
        for source in self._sources[1:]:
            group_of([self.first, source])

    def reserve(self) -> None:
        """This rank's memory, before anybody waits for it."""
        rank, tp = dist.get_rank(), self.role.layout.tp
        if not self._takes_part():
            return
        self.role.wake()
        mine = sum(part.numel() for part in self._cut())
        device = platform.device()
        count = tp if tp > 1 and rank in self._sources else 0
        held = self._parts[0].A.dtype
        self._room = [torch.empty(mine, dtype=held, device=device) for _ in range(count)]

    @torch.no_grad()
    def join(self) -> Tensor | None:
        """[numel] in the dtype that travels, on the role's first rank; None elsewhere. Collective over those
        that hold a part.
        """
        rank = dist.get_rank()
        if not self._takes_part():
            return None
        shards = self._gathered()
        self._room = []
        if shards is None:
            return None
        flat = self._joined(shards)
        if rank != self.first:
            dist.broadcast(flat.view(torch.uint8), src=rank, group=group_of([self.first, rank]))
            return None
        parts = [flat]
        for stage, source in enumerate(self._sources[1:], start=1):
            part = torch.empty(numel(self._stages[stage]), dtype=self.dtype, device=flat.device)
            dist.broadcast(part.view(torch.uint8), src=source, group=group_of([self.first, source]))
            parts.append(part)
        return torch.cat(parts) if len(parts) > 1 else flat

    def _takes_part(self) -> bool:
        layout, rank = self.role.layout, dist.get_rank()
        if not layout.contains(rank):
            return False
        mine = layout.coords(rank)
        return mine.dp == 0 and mine.cp == 0

    def _cut(self) -> Iterator[Tensor]:
        """This rank's parts of what tensor parallelism cuts."""
        for part in self._parts:
            yield from part.B if part.place.column else [part.A]

    def _gathered(self) -> list[Tensor] | None:
        """What every tensor-parallel rank holds of cut parameters, one after the other, on the first."""
        mine = torch.cat([tensor.detach().reshape(-1) for tensor in self._cut()])
        group = self.role.groups.tp
        if group.size() == 1:
            return [mine]
        dist.gather(mine, self._room or None, group=group, group_dst=0)
        return self._room or None

    def _joined(self, shards: Sequence[Tensor]) -> Tensor:
        """A stage's tensors in PEFT's order."""
        flat = torch.empty(numel(self._here()), dtype=self.dtype, device=shards[0].device)
        places = views(flat, self._here())
        at = 0

        def whole(held: Tensor, axis: int) -> Tensor:
            nonlocal at
            end = at + held.numel()
            pieces = [shard[at:end].view(held.shape) for shard in shards]
            at = end
            return torch.cat(pieces, dim=axis)

        for part in self._parts:
            column = part.place.column
            a = part.A.detach() if column else whole(part.A, 1)
            for name, piece, held in zip(part.place.projections, a.split(part.rank), part.B, strict=True):
                b = whole(held, 0) if column else held.detach()
                for key, tensor in zip(peft_names(name), (piece, b), strict=True):
                    places[key].copy_(tensor)
        return flat

    def _here(self) -> list[Sized]:
        return self._stages[self.role.layout.coords(dist.get_rank()).pp]


def numel(tensors: Sequence[Sized]) -> int:
    """Elements of all of them."""
    return sum(math.prod(size) for _, size in tensors)


def views(flat: Tensor, tensors: Sequence[Sized]) -> dict[str, Tensor]:
    """The tensors in a flat buffer, by name."""
    found, at = {}, 0
    for name, size in tensors:
        count = math.prod(size)
        found[name] = flat[at : at + count].view(size)
        at += count
    return found
