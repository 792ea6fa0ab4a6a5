"""How many nodes, tasks and GPUs a recipe needs, and why it does not fit where it does not. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from genac_megatron.cluster.gpus import gpu
from genac_megatron.models.families.base import Shape
from genac_megatron.recipe.estimate import memory_of, place_of, served_bytes
from genac_megatron.recipe.rules import ranks_of, read_shape
from genac_megatron.recipe.schema import Recipe
from genac_megatron.recipe.servers import role_gpus, started_engines, too_few

GIB = 2.0**30


@dataclass(frozen=True)
class Placement:
    """A recipe's share of a cluster; ranks fill nodes one after another."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int  # 0: ranks are CPU processes
    cpus_per_rank: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    def node_of(self, rank: int) -> int:
        """The node, counted from 0, that a rank is on."""
        return rank // self.ranks_per_node


def placement(recipe: Recipe) -> Placement:
    """Nodes and tasks for the recipe's ranks: as few nodes as hold them, all filled alike."""
    ranks, per_node = recipe.world.ranks, recipe.cluster.ranks_per_node
    nodes = -(-ranks // per_node)
    each = ranks // nodes if ranks % nodes == 0 else per_node
    return Placement(nodes, each, each if recipe.cluster.gpu else 0, recipe.cluster.cpus_per_rank)


def misfits(recipe: Recipe) -> list[str]:
    """Why the recipe does not fit the nodes it names; nothing where it does.

    Raises InputError where a model's folder cannot be read or the GPU is not known.
    """
    place = placement(recipe)
    found = []
    if place.ranks != recipe.world.ranks:
        found.append(
            f"world.ranks {recipe.world.ranks} leave one of {place.nodes} nodes of "
            f"{recipe.cluster.ranks_per_node} partly empty: set world.ranks to {place.ranks}, or "
            "cluster.ranks_per_node to a divisor of it"
        )
        return found
    found += _torn_groups(recipe, place) + _absent_nodes(recipe, place)
    if recipe.cluster.gpu is not None:
        found += _fp8(recipe) + _servers(recipe, place) + _memory(recipe)
    return found


def _torn_groups(recipe: Recipe, place: Placement) -> list[str]:
    """Tensor-parallel groups that would talk over the network in every layer."""
    found = []
    for name, role in recipe.roles.items():
        tp, first = role.layout.tp, role.layout.first_rank
        for start in range(first, first + ranks_of(role.layout, recipe.world.ranks), tp):
            if place.node_of(start) != place.node_of(start + tp - 1):
                found.append(
                    f"a tensor-parallel group of '{name}' (ranks {start} to {start + tp - 1}) lies on two "
                    f"nodes of {place.ranks_per_node} ranks: lower roles.{name}.layout.tp or move first_rank"
                )
                break
    return found


def _absent_nodes(recipe: Recipe, place: Placement) -> list[str]:
    """Nodes that servers are to start on and the job does not have."""
    return [
        f"the servers of '{name}' are to start on nodes {role.engine.nodes}, and the job's are 0 to "
        f"{place.nodes - 1}: change roles.{name}.engine.nodes, or world.ranks (each node has ranks, also one "
        "that only serves: layout.first_rank leaves them out of training)"
        for name, role in recipe.roles.items()
        if role.starts_servers and max(role.engine.nodes) >= place.nodes
    ]


def _fp8(recipe: Recipe) -> list[str]:
    name = recipe.cluster.gpu or ""
    known = gpu(name).fp8
    served = [
        f"'{role}' is served with quantization: fp8, which a {name} does not have: change "
        f"roles.{role}.engine.quantization"
        for role, config in recipe.roles.items()
        if config.starts_servers and config.engine.quantization == "fp8" and not known
    ]
    return served + [
        f"'{role}' trains with fp8: {config.training.fp8}, which a {name} does not have "
        f"({', '.join(known) or 'it has no fp8'}): change roles.{role}.training.fp8"
        for role, config in recipe.roles.items()
        if config.training.fp8 not in ("off", *known)
    ]


def _memory(recipe: Recipe) -> list[str]:
    name = recipe.cluster.gpu or ""
    rank, need, parts = heaviest(recipe)
    usable = gpu(name).usable_gib
    if need <= usable:
        return []
    text = ", ".join(f"{part} {size:.1f}" for part, size in parts.items() if size >= 0.05)
    return [
        f"rank {rank} needs about {need:.1f} GiB ({text}), and {usable:.1f} GiB of a {name} are free for it: "
        "raise tp, pp or the number of ranks, set recompute: full, or lower tokens_per_microbatch or "
        "engine.max_batch_tokens"
    ]


def heaviest(recipe: Recipe) -> tuple[int, float, dict[str, float]]:
    """The rank with the highest estimate, its GiB, and the GiB of its parts ("actor weights": ...)."""
    shapes = {name: read_shape(role.model) for name, role in recipe.roles.items()}
    place = placement(recipe)
    best: tuple[int, float, dict[str, float]] = (0, -1.0, {})
    seen = set()
    for rank in range(recipe.world.ranks):
        places = tuple(place_of(role.layout, rank, recipe.world.ranks) for role in recipe.roles.values())
        # Data-parallel ranks are alike: only the pipeline stage and servers change a rank's memory.
        served = tuple(_shares_gpu(recipe, name, rank, place) for name in recipe.roles)
        kind = (tuple(None if place is None else place.pp for place in places), served)
        if kind in seen:
            continue
        seen.add(kind)
        parts = _parts(recipe, shapes, rank)
        total = sum(parts.values())
        if total > best[1]:
            best = (rank, total, parts)
    return best


def _parts(recipe: Recipe, shapes: Mapping[str, Shape], rank: int) -> dict[str, float]:
    parts = {}
    for name, role in recipe.roles.items():
        place = place_of(role.layout, rank, recipe.world.ranks)
        memory = memory_of(role, shapes[name], place, recipe.world.ranks)
        for part in ("weights", "gradients", "optimizer", "activations"):
            parts[f"{name} {part}"] = getattr(memory, part) / GIB
        embedded = role.engine.kind == "embedded"
        parts[f"{name} engine"] = memory.engine / GIB if embedded else _server_gib(recipe, name, rank)
    return parts


def server_count(recipe: Recipe) -> int:
    """Servers that the run starts, of all roles and on all nodes."""
    return sum(engine.engines for engine in started_engines(recipe).values())


def _shares_gpu(recipe: Recipe, role: str, rank: int, place: Placement) -> bool:
    """Whether a server of a role runs on a rank's GPU."""
    return rank % place.ranks_per_node in role_gpus(recipe, role, place.node_of(rank))


def _server_gib(recipe: Recipe, role: str, rank: int) -> float:
    """What a role's SGLang servers hold on a rank's GPU."""
    if not _shares_gpu(recipe, role, rank, placement(recipe)):
        return 0.0
    return recipe.roles[role].engine.mem_fraction * gpu(recipe.cluster.gpu or "").memory_gib


def _servers(recipe: Recipe, place: Placement) -> list[str]:
    """GPUs that servers name and their node lacks, and models too large for a server."""
    found = too_few(started_engines(recipe), place.gpus_per_node)
    for name, role in recipe.roles.items():
        if role.starts_servers:
            weights = served_bytes(role, read_shape(role.model)) / GIB
            share = role.engine.mem_fraction * gpu(recipe.cluster.gpu or "").memory_gib
            if weights > share:
                found.append(
                    f"a server of '{name}' has {share:.1f} GiB per GPU, its weights take {weights:.1f}: "
                    f"raise roles.{name}.engine.tp or mem_fraction"
                )
    return found


def duties(recipe: Recipe) -> list[str]:
    """What each of the job's nodes is for; one line for neighbours that are alike."""
    place = placement(recipe)
    told = [_duty(recipe, place, node) for node in range(place.nodes)]
    lines, start = [], 0
    for node in range(1, place.nodes + 1):
        if node == place.nodes or told[node] != told[start]:
            name = f"node {start}" if node - start == 1 else f"nodes {start} to {node - 1}"
            lines.append(f"{name}: {told[start]}")
            start = node
    return lines


def _duty(recipe: Recipe, place: Placement, node: int) -> str:
    ranks = range(node * place.ranks_per_node, (node + 1) * place.ranks_per_node)
    trains, parts = [], []
    for name, role in recipe.roles.items():
        first = role.layout.first_rank
        if set(ranks) & set(range(first, first + ranks_of(role.layout, recipe.world.ranks))):
            trains.append(name)
        if role.starts_servers and node in role.engine.nodes:
            engine, used = role.engine, role_gpus(recipe, name, node)
            gpus = f", GPUs {', '.join(map(str, used))}" if place.gpus_per_node else ""
            parts.append(f"{engine.engines_per_node} server(s) of {name} (tp {engine.tp}{gpus})")
    if trains:
        parts.insert(0, f"train {' and '.join(trains)}")
    return "; ".join(parts) or "drive requests alone"


def describe(recipe: Recipe) -> str:
    """One line on what the job asks for."""
    place = placement(recipe)
    what = f"{place.gpus_per_node} x {recipe.cluster.gpu}" if recipe.cluster.gpu else "no GPU"
    text = f"{place.nodes} node(s) of {place.ranks_per_node} rank(s), {what}"
    if recipe.cluster.gpu:
        text += f", at most {heaviest(recipe)[1]:.1f} GiB per GPU estimated"
    return text
