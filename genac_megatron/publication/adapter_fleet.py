"""Adapters to servers that load them beside the base: by name and version, while they generate.

    load under a new name -> (every rank's requests name it) -> unload the version before last, once drained

Nothing pauses and nothing is flushed: a request ends on the adapter that it began with, and a server's prefix
cache is kept by adapter. What does not change, the base, a server is given once, as a whole model is and by
`publication.transport`. Roles on one fleet give it once together. A base that adapters were merged into is
given again, under how often as its version, while nothing is generated (stages/serving.py): what runs would
end on its old adapter over the new base. A completion's versions are its adapter's.

Adapters go in the call itself: as a handle to memory of this machine, or by value to servers elsewhere. (From
a folder SGLang reads them by the load format of its start, which is of random weights here.) They lie in host
memory on both sides, also where there are GPUs: SGLang keeps them there, and copies one to its device when a
request first names it. A server on this machine keeps the very memory that it was handed: so every version
has memory of its own, which is never written again. Its file stays while a server holds the name, as ranks
behind a server's first may open it after the answer.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from genac_megatron.errors import GenacError, InputError, PeerLost
from genac_megatron.models.peft import peft_config
from genac_megatron.publication.adapters import AdapterJoiner, views
from genac_megatron.publication.control import CallsFailed, Control
from genac_megatron.publication.fleet import FleetTransport
from genac_megatron.publication.memory import PeakMemory
from genac_megatron.publication.payload import by_handle, on_this_machine
from genac_megatron.publication.publisher import Publisher
from genac_megatron.publication.sequence import Steps
from genac_megatron.publication.tensor import in_shared_memory
from genac_megatron.serving.sglang.adapters import Changes, adapter_name, changes
from genac_megatron.serving.sglang.by_value import by_value
from genac_megatron.serving.sglang.client import ServerError
from genac_megatron.serving.sglang.fleet import Endpoint
from genac_megatron.training.agreement import agree, gathered
from genac_megatron.training.role import Role


class AdapterPublisher:
    """A role's adapters to its fleet. Every rank makes one with the same arguments; `publish` is collective.

    base: brings the base to servers (a Publisher with `base`). held: the endpoints that have it, with what
    it is called there, the same for all roles of the fleet: one that has moved is given again. in_use: the
    versions that this rank's requests name. `lost` names the servers
    that failed in the last publication, the same on every rank.
    """

    def __init__(
        self,
        role: Role,
        base: Publisher,
        endpoints: Sequence[Endpoint],
        held: dict[Endpoint, str],
        in_use: Callable[[], set[int]],
    ) -> None:
        self.role, self.base, self.held, self.in_use = role, base, held, in_use
        self.config = role.config.publication
        self.joiner = AdapterJoiner(role)
        self.steps = Steps(self.config, role.name, session=False)
        self.lost: list[str] = []
        self.endpoints: list[Endpoint] = []
        self.fleet: list[Control] = []
        self._given: set[Endpoint] = set()  # hold the version that was published last
        self._since: dict[Endpoint, int] = {}  # publications since a server compared checksums
        self._loaded: dict[Endpoint, set[str]] = {}  # names that were loaded from here, on the first rank
        self._kept: dict[str, Tensor] = {}  # shared memory of names that servers hold
        self._sent = 0
        self.set_endpoints(endpoints)

    @property
    def first(self) -> bool:
        """Whether this rank drives the servers."""
        return dist.get_rank() == self.joiner.first

    @property
    def lacking(self) -> list[str]:
        """Servers that do not hold what the others have been given; none before the first publication."""
        return [e.name for e in self.endpoints if e not in self._given] if self._given else []

    def set_endpoints(self, endpoints: Sequence[Endpoint]) -> None:
        """The fleet as it is now, on every rank alike: a server that was restarted holds nothing."""
        kept = {control.endpoint: control for control in self.fleet}
        for endpoint in kept.keys() - set(endpoints):
            kept[endpoint].close()
            self._loaded.pop(endpoint, None)
        self.fleet = [kept.get(endpoint) or Control(endpoint) for endpoint in endpoints]
        self.endpoints = list(endpoints)
        transport = self.base.transport
        assert isinstance(transport, FleetTransport)
        transport.set_endpoints(endpoints)
        self.lost = []

    def publish(self, version: int, only: Iterable[str] | None = None) -> dict[str, float]:
        """Have every server (`only`: those named) hold the adapter as `version`; what Publisher.publish says.

        A server that has no base yet is given it first: `bytes` count it, and `base_s` is its share.
        """
        names = None if only is None else set(only)
        servers = [s for s in self.fleet if names is None or s.name in names]
        figures = self._give_base([s.endpoint for s in servers])
        self.steps.servers, self.steps.version, self.steps.figures = servers, version, {}
        self.lost, self._sent = [], 0
        began = time.perf_counter()
        with PeakMemory() as memory:
            self.joiner.connect()
            agree(self.joiner.reserve)
            joining = time.perf_counter()
            flat = self.joiner.join()
            joined = time.perf_counter() - joining
            self._change_all(version, servers, flat)
        mine = {"host_peak_bytes": memory.host, "device_peak_bytes": memory.device}
        mine |= {"gather_s": joined if self.first else 0.0, "bytes": float(self._sent)} | self.steps.figures
        mine["seconds"] = time.perf_counter() - began
        return _shared(mine, figures)

    def close(self) -> None:
        """Let go of servers."""
        for server in self.fleet:
            server.close()
        self.base.close()

    # --- the base --------------------------------------------------------------------------------

    def _give_base(self, endpoints: Sequence[Endpoint]) -> dict[str, float]:
        base = self.role.memory
        bare = [endpoint for endpoint in endpoints if self.held.get(endpoint) != base.moved]
        if not bare:
            return {}
        try:
            figures = self.base.publish(base.merges, only=[endpoint.name for endpoint in bare])
        except PeerLost:
            transport = self.base.transport
            assert isinstance(transport, FleetTransport)
            self.lost = transport.lost
            raise
        self.held.update(dict.fromkeys(bare, base.moved))
        return figures

    # --- the adapter -----------------------------------------------------------------------------

    def _change_all(self, version: int, servers: Sequence[Control], flat: Tensor | None) -> None:
        """Load and unload, by the first rank. Raises the same error on every rank."""
        in_use = set().union(*gathered(self.in_use()))
        verifying = {s.endpoint for s in servers if self._due(s.endpoint)}
        failed: list[str] = []

        def act() -> None:
            if self.first:
                assert flat is not None
                try:
                    self._change(version, servers, flat, in_use, verifying)
                except PeerLost as error:
                    failed.extend(_lost(error))
                    raise _refusal(error) or error from error

        try:
            agree(act)
        except GenacError:
            self.lost = sorted({name for part in gathered(failed) for name in part})
            self._given -= {s.endpoint for s in servers}
            raise
        for endpoint in (server.endpoint for server in servers):
            self._since[endpoint] = 0 if endpoint in verifying else self._since.get(endpoint, 0) + 1
        if len(servers) == len(self.fleet):
            self._given.clear()
        self._given |= {server.endpoint for server in servers}

    def _due(self, endpoint: Endpoint) -> bool:
        """Whether a server is to compare checksums: at its first publication, and every `verify_every`."""
        since, every = self._since.get(endpoint), self.config.verify_every
        again = since is None or (every is not None and since + 1 >= every)
        return self.config.verify == "tensors" and again

    def _change(
        self,
        version: int,
        servers: Sequence[Control],
        flat: Tensor,
        in_use: set[int],
        verifying: set[Endpoint],
    ) -> None:
        name, limit = adapter_name(self.role.name, version), self.config.control_s
        found = self.steps.phase("ask", lambda server: server.adapters(limit_s=limit))
        plans = {
            server: changes(self.role.name, version, names, self._known(server), in_use)
            for server, names in zip(servers, found, strict=True)
        }
        self.steps.phase("unload", lambda server: self._unload(server, plans[server].drop))
        if any(plan.load for plan in plans.values()):
            self._load(name, flat, plans, verifying)
        self.steps.phase("unload", lambda server: self._unload(server, plans[server].unload))
        self._forget()

    def _known(self, server: Control) -> set[str]:
        return self._loaded.setdefault(server.endpoint, set())

    def _unload(self, server: Control, names: Sequence[str]) -> None:
        for name in names:
            server.unload_adapter(name, limit_s=self.config.control_s)
            self._known(server).discard(name)

    def _load(
        self, name: str, flat: Tensor, plans: Mapping[Control, Changes], verifying: set[Endpoint]
    ) -> None:
        adapter = self.role.config.training.adapter
        assert adapter is not None
        config = peft_config(adapter, None)
        sums = checksums(flat, self.joiner.tensors) if verifying else None
        deliver = self.by_memory(name, flat)

        def load(server: Control) -> None:
            if plans[server].load:
                deliver(server, config, sums if server.endpoint in verifying else None)
                self._known(server).add(name)

        self.steps.phase("send", load)
        self._sent = flat.nbytes

    def by_memory(self, name: str, flat: Tensor) -> Deliver:
        """What hands a server the adapter: a handle to this version's memory, or the bytes."""
        tensors, kept = self.joiner.tensors, in_shared_memory(flat.nbytes, self.role.name)
        self._kept[name] = kept
        kept.copy_(flat.view(torch.uint8))
        held = kept.view(flat.dtype)

        def deliver(server: Control, config: Mapping[str, object], sums: Mapping[str, str] | None) -> None:
            ranks = range(server.endpoint.tp)
            if on_this_machine(server.endpoint.url):
                blobs = [by_handle(held, tensors) for _ in ranks]
            else:
                blobs = [by_value(held, tensors)] * len(ranks)
            server.load_adapter(name, config, blobs, checksums=sums, limit_s=self.config.send_s)

        return deliver

    def _forget(self) -> None:
        """Let the memory go of names that no server of ours holds any more."""
        held = set().union(*self._loaded.values())
        self._kept = {name: tensor for name, tensor in self._kept.items() if name in held}


