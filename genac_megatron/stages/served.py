"""How a run serves its roles: by an engine in every rank, or by servers that a node's first rank owns."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from genac_megatron import platform
from genac_megatron.cluster.heartbeat import attempt_folder
from genac_megatron.errors import InputError
from genac_megatron.models.registry import hf_config
from genac_megatron.observe.runinfo import RunFolder
from genac_megatron.platform.network import fabric_address
from genac_megatron.publication.adapter_fleet import AdapterPublisher
from genac_megatron.publication.factory import adapter_publisher, fleet_publisher
from genac_megatron.publication.fleet import FleetTransport
from genac_megatron.publication.publisher import Publisher
from genac_megatron.recipe.schema import AdapterConfig, EngineConfig
from genac_megatron.recipe.servers import node_servers, plan_gpus
from genac_megatron.recipe.share import Share
from genac_megatron.serving.embedded import EmbeddedEngine
from genac_megatron.serving.engine import Engine
from genac_megatron.serving.sglang.cores import (
    allowed_threads,
    as_list,
    deal_cores,
    job_threads,
    read_topology,
)
from genac_megatron.serving.sglang.engine import MORE_FILES, SglangEngine
from genac_megatron.serving.sglang.fleet import Endpoint, Fleet, meeting_key
from genac_megatron.serving.sglang.gpus import identity, ranks_on, refusals, visible_gpus
from genac_megatron.serving.sglang.server import Zygote, serving_python
from genac_megatron.stages.servers import CACHE, WEIGHTS, Servers
from genac_megatron.training.agreement import gathered
from genac_megatron.training.role import Role

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Served(Protocol):
    """One role's engine, as this rank sees it, and what brings weights to it."""

    engine: Engine

    @property
    def publisher(self) -> Publisher | AdapterPublisher:
        """What brings weights to it."""
        ...

    def restart_lost(self) -> list[str]:
        """Replace the servers that were lost; the names of those that lack weights now. Collective."""
        ...

    @property
    def lacking(self) -> list[str]:
        """Servers that were replaced for another role, which lack this one's weights."""
        ...

    def restarts(self) -> int:
        """Servers replaced so far."""
        ...

    @property
    def bare(self) -> bool:
        """Whether weights were given up with their memory, and have to be brought again."""
        ...

    def filled(self) -> None:
        """All of it has the weights again."""
        ...

    @property
    def doubted(self) -> bool:
        """Whether a server did not give or take memory as told: `restart_lost` replaces it."""
        ...

    @property
    def sleeps(self) -> bool:
        """Whether the recipe has it give memory back while roles compute."""
        ...

    def sleep(self, *, weights: bool) -> None:
        """Give GPU memory back, as the recipe says: KV cache and, if asked for, weights. Collective."""
        ...

    def wake(self, *, cache: bool) -> None:
        """Take the weights' memory again, for a publication, and with `cache` the rest. Collective."""
        ...

    def close(self) -> None: ...


class InRanks:
    """An embedded engine in every rank."""

    bare = sleeps = doubted = False
    lacking: list[str] = []

    def __init__(self, role: Role) -> None:
        self.engine: Engine = EmbeddedEngine(hf_config(role.shape), role.config.engine, platform.device())
        fp8 = role.config.engine.quantization == "fp8"  # what arrives has their rounding
        self.publisher = Publisher(role, [self.engine], fp8=fp8)

    def restart_lost(self) -> list[str]:
        return []

    def restarts(self) -> int:
        return 0

    def filled(self) -> None:
        pass

    def sleep(self, *, weights: bool) -> None:
        pass

    def wake(self, *, cache: bool) -> None:
        pass

    def close(self) -> None:
        self.engine.close()


class OnServers:
    """SGLang servers that hold the role's weights."""

    publisher: Publisher | AdapterPublisher

    def __init__(self, role: Role, servers: Servers, folder: RunFolder) -> None:
        self._servers = servers
        self.engine: Engine = _engine(role, servers)
        gpus = shared_gpus(servers.endpoints, role.config.engine)
        scratch = _scratch(role, folder)
        self.publisher = fleet_publisher(role, servers.endpoints, scratch, gpus, run_name=folder.unique_name)

    @property
    def bare(self) -> bool:
        return self._servers.bare

    @property
    def doubted(self) -> bool:
        return self._servers.doubted

    @property
    def lacking(self) -> list[str]:
        return []

    def restart_lost(self) -> list[str]:
        assert isinstance(self.publisher, Publisher)
        transport = self.publisher.transport
        assert isinstance(transport, FleetTransport)
        lost = self._servers.replace_lost(transport.lost)
        if lost:
            transport.set_endpoints(self._servers.endpoints)  # to the engine's clients nothing changed
        return lost

    def restarts(self) -> int:
        return self._servers.restarts

    @property
    def sleeps(self) -> bool:
        return self._servers.sleeps

    def sleep(self, *, weights: bool) -> None:
        self._servers.release(CACHE, *((WEIGHTS,) if weights else ()))

    def wake(self, *, cache: bool) -> None:
        self._servers.take(WEIGHTS, *((CACHE,) if cache else ()))

    def filled(self) -> None:
        self._servers.bare = False

    def close(self) -> None:
        self.publisher.close()
        self.engine.close()


