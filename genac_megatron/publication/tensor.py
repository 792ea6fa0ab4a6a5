"""To servers on this machine, by memory that both see: `/update_weights_from_tensor`.

Host tensors are joined straight into named shared memory; a server maps it and copies its slices out. A
server elsewhere gets the bytes themselves, in base64. Device tensors go as CUDA IPC handles.

Of CUDA IPC, as torch has it (torch/csrc/CudaIPCTypes.cpp, StorageSharing.cpp): an exported block is counted
as in use until its one reader has let go, and the reader synchronises its stream before it does. A block that
its maker lets go meanwhile is set aside, and allocated anew once the count is 0 (at the next shortage, or in
`ipc_collect`). So a handle that nobody reads keeps its block for good; and memory that was exported is safe
to write as a *fresh* allocation, not by the server's answer: of a server's ranks only the first has let go by
then (SGLang's scheduler frees what it read after the barrier that comes before the answer).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from genac_megatron import platform
from genac_megatron.errors import InputError
from genac_megatron.publication.control import FLAT_BUCKET, Control, at_once
from genac_megatron.publication.fleet import FleetTransport
from genac_megatron.publication.groups import group_of
from genac_megatron.publication.payload import by_handle, on_this_machine, shared_buffer
from genac_megatron.publication.transport import Ended, Parcel
from genac_megatron.recipe.schema import PublicationConfig
from genac_megatron.serving.sglang.by_value import by_value
from genac_megatron.serving.sglang.fleet import Endpoint
from genac_megatron.training.role import Role

SHARED_MEMORY = "/dev/shm"
logger = logging.getLogger(__name__)


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
        return in_shared_memory(nbytes, self.role.name)

    def release(self) -> None:
        """Keep the buffers."""


def in_shared_memory(nbytes: int, role: str) -> Tensor:
    """uint8 [nbytes] for a role's buckets. Raises InputError where there is no room."""
    free = shutil.disk_usage(SHARED_MEMORY).free
    if nbytes > free:
        raise InputError(
            f"a bucket of {nbytes:,} bytes does not fit in {SHARED_MEMORY} ({free:,} bytes free)",
            where=f"publication of {role}",
            way_out="a smaller publication.bucket_mib, or publication.transport: group",
        )
    return shared_buffer(nbytes)


