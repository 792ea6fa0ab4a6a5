"""A role's servers: started here or attached by URL, watched, restarted within a budget.

The first rank of a node owns the servers on it; all ranks know the endpoints of all. A restarted server holds
random weights: whoever restarts it publishes to it before any request goes there.

A server may span nodes (`engine.nnodes`): each node's fleet starts, watches and replaces its part. The first
part is the endpoint; it tells the others, through a store that all fleets of the role have, where their ranks
meet. Where one part is lost all of them are started again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from genac_megatron.errors import InputError, PeerLost
from genac_megatron.models.blockwise import served_config
from genac_megatron.observe.runinfo import write_json_atomic
from genac_megatron.platform.fp8 import fp8_arguments, serving_refusal
from genac_megatron.platform.network import bracketed, spare_ports
from genac_megatron.recipe.schema import AdapterConfig, EngineConfig
from genac_megatron.recipe.servers import plan_gpus
from genac_megatron.recipe.share import Share
from genac_megatron.serving.sglang.adapters import lora_arguments, refusal
from genac_megatron.serving.sglang.client import ServerClient
from genac_megatron.serving.sglang.cores import as_list
from genac_megatron.serving.sglang.free_memory import free_bytes
from genac_megatron.serving.sglang.gpus import VARIABLE, arguments_on, identity, server_gpus, visible_gpus
from genac_megatron.serving.sglang.server import Server, ServerSpec, Zygote

ASK_S = 60.0  # for one token; a server that takes longer is lost
FREE_S = 30.0  # for the memory of a process that was killed to be given back
CPU_FRACTION = 0.3  # of the host's memory, which max_batch_tokens bounds first


@dataclass(frozen=True)
class Endpoint:
    """Where a server is reached. `instance` grows with its restarts."""

    name: str  # "actor/0"
    url: str
    key: str
    tp: int
    device: Literal["cpu", "cuda"]
    instance: int = 0
    node: int = 0  # of the world, where it runs; of a server that somebody else runs it says nothing
    gpus: tuple[
        str, ...
    ] = ()  # of its ranks, in order, as `gpus.identity` calls them; none: on a CPU, or not ours
    nnodes: int = 1  # that it spans, from `node` on

    @property
    def index(self) -> int:
        """Among the role's servers."""
        return int(self.name.rpartition("/")[2])

    @property
    def spans(self) -> bool:
        """Whether its ranks are on several nodes."""
        return self.nnodes > 1


class Meeting(Protocol):
    """What parts of a server find each other by: torch's stores are such."""

    def set(self, key: str, value: str) -> None: ...

    def wait(self, keys: list[str], timeout: timedelta) -> None: ...

    def get(self, key: str) -> bytes: ...


def meeting_key(server: str, instance: int) -> str:
    """Under which a server's first part says where the others meet it; "" there: it could not be started."""
    return f"serving/{server}/{instance}"


