"""What every way to a fleet of servers shares: the sequence around the buckets, verification, failure."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.distributed as dist

from genac_megatron.dtypes import DTYPES
from genac_megatron.errors import PeerLost
from genac_megatron.publication.checksum import RankSums, Sums
from genac_megatron.publication.control import CallsFailed, Control
from genac_megatron.publication.sequence import WAY_OUT, Steps, place
from genac_megatron.publication.transport import Parcel, Transport, elements
from genac_megatron.recipe.schema import PublicationConfig
from genac_megatron.serving.sglang.fleet import Endpoint
from genac_megatron.training.agreement import agree, gathered
from genac_megatron.training.role import Role

Expected = dict[tuple[str, int], list[Sums]]  # (device, tensor-parallel size) -> per rank


class FleetTransport(Transport):
    """To SGLang servers.

    Every rank holds one, with the same endpoints. The role's first rank drives the servers; each bucket's
    source delivers it. `usable` names the servers that hold a complete set of weights; after a failure `lost`
    names those that could not be brought back. Both are the same on every rank.
    """

    session = True  # whether buckets come between /begin_weight_update and /end_weight_update

    def __init__(self, role: Role, endpoints: Sequence[Endpoint], config: PublicationConfig) -> None:
        super().__init__()
        self.role, self.config = role, config
        self.dtype = DTYPES[role.config.engine.dtype]  # of the engine
        self.wire = wire_dtype(role)
        self.lost: list[str] = []
        self.usable: set[str] = set()
        self.steps = Steps(config, role.name, self.session)
        self.servers: list[Control] = []  # that this publication goes to
        self.fleet: list[Control] = []
        self._verified: set[Endpoint] = set()  # tensor by tensor
        self._sums: dict[tuple[str, int], list[RankSums]] = {}
        self._touched = False
        self.set_endpoints(endpoints)

    @property
    def leader(self) -> int:
        """The global rank that drives the servers."""
        return self.role.layout.first_rank

    def set_endpoints(self, endpoints: Sequence[Endpoint]) -> None:
        """The fleet as it is now, on every rank alike: a server that was restarted holds no weights."""
        kept = {control.endpoint: control for control in self.fleet}
        for endpoint in kept.keys() - set(endpoints):
            kept[endpoint].close()
            self.usable.discard(endpoint.name)
        self.fleet = [kept.get(endpoint) or Control(endpoint) for endpoint in endpoints]

    # --- the publication -------------------------------------------------------------------------

    def open(self, version: int) -> None:
        self.servers = [s for s in self.fleet if self.only is None or s.name in self.only]
        self.steps.servers, self.steps.figures = self.servers, self.figures
        self.steps.version = version
        self._sums, self._touched = {}, False
        with self.timed("connect_s"):
            self.connect()
        agree(lambda: self.steps.open(version) if dist.get_rank() == self.leader else None)

    def connect(self) -> None:
        """Make what must be there before the servers pause. Collective."""

    def send(self, parcel: Parcel) -> None:
        if not parcel.mine or not parcel.bucket.items:
            return
        self._touched = True
        try:
            self.deliver(parcel)
        except CallsFailed as error:
            raise self.failed(parcel, error.what) from error
        if self.verifying:
            with self.timed("verify_s"):
                self._add_sums(parcel)

    @abstractmethod
    def deliver(self, parcel: Parcel) -> None:
        """Bring the bucket to every server, on its source. Raises CallsFailed."""

    def failed(self, parcel: Parcel, what: str) -> PeerLost:
        """The error of a bucket that did not arrive."""
        bucket = f"{parcel.index + 1} of {parcel.count}"
        return PeerLost(what, where=place(self.role.name, parcel.version, "send", bucket), way_out=WAY_OUT)

    def close(self, version: int) -> None:
        expected = self._expected() if self.verifying else None
        agree(lambda: self.steps.close(expected) if dist.get_rank() == self.leader else None)
        self.lost = []
        self.usable |= {server.name for server in self.servers}
        if expected is not None:
            self._verified |= {server.endpoint for server in self.servers}
        self.release()

    def abandon(self) -> None:
        touched = any(gathered(self._touched))
        lost = self.steps.abandon(touched) if dist.get_rank() == self.leader else []
        self.lost = sorted({name for part in gathered(lost) for name in part})
        self.usable -= set(self.lost)
        if touched:
            self.usable -= {server.name for server in self.servers}
        self.release()

    def shut(self) -> None:
        super().shut()
        for server in self.fleet:
            server.close()

    # --- verification ----------------------------------------------------------------------------

    @property
    def verifying(self) -> bool:
        """Whether this publication is checked tensor by tensor: the first to some server."""
        new = any(server.endpoint not in self._verified for server in self.servers)
        return self.config.verify == "tensors" and new

    def _add_sums(self, parcel: Parcel) -> None:
        """What SGLang hashes of a weight in FP8 is the product with its scales, in bf16."""
        assert parcel.flat is not None
        flat = elements(parcel.bucket, parcel.flat, self.wire).to(self.dtype)
        for device, tp in {(s.endpoint.device, s.endpoint.tp) for s in self.servers}:
            if (device, tp) not in self._sums:
                made = [RankSums(self.role.shape, tp, rank, device) for rank in range(tp)]
                self._sums[device, tp] = made
            for sums in self._sums[device, tp]:
                sums.add(parcel.bucket, flat)

    def _expected(self) -> dict[str, list[Sums]]:
        """Per server and rank what it must hold, from the sources of all stages. Collective."""
        merged: Expected = {}
        mine = {key: [rank.sums for rank in ranks] for key, ranks in self._sums.items()}
        for part in gathered(mine):
            for key, ranks in part.items():
                for rank, sums in enumerate(ranks):
                    merged.setdefault(key, [{} for _ in ranks])[rank].update(sums)
        return {s.name: merged[s.endpoint.device, s.endpoint.tp] for s in self.servers}


def wire_dtype(role: Role) -> torch.dtype:
    """What travels: the narrower of the trainer's and the engine's precision."""
    both = DTYPES[role.config.training.dtype], DTYPES[role.config.engine.dtype]
    return min(both, key=lambda dtype: dtype.itemsize)