class DeviceTensors(FleetTransport):
    """CUDA IPC, for servers on the trainer's own GPUs. Not run on a GPU; on a CPU, as tests run it, shared
    memory takes its place.

    An engine rank can open memory of its own GPU only. So a bucket is broadcast to the ranks on whose GPUs
    this role's servers run, and to no others; each makes one handle to its copy, and a server's handles go to
    it in one list, from the first of its ranks. Every handle that is made is sent, but where a publication
    fails: what was not read then stays allocated, and is told.

    gpus: per server name, the global ranks whose GPUs it runs on, in the order of its ranks.
    """

    in_turn = False  # readers take bucket after bucket

    def __init__(
        self,
        role: Role,
        endpoints: Sequence[Endpoint],
        config: PublicationConfig,
        gpus: Mapping[str, Sequence[int]],
    ) -> None:
        super().__init__(role, endpoints, config)
        self.gpus = gpus
        self.handles_made = 0  # by this rank
        self.handles_read = 0  # of those: what its servers have answered for
        self._mine: list[Control] = []  # servers that run on this rank's GPU
        self._groups: dict[int, dist.ProcessGroup | None] = {}
        self._payloads: dict[str, list[str]] = {}  # of this bucket, for servers that this rank leads
        self._exported: set[int] = set()  # slots whose memory a server may still read

    def readers(self) -> Sequence[int]:
        return sorted({rank for server in self.servers for rank in self.gpus[server.name]})

    def join_servers(self, sources: Sequence[int]) -> None:
        self._groups = {source: group_of([source, *self.readers()]) for source in sources}
        self._engines = {server.name: group_of(self.gpus[server.name]) for server in self.servers}
        self._mine = [server for server in self.servers if dist.get_rank() in self.gpus[server.name]]

    def takes_part(self, source: int) -> bool:
        return bool(self._mine) or super().takes_part(source)

    # --- a bucket --------------------------------------------------------------------------------

    def send(self, parcel: Parcel) -> None:
        flat, group = parcel.flat, self._groups[parcel.source]
        if flat is None:
            flat = self.staging(parcel.index % 2, parcel.bucket.nbytes(self.wire.itemsize))
        flat = flat.view(torch.uint8)
        if group is not None:
            dist.broadcast(flat, src=parcel.source, group=group)
        if flat.is_cuda:
            torch.cuda.synchronize(flat.device)  # the reader has no stream of ours to wait on
        for server in self._mine:
            self._collect(server, parcel, flat)
        if self._payloads:
            self.attempt(lambda: self.delivered(parcel))
        self._payloads = {}
        for server in self._mine:
            self._settle(server)
        if parcel.mine:
            self.attempt(lambda: self.add_sums(parcel))

    def _collect(self, server: Control, parcel: Parcel, flat: Tensor) -> None:
        """A handle of each of the server's ranks, on the first of them."""
        ranks, group = self.gpus[server.name], self._engines[server.name]
        handle = self.attempt(lambda: self._handle(parcel, flat))
        handles = [handle]
        if group is not None:
            first = dist.get_rank() == ranks[0]
            handles = [None] * len(ranks) if first else []
            dist.gather_object(handle, handles if first else None, dst=ranks[0], group=group)
            order = sorted(ranks)  # as the group has them
            handles = [handles[order.index(rank)] for rank in ranks] if first else []
        if all(handles) and handles:
            self._payloads[server.name] = handles
        elif handles:
            self.stopped = True

    def _handle(self, parcel: Parcel, flat: Tensor) -> str:
        self._exported.add(parcel.index % 2)
        handle = by_handle(flat, parcel.bucket.tensors, parcel.bucket.dtypes(self.wire))
        self.handles_made += 1
        return handle

    def deliver(self, parcel: Parcel) -> None:
        servers = [server for server in self._mine if server.name in self._payloads]
        at_once(
            servers,
            lambda server: server.update_from_tensor(
                self._payloads[server.name], load_format=FLAT_BUCKET, limit_s=self.config.send_s
            ),
        )

    def _settle(self, server: Control) -> None:
        """The server's ranks learn from the first whether it has the bucket: none runs ahead of it."""
        well = torch.tensor([self.failure is None and not self.stopped])
        group = self._engines[server.name]
        if group is not None:
            dist.broadcast(well, src=self.gpus[server.name][0], group=group)
        if well.item():
            self.handles_read += 1
        else:
            self.stopped = True

    # --- memory ----------------------------------------------------------------------------------

    def reserve(self, sizes: Mapping[int, int]) -> None:
        super().reserve(dict.fromkeys(sizes, max(sizes.values(), default=0)))

    def staging(self, slot: int, nbytes: int) -> Tensor:
        """Memory that no server reads. Where there is none, any: the publication has failed, and goes on only
        for the sake of the others.
        """
        if slot in self._exported:
            self._exported.discard(slot)
            size = self._slots.pop(slot).numel()
            fresh = self.attempt(lambda: self.allocate(size))
            self._slots[slot] = next(iter(self._slots.values())) if fresh is None else fresh
        return super().staging(slot, nbytes)

    def allocate(self, nbytes: int) -> Tensor:
        if platform.device().type == "cpu":
            return in_shared_memory(nbytes, self.role.name)
        return super().allocate(nbytes)

    def release(self) -> None:
        """Every block that was read goes back to the allocator."""
        super().release()
        self._exported.clear()
        if torch.cuda.is_initialized():
            torch.cuda.ipc_collect()

    def abandon(self) -> Ended:
        ended = super().abandon()
        if self.handles_made > self.handles_read:
            logger.warning(
                "%s: %d handles of device memory were not read, in a publication that failed: their buckets "
                "stay allocated until this process ends",
                *(self.role.name, self.handles_made - self.handles_read),
            )
        return ended
