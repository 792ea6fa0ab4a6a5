"""Bring a role's weights from any training layout to everything that needs them whole.

    Publisher(role, [engine]).publish(version)               to sinks in this process
    fleet_publisher(role, servers).publish(version)          to servers (publication/fleet.py)

Bucket by bucket along the plan: the owning pipeline stage joins its shards on its first rank, the source,
while a worker thread still sends the bucket before; at most two buckets are alive. Only sources and readers
take part in a bucket. The circle, those that hold what is joined and those that read it, agrees a few times
per publication, however many buckets it has: before anything is touched, after the last bucket, at the end. A
rank that fails by itself in between goes on with its part of what is collective (transport.py), so nobody
waits for it. All other ranks, nearly all of a large world, wait for the end in the store; then the first
source tells everybody once how it went, which is the one exchange of the whole world.

The order of device collectives. Two threads that launch kernels of two NCCL communicators may do so in one
order here and in another there: where kernels share a queue (CUDA_DEVICE_MAX_CONNECTIONS=1, which Megatron's
tensor-parallel overlap wants) each then waits for the other. So on a GPU a bucket is joined only when the one
before has arrived, unless it is sent without the device (`Transport.on_device`), and `publish` returns when
its worker has ended: of a rank, one thread at a time launches collectives, in the same order as on every
other. `OneThread` checks it. Not run on a GPU.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from genac_megatron import platform
from genac_megatron.dtypes import DTYPES
from genac_megatron.errors import GenacError, InputError
from genac_megatron.models.mapping import ParamRule, role_rules, set_parameter, with_head
from genac_megatron.publication.groups import group_of
from genac_megatron.publication.join import Joiner, source_of
from genac_megatron.publication.memory import PeakMemory
from genac_megatron.publication.plan import make_plan
from genac_megatron.publication.progress import Progress
from genac_megatron.publication.transport import Ended, InProcess, Named, Parcel, Sink, Transport
from genac_megatron.training.agreement import Circle, Told, from_rank, raised, told_of
from genac_megatron.training.layout import Coords, collective_limit_s
from genac_megatron.training.role import Role


class Outcome(NamedTuple):
    """How a publication went."""

    error: Told | None  # None: well
    left: Ended | None  # where it failed
    figures: dict[str, float]


class Publisher:
    """A role's weights to sinks of every rank, or by another transport. `publish` is collective.

    bucket_bytes: as for `make_plan`. dtype: of the tensors that travel; None: the role's own. fp8: weights
    travel in blocks of FP8, as engines with `quantization: fp8` hold them. An adapter's weights are merged on
    the way; base: they stay behind.
    """

    def __init__(
        self,
        role: Role,
        sinks: Sequence[Sink] = (),
        bucket_bytes: int | None = None,
        *,
        transport: Transport | None = None,
        dtype: torch.dtype | None = None,
        fp8: bool = False,
        base: bool = False,
    ) -> None:
        self.role = role
        self.dtype = dtype or DTYPES[role.config.training.dtype]
        self.plan = make_plan(role.shape, role.layout, self.dtype.itemsize, bucket_bytes, fp8=fp8)
        self.transport = transport or InProcess(sinks, self.dtype)
        # False: a bucket is joined once the one before has arrived; measurements switch it off, too.
        self.overlap = may_overlap(self.transport, platform.device())
        self._one_thread = OneThread()
        self._joiner = Joiner(role, self.transport.attempt, base=base)
        layout = role.layout
        self._sources = [layout.rank_of(Coords(0, 0, 0, stage)) for stage in range(layout.pp)]

    def publish(self, version: int, only: Iterable[str] | None = None) -> dict[str, float]:
        """Load the current weights into every receiver as `version`; of a fleet, `only` into servers named.

        Returns, alike on every rank: bytes, buckets, seconds, seconds of the phases (drain_s, pause_s,
        flush_s, gather_s, send_s, verify_s, resume_s; gathering and sending overlap), and host_peak_bytes
        and device_peak_bytes, the most that a rank held beyond what it had before. Where it fails, every
        rank raises the same error, which names phase, rank, server and bucket.
        """
        transport = self.transport
        transport.start(only)
        name = f"publication of {self.role.name} {version}, phase send"
        progress = Progress(self._sources, collective_limit_s(), name)
        first = self._sources[0]
        own: GenacError | None = None
        outcome: Outcome | None = None
        if self._circle() is None:
            progress.wait_until_over()
        else:
            own, outcome = self._carried(version, progress)
            if dist.get_rank() == first:
                progress.over()
        outcome = from_rank(first, outcome)
        assert outcome is not None
        transport.ended(version, outcome.left)
        if outcome.error is not None:
            raise own or raised(outcome.error)
        return outcome.figures

    def _circle(self) -> Circle | None:
        """The ranks that carry a publication, the same on every rank; None outside. Collective over the world
        where transports first ask who reads.
        """
        ranks = tuple(sorted({*self._joiner.ranks(self.plan), *self._sources, *self.transport.readers()}))
        inside = dist.get_rank() in ranks
        self.transport.circle = Circle(ranks, group_of(ranks)) if inside else None
        return self.transport.circle

    def _carried(self, version: int, progress: Progress) -> tuple[GenacError | None, Outcome]:
        """Everything between the circle's ranks: what it ended with, alike on all of them."""
        transport = self.transport
        with PeakMemory() as memory:
            try:
                with transport.timed("seconds"):
                    transport.connect(version, self._sources)
                    transport.agree(lambda: self._begin(version))
                    self._send(version, progress)
                    transport.close(version)
            except GenacError as error:
                if not error.agreed:
                    raise
                return error, Outcome(told_of(error), transport.abandon(), {})
            finally:
                self._joiner.release()
        return None, Outcome(None, None, self._shared_figures(memory))

    def close(self) -> None:
        """Let go of servers, groups and shared memory. Needed by no publication to sinks."""
        self.transport.shut()

    def _begin(self, version: int) -> None:
        """Have this rank's memory, before anybody waits for its buckets, and make the receivers ready."""
        sizes: dict[int, int] = {}
        for index, bucket in enumerate(self.plan):
            if self.transport.takes_part(self._sources[bucket.stage]):
                sizes[index % 2] = max(sizes.get(index % 2, 0), bucket.nbytes(self.dtype.itemsize))
        self.transport.reserve(sizes)
        self._joiner.reserve(self.plan)
        self.transport.begin(version)

    def _send(self, version: int, progress: Progress) -> None:
        """All buckets; then the first error of any rank, on all of them."""
        rank = dist.get_rank()
        mine = self._sources.index(rank) if rank in self._sources else None
        try:
            self._send_buckets(version, progress)
        finally:  # whatever ended it here, the others must not wait for it
            if mine is not None:
                progress.end(mine, ok=False)
        progress.wait_for_all()
        self.transport.agree(self._outcome)
        if mine is not None:
            progress.forget(mine)

    def _send_buckets(self, version: int, progress: Progress) -> None:
        arriving: Future[None] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="publish") as worker:
            for index in range(len(self.plan)):
                ready = self._turn(index, progress)  # not within a collective, which has a limit
                parcel = self._joined(version, index)
                if arriving is not None:
                    arriving.result()
                    arriving = None
                if self.transport.takes_part(parcel.source):
                    arriving = worker.submit(self._deliver, parcel, progress, ready)
                if arriving is not None and not self.overlap:
                    arriving.result()
            if arriving is not None:
                arriving.result()

    def _begins(self, index: int) -> bool:
        """Whether a bucket is its pipeline stage's first."""
        return index == 0 or self.plan[index - 1].stage != self.plan[index].stage

    def _turn(self, index: int, progress: Progress) -> bool:
        """Wait where a bucket's stage begins and servers take one stage at a time; whether all before it
        went well. Ranks without a part in the bucket do not wait.
        """
        bucket = self.plan[index]
        if not (self.transport.in_turn and self._begins(index)):
            return True
        part = self._joiner.takes_part(bucket) or self.transport.takes_part(self._sources[bucket.stage])
        return progress.turn(bucket.stage) if part else True

    def _outcome(self) -> None:
        if self.transport.failure is not None:
            raise self.transport.failure

    def _joined(self, version: int, index: int) -> Parcel:
        """The next bucket, joined on its source."""
        bucket = self.plan[index]
        source = source_of(bucket, self.role.layout)
        flat: Tensor | None = None
        if dist.get_rank() == source:
            flat = self.transport.staging(index % 2, bucket.nbytes(self.dtype.itemsize))
            flat = flat if bucket.fp8 else flat.view(self.dtype)
        if self._joiner.takes_part(bucket):
            figure = "gather_s" if flat is not None else "gather_others_s"
            with self.transport.timed(figure), self._launching():
                self._joiner.join(bucket, flat, self.dtype)
        return Parcel(version, index, len(self.plan), bucket, source, flat)

    @torch.no_grad()
    def _deliver(self, parcel: Parcel, progress: Progress, ready: bool) -> None:
        """Send a bucket. Not `ready`: a stage before it did not go well, and nothing more is sent."""
        transport, stage, index = self.transport, parcel.bucket.stage, parcel.index
        if not ready:
            transport.stopped = True
        with transport.timed("send_s" if parcel.mine else "receive_s"), self._launching():
            transport.send(parcel)
        if parcel.mine and index + 1 < len(self.plan) and self.plan[index + 1].stage == stage:
            progress.tell(stage, index)
        elif parcel.mine:
            progress.end(stage, ok=transport.failure is None and not transport.stopped)

    def _launching(self) -> contextlib.AbstractContextManager[None]:
        """Around what launches device collectives."""
        both = platform.device().type == "cuda" and self.transport.on_device
        return self._one_thread.launching() if both else contextlib.nullcontext()

    def _shared_figures(self, memory: PeakMemory) -> dict[str, float]:
        """Phases summed over the ranks that did them, the rest at its largest."""
        mine = self.transport.figures | {
            "host_peak_bytes": memory.host,
            "device_peak_bytes": memory.device,
        }
        parts = self.transport.gathered(mine)
        largest = {"seconds", "host_peak_bytes", "device_peak_bytes"}
        figures = {
            key: max(part.get(key, 0.0) for part in parts)
            if key in largest
            else sum(part.get(key, 0.0) for part in parts)
            for key in dict.fromkeys(key for part in parts for key in part)
            if key not in {"gather_others_s", "receive_s"}
        }
        figures["buckets"] = float(len(self.plan))
        figures["bytes"] = float(sum(bucket.nbytes(self.dtype.itemsize) for bucket in self.plan))
        return figures


