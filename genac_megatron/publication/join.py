"""From a role's parameter shards to whole Hugging Face tensors, one bucket at a time, in one flat buffer.

The work of a pipeline stage's first data-parallel replica: its tensor-parallel ranks send their shards to
its first rank, the bucket's source, which joins them straight into the buffer that will be sent. Experts on
other ranks come from the source's expert-parallel group, which may reach into other replicas.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from genac_megatron import platform
from genac_megatron.dtypes import DTYPES
from genac_megatron.models.blockwise import scale_name
from genac_megatron.models.mapping import param_rules, unshard
from genac_megatron.platform.fp8 import plain
from genac_megatron.publication.plan import Bucket, Item
from genac_megatron.publication.quantize import quantize
from genac_megatron.publication.transport import view_of
from genac_megatron.training.layout import Coords, Layout
from genac_megatron.training.role import Role


def source_of(bucket: Bucket, layout: Layout) -> int:
    """The global rank that joins and sends `bucket`: the first of its pipeline stage."""
    return layout.rank_of(Coords(0, 0, 0, bucket.stage))


class Joiner:
    """This rank's part in joining a role's buckets."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self._parameters: dict[tuple[int, str, int | None], Tensor] = {}
        for index, model in enumerate(role.models if role.active else []):
            offset = role.layout.chunk_layers(role.shape.layers, role.groups.pp.rank(), index).start
            for found in param_rules(model, offset, role.shape):
                self._parameters[index, found.rule.name, found.layer] = found.parameter
        self._dtype = DTYPES[role.config.training.dtype]

    def takes_part(self, bucket: Bucket) -> bool:
        """Whether this rank holds shards that the bucket is joined from."""
        rank, layout = dist.get_rank(), self.role.layout
        if not layout.contains(rank):
            return False
        mine = layout.coords(rank)
        first_replica = mine.dp == 0 and mine.cp == 0
        return mine.pp == bucket.stage and (first_replica or self._with_source(bucket))

    def _with_source(self, bucket: Bucket) -> bool:
        """Whether this rank is in the expert-parallel group of the bucket's source: ranks in a row."""
        return dist.get_rank() - source_of(bucket, self.role.layout) in range(self.role.layout.ep)

    @torch.no_grad()
    def join(self, bucket: Bucket, flat: Tensor | None, dtype: torch.dtype | None = None) -> None:
        """Write the bucket's tensors into `flat`, one after the other, in the plan's order.

        flat: [bucket.numel] in the dtype that travels, on the source; None on the stage's other ranks. Of an
        FP8 bucket: uint8 [bucket.nbytes], what is not in FP8 being in `dtype`. Collective over the ranks that
        take part.
        """
        self.role.wake()
        bytes_ = None if flat is None else flat.view(torch.uint8)
        places = bucket.places(dtype or (self._dtype if flat is None else flat.dtype))
        for item in bucket.items:
            expert = item.rule.expert is not None and self.role.layout.ep > 1
            shards = self._expert(item, bucket) if expert else self._gathered(item)
            if bytes_ is None:
                continue
            whole = unshard(item.rule, shards, self.role.shape, item.layer)
            for name, _ in item.hf:
                tensor, mine = whole.pop(name), view_of(bytes_, places[name])
                if bucket.fp8 and item.in_blocks:
                    quantize(tensor, mine, view_of(bytes_, places[scale_name(name)]))
                else:
                    mine.copy_(tensor)

    def _gathered(self, item: Item) -> list[Tensor]:
        """The shards of all tensor-parallel ranks in order, on the first; a replicated one is not sent."""
        mine = plain(self._parameters[item.chunk, item.rule.name, item.layer]).detach()
        at = self.role.layout.coords(dist.get_rank())
        if self.role.layout.tp == 1 or item.rule.tp_axis is None or at.dp > 0 or at.cp > 0:
            return [mine]
        group = self.role.groups.tp
        first = group.rank() == 0
        shards = [torch.empty_like(mine) for _ in range(group.size())] if first else None
        dist.gather(mine.contiguous(), shards, group=group, group_dst=0)
        return shards or []

    def _expert(self, item: Item, bucket: Bucket) -> list[Tensor]:
        """An expert's parameter, on the source; it is sent there by the rank of its group that holds it."""
        mine = self._parameters.get((item.chunk, item.rule.name, item.layer))
        mine = None if mine is None else plain(mine).detach()
        if not self._with_source(bucket):
            return []
        first = dist.get_rank() == source_of(bucket, self.role.layout)
        if first and mine is None:
            each = (self.role.shape.experts or 0) // self.role.layout.ep
            held = torch.empty(item.shard_size, dtype=self._dtype, device=platform.device())
            dist.recv(held, group=self.role.groups.ep, group_src=(item.rule.expert or 0) // each)
            return [held]
        if not first and mine is not None:
            dist.send(mine.contiguous(), group=self.role.groups.ep, group_dst=0)
        return [] if mine is None else [mine]
