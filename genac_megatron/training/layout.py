"""Layouts: a role's block of ranks, its parallel sizes, and its own process groups.

Interface in short:

    world = init_world(timeout_s=600, seed=0)          # once per process, before anything else
    layout = Layout.from_config("actor", recipe.roles["actor"].layout, world.size)
    groups = layout.groups()                            # EVERY rank of the world calls it, in the same order;
                                                        # None on ranks outside the block
    layout.contains(rank), layout.coords(rank) -> Coords(tp, cp, dp, pp), layout.rank_of(Coords)
    layout.dp, layout.ranks, layout.leaders             # leaders: ranks with tp = cp = pp = 0, one per dp
    layout.is_last_stage(groups), layout.output_rank    # who holds the outputs; the first of them
    layout.chunk_layers(layers, pp, chunk) -> range     # global layers of a (virtual) model chunk
    close_world()                                       # destroys every group

Roles may share ranks, be disjoint or overlap. Every role has groups of its own, also where sizes and ranks
are equal, so that no two roles' collectives meet in one group.

A rank makes the groups that it is in and no others, and meets nobody else for it (`new_group`): torch's own
way has every rank of the world pass a barrier for each group of anybody. No role uses megatron's global
parallel state: it is initialised because Megatron's global memory buffer and random-state tracker live there,
over the world's group and one of this rank alone (`_global_state`); by itself it would make eleven groups of
the whole world, each with a connection from every rank to every other.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as distributed_c10d
from megatron.core import parallel_state
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from genac_megatron import platform
from genac_megatron.launch import MEETING
from genac_megatron.models.layout import Coords as Coords
from genac_megatron.models.layout import Sizes

GRID = ("tp", "cp", "dp", "pp")  # fastest first
_Gloo: Any = distributed_c10d.ProcessGroupGloo
EXPERT_GRID = ("expt_tp", "ep", "expt_dp", "pp")  # the same ranks as an expert layer sees them; expt_tp is 1


class World(NamedTuple):
    """This process's place among all processes."""

    rank: int
    size: int
    local_rank: int


_timeout = timedelta(seconds=600)
_worlds = 0  # that this process has joined: names of groups are never used twice in a store
_devices: list[Any] = []  # gloo's, once there is one
_groups: dict[tuple[str | int, ...], ProcessGroupCollection | None] = {}


class _OneDevice(type):
    """Makes a ProcessGroupGloo over the device that all groups of this process share.

    torch makes each group one of its own: a run of two roles has 25, whose threads wake 2,000 times a second
    and take 3 % of a core while nothing is sent.
    """

    def __call__(cls, store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
        if not _devices:
            _devices.append(_Gloo.create_default_device())
        options = _Gloo._Options()
        options._devices, options._timeout = list(_devices), timeout
        return _Gloo(store, rank, size, options)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _Gloo)


class _Shared(metaclass=_OneDevice):
    pass


@contextmanager
def one_gloo_device() -> Iterator[None]:
    """Groups that are made meanwhile share gloo's device. Collectives of each stay its own."""
    distributed_c10d.ProcessGroupGloo = _Shared  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        distributed_c10d.ProcessGroupGloo = _Gloo  # type: ignore[misc]


@one_gloo_device()
def init_world(timeout_s: float = 600.0, seed: int = 0) -> World:
    """Join the ranks given by RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*; without them be a world of one.

    Every collective of every group made afterwards fails after `timeout_s` seconds. Seeds torch's generator
    and Megatron's random-state tracker with `seed`. Calling it again returns the same world.
    """
    global _timeout, _worlds
    if not dist.is_initialized():
        _worlds += 1
        _timeout = timedelta(seconds=timeout_s)
        local = platform.device()
        if local.type == "cuda":
            torch.cuda.set_device(local)
        if "WORLD_SIZE" in os.environ:
            # Objects (rollouts) travel over gloo, also where tensors travel over NCCL.
            backend = "gloo" if local.type == "cpu" else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, timeout=_timeout, **_meeting())
        else:
            dist.init_process_group(
                platform.backend(), timeout=_timeout, store=dist.HashStore(), rank=0, world_size=1
            )
    if not parallel_state.model_parallel_is_initialized():
        _global_state()
    seed_everything(seed)
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


def _global_state() -> None:
    """Megatron's global parallel state, all sizes 1, over two groups."""
    rank, size = dist.get_rank(), dist.get_world_size()
    alone = dist.group.WORLD if size == 1 else new_group([rank], "alone", platform.backend())

    def found(ranks: Sequence[int], *_: Any, **__: Any) -> Any:
        if len(ranks) == size:
            return dist.group.WORLD
        return alone if list(ranks) == [rank] else dist.GroupMember.NON_GROUP_MEMBER

    made, parallel_state.create_group = parallel_state.create_group, found
    try:
        parallel_state.initialize_model_parallel()
    finally:
        parallel_state.create_group = made


def _meeting() -> dict[str, Any]:
    """Where ranks of a launcher meet: the port that it has bound (launch.MEETING). Else as torch has it."""
    held = os.environ.pop(MEETING, None)
    if held is None:
        return {}
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if held:
        os.set_inheritable(int(held), False)  # the store's alone from here on
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=bool(held),
        timeout=_timeout,
        master_listen_fd=int(held) if held else None,
    )
    return {"store": store, "rank": rank, "world_size": size}