def may_overlap(transport: Transport, device: torch.device) -> bool:
    """Whether the next bucket may be joined while one is sent: not where both launch device collectives."""
    return device.type != "cuda" or not transport.on_device


class OneThread:
    """Stops a second thread that would launch device collectives beside a first one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def launching(self) -> Iterator[None]:
        """Raises GenacError at once where another thread is inside."""
        if not self._lock.acquire(blocking=False):
            raise GenacError(
                "two threads would launch device collectives at the same time, which can deadlock",
                where="publication",
                way_out="leave Publisher.overlap as it is",
            )
        try:
            yield
        finally:
            self._lock.release()


class RoleSink:
    """Loads published tensors into another role of the same shape, a scalar head apart.

    Each parameter is cut and set as its bucket comes: nothing is held between buckets. A publication that
    fails leaves the role with some of each.
    """

    def __init__(self, role: Role) -> None:
        self.role = role
        self._waiting: dict[str, list[ParamRule]] | None = None  # by each of the tensors that it is made of
        self._held: dict[str, Tensor] = {}  # of parameters that lack another: none, as a plan goes

    @property
    def reads(self) -> bool:
        """Whether this rank is one of the role's."""
        return self.role.active

    def load_weights(self, version: int, tensors: Iterable[Named], *, final: bool = True) -> None:
        """Set what the tensors make of this rank. Raises InputError where the last is in and some lacks."""
        role = self.role
        if not role.active:
            role.serial += int(final)
            return
        if self._waiting is None:
            self._waiting = {}
            for item in role_rules(role.models, role.layout, role.shape):
                for name in item.hf_names:
                    self._waiting.setdefault(name, []).append(item)
        for name, tensor in tensors:
            if name in self._waiting:
                self._take(name, tensor, self._waiting)
        self._held = {name: tensor.clone() for name, tensor in self._held.items()}
        if final:
            self._finish(self._waiting)
            self._waiting, self._held = None, {}
            role.refresh_master()

    def _take(self, name: str, tensor: Tensor, waiting: dict[str, list[ParamRule]]) -> None:
        """Set the parameters that have all their tensors now."""
        role, held = self.role, self._held
        held[name] = tensor
        for item in list(waiting[name]):
            if all(part in held for part in item.hf_names):
                parts = [held[part] for part in item.hf_names]
                set_parameter(item, parts, role.models, role.layout, role.shape)
                for part in item.hf_names:
                    waiting[part].remove(item)
                    if not waiting[part]:
                        del waiting[part], held[part]

    def _finish(self, waiting: dict[str, list[ParamRule]]) -> None:
        """A scalar head that a language model lacks begins as it would without one."""
        role = self.role

        def absent(name: str) -> Tensor:
            raise InputError(f"{name} was not published", where=f"weights of {role.name}")

        get = with_head(absent, (), role.shape, role.config.model.init_seed)
        for name in list(waiting):
            if name in waiting:
                self._take(name, get(name), waiting)
