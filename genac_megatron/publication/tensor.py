"""To servers on this machine, by memory that both see: `/update_weights_from_tensor`.

Host tensors are joined straight into named shared memory; a server maps it and copies its slices out. A
server elsewhere gets the bytes themselves, in base64. Device tensors go as CUDA IPC handles.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from genac_megatron.errors import InputError
from genac_megatron.publication.control import FLAT_BUCKET, Control, at_once
from genac_megatron.publication.fleet import FleetTransport
from genac_megatron.publication.payload import by_handle, by_value, on_this_machine, shared_buffer
from genac_megatron.publication.transport import Parcel, side_group
from genac_megatron.recipe.schema import PublicationConfig
from genac_megatron.serving.sglang.fleet import Endpoint
from genac_megatron.training.role import Role

SHARED_MEMORY = "/dev/shm"


class HostTensors(FleetTransport):
    """Shared memory, kept between publications: faulting its pages in anew costs more than a copy."""

    def deliver(self, parcel: Parcel) -> None:
        flat, tensors = parcel.flat, parcel.bucket.tensors
        assert flat is not None
        dtypes = parcel.bucket.dtypes(self.wire)

        def deliver(server: Control) -> None:
            ranks = range(server.endpoint.tp)
            if on_this_machine(server.endpoint.url):
                payloads = [by_handle(flat, tensors, dtypes) for _ in ranks]
            else:
                payloads = [by_value(flat, tensors, dtypes)] * len(ranks)
            server.update_from_tensor(payloads, load_format=FLAT_BUCKET, limit_s=self.config.send_s)

        at_once(self.servers, deliver)

    def allocate(self, nbytes: int) -> Tensor:
        free = shutil.disk_usage(SHARED_MEMORY).free
        if nbytes > free:
            raise InputError(
                f"a bucket of {nbytes:,} bytes does not fit in {SHARED_MEMORY} ({free:,} bytes free)",
                where=f"publication of {self.role.name}",
                way_out="a smaller publication.bucket_mib, or publication.transport: group",
            )
        return shared_buffer(nbytes)

    def release(self) -> None:
        """Keep the buffers."""


class DeviceTensors(FleetTransport):
    """CUDA IPC, for servers on the trainer's own GPUs. Not run on a GPU.

    An engine rank can open memory of its own GPU only. So every bucket is broadcast to all ranks, each makes
    a handle to its copy, and the handles of a server's GPUs go to it in one list.

    gpus: per server name, the global ranks whose GPUs it runs on, in the order of its ranks.
    """

    def __init__(
        self,
        role: Role,
        endpoints: Sequence[Endpoint],
        config: PublicationConfig,
        gpus: Mapping[str, Sequence[int]],
    ) -> None:
        super().__init__(role, endpoints, config)
        self.gpus = gpus

    def connect(self) -> None:
        if dist.get_world_size() > 1:
            side_group()

    def spread(self, parcel: Parcel) -> list[str]:
        """The bucket on every rank's device; the handles of all ranks."""
        flat = parcel.flat
        if flat is None:
            flat = self.staging(parcel.index % 2, parcel.bucket.nbytes(self.wire.itemsize))
        flat = flat.view(torch.uint8)
        tensors, dtypes = parcel.bucket.tensors, parcel.bucket.dtypes(self.wire)
        if dist.get_world_size() == 1:
            torch.cuda.synchronize(flat.device)
            return [by_handle(flat, tensors, dtypes)]
        dist.broadcast(flat, src=parcel.source, group=side_group())
        torch.cuda.synchronize(flat.device)  # the reader has no stream of ours to wait on
        handles: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(handles, by_handle(flat, tensors, dtypes), group=side_group())
        return handles

    def send(self, parcel: Parcel) -> None:
        if parcel.bucket.items:
            self._handles = self.spread(parcel)
        try:
            super().send(parcel)
        finally:
            if dist.get_world_size() > 1:
                dist.barrier(group=side_group())  # no rank reuses its copy before the servers have it

    def deliver(self, parcel: Parcel) -> None:
        def deliver(server: Control) -> None:
            payloads = [self._handles[rank] for rank in self.gpus[server.name]]
            server.update_from_tensor(payloads, load_format=FLAT_BUCKET, limit_s=self.config.send_s)

        at_once(self.servers, deliver)
