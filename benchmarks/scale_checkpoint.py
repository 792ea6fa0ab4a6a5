"""A checkpoint of a 235B-shaped model at 1,024 ranks: who writes and reads what, by the code that plans it.

One process plays all ranks, one after the other, and no memory is there for what they hold: each rank's real
role, with its optimizer, is made of torch's "meta" tensors. What it would save goes through
training/sharding.py, Megatron's strategies and torch's planner, up to the lists that writers get; what other
ranks would tell it in a collective is what those told when they were played. Not played: bytes on a disk.

Saved are weights in bf16, fp32 masters and Adam's two moments: 14 bytes a parameter. Told, of one rank at
most: to all others what it holds, which Megatron validates, to its data-parallel group what weights, to the
coordinator its plan. Seconds are this process's processor's: of a rank's state and plan; of reading what all
others hold; of the coordinator's validation, reading of plans and global plan. A resume in the same layout is
planned for four ranks of the first data-parallel groups of the first and the last stage; every rank reads the
metadata once for its weights and once for its optimizer. How often ranks meet:
benchmarks/checkpoint_collectives.py.
Run: python -m benchmarks.scale_checkpoint [--ranks 128] [--groups 4]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.machine import save, table
from benchmarks.scale_start import GIB, SHAPE, STAGES  # Megatron's hook before its first import
from genac_megatron.errors import GenacError
from genac_megatron.models.families.base import Shape
from genac_megatron.models.registry import shape_of
from genac_megatron.models.sizes import parameters
from genac_megatron.recipe.schema import RoleConfig

# isort: split
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import state_dict_utils
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as strategies
from megatron.core.dist_checkpointing.validation import validate_sharding_integrity
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, default_planner
from torch.distributed.checkpoint.filesystem import _StorageInfo

from genac_megatron.platform.without_cuda import facade
from genac_megatron.training import layout as layouts
from genac_megatron.training import sharding
from genac_megatron.training.layout import Coords, Layout, close_world, init_world
from genac_megatron.training.role import Role
from genac_megatron.training.sharding import OPTIMIZER, ROLES, SharedReading, SharedWriting, role_state

META = torch.device("meta")
OTHERS = 5  # files beside the ranks': torch's and Megatron's metadata, two of what is no shard, the manifest
READERS = 4  # ranks of a group whose resume is planned
_type = Tensor.type


class Group:
    """A process group of so many ranks, with nobody in it."""

    def __init__(self, ranks: list[int], mine: int) -> None:
        self.ranks, self._mine = ranks, mine

    def rank(self) -> int:
        return self.ranks.index(self._mine)

    def size(self) -> int:
        return len(self.ranks)


@dataclass
class Told:
    """What ranks have told each other, by the collective's name; the bytes of one rank's."""

    plans: list[bytes]  # by rank, pickled: for the coordinator
    holdings: list[bytes]  # by rank, pickled: for Megatron's validation
    last: Any = None  # what was told last
    weights: list[Any] | None = None  # of the ranks of a data-parallel group; None: not asked yet
    nbytes: dict[str, int] = field(default_factory=dict)
    plans_read_s: float = 0.0

    def all_gathered(self, found: list[Any], mine: Any, group: Any = None) -> None:
        self.last = mine
        if isinstance(group, Group) and mine:
            self.nbytes["group"] = max(self.nbytes.get("group", 0), len(pickle.dumps(mine)))
        of_group = self.weights if isinstance(group, Group) else None
        found[:] = [mine] * len(found) if of_group is None else of_group

    def gathered(self, obj: Any, object_gather_list: list[Any] | None = None, **_: Any) -> None:
        self.plans[dist.get_rank()] = pickle.dumps(obj)
        if object_gather_list is not None:  # the coordinator, played last
            began = time.process_time()
            object_gather_list[:] = map(pickle.loads, self.plans)
            self.plans_read_s = time.process_time() - began


@contextmanager
def as_rank(rank: int, world: int, told: Told) -> Iterator[None]:
    """This process as a rank of such a world, whose device is torch's "meta"."""

    def of(group: Any, known: Callable[[Group], Any], other: Any) -> Any:
        return known(group) if isinstance(group, Group) else other

    def type_of(self: Tensor, *args: Any, **kwargs: Any) -> Any:  # Megatron knows its parameters by it
        found = _type(self, *args, **kwargs)
        return found.replace("torch.meta.", "torch.") if isinstance(found, str) else found

    def made(ranks: Any, *_: Any, **__: Any) -> Group | None:
        return Group(list(ranks), rank) if rank in ranks else None

    told_of_it: Any = {
        "get_rank": lambda group=None: of(group, Group.rank, rank),
        "get_world_size": lambda group=None: of(group, Group.size, world),
        "get_process_group_ranks": lambda group=None: of(group, lambda g: g.ranks, list(range(world))),
        "get_global_rank": lambda group, at: of(group, lambda g: g.ranks[at], at),
        "all_gather_object": told.all_gathered,
        "gather_object": told.gathered,
    }
    with (
        mock.patch.multiple(dist, **told_of_it),
        mock.patch.multiple(dist.distributed_c10d, **told_of_it),  # where torch's own calls find them
        mock.patch.object(layouts, "new_group", made),
        mock.patch.object(type(facade.CPU_CUDA), "current_device", staticmethod(lambda: META)),
        mock.patch("genac_megatron.platform.device", return_value=META),
        mock.patch.object(Tensor, "type", type_of),
        mock.patch.object(filesystem_async, "_get_write_results_queue", return_value=None),
    ):
        yield


