"""How buckets travel: the interface that a publication drives, and the way within this process.

The ranks of a publication's circle (publisher.py) call `connect`, `close` and `abandon` in the same order,
from their main threads; they may communicate with each other, by `agree` and `gathered`. All ranks of the
world call `ended`, which is local. `send` runs in a worker thread while the main thread joins the next bucket
over other process groups, so it must leave the default group alone: `groups.group_of` is for it.

Between `connect` and the last bucket a rank that fails by itself must not leave others waiting in a
collective. So memory is there before the first one (`reserve`), and what is local goes through `attempt`: its
error is kept until the end, while the rank goes on with its part of what is collective.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from genac_megatron import platform
from genac_megatron.models.blockwise import scale_name
from genac_megatron.models.quantize import dequantize
from genac_megatron.publication.groups import group_of
from genac_megatron.publication.plan import Bucket, Place
from genac_megatron.training.agreement import Circle, agree, gathered

Named = tuple[str, Tensor]


class Sink(Protocol):
    """Whatever takes a full set of Hugging Face tensors under a version: an engine, another role.

    One with an attribute `reads` that is False needs none on this rank: it is told of the version alone.
    """

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


class Ended(NamedTuple):
    """What a publication that failed has left of a fleet."""

    lost: tuple[str, ...]  # servers that could not be brought back
    doubtful: tuple[str, ...]  # whose weights may be mixed


class Transport(ABC):
    """Brings buckets to their receivers; `figures` are this rank's seconds and bytes of one publication."""

    on_device = True  # whether `send` runs collectives on device memory where there is a GPU
    in_turn = False  # whether a pipeline stage sends once the stages before it have sent everything

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self.only: frozenset[str] | None = None  # of a fleet: the servers that are meant
        self.failure: Exception | None = None  # the first that this rank had by itself
        self.stopped = False  # another rank has failed: nothing more is delivered
        self.circle: Circle | None = None  # of this publication, on its ranks
        self._slots: dict[int, Tensor] = {}

    def start(self, only: Iterable[str] | None) -> None:
        """Another publication begins."""
        self.figures, self.only = {}, None if only is None else frozenset(only)
        self.failure, self.stopped = None, False

    def readers(self) -> Sequence[int]:
        """Global ranks that read buckets, alike on every rank. Collective over the world, the first time."""
        return ()

    def agree(self, act: Callable[[], Any]) -> Any:
        """`training.agreement.agree` among the circle."""
        return agree(act, circle=self.circle)

    def gathered(self, value: Any) -> list[Any]:
        """`value` of every rank of the circle."""
        return gathered(value, self.circle)

    @abstractmethod
    def connect(self, version: int, sources: Sequence[int]) -> None:
        """Make the groups that the way needs. sources: global ranks, per pipeline stage. Collective over the
        circle.
        """

    @abstractmethod
    def begin(self, version: int) -> None:
        """Make the receivers ready: this rank's part, none of it collective."""

    def takes_part(self, source: int) -> bool:
        """Whether this rank sends or receives the buckets of a source."""
        return dist.get_rank() == source

    @abstractmethod
    def send(self, parcel: Parcel) -> None:
        """This rank's part in delivering a bucket. When it returns, nobody reads `parcel.flat` any more.

        Raises only what a collective raises: other errors go to `failure`.
        """

    @abstractmethod
    def close(self, version: int) -> None:
        """Every bucket was delivered: make `version` current. Collective over the circle."""

    def abandon(self) -> Ended:
        """The publication failed, on all its ranks alike: leave no receiver waiting. Collective over the
        circle. What it gives on the first source, `ended` is told everywhere.
        """
        return Ended((), ())

    def ended(self, version: int, failed: Ended | None) -> None:
        """On every rank of the world: how it went. failed: None where all is well."""
        self.release()

    def release(self) -> None:
        """Give the staging memory back."""
        self._slots = {}

    def shut(self) -> None:
        """There will be no further publication."""
        self._slots = {}

    def attempt(self, act: Callable[[], Any]) -> Any:
        """What a local act returns; None where it fails, or something has failed in this publication."""
        if self.failure is not None or self.stopped:
            return None
        try:
            return act()
        except Exception as error:
            self.failure = error
            return None

    def reserve(self, sizes: Mapping[int, int]) -> None:
        """Have the memory of the slots 0 and 1 that this rank uses. sizes: their bytes."""
        for slot, nbytes in sizes.items():
            held = self._slots.get(slot)
            if held is None or held.numel() < nbytes:
                self._slots.pop(slot, None)  # before its successor is allocated
                del held
                self._slots[slot] = self.allocate(nbytes)

    def staging(self, slot: int, nbytes: int) -> Tensor:
        """uint8 [nbytes] that a bucket is joined or received in; `slot` alternates between 0 and 1."""
        return self._slots[slot][:nbytes]

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
    """Broadcasts every bucket from its source to the ranks with a sink that reads, which loads it there."""

    def __init__(self, sinks: Sequence[Sink], dtype: torch.dtype) -> None:
        super().__init__()
        self.sinks, self.dtype = list(sinks), dtype
        self._reading = [sink for sink in self.sinks if getattr(sink, "reads", True)]
        self._readers: list[int] | None = None
        self._groups: dict[int, dist.ProcessGroup | None] = {}

    def readers(self) -> Sequence[int]:
        if self._readers is None:
            self._readers = [rank for rank, reads in enumerate(gathered(bool(self._reading))) if reads]
        return self._readers

    def connect(self, version: int, sources: Sequence[int]) -> None:
        self._groups = {source: group_of([source, *self.readers()]) for source in sources}

    def begin(self, version: int) -> None:
        """Sinks are ready."""

    def takes_part(self, source: int) -> bool:
        return bool(self._reading) or super().takes_part(source)

    def send(self, parcel: Parcel) -> None:
        flat, group = parcel.flat, self._groups[parcel.source]
        if flat is None:
            flat = self.staging(parcel.index % 2, parcel.bucket.nbytes(self.dtype.itemsize))
        if group is not None:
            flat = flat.view(torch.uint8)  # gloo broadcasts these alone of what a bucket in FP8 may be
            dist.broadcast(flat, src=parcel.source, group=group)
        self.attempt(lambda: self._load(parcel, flat))

    def _load(self, parcel: Parcel, flat: Tensor) -> None:
        final = parcel.index == parcel.count - 1
        for sink in self._reading:
            sink.load_weights(parcel.version, named(parcel.bucket, flat, self.dtype), final=final)

    def close(self, version: int) -> None:
        """Sinks have it."""

    def ended(self, version: int, failed: Ended | None) -> None:
        for sink in self.sinks if failed is None else ():
            if not getattr(sink, "reads", True):
                sink.load_weights(version, (), final=True)
        super().ended(version, failed)


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