class BesideBase(OnServers):
    """SGLang servers that hold a base and load the role's adapters, and those of roles that share them.

    held: the endpoints that have the base, and which, the same for all roles on them.
    """

    def __init__(self, role: Role, servers: Servers, folder: RunFolder, held: dict[Endpoint, str]) -> None:
        self._servers, self._owner = servers, role.config.engine.share is None
        engine = _engine(role, servers, adapter=role.name)
        self.engine = engine
        gpus = shared_gpus(servers.endpoints, role.config.engine)
        self._adapters = self.publisher = adapter_publisher(
            *(role, servers.endpoints, _scratch(role, folder), gpus),
            run_name=folder.unique_name,
            held=held,
            in_use=engine.in_use,
        )

    @property
    def lacking(self) -> list[str]:
        if self._servers.endpoints != self._adapters.endpoints:
            self._adapters.set_endpoints(self._servers.endpoints)
        return self._adapters.lacking

    def restart_lost(self) -> list[str]:
        lost = self._servers.replace_lost(self._adapters.lost)
        return sorted({*lost, *self.lacking})

    def restarts(self) -> int:
        return self._servers.restarts if self._owner else 0  # each counts once


def _engine(role: Role, servers: Servers, adapter: str | None = None) -> SglangEngine:
    made = SglangEngine(
        servers.clients, role.config.engine, role.shape, first=dist.get_rank(), adapter=adapter
    )
    _tell_of_files(role.name, made)
    return made


def _scratch(role: Role, folder: RunFolder) -> Path:
    return folder.path / "serving" / role.name / "weights"


class Fleets:
    """The servers of a run on this node, on its first rank; they start while the trainer builds its models.

    engines: of all roles whose servers the run starts. Made by every rank. Collective.
    """

    def __init__(self, folder: RunFolder, engines: Mapping[str, EngineConfig]) -> None:
        self._folder, self._engines = folder, engines
        self._logs = attempt_folder(folder.path) or folder.logs
        nodes = nodes_of_ranks()
        self._nodes, self._node = max(nodes) + 1, nodes[dist.get_rank()]
        self._first = nodes.index(self._node) == dist.get_rank()
        self._zygote: Zygote | None = None
        self._started: list[Fleet] = []
        self._places = plan_gpus(engines)
        self._cores: dict[str, list[int]] | None = None  # by server of this node, once they are dealt
        masks = zip(nodes, gathered(os.sched_getaffinity(0)), strict=True)
        self._masks = [mask for node, mask in masks if node == self._node]

    def start(
        self,
        role: str,
        config: EngineConfig,
        model: Mapping[str, object],
        share: Share | None = None,
        adapters: Sequence[AdapterConfig] = (),
    ) -> Fleet | None:
        """Begin to start this node's share of a role's servers; None on a rank that owns none.

        share: what a server gets of its GPUs; None on a CPU. adapters: that they load beside their base.
        Raises InputError where the world lacks a node that the recipe names.
        """
        if max(config.nodes) >= self._nodes:
            raise InputError(
                f"servers are to start on nodes {config.nodes}, and the world has {self._nodes}",
                where=f"roles.{role}.engine.nodes",
                way_out="nodes are counted from 0, by SLURM_NODEID of srun or GROUP_RANK of torchrun",
            )
        if not self._first or self._node not in config.nodes:
            return None
        device: Literal["cpu", "cuda"] = "cuda" if platform.device().type == "cuda" else "cpu"
        scratch, host = self._folder.path / "serving" / role, self._host(config)
        if self._cores is None:
            if device == "cuda":
                self._check_gpus()
            self._cores = self._deal_cores(device)
        fleet = Fleet(
            *(role, config, model, scratch, self._logs, device),
            node=self._node,
            host=host,
            places=self._places.get(role),
            cores=self._cores,
            share=share,
            neighbours=tuple(self._started),
            adapters=adapters,
            meeting=None if config.nnodes == 1 else c10d._get_default_store(),
        )
        self._started.append(fleet)
        if not config.urls:
            python = serving_python(config.python)
            if device == "cpu" and self._zygote is None:
                self._zygote = Zygote(python, self._logs / f"zygote{fleet.suffix}.log")
            fleet.start(python, self._zygote)
        return fleet

    def telling(self, act: Callable[[], T]) -> T:
        """What `act`, which starts them, gives. Where it fails, other nodes' parts of servers do not wait for
        this one's first parts.
        """
        try:
            return act()
        except BaseException:
            self._give_up()
            raise

    def _give_up(self) -> None:
        for role, engine in self._engines.items() if self._first else ():
            for index in range(engine.engines) if engine.nnodes > 1 else ():
                if engine.node_of(index) == self._node:
                    c10d._get_default_store().set(meeting_key(f"{role}/{index}", 0), "")

    def _check_gpus(self) -> None:
        """Raise InputError where this node has not the GPUs of all roles' servers: before any is started."""
        visible = visible_gpus(os.environ, torch.cuda.device_count())
        for refusal in refusals(self._engines, self._node, visible):
            raise refusal

    def _deal_cores(self, device: Literal["cpu", "cuda"]) -> dict[str, list[int]]:
        """The hardware threads of each of this node's servers, over all roles."""
        servers = node_servers(self._engines, self._node, gpu=device == "cuda")
        threads = job_threads(self._masks, allowed_threads(), os.environ)
        if device == "cpu":  # servers and ranks compute in turns there: each may use all of the job's
            return dict.fromkeys(servers, sorted(threads))
        if len(servers) > len(threads):
            logger.warning(
                "genac: warning: %d servers share the %d cores that this job has on node %d (%s)",
                *(len(servers), len(threads), self._node, as_list(sorted(threads))),
            )
        dealt = deal_cores(servers, read_topology(threads, pci_addresses()))
        told = "; ".join(f"{name}: {as_list(cores)}" for name, cores in dealt.items())
        logger.info("cores of the servers on node %d: %s", self._node, told)
        return dealt

    def _host(self, config: EngineConfig) -> str:
        """Where servers listen: in a world of several nodes, other nodes do not reach loopback."""
        if self._nodes == 1 or config.host != EngineConfig().host:
            return config.host
        named = os.environ.get("GENAC_FABRIC", "").replace(",", " ").split()
        return fabric_address(named, os.environ.get("MASTER_ADDR", ""))

    def close(self) -> None:
        """End all servers, and what forked them."""
        for fleet in self._started:
            fleet.close()
        if self._zygote is not None:
            self._zygote.close()