def role_of(config: RoleConfig, shape: Shape, layout: Layout) -> Role:
    """This rank's part of the role, after a step: it has Adam's states."""
    # Random values of meta tensors are none, and take a third of all seconds.
    with META, mock.patch.object(torch.nn.init, "normal_", lambda tensor, *_, **__: tensor):
        role = Role("actor", config, shape, layout, layouts._make_groups(layout, "actor"))
        role.begin_stage(None, 10)
        for part in getattr(role.optimizer, "chained_optimizers", [role.optimizer]):
            part.init_state_fn(part.optimizer, part.config)
            for one in part.optimizer.state.values():
                one["step"] = torch.tensor(1.0, device="cpu")
    return role


@dataclass
class Rank:
    """A rank that has been played up to what it would save."""

    rank: int
    role: Role
    state: dict[str, Any]
    seconds: float


def held(rank: int, told: Told, config: RoleConfig, shape: Shape, layout: Layout) -> Rank:
    """Up to Megatron's validation, which gathers of every rank what it holds."""
    gc.freeze()  # Megatron collects garbage at a save: this rank's, not what others were played with
    with as_rank(rank, layout.count, told):
        role = role_of(config, shape, layout)
        began = time.process_time()
        shards, _ = extract_matching_values(
            role_state(role, optimizer=True), lambda value: isinstance(value, ShardedBase)
        )
        with mock.patch.object(state_dict_utils, "validate_sharding_integrity"):
            state, _ = state_dict_utils.save_preprocess({ROLES: {role.name: shards}})
        told.holdings[rank] = pickle.dumps(told.last)
        return Rank(rank, role, state, time.process_time() - began)


def planned(one: Rank, told: Told, layout: Layout, folder: Path, written: Written) -> tuple[list[Any], float]:
    """The files that a rank's writers get, (path, name, (objects, tensors)), and seconds. Of the coordinator
    what it makes of all plans is `written`, and its seconds apart.
    """
    create = strategies.MCoreSavePlanner.create_global_plan

    def global_plan(planner: Any, plans: list[Any]) -> Any:
        began = time.process_time()
        found = create(planner, plans)
        written.coordinator_s, written.metadata = time.process_time() - began, found[1]
        return found

    with (
        as_rank(one.rank, layout.count, told),
        mock.patch.object(strategies.MCoreSavePlanner, "create_global_plan", global_plan),
    ):
        began = time.process_time()
        request = SharedWriting({one.role.name: one.role}).async_save(one.state, folder)
        seconds = time.process_time() - began
        if one.rank == 0:
            seconds -= told.plans_read_s + written.coordinator_s
        return list(request.async_fn_args[1]) if request.async_fn_args else [], seconds


def deals(one: Rank, told: Told, layout: Layout) -> Any:
    """What a rank tells its data-parallel group before weights are dealt out."""
    weights = {key: part for key, part in one.state[ROLES][one.role.name].items() if key != OPTIMIZER}
    with as_rank(one.rank, layout.count, told), mock.patch.object(told, "weights", None):
        determine_main_replica_uniform_distribution(weights, one.role.groups.dp_cp)
    return told.last