def seed_everything(seed: int) -> None:
    """Seed torch's generators and Megatron's random-state tracker."""
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed + 1, force_reset_rng=True)


@one_gloo_device()
def new_group(ranks: Sequence[int], name: str, backend: str | None = None) -> dist.ProcessGroup | None:
    """A further group of these global ranks, in their order, with the limit of all others; None outside.

    Collective over its members alone. name: another for each group of the same ranks. backend: None: the
    world's. By torch's internals: with `use_local_synchronization`, its own way, members that are in
    different numbers of other groups give it different names, and wait for each other.
    """
    rank = dist.get_rank()
    if rank not in ranks:
        return None
    world = dist.group.WORLD
    assert world is not None
    known, store = distributed_c10d._world.pg_map[world]
    told = hashlib.sha256(",".join(map(str, ranks)).encode()).hexdigest()[:16]
    group, _ = distributed_c10d._new_process_group_helper(
        len(ranks),
        list(ranks).index(rank),
        list(ranks),
        distributed_c10d.Backend(backend or known),
        store,
        group_name=distributed_c10d.GroupName(f"genac/{_worlds}/{name}/{told}"),
        timeout=_timeout,
    )
    distributed_c10d._world.pg_group_ranks[group] = {r: at for at, r in enumerate(ranks)}
    return group  # type: ignore[no-any-return,unused-ignore]


def collective_limit_s() -> float:
    """Seconds after which a collective of any group fails."""
    return _timeout.total_seconds()


def close_world() -> None:
    """Destroy every process group. The process may call `init_world` again."""
    _groups.clear()
    _devices.clear()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


class Layout(Sizes):
    """A role's block of ranks and its parallel sizes in it, with its process groups."""

    def is_last_stage(self, groups: ProcessGroupCollection) -> bool:
        """Whether this rank is in the last pipeline stage, where outputs are."""
        return bool(groups.pp.rank() == self.pp - 1)

    def groups(self) -> ProcessGroupCollection | None:
        """This layout's process groups, or None on a rank outside the block.

        Collective over the block: its ranks call it, for all layouts that they share in the same order.
        Asked for again by the same role with the same sizes, they are the same groups.
        """
        key = (self.name, self.first_rank, self.count, self.tp, self.pp, self.cp, self.ep)
        if key not in _groups:
            inside = self.contains(dist.get_rank())
            _groups[key] = _make_groups(self, "/".join(map(str, key))) if inside else None
        return _groups[key]


class _GridGroups:
    """The process groups of one block that this rank is in; the same enumeration of ranks is made only once.

    name: of the layout, as no other is called.
    """

    def __init__(self, layout: Layout, name: str) -> None:
        self.name = name
        self.made: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup | None] = {}
        sizes = [layout.tp, layout.cp, layout.dp, layout.pp]
        experts = [1, layout.ep, layout.tp * layout.cp * layout.dp // layout.ep, layout.pp]
        self.dense = self._grid(sizes, GRID, layout)
        self.expert = self._grid(experts, EXPERT_GRID, layout)

    @staticmethod
    def _grid(sizes: list[int], names: Sequence[str], layout: Layout) -> HyperCommGrid:
        return HyperCommGrid(sizes, list(names), layout.first_rank, platform.backend())

    def __call__(self, *dims: str) -> dist.ProcessGroup | None:
        """The group that this rank is in, of those that vary along `dims`."""
        grid = self.dense if all(d in GRID for d in dims) else self.expert
        return self.of(grid.get_rank_enum(list(dims)))

    def of(self, enumeration: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
        """The group that this rank is in, of those listed."""
        key = tuple(tuple(int(r) for r in ranks) for ranks in enumeration)
        if key not in self.made:
            mine = next((ranks for ranks in key if dist.get_rank() in ranks), None)
            name = f"{self.name}/{len(self.made)}"
            self.made[key] = None if mine is None else new_group(mine, name, platform.backend())
        return self.made[key]


def _make_groups(layout: Layout, name: str) -> ProcessGroupCollection:
    """Make every group that Megatron asks a collection for, on a rank of the block."""
    group = _GridGroups(layout, name)
    pipelines = group.dense.get_rank_enum("pp")
    alone = group("expt_tp")  # every rank by itself
    ends = group.of([[ranks[0], ranks[-1]] for ranks in pipelines]) if layout.pp > 1 else alone
    fields = {
        "tp": group("tp"),
        "cp": group("cp"),
        "dp": group("dp"),
        "pp": group("pp"),
        "mp": group("tp", "pp"),
        "tp_cp": group("tp", "cp"),
        "dp_cp": group("cp", "dp"),
        "tp_dp_cp": group("tp", "cp", "dp"),
        "intra_dp_cp": group("cp", "dp"),
        "intra_dist_opt": group(*GRID),
        "ep": group("ep"),
        "expt_tp": alone,
        "expt_dp": group("expt_dp"),
        "intra_expt_dp": group("expt_dp"),
        "tp_ep": group("expt_tp", "ep"),
        "tp_ep_pp": group("expt_tp", "ep", "pp"),
        # Tied embeddings are summed over the first and the last stage; a middle stage is by itself.
        "embd": ends if ends is not None else alone,
        "pos_embd": alone,
    }
    return ProcessGroupCollection(**fields)