def _tell_of_files(role: str, engine: SglangEngine) -> None:
    """Say once, by rank 0, where few open files keep an engine below its max_in_flight."""
    if dist.get_rank() == 0 and engine.in_flight < engine.config.max_in_flight:
        logger.warning(
            "genac: warning: roles.%s.engine: at most %d requests at a time on a server, not max_in_flight "
            "%d: this process may have %d files open\n  way out: %s",
            *(role, engine.in_flight, engine.config.max_in_flight, platform.raise_open_files(), MORE_FILES),
        )


def shared_gpus(endpoints: Sequence[Endpoint], config: EngineConfig) -> dict[str, list[int]] | None:
    """Per server the global ranks that train on its GPUs; None where one has GPUs of its own. Collective.

    Not run on a GPU.
    """
    if platform.device().type != "cuda" or config.urls or config.nnodes > 1:
        return None
    places = list(zip(nodes_of_ranks(), gathered(_own_gpu()), strict=True))
    return ranks_on({endpoint.name: (endpoint.node, endpoint.gpus) for endpoint in endpoints}, places)


def _own_gpu() -> str:
    """This rank's GPU, as `identity` calls it."""
    index, count = torch.cuda.current_device(), torch.cuda.device_count()
    visible = visible_gpus(os.environ, count) or ()
    name = visible[index] if index < len(visible) else str(index)
    return identity(name, str(getattr(torch.cuda.get_device_properties(index), "uuid", "")))


def pci_addresses() -> dict[int, str]:
    """By number among the job's GPUs, the PCI address of each whose address torch tells. Not run on a GPU."""
    found = {}
    for number in range(torch.cuda.device_count()):
        told = torch.cuda.get_device_properties(number)
        parts = [getattr(told, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
        if None not in parts:
            domain, bus, device = map(int, parts)  # type: ignore[arg-type]
            found[number] = f"{domain:04x}:{bus:02x}:{device:02x}.0"
    return found


def nodes_of_ranks() -> list[int]:
    """The node that each rank is on, counted from 0 in order of rank. Collective.

    As srun or torchrun say, and never one for two machines.
    """
    machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    said = [os.environ.get(name) for name in ("SLURM_NODEID", "GROUP_RANK")]
    places = gathered((machine, *said))
    return [list(dict.fromkeys(places)).index(place) for place in places]
