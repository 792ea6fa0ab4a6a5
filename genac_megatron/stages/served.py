"""How a run serves its roles: by an engine in every rank, or by servers that a node's first rank owns."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.distributed as dist

from genac_megatron import platform
from genac_megatron.cluster.network import fabric_address
from genac_megatron.errors import InputError, PeerLost
from genac_megatron.models.registry import hf_config
from genac_megatron.observe.runinfo import RunFolder
from genac_megatron.publication.factory import fleet_publisher
from genac_megatron.publication.fleet import FleetTransport
from genac_megatron.publication.publisher import Publisher
from genac_megatron.recipe.schema import EngineConfig
from genac_megatron.serving.embedded import EmbeddedEngine
from genac_megatron.serving.engine import Engine
from genac_megatron.serving.sglang.client import ServerClient
from genac_megatron.serving.sglang.engine import MORE_FILES, SglangEngine
from genac_megatron.serving.sglang.fleet import Endpoint, Fleet
from genac_megatron.serving.sglang.gpus import identity, ranks_on, visible_gpus
from genac_megatron.serving.sglang.server import Zygote, serving_python
from genac_megatron.training.agreement import agree, from_first, gathered
from genac_megatron.training.role import Role

logger = logging.getLogger(__name__)


class Served(Protocol):
    """One role's engine, as this rank sees it, and what brings weights to it."""

    engine: Engine
    publisher: Publisher

    def restart_lost(self) -> list[str]:
        """Replace the servers that were lost; their names. They hold no weights yet. Collective."""
        ...

    def restarts(self) -> int:
        """Servers replaced so far."""
        ...

    def sleep(self) -> None:
        """Give GPU memory back, as the recipe says. Collective."""
        ...

    def wake(self) -> bool:
        """Take the memory again; whether the weights were given up with it. Collective."""
        ...

    def close(self) -> None: ...


class InRanks:
    """An embedded engine in every rank."""

    def __init__(self, role: Role) -> None:
        self.engine: Engine = EmbeddedEngine(hf_config(role.shape), role.config.engine, platform.device())
        fp8 = role.config.engine.quantization == "fp8"  # what arrives has their rounding
        self.publisher = Publisher(role, [self.engine], fp8=fp8)

    def restart_lost(self) -> list[str]:
        return []

    def restarts(self) -> int:
        return 0

    def sleep(self) -> None:
        pass

    def wake(self) -> bool:
        return False

    def close(self) -> None:
        self.engine.close()


class OnServers:
    """SGLang servers. fleet: those of this rank's node, on its first rank; None elsewhere."""

    def __init__(self, role: Role, fleet: Fleet | None, folder: RunFolder) -> None:
        self._fleet, self._budget = fleet, role.config.engine.restarts
        self._restarts = 0
        endpoints = _of_all(agree(lambda: fleet.ready() if fleet is not None else []))
        self._release = role.config.engine.release
        self._asleep = False
        self._clients = [ServerClient(e.url, e.key, name=e.name) for e in endpoints]
        engine = SglangEngine(self._clients, role.config.engine, role.shape)
        self.engine: Engine = engine
        _tell_of_files(role.name, engine)
        self._doubted: list[str] = []  # servers that could not be put to sleep or woken
        gpus = shared_gpus(endpoints, role.config.engine)
        scratch = folder.path / "serving" / role.name / "weights"
        self.publisher = fleet_publisher(role, endpoints, scratch, gpus, run_name=folder.unique_name)

    def restart_lost(self) -> list[str]:
        assert isinstance(self.publisher.transport, FleetTransport)
        doubted, self._doubted = [*self.publisher.transport.lost, *self._doubted], []

        fleet = self._fleet
        found = gathered(agree(lambda: fleet.lost() if fleet is not None else []))
        lost = sorted({*doubted, *(name for part in found for name in part)})
        allowed = lost[: self._budget - self._restarts]

        def replace() -> list[Endpoint]:
            if fleet is None:
                return []
            fleet.restart(lost, allowed)
            return fleet.endpoints()

        endpoints = _of_all(agree(replace))
        self._restarts += len(lost)
        if lost:
            self.publisher.transport.set_endpoints(endpoints)  # to the engine's clients nothing changed
        return lost

    def restarts(self) -> int:
        return self._restarts

    def sleep(self) -> None:
        if self._release != "off" and not self._asleep:
            self._asleep = True
            self._doubted += from_first(lambda: self._each(ServerClient.release_memory))

    def wake(self) -> bool:
        was, self._asleep = self._asleep, False
        if was:
            self._doubted += from_first(lambda: self._each(ServerClient.resume_memory))
        return was and self._release == "all"

    def _each(self, call: Callable[[ServerClient, Sequence[str]], None]) -> list[str]:
        """The names of those that failed: they are replaced before anything is asked of them."""
        tags = ("kv_cache",) if self._release == "kv_cache" else ("kv_cache", "weights")
        failed = []
        for client in self._clients:
            try:
                call(client, tags)
            except PeerLost as error:
                logger.warning("%s", error)
                failed.append(client.name)
        return failed

    def close(self) -> None:
        self.publisher.close()
        self.engine.close()


class Fleets:
    """The servers of a run on this node, on its first rank; they start while the trainer builds its models.

    Made by every rank. Collective.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        # The batch script has a folder for each of a job's attempts.
        self._logs = Path(os.environ.get("GENAC_LOGS") or folder.logs)
        nodes = nodes_of_ranks()
        self._nodes, self._node = max(nodes) + 1, nodes[dist.get_rank()]
        self._first = nodes.index(self._node) == dist.get_rank()
        self._zygote: Zygote | None = None
        self._started: list[Fleet] = []

    def start(self, role: str, config: EngineConfig, model: Mapping[str, object]) -> Fleet | None:
        """Begin to start this node's share of a role's servers; None on a rank that owns none.

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
        fleet = Fleet(role, config, model, scratch, self._logs, device, node=self._node, host=host)
        self._started.append(fleet)
        if not config.urls:
            python = serving_python(config.python)
            if device == "cpu" and self._zygote is None:
                self._zygote = Zygote(python, self._logs / f"zygote{fleet.suffix}.log")
            fleet.start(python, self._zygote)
        return fleet

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
    if platform.device().type != "cuda" or config.urls:
        return None
    places = list(zip(nodes_of_ranks(), gathered(_own_gpu()), strict=True))
    return ranks_on({endpoint.name: (endpoint.node, endpoint.gpus) for endpoint in endpoints}, places)


def _own_gpu() -> str:
    """This rank's GPU, as `identity` calls it."""
    index, count = torch.cuda.current_device(), torch.cuda.device_count()
    visible = visible_gpus(os.environ, count) or ()
    name = visible[index] if index < len(visible) else str(index)
    return identity(name, str(getattr(torch.cuda.get_device_properties(index), "uuid", "")))


def nodes_of_ranks() -> list[int]:
    """The node that each rank is on, counted from 0 in order of rank. Collective.

    As srun or torchrun say, and never one for two machines.
    """
    machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    said = [os.environ.get(name) for name in ("SLURM_NODEID", "GROUP_RANK")]
    places = gathered((machine, *said))
    return [list(dict.fromkeys(places)).index(place) for place in places]


def _of_all(mine: list[Endpoint]) -> list[Endpoint]:
    """The endpoints of every node, in order. Collective."""
    return sorted((e for part in gathered(mine) for e in part), key=lambda endpoint: endpoint.index)
