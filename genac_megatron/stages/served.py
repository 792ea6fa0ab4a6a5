"""How a run serves its roles: by an engine in every rank, or by a fleet of servers that rank 0 owns."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.distributed as dist

from genac_megatron import platform
from genac_megatron.errors import PeerLost
from genac_megatron.models.registry import hf_config
from genac_megatron.observe.runinfo import RunFolder
from genac_megatron.publication.factory import fleet_publisher
from genac_megatron.publication.fleet import FleetTransport
from genac_megatron.publication.publisher import Publisher
from genac_megatron.recipe.schema import EngineConfig
from genac_megatron.serving.embedded import EmbeddedEngine
from genac_megatron.serving.engine import Engine
from genac_megatron.serving.sglang.client import ServerClient
from genac_megatron.serving.sglang.engine import SglangEngine
from genac_megatron.serving.sglang.fleet import Endpoint, Fleet
from genac_megatron.serving.sglang.server import Zygote, serving_python
from genac_megatron.training.agreement import from_first, gathered
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
        self.publisher = Publisher(role, [self.engine])

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
    """A fleet of SGLang servers. fleet: on rank 0 alone."""

    def __init__(self, role: Role, fleet: Fleet | None, folder: RunFolder) -> None:
        self._fleet = fleet
        self._restarts = 0
        endpoints = from_first(lambda: fleet.ready() if fleet is not None else [])
        self._release = role.config.engine.release
        self._asleep = False
        self._clients = [ServerClient(e.url, e.key, name=e.name) for e in endpoints]
        self.engine: Engine = SglangEngine(self._clients, role.config.engine, role.shape)
        self._doubted: list[str] = []  # servers that could not be put to sleep or woken
        gpus = shared_gpus(endpoints, role.config.engine)
        scratch = folder.path / "serving" / role.name / "weights"
        self.publisher = fleet_publisher(role, endpoints, scratch, gpus, run_name=folder.path.name)

    def restart_lost(self) -> list[str]:
        assert isinstance(self.publisher.transport, FleetTransport)
        doubted, self._doubted = [*self.publisher.transport.lost, *self._doubted], []

        def replace() -> tuple[list[str], list[Endpoint], int]:
            fleet = self._fleet
            assert fleet is not None
            lost = sorted({*fleet.lost(), *doubted})
            fleet.restart(lost)
            return lost, fleet.endpoints(), fleet.restarts

        lost, endpoints, self._restarts = from_first(replace)
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
    """The fleets of a run, on the rank that owns them, starting up while the trainer builds its models."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._zygote: Zygote | None = None
        self._started: list[Fleet] = []

    def start(self, role: str, config: EngineConfig, model: Mapping[str, object]) -> Fleet:
        """Begin to start a role's servers."""
        device: Literal["cpu", "cuda"] = "cuda" if platform.device().type == "cuda" else "cpu"
        logs = self._folder.path / "logs"
        fleet = Fleet(role, config, model, self._folder.path / "serving" / role, logs, device)
        self._started.append(fleet)
        if not config.urls:
            python = serving_python(config.python)
            if device == "cpu" and self._zygote is None:
                self._zygote = Zygote(python, logs / "zygote.log")
            fleet.start(python, self._zygote)
        return fleet

    def close(self) -> None:
        """End all servers, and what forked them."""
        for fleet in self._started:
            fleet.close()
        if self._zygote is not None:
            self._zygote.close()


def shared_gpus(endpoints: Sequence[Endpoint], config: EngineConfig) -> dict[str, list[int]] | None:
    """Per server the global ranks that train on its GPUs; None where one has GPUs of its own. Collective."""
    if platform.device().type != "cuda" or not config.gpus:
        return None
    machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    places = gathered((machine, torch.cuda.current_device()))
    here = {gpu: rank for rank, (where, gpu) in enumerate(places) if where == places[0][0]}
    found = {}
    for index, endpoint in enumerate(endpoints):
        gpus = config.gpus[index * config.tp : (index + 1) * config.tp]
        if not all(gpu in here for gpu in gpus):
            return None
        found[endpoint.name] = [here[gpu] for gpu in gpus]
    return found


def owns_fleets() -> bool:
    """Whether this rank starts and ends the servers."""
    return dist.get_rank() == 0