Deliver = Callable[[Control, Mapping[str, object], Mapping[str, str] | None], None]


def checksums(flat: Tensor, tensors: Sequence[tuple[str, tuple[int, ...]]]) -> dict[str, str]:
    """sha256 of every tensor's bytes, as SGLang takes it."""
    host = flat.cpu()
    return {
        name: hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
        for name, tensor in views(host, tensors).items()
    }


def _lost(error: PeerLost) -> list[str]:
    """The servers whose calls failed for no reason that they gave."""
    cause = error.__cause__
    failed = cause.failed if isinstance(cause, CallsFailed) else {}
    return [name for name, one in failed.items() if not isinstance(one, ServerError) or one.retryable]


def _refusal(error: PeerLost) -> InputError | None:
    """What is wrong with the servers, where all that failed said why."""
    if _lost(error):
        return None
    return InputError(
        error.what,
        where=error.where,
        way_out="start attached servers (urls) with --enable-lora, and --max-lora-rank and "
        "--lora-target-modules that hold the roles' adapters; read that server's log",
    )


def _shared(mine: dict[str, float], base: Mapping[str, float]) -> dict[str, float]:
    """Figures of all ranks: the largest, as one of them did each; what the base cost on top. Collective."""
    parts = gathered(mine)
    figures = {key: max(p.get(key, 0.0) for p in parts) for key in dict.fromkeys(k for p in parts for k in p)}
    figures["buckets"] = 1.0 + base.get("buckets", 0.0)
    if base:
        figures["base_s"] = base["seconds"]
        figures["bytes"] += base["bytes"]
        figures["seconds"] += base["seconds"]
    return figures
