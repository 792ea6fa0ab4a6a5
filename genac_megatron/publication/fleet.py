"""What every way to a fleet of servers shares: the sequence around the buckets, verification, failure."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from genac_megatron.dtypes import DTYPES
from genac_megatron.errors import PeerLost
from genac_megatron.publication.checksum import RankSums, Sums
from genac_megatron.publication.control import CallsFailed, Control
from genac_megatron.publication.sequence import WAY_OUT, Steps, place
from genac_megatron.publication.transport import Ended, Parcel, Transport, elements
from genac_megatron.recipe.schema import PublicationConfig
from genac_megatron.serving.sglang.fleet import Endpoint
from genac_megatron.training.role import Role

Expected = dict[tuple[str, int], list[Sums]]  # (device, tensor-parallel size) -> per rank


class FleetTransport(Transport):
    """To SGLang servers.

    Every rank holds one, with the same endpoints. The role's first rank drives the servers; each bucket's
    source delivers it. `usable` names the servers that hold a complete set of weights; after a failure `lost`
    names those that could not be brought back. Both are the same on every rank.
    """

    session = True  # whether buckets come between /begin_weight_update and /end_weight_update
    in_turn = True  # two stages that send at once would wait for one another in a server

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
        self.verifying = False  # whether this publication is checked tensor by tensor
        self._since: dict[Endpoint, int] = {}  # publications since a server's weights were checked so
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

    def start(self, only: Iterable[str] | None) -> None:
        super().start(only)
        self.servers = [s for s in self.fleet if self.only is None or s.name in self.only]
        self.verifying = self._due()
        self._sums, self._touched = {}, False

    def connect(self, version: int, sources: Sequence[int]) -> None:
        self.steps.servers, self.steps.figures = self.servers, self.figures
        self.steps.version = version
        with self.timed("connect_s"):
            self.join_servers(sources)

    def join_servers(self, sources: Sequence[int]) -> None:
        """Make what must be there before the servers pause. Collective over the circle."""

    def begin(self, version: int) -> None:
        if dist.get_rank() == self.leader:
            self.steps.open(version)

    def send(self, parcel: Parcel) -> None:
        if parcel.mine:
            self.attempt(lambda: self.delivered(parcel))
            self.attempt(lambda: self.add_sums(parcel))

    def delivered(self, parcel: Parcel) -> None:
        """Bring the bucket to servers. Raises PeerLost naming bucket, rank and servers."""
        self._touched = True
        try:
            self.deliver(parcel)
        except CallsFailed as error:
            bucket = f"{parcel.index + 1} of {parcel.count}"
            where = place(self.role.name, parcel.version, "send", bucket)
            raise PeerLost(error.what, where=where, way_out=WAY_OUT) from error

    @abstractmethod
    def deliver(self, parcel: Parcel) -> None:
        """Bring the bucket to every server, on its source. Raises CallsFailed."""

    def close(self, version: int) -> None:
        expected = self._expected() if self.verifying else None
        self.agree(lambda: self.steps.close(expected) if dist.get_rank() == self.leader else None)

    def abandon(self) -> Ended:
        touched = any(self.gathered(self._touched))
        lost = self.steps.abandon(touched) if dist.get_rank() == self.leader else []
        return Ended(tuple(lost), tuple(server.name for server in self.servers) if touched else ())

    def ended(self, version: int, failed: Ended | None) -> None:
        if failed is None:
            self.lost = []
            self.usable |= {server.name for server in self.servers}
            for server in self.servers:
                since = 0 if self.verifying else self._since.get(server.endpoint, 0) + 1
                self._since[server.endpoint] = since
        else:
            self.lost = sorted(failed.lost)
            self.usable -= {*failed.lost, *failed.doubtful}
        super().ended(version, failed)

    def shut(self) -> None:
        super().shut()
        for server in self.fleet:
            server.close()

    # --- verification ----------------------------------------------------------------------------

    def _due(self) -> bool:
        """Whether some server has never been checked tensor by tensor, or `verify_every` publications ago."""
        every = self.config.verify_every
        since = [self._since.get(server.endpoint) for server in self.servers]
        due = any(count is None or (every is not None and count + 1 >= every) for count in since)
        return self.config.verify == "tensors" and due

    def add_sums(self, parcel: Parcel) -> None:
        """Of a source's bucket, where servers are to be checked.

        What SGLang hashes of a weight in FP8 is the product with its scales, in bf16.
        """
        if not self.verifying:
            return
        assert parcel.flat is not None
        with self.timed("verify_s"):
            flat = elements(parcel.bucket, parcel.flat, self.wire).to(self.dtype)
            for device, tp in {(s.endpoint.device, s.endpoint.tp) for s in self.servers}:
                if (device, tp) not in self._sums:
                    made = [RankSums(self.role.shape, tp, rank, device) for rank in range(tp)]
                    self._sums[device, tp] = made
                for sums in self._sums[device, tp]:
                    sums.add(parcel.bucket, flat)

    def _expected(self) -> dict[str, list[Sums]]:
        """Per server and rank what it must hold, from the sources of all stages. Collective over the
        circle.
        """
        merged: Expected = {}
        mine = {key: [rank.sums for rank in ranks] for key, ranks in self._sums.items()}
        for part in self.gathered(mine):
            for key, ranks in part.items():
                for rank, sums in enumerate(ranks):
                    merged.setdefault(key, [{} for _ in ranks])[rank].update(sums)
        return {s.name: merged[s.endpoint.device, s.endpoint.tp] for s in self.servers}


def wire_dtype(role: Role) -> torch.dtype:
    """What travels: the narrower of the trainer's and the engine's precision."""
    both = DTYPES[role.config.training.dtype], DTYPES[role.config.engine.dtype]
    return min(both, key=lambda dtype: dtype.itemsize)
