"""To servers elsewhere, by broadcast over a process group: `/update_weights_from_distributed`.

Per pipeline stage one group: the stage's first rank is its rank 0, the engines' ranks follow. It is made
once and kept; another is made when the servers are others, or after a failure. gloo for host tensors, NCCL
for device tensors (not run on a GPU).
"""

from __future__ import annotations

import logging
import socket
import traceback
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from genac_megatron import platform
from genac_megatron.errors import PeerLost
from genac_megatron.publication.control import FLAT_BUCKET, CallsFailed, at_once, words
from genac_megatron.publication.fleet import FleetTransport
from genac_megatron.publication.sequence import WAY_OUT, place
from genac_megatron.publication.transport import Ended, Parcel
from genac_megatron.recipe.schema import PublicationConfig
from genac_megatron.serving.sglang.fleet import Endpoint
from genac_megatron.training.role import Role

GOODBYE_S = 15.0  # for a server to leave a group, on a busy machine too; a lost one does not answer
logger = logging.getLogger(__name__)


@dataclass
class Joined:
    """A process group of one stage's source and the servers' ranks."""

    name: str
    members: list[Endpoint]
    group: Any
    store: dist.Store  # served by this process; lives as long as the group


class Group(FleetTransport):
    """Broadcast from each stage's first rank."""

    def __init__(self, role: Role, endpoints: Sequence[Endpoint], config: PublicationConfig) -> None:
        super().__init__(role, endpoints, config)
        self._joined: Joined | None = None  # this rank's, where it is a source
        self._members: list[Endpoint] | None = None  # of all sources' groups, known to the circle

    def join_servers(self, sources: Sequence[int]) -> None:
        members = [server.endpoint for server in self.servers]
        if members == self._members:
            return
        self._members = None
        for source in sources:  # one by one: a server that waits in one group cannot join another
            self.agree(self._join if dist.get_rank() == source else _nothing)
        self._members = members

    def deliver(self, parcel: Parcel) -> None:
        joined, flat = self._joined, parcel.flat
        assert joined is not None
        assert flat is not None
        names, shapes = zip(*parcel.bucket.tensors, strict=True)
        dtypes = [str(dtype).removeprefix("torch.") for dtype in parcel.bucket.dtypes(self.wire)]
        limit = self.config.send_s + GOODBYE_S  # the broadcast gives up first
        with ThreadPoolExecutor(1, thread_name_prefix="broadcast") as thread:
            # They are told at the same time: they answer once they have received and loaded it.
            sent = thread.submit(self._broadcast, joined, flat)
            at_once(
                self.servers,
                lambda s: s.update_from_distributed(
                    names, dtypes, shapes, group=joined.name, load_format=FLAT_BUCKET, limit_s=limit
                ),
            )
        failure = sent.exception()
        if failure is not None:
            raise CallsFailed({endpoint.name: failure for endpoint in joined.members})

    def _broadcast(self, joined: Joined, flat: Tensor) -> None:
        try:
            dist.broadcast(flat.view(torch.uint8), group=joined.group, group_src=0)
            if flat.is_cuda:
                torch.cuda.synchronize(flat.device)
        except Exception as error:
            # Its end closes the connections, which brings out the servers that still wait for data. Frames
            # of the error would hold it on.
            traceback.clear_frames(error.__traceback__)
            self._joined = None
            _destroy(joined)
            raise

    def shut(self) -> None:
        self._leave()
        super().shut()

    def abandon(self) -> Ended:
        joined, self._joined, self._members = self._joined, None, None
        if joined is not None:
            _destroy(joined)
        return super().abandon()

    # --- groups ----------------------------------------------------------------------------------

    def _join(self) -> None:
        """Make this source's group, unless it is there already. Raises PeerLost."""
        members = [server.endpoint for server in self.servers]
        if self._joined is not None and self._joined.members == members:
            return
        self._leave()
        name = f"{self.role.name}-{dist.get_rank()}-{uuid.uuid4().hex}"  # never one that a server knows
        size = 1 + sum(endpoint.tp for endpoint in members)
        limit, address = self.config.control_s, self.config.address or address_towards(members[0].url)
        store = dist.TCPStore(address, 0, size, is_master=True, wait_for_workers=False)
        offsets = dict(
            zip((e.name for e in members), accumulate((e.tp for e in members), initial=1), strict=False)
        )
        with ThreadPoolExecutor(1, thread_name_prefix="invite") as thread:
            invited = thread.submit(
                at_once,
                self.servers,
                lambda server: server.init_group(
                    address,
                    store.port,
                    rank_offset=offsets[server.name],
                    world_size=size,
                    group=name,
                    backend=platform.backend(),
                    limit_s=limit,
                ),
            )
            failed: BaseException | None = None
            try:
                group = make_group(name, size, store, limit, self.config.send_s)
            except Exception as error:
                failed = error
        failed = invited.exception() or failed  # a server's own words say more
        if failed is not None:
            where_failed = place(self.role.name, self.steps.version, "connect")
            raise PeerLost(words(failed), where=where_failed, way_out=WAY_OUT) from failed
        self._joined = Joined(name, members, group, store)

    def _leave(self) -> None:
        """Give up a group that has other members than the fleet now."""
        joined, self._joined = self._joined, None
        if joined is None:
            return
        _destroy(joined)
        staying = [server for server in self.fleet if server.endpoint in joined.members]
        try:
            at_once(staying, lambda server: server.destroy_group(joined.name, limit_s=GOODBYE_S))
        except CallsFailed as error:
            logger.info("leaving group %s: %s", joined.name, error.what)


def _nothing() -> None:
    """What ranks do that are no source."""


def _destroy(joined: Joined) -> None:
    try:
        dist.destroy_process_group(joined.group)
    except Exception as error:
        logger.info("leaving group %s: %s", joined.name, error)
    joined.group = None


def make_group(name: str, size: int, store: dist.Store, join_s: float, limit_s: float) -> Any:
    """Rank 0 of a group with processes outside this world, made as SGLang makes it: by torch's internals.

    The others have `join_s` seconds to come; each broadcast has `limit_s`.
    """
    prefixed = dist.PrefixStore(name, store)
    prefixed.set_timeout(timedelta(seconds=join_s))
    backend = dist.Backend(platform.backend())
    group, _ = c10d._new_process_group_helper(
        size, 0, [], backend, prefixed, group_name=c10d.GroupName(name), timeout=timedelta(seconds=limit_s)
    )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group


def address_towards(url: str) -> str:
    """This machine's address on the route to the host of `url`; nothing is sent."""
    parts = urlsplit(url)
    family, _, _, _, address = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
