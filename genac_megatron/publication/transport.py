"""How buckets travel: the interface that a publication drives, and the way within this process.

Every rank of the world calls `open`, `close` and `abandon` in the same order, from its main thread; they may
communicate. `send` runs in a worker thread while the main thread joins the next bucket over other process
groups, so it must leave the default group alone: `side_group` is for it.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from genac_megatron import platform
from genac_megatron.models.blockwise import scale_name
from genac_megatron.publication.plan import Bucket, Place
from genac_megatron.publication.quantize import dequantize

Named = tuple[str, Tensor]
_side: tuple[object, object] | None = None  # the world it was made for, and the group


class Sink(Protocol):
    """Whatever takes a full set of Hugging Face tensors under a version: an engine, another role."""

    def load_weights(self, version: int, tensors: Iterable[Named], *, final: bool = True) -> None: ...


@dataclass(frozen=True)
class Parcel:
    """One bucket on its way. `flat` [bucket.numel] holds its tensors on the source, else is None.

    Of an FP8 bucket it is uint8 [bucket.nbytes].
    """

    version: int
    index: int  # of `count` buckets
    count: int
    bucket: Bucket
    source: int  # global rank
    flat: Tensor | None

    @property
    def mine(self) -> bool:
        """Whether this rank is the source."""
        return dist.get_rank() == self.source


class Transport(ABC):
    """Brings buckets to their receivers; `figures` are this rank's seconds and bytes of one publication."""

    on_device = True  # whether `send` runs collectives on device memory where there is a GPU

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self.only: frozenset[str] | None = None  # of a fleet: the servers that are meant
        self._slots: dict[int, Tensor] = {}

    @abstractmethod
    def open(self, version: int) -> None:
        """Make the receivers ready. Collective."""

    @abstractmethod
    def send(self, parcel: Parcel) -> None:
        """Deliver a bucket. When it returns, nobody reads `parcel.flat` any more."""

    @abstractmethod
    def close(self, version: int) -> None:
        """Every bucket was delivered: make `version` current. Collective."""

    def abandon(self) -> None:
        """The publication failed, on all ranks alike: leave no receiver waiting. Collective."""
        self.release()

    def release(self) -> None:
        """Give the staging memory back."""
        self._slots = {}

    def shut(self) -> None:
        """There will be no further publication."""
        self._slots = {}

    def staging(self, slot: int, nbytes: int) -> Tensor:
        """uint8 [nbytes] that a bucket is joined or received in; `slot` alternates between 0 and 1."""
        held = self._slots.get(slot)
        if held is None or held.numel() < nbytes:
            self._slots.pop(slot, None)  # before its successor is allocated
            held = self._slots[slot] = self.allocate(nbytes)
        return held[:nbytes]

    def allocate(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=platform.device())

    @contextmanager
    def timed(self, figure: str) -> Iterator[None]:
        """Add the seconds that pass to a figure."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.figures[figure] = self.figures.get(figure, 0.0) + time.perf_counter() - began


class InProcess(Transport):
    """Broadcasts every bucket to the world, where each rank's sinks load it."""

    def __init__(self, sinks: Sequence[Sink], dtype: torch.dtype) -> None:
        super().__init__()
        self.sinks, self.dtype = list(sinks), dtype

    def open(self, version: int) -> None:
        if dist.get_world_size() > 1:
            side_group()  # made by all ranks together, before any worker wants it

    def send(self, parcel: Parcel) -> None:
        flat = parcel.flat
        if dist.get_world_size() > 1:
            if flat is None:
                nbytes = parcel.bucket.nbytes(self.dtype.itemsize)
                flat = self.staging(parcel.index % 2, nbytes)
            flat = flat.view(torch.uint8)  # gloo broadcasts these alone of what a bucket in FP8 may be
            dist.broadcast(flat, src=parcel.source, group=side_group())
        assert flat is not None
        final = parcel.index == parcel.count - 1
        for sink in self.sinks:
            sink.load_weights(parcel.version, named(parcel.bucket, flat, self.dtype), final=final)

    def close(self, version: int) -> None:
        self.release()


def named(bucket: Bucket, flat: Tensor, dtype: torch.dtype) -> Iterator[Named]:
    """The bucket's Hugging Face tensors: views of its flat buffer, or made of what is there in FP8.

    dtype: of the tensors that are not in FP8, and of those that are made.
    """
    places, bytes_ = bucket.places(dtype), flat.view(torch.uint8)
    for item in bucket.items:
        for name, _ in item.hf:
            found = view_of(bytes_, places[name])
            if bucket.fp8 and item.in_blocks:
                found = dequantize(found, view_of(bytes_, places[scale_name(name)]), dtype)
            yield name, found


def elements(bucket: Bucket, flat: Tensor, dtype: torch.dtype) -> Tensor:
    """[bucket.numel] in `dtype`: the Hugging Face tensors one after the other, those in FP8 dequantized."""
    if not bucket.fp8:
        return flat
    return torch.cat([tensor.reshape(-1) for _, tensor in named(bucket, flat, dtype)])


def view_of(buffer: Tensor, place: Place) -> Tensor:
    """A tensor in a bucket's buffer, uint8 [bucket.nbytes]."""
    count = torch.Size(place.size).numel() * place.dtype.itemsize
    return buffer[place.start : place.start + count].view(place.dtype).view(place.size)


def side_group() -> dist.ProcessGroup:
    """A second group of the whole world, for worker threads. The first call in a world is collective."""
    global _side
    world = dist.group.WORLD
    if _side is None or _side[0] is not world:
        _side = world, dist.new_group()
    return _side[1]  # type: ignore[return-value]