class Fleet:
    """The servers of one role that run on one node.

    name: the role's, for messages. model: a folder of the fleet's own, where config.json is written.
    node: counted from 0; host: the address that its servers bind to. places: of every server of the role, its
    GPUs (recipe/servers.py); None: as if there were no other role. cores: by a server's name, the hardware
    threads that it runs on; None: this process's. share: what a server gets of each GPU; None on a CPU.
    neighbours: fleets that started before, perhaps on the same GPUs. adapters: of the roles whose adapters
    these servers load; none: they hold whole weights. meeting: of servers that span nodes.
    """

    def __init__(
        self,
        name: str,
        config: EngineConfig,
        hf_config: Mapping[str, Any],
        model: Path,
        logs: Path,
        device: Literal["cpu", "cuda"],
        *,
        node: int = 0,
        host: str = "127.0.0.1",
        places: Sequence[Sequence[int]] | None = None,
        cores: Mapping[str, Sequence[int]] | None = None,
        share: Share | None = None,
        neighbours: Sequence[Fleet] = (),
        adapters: Sequence[AdapterConfig] = (),
        meeting: Meeting | None = None,
    ) -> None:
        self._meeting = meeting
        self.name, self.config, self.device = name, config, device
        self.node, self.host = node, host
        self._model, self._logs = model, logs
        self._servers: list[Server] = []
        self._instances: list[int] = []
        self._cores = cores or {}
        self._gpus: dict[int, list[str]] = {}  # by server, as CUDA_VISIBLE_DEVICES names them
        self._uuids: dict[str, str] = {}  # of those names
        self._starting: list[Server] = []  # not known to be healthy yet
        self._share, self._neighbours = share, neighbours
        self._lora = lora_arguments(adapters, gpu=device == "cuda")
        why = refusal(adapters, int(hf_config.get("intermediate_size", 0)), config.tp, gpu=device == "cuda")
        if why:
            raise InputError(
                f"the servers of '{name}': {why}",
                where=f"roles.{name}.engine.enable_lora",
                way_out="give training.adapter other targets, or take enable_lora out",
            )
        if not config.urls:
            if device == "cuda":
                self._choose_gpus(plan_gpus({name: config})[name] if places is None else places)
            if config.quantization == "fp8":
                self._check_fp8()
            model.mkdir(parents=True, exist_ok=True)
            write_json_atomic(model / "config.json", served_config(hf_config, config.quantization))

    def start(self, python: Path | None = None, zygote: Zygote | None = None) -> None:
        """Start every server and return at once; nothing where URLs are given.

        python: the serving environment's interpreter. zygote: forks the servers instead (CPU machines).
        """
        if self.config.urls:
            return
        here, base = self._here(), self.config.port
        ports = spare_ports(len(here), self.host) if base is None else [base + index for index in here]
        for index, port in zip(here, ports, strict=True):
            spec = self._spec(index, port)
            self._servers.append(Server(spec, self._log(index), python=python, zygote=zygote))
            self._instances.append(0)
        try:
            for server in self._servers:
                self._begin(server)
        except BaseException:
            self.close()
            raise
        self._note()

    def _begin(self, server: Server) -> None:
        """Start a server, on a GPU with the fraction of what is free there that is its share.

        What anybody takes until it is healthy is lost to its KV cache (recipe/memory.py: `kv_pool`), so
        servers of one GPU start one after another.
        """
        if self._share is not None:
            gpus = self._gpus[int(server.spec.name.rpartition("/")[2])]
            for fleet in self._neighbours:
                fleet._settle(gpus)
            fraction = self._share.fraction(self._free(gpus, self._share))
            server.spec = replace(server.spec, mem_fraction=fraction)
        if server.spec.nnodes > 1:
            server.spec = self._meet(server.spec)
        server.start()
        self._starting.append(server)

    def _meet(self, spec: ServerSpec) -> ServerSpec:
        """A part of a server with what its first part says: where they meet, and the fraction, as ranks whose
        KV caches differ would schedule apart. Raises PeerLost where it is not started, or says nothing.
        """
        assert self._meeting is not None, "parts of a server cannot meet"
        index = [server.spec.name for server in self._servers].index(spec.name)
        key = meeting_key(spec.name, self._instances[index])
        if spec.node_rank == 0:
            address = f"{bracketed(spec.host)}:{spare_ports(1, spec.host)[0]}"
            self._meeting.set(key, f"{address} {spec.mem_fraction}")
        limit = self.config.start_timeout_s
        try:
            self._meeting.wait([key], timedelta(seconds=limit))
        except RuntimeError as error:
            raise self._alone(spec, f"said nothing within {limit:.0f} s (engine.start_timeout_s)") from error
        said = self._meeting.get(key).decode().split()
        if not said:
            raise self._alone(spec, "could not be started")
        return replace(spec, meeting=said[0], mem_fraction=float(said[1]))

    def _alone(self, spec: ServerSpec, why: str) -> PeerLost:
        """Of a part that its server's first one leaves alone."""
        return PeerLost(
            f"its first part, on node {self.config.node_of(int(spec.name.rpartition('/')[2]))}, {why}",
            where=f"SGLang server {spec.name}, part {spec.node_rank}",
            way_out="read the log of that node's first rank",
        )

    def _settle(self, gpus: Sequence[str]) -> None:
        """Wait for those that are starting on one of these GPUs."""
        mine = {f"{self.name}/{index}" for index, names in self._gpus.items() if set(names) & set(gpus)}
        self._wait([server for server in self._starting if server.spec.name in mine])

    def _free(self, gpus: Sequence[str], share: Share) -> float:
        """Bytes free on the fullest of these GPUs, once they are enough or FREE_S seconds have passed."""
        until = time.monotonic() + FREE_S
        while True:
            free = min(free_bytes(gpus, self._uuids))
            if free >= share.static + share.runtime or time.monotonic() > until:
                return free
            time.sleep(1.0)

    def ready(self) -> list[Endpoint]:
        """The endpoints, once all servers are healthy. Raises PeerLost where one does not come up in time."""
        if self.config.urls:
            self._attach()
        try:
            self._wait(self._servers)
        except BaseException:
            self.close()
            raise
        return self.endpoints()

    def _wait(self, servers: Sequence[Server]) -> None:
        """Until all are healthy, start_timeout_s seconds for all of them together."""
        until = time.monotonic() + self.config.start_timeout_s
        for server in servers:
            server.wait_healthy(max(1.0, until - time.monotonic()))
        self._starting = [server for server in self._starting if server not in servers]

    def endpoints(self) -> list[Endpoint]:
        """Where the servers are, in order."""
        if self.config.urls:
            key = self._attached_key()
            tp, device = self.config.tp, self.device
            return [
                Endpoint(f"{self.name}/{index}", url, key, tp, device)
                for index, url in enumerate(self.config.urls)
            ]
        return [
            self._endpoint(server, instance)
            for server, instance in zip(self._servers, self._instances, strict=True)
            if server.spec.node_rank == 0
        ]

    def _endpoint(self, server: Server, instance: int) -> Endpoint:
        spec = server.spec
        bare = Endpoint(spec.name, spec.url, spec.key, spec.tp, spec.device, instance, self.node)
        gpus = self._gpus.get(bare.index, ()) if spec.nnodes == 1 else ()  # elsewhere they are not known
        named = tuple(identity(name, self._uuids.get(name, "")) for name in gpus)
        return replace(bare, gpus=named, nnodes=spec.nnodes)

    def lost(self, *, resting: bool = False) -> list[str]:
        """Names of the servers that have died, or a part of which on this node has, or that do not answer
        within ASK_S seconds.

        resting: they have given memory back, and are asked for no token.
        """
        endpoints = self.endpoints()
        with ThreadPoolExecutor(max(1, len(endpoints)), thread_name_prefix="ask") as pool:
            answered = list(pool.map(partial(answers, resting=resting), endpoints))
        silent = {e.name for e, told in zip(endpoints, answered, strict=True) if not told}
        known = [server.spec.name for server in self._servers] or [endpoint.name for endpoint in endpoints]
        dead = {server.spec.name for server in self._servers if not server.alive()}
        return [name for name in known if name in silent | dead]

    def restart(self, names: Sequence[str], allowed: Collection[str]) -> None:
        """Replace those of these servers that are ours.

        Raises PeerLost, with the log's end, at one that is not `allowed`: the budget is spent.
        """
        for endpoint in self.endpoints() if self.config.urls else ():
            if endpoint.name in names:
                raise PeerLost(
                    f"it does not answer at {endpoint.url}, and it is not ours to restart",
                    where=f"SGLang server {endpoint.name}",
                    way_out="start it again; --resume goes on from the newest checkpoint",
                )
        begun = []
        for index, server in enumerate(self._servers):
            if server.spec.name not in names:
                continue
            if server.spec.name not in allowed:
                raise PeerLost(
                    f"it was lost, and the {self.config.restarts} restarts of engine.restarts are spent;"
                    f" its log ends:\n{server.log_tail()}",
                    where=f"SGLang server {server.spec.name}",
                    way_out=f"read {server.log}; --resume goes on from the newest checkpoint",
                )
            server.stop()
            self._instances[index] += 1
            self._begin(server)
            begun.append(server)
        self._note()
        self._wait(begun)

    def _note(self) -> None:
        """Leave word beside the model of where the servers are, for people: no keys."""
        rows = [
            {
                "name": server.spec.name,
                "url": server.spec.url,
                "pid": server.pid,
                "log": str(server.log),
                "gpus": server.spec.env.get(VARIABLE, ""),
                "cores": as_list(server.spec.cores),
            }
            for server in self._servers
        ]
        write_json_atomic(self._model / f"servers{self.suffix}.json", rows)

    @property
    def suffix(self) -> str:
        """Sets a node's files apart from the first's in a folder that all share."""
        return f"-node{self.node}" if self.node else ""

    def close(self) -> None:
        """End the servers that were started here."""
        for server in self._servers:
            server.stop()

    def _spec(self, index: int, port: int) -> ServerSpec:
        config, tp, gpu = self.config, self.config.tp, self.device == "cuda"
        gpus = self._gpus.get(index, [])
        env = {VARIABLE: ",".join(gpus)} if gpus else {}
        memory_saver = ("--enable-memory-saver",) if config.release != "off" and gpu else ()
        replay = ("--enable-return-routed-experts",) if config.routing_replay else ()
        fp8 = fp8_arguments(self._capability()) if config.quantization == "fp8" else ()
        return ServerSpec(
            name=f"{self.name}/{index}",
            nnodes=config.nnodes,
            node_rank=config.nodes_of(index).index(self.node) if config.nnodes > 1 else 0,
            model=self._model,
            port=port,
            dtype=config.dtype,
            tp=tp,
            device=self.device,
            host=self.host,
            mem_fraction=config.mem_fraction or CPU_FRACTION,
            max_running=config.max_batch if gpu else config.batch,
            max_tokens=config.max_batch_tokens if gpu else config.batch_tokens,
            args=(*memory_saver, *replay, *fp8, *self._lora, *arguments_on(gpus), *config.args),
            env=env,
            cores=tuple(self._cores.get(f"{self.name}/{index}", ())),
        )

    def _here(self) -> list[int]:
        """The servers of this node."""
        return [n for n in range(self.config.engines) if self.node in self.config.nodes_of(n)]

    def _choose_gpus(self, places: Sequence[Sequence[int]]) -> None:
        """Give each server of this node its GPUs. Raises InputError where the job has too few."""
        import torch

        count = torch.cuda.device_count()
        visible = visible_gpus(os.environ, count)
        self._gpus = {n: server_gpus(self.name, n, places[n], visible) for n in self._here()}
        uuids = (str(getattr(torch.cuda.get_device_properties(n), "uuid", "")) for n in range(count))
        self._uuids = dict(zip(visible or (), uuids, strict=False))

    def _capability(self) -> tuple[int, int] | None:
        """Of the GPU that servers run on, taken to be like the trainer's; None on a CPU."""
        import torch

        return torch.cuda.get_device_capability() if self.device == "cuda" else None

    def _check_fp8(self) -> None:
        """Raise InputError where SGLang cannot serve weights in FP8."""
        why = serving_refusal(self._capability())
        if why:
            raise InputError(
                why,
                where=f"roles.{self.name}.engine.quantization",
                way_out="set quantization: off; or kind: embedded, which serves the same weights dequantized",
            )

    def _log(self, index: int) -> Path:
        part = self.suffix if self.config.nnodes > 1 else ""
        return self._logs / f"{self.name}-{index}{part}.log"

    def _attached_key(self) -> str:
        name = self.config.api_key_env
        if name is None:
            return ""
        if name not in os.environ:
            raise InputError(
                f"the environment variable {name} is not set",
                where="engine.api_key_env",
                way_out="export it, or leave engine.api_key_env out",
            )
        return os.environ[name]

    def _attach(self) -> None:
        silent = [endpoint.url for endpoint in self.endpoints() if not answers(endpoint)]
        if silent:
            raise PeerLost(
                f"no SGLang server answers at {', '.join(silent)}",
                where=f"engine.urls of {self.name}",
                way_out="start it, or check address and key (engine.api_key_env)",
            )


def answers(endpoint: Endpoint, *, resting: bool = False) -> bool:
    """Whether a server's scheduler answers within ASK_S seconds.

    A token of one that is resting would be computed in memory that is not there, and end it.
    """
    client = ServerClient(endpoint.url, endpoint.key, name=endpoint.name)
    try:
        return client.present(ASK_S) if resting else client.healthy(ASK_S)
    finally:
        client.close()