def groups_of(layout: Layout) -> Iterator[list[int]]:
    """Data-parallel groups, the one of rank 0 last, and it last in it: it is the coordinator."""
    for stage in reversed(range(layout.pp)):
        for tp in reversed(range(layout.tp)):
            yield [layout.rank_of(Coords(tp, 0, dp, stage)) for dp in reversed(range(layout.dp))]


@dataclass
class Written:
    """What a save makes."""

    files: dict[str, int] = field(default_factory=dict)  # by name: bytes
    by_rank: dict[int, int] = field(default_factory=dict)  # bytes
    of_tensors: int = 0  # bytes
    seconds: list[float] = field(default_factory=list)  # of a rank, but for the coordinator's global plan
    coordinator_s: float = 0.0
    metadata: Any = None

    def add(self, rank: int, buckets: list[Any]) -> dict[Any, _StorageInfo]:
        """The files of a rank's writers."""
        places: dict[Any, _StorageInfo] = {}
        for _, name, (objects, tensors) in buckets:
            at = 0
            self.of_tensors += sum(tensor.numel() * tensor.itemsize for _, tensor in tensors)
            for item, size in [
                *((item, len(data.getvalue())) for item, data in objects),
                *((item, tensor.numel() * tensor.itemsize) for item, tensor in tensors),
            ]:
                places[item.index] = _StorageInfo(name, at, size)
                at += size
            self.files[name] = at
            self.by_rank[rank] = self.by_rank.get(rank, 0) + at
        return places


