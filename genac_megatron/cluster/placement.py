"""How many nodes, tasks and GPUs a recipe needs, and why it does not fit where it does not. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from genac_megatron.cluster.gpus import gpu
from genac_megatron.recipe import memory
from genac_megatron.recipe.estimate import place_of
from genac_megatron.recipe.memory import Tenants
from genac_megatron.recipe.rules import ranks_of
from genac_megatron.recipe.schema import Recipe
from genac_megatron.recipe.servers import plan_gpus, role_gpus, started_engines, too_few
from genac_megatron.recipe.share import GIB, Share

SUGGESTED = "change these keys; genac run RECIPE --dry-run shows who holds what"


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
        found += _fp8(recipe) + _servers(recipe, place) + publication_faults(recipe)
        found += [] if found else fit_faults(recipe)
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


def publication_faults(recipe: Recipe) -> list[str]:
    """Servers on GPUs that no way brings weights to; nothing where all are reached.

    CUDA IPC stays on a GPU, so each of a role's servers must share those of ranks. NCCL takes one process of
    a GPU in a group: none may share that of a rank that sends, the first of a pipeline stage.
    """
    place, found = placement(recipe), []
    plan = plan_gpus(started_engines(recipe))
    for name, engine in started_engines(recipe).items():
        role = recipe.roles[name]
        layout, way = role.layout, role.publication.transport
        stage = ranks_of(layout, recipe.world.ranks) // layout.pp
        sources = [layout.first_rank + stage * index for index in range(layout.pp)]
        sending = {(place.node_of(rank), rank % place.ranks_per_node) for rank in sources}
        served = {
            (node, gpu)
            for index, gpus in enumerate(plan[name])
            for node in engine.nodes_of(index)
            for gpu in gpus
        }
        alone, both = {one for one in served if one[1] >= place.ranks_per_node}, served & sending
        if way == "tensor" and alone:
            why = f"no rank is on GPU {_named(alone)}, where CUDA IPC would have to begin"
        elif both and (way == "group" or (way == "auto" and (alone or engine.nnodes > 1))):
            why = f"on GPU {_named(both)} is also a rank that sends, and NCCL takes one process of a GPU"
            why += f"; CUDA IPC does not reach GPU {_named(alone)}, where no rank is" if alone else ""
        else:
            continue
        found.append(
            f"weights of '{name}' do not reach all its servers: {why}: change roles.{name}.engine.gpus (all "
            "with ranks, or none with a sender), or publication.transport (tensor: all with ranks; disk: any)"
        )
    return found


def _named(gpus: set[tuple[int, int]]) -> str:
    return ", ".join(f"{gpu} of node {node}" for node, gpu in sorted(gpus))


def fit_faults(recipe: Recipe) -> list[str]:
    """What does not fit the memory of the GPU that the recipe names; nothing where all does."""
    name = recipe.cluster.gpu or ""
    return memory.faults(recipe, tenants(recipe), gpu(name).memory_gib * GIB, name)


def server_shares(recipe: Recipe) -> dict[str, Share]:
    """What the servers of each role get of each of their GPUs. The recipe names its GPU."""
    return memory.shares(recipe, tenants(recipe), gpu(recipe.cluster.gpu or "").memory_gib * GIB)


def describe_memory(recipe: Recipe) -> str:
    """Who holds what on each kind of GPU in each phase, and what does not fit. The recipe names its GPU."""
    name = recipe.cluster.gpu or ""
    text = memory.describe(recipe, tenants(recipe), gpu(name).memory_gib * GIB, name)
    return "\n".join([text, *(f"  does not fit: {reason}" for reason in misfits(recipe))])


def heaviest(recipe: Recipe) -> tuple[int, float, dict[str, float]]:
    """The rank whose GPU needs most in some phase, its GiB, and the GiB of the parties in that phase.

    Of a KV cache that takes what is left it counts one response. Of GPUs without a rank it says nothing. The
    recipe names its GPU.
    """
    total = gpu(recipe.cluster.gpu or "").memory_gib * GIB
    found = memory.timelines(recipe, tenants(recipe), total, least=True)
    lines = [line for line in found if line.tenants.rank is not None]
    line = max(lines, key=lambda line: line.used(line.peak))
    parties = line.phases[line.peak]
    return line.tenants.rank or 0, line.used(line.peak) / GIB, {k: v / GIB for k, v in parties.items()}


def tenants(recipe: Recipe) -> list[Tenants]:
    """Who shares a GPU with whom, each kind of GPU once.

    Data-parallel ranks are alike: a rank's pipeline stages and the servers on its GPU make its kind.
    """
    place, roles = placement(recipe), recipe.roles
    kinds: dict[object, Tenants] = {}
    alike: dict[object, list[tuple[int, int]]] = {}
    for node in range(place.nodes):
        servers = {name: role_gpus(recipe, name, node) for name in roles}
        each = max([place.ranks_per_node, *(1 + max(gpus) for gpus in servers.values() if gpus)])
        for index in range(each):
            rank = node * place.ranks_per_node + index if index < place.ranks_per_node else None
            at = {name: place_of(role.layout, rank, recipe.world.ranks) if rank is not None else None
                  for name, role in roles.items()}  # fmt: skip
            there = tuple(name for name, gpus in servers.items() if index in gpus)
            kind = (rank is None, there, tuple(None if found is None else found.pp for found in at.values()))
            kinds.setdefault(kind, Tenants((), rank, at, there))
            alike.setdefault(kind, []).append((node, index))
    return [replace(known, gpus=tuple(alike[kind])) for kind, known in kinds.items()]


def server_count(recipe: Recipe) -> int:
    """Servers that the run starts, of all roles and on all nodes."""
    return sum(engine.engines for engine in started_engines(recipe).values())


def _servers(recipe: Recipe, place: Placement) -> list[str]:
    """GPUs that servers name and their node lacks."""
    return too_few(started_engines(recipe), place.gpus_per_node)


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
            share = f"a part of {engine.engines_per_node}" if engine.nnodes > 1 else engine.engines_per_node
            parts.append(f"{share} server(s) of {name} (tp {engine.tp}{gpus})")
    if trains:
        parts.insert(0, f"train {' and '.join(trains)}")
    return "; ".join(parts) or "drive requests alone"


def describe(recipe: Recipe) -> str:
    """One line on what the job asks for."""
    place = placement(recipe)
    what = f"{place.gpus_per_node} x {recipe.cluster.gpu}" if recipe.cluster.gpu else "no GPU"
    text = f"{place.nodes} node(s) of {place.ranks_per_node} rank(s), {what}"
    if recipe.cluster.gpu:
        text += f", {heaviest(recipe)[1]:.1f} GiB of each GPU needed, as estimated"
    return text
