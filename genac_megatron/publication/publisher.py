"""Bring a role's weights from any training layout to everything that needs them whole.

    Publisher(role, [engine]).publish(version)               to sinks in this process
    fleet_publisher(role, servers).publish(version)          to servers (publication/fleet.py)

Bucket by bucket along the plan: the owning pipeline stage joins its shards on its first rank, the source,
while a worker thread still sends the bucket before. At most two buckets are alive, and a bucket is sent only
once every rank knows that the one before has arrived: so stages never send at once, and an error anywhere is
raised everywhere.

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

import torch
import torch.distributed as dist
from torch import Tensor

from genac_megatron import platform
from genac_megatron.dtypes import DTYPES
from genac_megatron.errors import GenacError
from genac_megatron.models.mapping import load_hf_into, with_head
from genac_megatron.publication.join import Joiner, source_of
from genac_megatron.publication.memory import PeakMemory
from genac_megatron.publication.plan import make_plan
from genac_megatron.publication.transport import InProcess, Named, Parcel, Sink, Transport
from genac_megatron.training.agreement import agree, gathered
from genac_megatron.training.role import Role


class Publisher:
    """A role's weights to sinks of every rank, or by another transport. `publish` is collective.

    bucket_bytes: as for `make_plan`. dtype: of the tensors that travel; None: the role's own. fp8: weights
    travel in blocks of FP8, as engines with `quantization: fp8` hold them.
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
    ) -> None:
        self.role = role
        self.dtype = dtype or DTYPES[role.config.training.dtype]
        self.plan = make_plan(role.shape, role.layout, self.dtype.itemsize, bucket_bytes, fp8=fp8)
        self.transport = transport or InProcess(sinks, self.dtype)
        # False: a bucket is joined once the one before has arrived; measurements switch it off, too.
        self.overlap = may_overlap(self.transport, platform.device())
        self._one_thread = OneThread()
        self._joiner = Joiner(role)

    def publish(self, version: int, only: Iterable[str] | None = None) -> dict[str, float]:
        """Load the current weights into every receiver as `version`; of a fleet, `only` into servers named.

        Returns, alike on every rank: bytes, buckets, seconds, seconds of the phases (drain_s, pause_s,
        flush_s, gather_s, send_s, verify_s, resume_s; gathering and sending overlap), and host_peak_bytes
        and device_peak_bytes, the most that a rank held beyond what it had before. Where it fails, every
        rank raises the same error, which names phase, rank, server and bucket.
        """
        transport = self.transport
        transport.figures, transport.only = {}, None if only is None else frozenset(only)
        with PeakMemory() as memory:
            try:
                with transport.timed("seconds"):
                    transport.open(version)
                    self._send(version)
                    transport.close(version)
            except GenacError as error:
                if error.agreed:
                    transport.abandon()
                raise
        return self._shared_figures(memory)

    def close(self) -> None:
        """Let go of servers, groups and shared memory. Needed by no publication to sinks."""
        self.transport.shut()

    def _send(self, version: int) -> None:
        agree(self._stage)
        arriving: Future[None] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="publish") as worker:
            for index in range(len(self.plan)):
                parcel = self._joined(version, index)
                if arriving is not None:
                    agree(arriving.result)
                arriving = worker.submit(self._deliver, parcel)
                if not self.overlap:
                    agree(arriving.result)
            if arriving is not None:
                agree(arriving.result)

    def _stage(self) -> None:
        """Have the memory for this rank's largest buckets, before anybody waits for them."""
        sizes: dict[int, int] = {}
        for index, bucket in enumerate(self.plan):
            if source_of(bucket, self.role.layout) == dist.get_rank():
                sizes[index % 2] = max(sizes.get(index % 2, 0), bucket.nbytes(self.dtype.itemsize))
        for slot, nbytes in sizes.items():
            self.transport.staging(slot, nbytes)

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
    def _deliver(self, parcel: Parcel) -> None:
        figure = "send_s" if parcel.mine else "receive_s"
        with self.transport.timed(figure), self._launching():
            self.transport.send(parcel)

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
        parts = gathered(mine)
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
    """Loads published tensors into another role of the same shape, a scalar head apart."""

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
            role, seed = self.role, self.role.config.model.init_seed
            weights = with_head(self._held.__getitem__, self._held, role.shape, seed)
            load_hf_into(role.models, role.layout, role.shape, weights)
            role.refresh_master()
            self._held = {}