def saved(
    config: RoleConfig, shape: Shape, layout: Layout, folder: Path, count: int | None
) -> tuple[Written, Told]:
    """Every rank's part of a save, planned; the metadata's file lies in `folder` then. Or of `count` groups'
    ranks, without the coordinator's part.
    """
    told, written = Told([b""] * layout.count, [b""] * layout.count), Written()
    places: dict[Any, _StorageInfo] = {}
    every = list(groups_of(layout))
    for group in every if count is None else every[:: len(every) // count][:count]:
        gc.unfreeze()
        ranks = [held(rank, told, config, shape, layout) for rank in group]
        told.weights = [deals(one, told, layout) for one in reversed(ranks)]  # in the group's order
        for one in ranks:
            buckets, seconds = planned(one, told, layout, folder, written)
            places |= written.add(one.rank, buckets)
            written.seconds.append(one.seconds + seconds)
        print(f"ranks {group[-1]} to {group[0]}: {written.seconds[-1]:.1f} s of the last", flush=True)
    if count is None:
        written.metadata.storage_data = places
        (folder / ".metadata").write_bytes(pickle.dumps(written.metadata))
    return written, told


class Planned(GenacError):
    """A rank knows what it will read."""


def read(
    config: RoleConfig, shape: Shape, layout: Layout, stage: int, told: Told, metadata: Any
) -> list[Any]:
    """Of a data-parallel group that resumes, which has read the metadata: (bytes, files, seconds) of each of
    its first READERS, and what they are sent of weights, (tensors, bytes).
    """
    gc.unfreeze()
    group = [layout.rank_of(Coords(0, 0, dp, stage)) for dp in range(layout.dp)]
    ranks = [held(rank, told, config, shape, layout) for rank in group]
    told.weights = [deals(one, told, layout) for one in ranks]
    found: list[Any] = []

    def planned_only(state: Any, reader: Any, planner: Any, **_: Any) -> None:
        planner.set_up_planner(state, metadata, is_coordinator=False)
        reader.set_up_storage_reader(metadata, is_coordinator=False)
        plan = reader.prepare_local_plan(planner.create_local_plan())
        places = [reader.storage_data[item.storage_index] for item in plan.items]
        found.append([sum(place.length for place in places), len({place.relative_path for place in places})])
        raise Planned("planned")

    for one in ranks[:READERS]:
        gc.freeze()
        with (
            as_rank(one.rank, layout.count, told),
            mock.patch.object(sharding, "agree", lambda act: act()),
            mock.patch.object(strategies.checkpoint, "load_state_dict", planned_only),
            mock.patch.object(default_planner, "_init_state_dict"),  # makes memory
        ):
            state = {ROLES: {one.role.name: role_state(one.role, optimizer=True, loading=True)}}
            request, *_ = state_dict_utils.load_preprocess(state)
            request, _ = extract_matching_values(request, lambda value: isinstance(value, ShardedBase))
            began = time.process_time()
            with contextlib.suppress(Planned):
                SharedReading({one.role.name: one.role}, lambda _: Planned("planned")).load(request, Path())
            found[-1] += [time.process_time() - began, *sent(request[ROLES][one.role.name], one.role)]
    return found


def sent(role: dict[str, Any], played: Role) -> tuple[int, int]:
    """(broadcasts, bytes) that weights take, each from the rank that reads it to those that need it too."""
    weights = {key: part for key, part in role.items() if key != OPTIMIZER}
    plan = determine_main_replica_uniform_distribution(weights, played.groups.dp_cp, True)
    shared = [
        plan.shard_to_metadata[key] for key, ranks in plan.all_ranks_for_shard.items() if len(ranks) > 1
    ]
    return len(shared), sum(math.prod(one.local_shape) * one.dtype.itemsize for one in shared)


def validated(told: Told, layout: Layout) -> tuple[float, float]:
    """Seconds of reading what all ranks hold, as each does, and of looking through it, as the first does."""
    began = time.process_time()
    found = [pickle.loads(one) for one in told.holdings]
    read_s = time.process_time() - began
    with as_rank(0, layout.count, told):
        began = time.process_time()
        validate_sharding_integrity(found)
    return read_s, time.process_time() - began


def rows(
    config: RoleConfig, shape: Shape, layout: Layout, folder: Path, count: int | None = None
) -> list[dict[str, Any]]:
    """count: of data-parallel groups that are played; None: all, and what needs all of them."""
    written, told = saved(config, shape, layout, folder, count)
    shares = list(written.by_rank.values())
    made: list[dict[str, Any]] = [
        {
            "a save": "of a rank",
            "files": f"{len(written.files) / len(shares):g}",
            "GiB": f"{min(shares) / GIB:.2f} to {max(shares) / GIB:.2f}",
            "told all, KB": round(max(map(len, told.holdings)) / 1e3),
            "told its group, KB": round(told.nbytes["group"] / 1e3),
            "told one, KB": round(max(map(len, told.plans)) / 1e3),
            "s": round(max(written.seconds), 2),
        }
    ]
    if count is not None:
        return made
    read_s, look_s = validated(told, layout)
    stages = (0, layout.pp - 1)
    began = time.process_time()
    metadata = FileSystemReader(folder).read_metadata()
    metadata_s = time.process_time() - began
    resumed = [one for stage in stages for one in read(config, shape, layout, stage, told, metadata)]
    gib, files, seconds, calls, weights = zip(*resumed, strict=True)
    made.append(
        {
            "a save": "of all",
            "files": len(written.files) + OTHERS,
            "bytes": sum(shares),
            "of tensors": written.of_tensors,
            "pieces": sum(len(pickle.loads(plan).items) for plan in told.plans),
            "metadata, MB": round((folder / ".metadata").stat().st_size / 1e6, 1),
            "what all hold read by each, s": round(read_s, 2),
            "validated by one, s": round(look_s, 2),
            "plans read by one, s": round(told.plans_read_s, 2),
            "planned by one, s": round(written.coordinator_s, 2),
        }
    )
    made.append(
        {
            "a resume": "of a rank",
            "files": f"{min(files)} to {max(files)}",
            "GiB": f"{min(gib) / GIB:.2f} to {max(gib) / GIB:.2f}",
            "broadcasts": max(calls),
            "GiB of them": round(max(weights) / GIB, 2),
            "metadata read, s": round(metadata_s, 2),
            "s": round(max(seconds), 2),
        }
    )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--groups", type=int, help="data-parallel groups that are played; all: the default")
    options = parser.parse_args()
    layout_ = {"count": options.ranks, "tp": 4, "pp": 8, "ep": 16, "pipeline_model_parallel_layout": STAGES}
    config = RoleConfig.model_validate(
        {
            "model": {"family": "qwen3_moe", "shape": SHAPE, "tokenizer": "builtin:tiny"},
            "layout": layout_,
            "training": {"dtype": "bf16"},
        }
    )
    shape = shape_of(config.model, SHAPE["vocab"])
    init_world()
    layout = Layout.from_config("actor", config.layout, options.ranks)
    with tempfile.TemporaryDirectory(prefix="genac-") as folder:
        found = rows(config, shape, layout, Path(folder), options.groups)
    close_world()
    for row in found:
        print(table([row]), end="\n\n")
    settings = {**vars(options), "shape": SHAPE, "layout": "tp4 pp8 ep16", "parameters": parameters(shape)}
    print(save(f"scale_checkpoint-{options.ranks}", settings, found))


if __name__ == "__main__":
    main()
