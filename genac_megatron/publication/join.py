"""From a role's parameter shards to whole Hugging Face tensors, one bucket at a time, in one flat buffer.

The work of a pipeline stage's first data-parallel replica: its tensor-parallel ranks send their shards to
its first rank, the bucket's source, which joins them straight into the buffer that will be sent. Experts on
other ranks come from the source's expert-parallel group, which may reach into other replicas.

Of a bucket in FP8 each rank quantizes what it holds, and its blocks travel: an expert's holder, and each
tensor-parallel rank its shard where that ends between blocks. Where a block reaches over two ranks' shards,
the source quantizes that parameter, whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from genac_megatron import platform
from genac_megatron.dtypes import DTYPES
from genac_megatron.models.adapters import LowRank
from genac_megatron.models.blockwise import scale_name
from genac_megatron.models.mapping import param_rules, unshard
from genac_megatron.models.quantize import quantize
from genac_megatron.models.sizes import Size, cut_between_blocks
from genac_megatron.platform.fp8 import as_set, kept_in_fp8, plain
from genac_megatron.publication.plan import Bucket, Item, Place
from genac_megatron.publication.transport import view_of
from genac_megatron.training.layout import Coords, Layout
from genac_megatron.training.role import Role


def source_of(bucket: Bucket, layout: Layout) -> int:
    """The global rank that joins and sends `bucket`: the first of its pipeline stage."""
    return layout.rank_of(Coords(0, 0, 0, bucket.stage))


def _at_once(act: Callable[[], Any]) -> Any:
    return act()


class Joiner:
    """This rank's part in joining a role's buckets.

    attempt: runs what is local; where it keeps an error and gives None, the rank still takes part in what is
    collective, so that its peers do not wait for it. Of an adapter each rank merges its own shards, as they
    go; with `base` they go without.
    """

    def __init__(
        self, role: Role, attempt: Callable[[Callable[[], Any]], Any] = _at_once, *, base: bool = False
    ) -> None:
        self.role, self.attempt = role, attempt
        self._plain = as_set if base else plain  # a base in FP8 is known by what it was made of
        self._gathering: Tensor | None = None  # uint8: the shards that come from other ranks
        self._sending: Tensor | None = None  # uint8: what goes out for a shard that could not be made
        self._parameters: dict[tuple[int, str, int | None], Tensor] = {}
        self._adapters: dict[tuple[int, str, int | None], LowRank] = {}
        for index, model in enumerate(role.models if role.active else []):
            offset = role.layout.chunk_layers(role.shape.layers, role.groups.pp.rank(), index).start
            for found in param_rules(model, offset, role.shape):
                key = index, found.rule.name, found.layer
                self._parameters[key] = found.parameter
                adapter = None if base or model.adapters is None else model.adapters.of(*key[1:])
                if adapter is not None:
                    self._adapters[key] = adapter
        self._dtype = DTYPES[role.config.training.dtype]

    def takes_part(self, bucket: Bucket) -> bool:
        """Whether this rank holds shards that the bucket is joined from."""
        rank, layout = dist.get_rank(), self.role.layout
        if not layout.contains(rank):
            return False
        mine = layout.coords(rank)
        first_replica = mine.dp == 0 and mine.cp == 0
        return mine.pp == bucket.stage and (first_replica or self._with_source(bucket))

    def ranks(self, plan: Sequence[Bucket]) -> set[int]:
        """Global ranks that hold shards that some bucket is joined from."""
        layout = self.role.layout
        found: set[int] = set()
        for source in {source_of(bucket, layout) for bucket in plan}:
            stage = layout.coords(source).pp
            found |= {layout.rank_of(Coords(tp, 0, 0, stage)) for tp in range(layout.tp)}
            found |= set(range(source, source + layout.ep))
        return found

    def travels_in_blocks(self, item: Item, bucket: Bucket) -> bool:
        """Whether ranks quantize what they hold of an item: an expert, or a shard that is whole blocks."""
        if not (bucket.fp8 and item.in_blocks):
            return False
        if item.rule.expert is not None:
            return self.role.layout.ep > 1
        tp = self.role.layout.tp
        return tp > 1 and cut_between_blocks(item.rule, self.role.shape, tp)

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
        self.role.settle()
        bytes_ = None if flat is None else flat.view(torch.uint8)
        places = bucket.places(dtype or (self._dtype if flat is None else flat.dtype))
        for item in bucket.items:
            expert = item.rule.expert is not None and self.role.layout.ep > 1
            shards = self._expert(item, bucket) if expert else self._gathered(item, bucket)
            if bytes_ is None:
                continue
            if self.travels_in_blocks(item, bucket):
                self.attempt(partial(self._place, item, shards, bytes_, places))
            else:
                self.attempt(partial(self._write, item, shards, bytes_, places, bucket.fp8))

    def _blocks(self, item: Item, shard: Tensor) -> Tensor:
        """A shard in FP8 as it goes to the source, uint8 [bytes]: scales, then weights."""
        part = unshard(item.rule, [shard], self.role.shape, item.layer)
        made = [quantize(part[name]) for name, _ in item.hf]
        parts = [*(scales for _, scales in made), *(weights for weights, _ in made)]
        return torch.cat([part.contiguous().view(torch.uint8).flatten() for part in parts])

    def _place(
        self, item: Item, shards: Sequence[Tensor], bytes_: Tensor, places: Mapping[str, Place]
    ) -> None:
        """Put what `_blocks` made of each shard, in order, into the bucket, uint8 [bucket.nbytes]."""
        at = 0
        for name in (*(scale_name(name) for name, _ in item.hf), *(name for name, _ in item.hf)):
            whole = view_of(bytes_, places[name])
            for blocks, to in zip(shards, whole.chunk(len(shards), item.rule.tp_axis or 0), strict=True):
                to.copy_(blocks[at : at + to.nbytes].view(to.dtype).view(to.shape))
            at += whole.nbytes // len(shards)

    def _write(
        self, item: Item, shards: Sequence[Tensor], bytes_: Tensor, places: Mapping[str, Place], fp8: bool
    ) -> None:
        """Join an item's shards into its places in the bucket, uint8 [bucket.nbytes]."""
        whole = unshard(item.rule, shards, self.role.shape, item.layer)
        for name, _ in item.hf:
            tensor, mine = whole.pop(name), view_of(bytes_, places[name])
            if fp8 and item.in_blocks:
                quantize(tensor, mine, view_of(bytes_, places[scale_name(name)]))
            else:
                mine.copy_(tensor)

    # --- shards of other ranks -------------------------------------------------------------------

    def reserve(self, plan: Sequence[Bucket]) -> None:
        """Have the memory that collectives of these buckets need here, for their largest item."""
        gathering = sending = 0
        for bucket in plan:
            for item in bucket.items if self.takes_part(bucket) else ():
                first = dist.get_rank() == source_of(bucket, self.role.layout)
                mine = self._parameters.get((item.chunk, item.rule.name, item.layer))
                nbytes = item.shard_numel * (self._dtype if mine is None else mine.dtype).itemsize
                if mine is not None and not self._as_it_is(item, mine):
                    sending = max(sending, nbytes)
                if self.travels_in_blocks(item, bucket):
                    nbytes = self._nbytes_in_blocks(item)
                    sending = max(sending, nbytes if mine is not None else 0)
                if first and mine is None:
                    gathering = max(gathering, nbytes)
                elif first and self._from_others(item):
                    gathering = max(gathering, nbytes * self.role.layout.tp)
        self._gathering, self._sending = self._bytes(gathering), self._bytes(sending)

    def release(self) -> None:
        """Let that memory go."""
        self._gathering = self._sending = None

    @staticmethod
    def _bytes(count: int) -> Tensor | None:
        return torch.empty(count, dtype=torch.uint8, device=platform.device()) if count else None

    def _room(self, count: int, size: Size, dtype: torch.dtype) -> list[Tensor]:
        """`count` shards to receive in."""
        each = torch.Size(size).numel() * dtype.itemsize
        if self._gathering is None or self._gathering.numel() < count * each:
            self._gathering = self._bytes(count * each)  # `reserve` was not called
        assert self._gathering is not None
        return [self._gathering[i * each : (i + 1) * each].view(dtype).view(size) for i in range(count)]

    def _from_others(self, item: Item) -> bool:
        """Whether tensor parallelism cuts an item that is no expert of another rank."""
        expert = item.rule.expert is not None and self.role.layout.ep > 1
        return not expert and self.role.layout.tp > 1 and item.rule.tp_axis is not None

    def _nbytes_in_blocks(self, item: Item) -> int:
        """Of a shard that travels in blocks."""
        parts = self.role.layout.tp if self._from_others(item) else 1
        return item.nbytes(self._dtype.itemsize, True) // parts

    def _as_it_is(self, item: Item, held: Tensor) -> bool:
        """Whether this rank's shard travels as it lies there."""
        merges = (item.chunk, item.rule.name, item.layer) in self._adapters
        return not merges and not kept_in_fp8(held) and held.is_contiguous()

    def _mine(self, item: Item) -> Tensor | None:
        """This rank's shard as it travels, contiguous; None where it holds none."""
        key = item.chunk, item.rule.name, item.layer
        held, adapter = self._parameters.get(key), self._adapters.get(key)
        if held is None:
            return None
        if self._as_it_is(item, held):
            return held.detach()
        merge = (lambda weight: weight) if adapter is None else adapter.merged
        made: Tensor | None = self.attempt(lambda: merge(self._plain(held).detach()).contiguous())
        if made is not None or self._sending is None:
            return held.detach() if made is None else made
        return self._sending[: held.numel() * held.dtype.itemsize].view(held.dtype).view(held.shape)

    def _travelling(self, item: Item, bucket: Bucket) -> Tensor | None:
        """This rank's part as it goes to the source: its blocks, or its shard; None where it holds none."""
        mine = self._mine(item)
        if mine is None or not self.travels_in_blocks(item, bucket):
            return mine
        made: Tensor | None = self.attempt(partial(self._blocks, item, mine))
        if made is None and self._sending is not None:
            made = self._sending[: self._nbytes_in_blocks(item)]
        return made

    def _gathered(self, item: Item, bucket: Bucket) -> list[Tensor]:
        """The parts of all tensor-parallel ranks in order, on the first; a replicated one is not sent."""
        at = self.role.layout.coords(dist.get_rank())
        if at.dp > 0 or at.cp > 0:
            return []  # here for its experts
        mine = self._travelling(item, bucket)
        assert mine is not None
        if not self._from_others(item):
            return [mine]
        group = self.role.groups.tp
        shards = self._room(group.size(), tuple(mine.shape), mine.dtype) if group.rank() == 0 else None
        dist.gather(mine, shards, group=group, group_dst=0)
        return shards or []

    def _expert(self, item: Item, bucket: Bucket) -> list[Tensor]:
        """An expert's parameter, on the source; it is sent there by the rank of its group that holds it."""
        if not self._with_source(bucket):
            return []
        mine = self._travelling(item, bucket)
        first = dist.get_rank() == source_of(bucket, self.role.layout)
        if first and mine is None:
            each = (self.role.shape.experts or 0) // self.role.layout.ep
            blocks = self.travels_in_blocks(item, bucket)
            size, dtype = (
                ((self._nbytes_in_blocks(item),), torch.uint8) if blocks else (item.shard_size, self._dtype)
            )
            (held,) = self._room(1, size, dtype)
            dist.recv(held, group=self.role.groups.ep, group_src=(item.rule.expert or 0) // each)
            return [held]
        if not first and mine is not None:
            dist.send(mine, group=self.role.groups.ep, group_dst=0)
        return [] if mine is None else [mine]
