"""Which GPUs a run's servers take: one plan for `genac slurm`, preflight, estimate and fleet. No torch.

GPUs are numbers among the job's on a node, as CUDA_VISIBLE_DEVICES lists them there
(serving/sglang/gpus.py makes names of them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from genac_megatron.recipe.schema import AdapterConfig, EngineConfig, Recipe

VERSIONS_AT_ONCE = 2  # of a role's adapters that a server decodes with: the newest, and the one before
Plan = dict[str, list[list[int]]]  # role -> server -> the GPUs of its ranks, in order, on each of its nodes


def plan_gpus(engines: Mapping[str, EngineConfig]) -> Plan:
    """The GPUs of every server of these roles, each role's servers in order.

    `engine.gpus` is taken at its word: only so do two roles share a GPU. Every other server takes the first
    GPUs of its node that nobody has, roles in their order.
    """
    plan: Plan = {
        name: [engine.gpus_of(n) for n in range(engine.engines)] for name, engine in engines.items()
    }
    taken: dict[int, set[int]] = {}  # by node
    for name, engine in engines.items():
        for index, places in enumerate(plan[name]):
            for node in engine.nodes_of(index):
                taken.setdefault(node, set()).update(places)
    for name, engine in engines.items():
        for index in range(engine.engines) if not engine.gpus else ():
            here = [taken.setdefault(node, set()) for node in engine.nodes_of(index)]
            used = set[int]().union(*here)
            free = (place for place in range(len(used) + engine.tp) if place not in used)
            plan[name][index] = [next(free) for _ in range(engine.tp_per_node)]
            for held in here:
                held.update(plan[name][index])
    return plan


def started_engines(recipe: Recipe) -> dict[str, EngineConfig]:
    """The engines whose servers the run starts, by role."""
    return {name: role.engine for name, role in recipe.roles.items() if role.starts_servers}


def served_adapters(recipe: Recipe, role: str) -> list[AdapterConfig]:
    """What a role's servers load beside their base: its adapters and those of roles that share them."""
    if not recipe.roles[role].engine.enable_lora:
        return []
    sharing = (config for name, config in recipe.roles.items() if role in (name, config.engine.share))
    return [config.training.adapter for config in sharing if config.training.adapter is not None]


def lora_slots(adapters: Sequence[AdapterConfig]) -> int:
    """How many adapters of these roles a server decodes with at once, the base itself being one."""
    return VERSIONS_AT_ONCE * len(adapters) + 1


def widest(adapters: Sequence[AdapterConfig]) -> AdapterConfig:
    """What every slot has room for: the largest rank on all their projections."""
    targets = sorted({target for adapter in adapters for target in adapter.targets})
    return AdapterConfig(rank=max(adapter.rank for adapter in adapters), targets=targets)


def node_servers(engines: Mapping[str, EngineConfig], node: int, *, gpu: bool) -> dict[str, list[int]]:
    """The servers of a node by name, "actor/0", and the GPU of each rank; on a CPU the ranks' own numbers."""
    return {
        f"{name}/{index}": places if gpu else list(range(len(places)))
        for name, servers in plan_gpus(engines).items()
        for index, places in enumerate(servers)
        if node in engines[name].nodes_of(index)
    }


def role_gpus(recipe: Recipe, role: str, node: int) -> list[int]:
    """The GPUs that a role's servers take on a node, in order; none where the run starts no server there."""
    engines = started_engines(recipe)
    if role not in engines:
        return []
    plan, engine = plan_gpus(engines)[role], engines[role]
    return [place for n, places in enumerate(plan) if node in engine.nodes_of(n) for place in places]


def too_few(engines: Mapping[str, EngineConfig], gpus: int) -> list[str]:
    """What servers take more GPUs than the `gpus` of their node, and the way out; nothing where all fit."""
    found = []
    plan = plan_gpus(engines)
    for name, engine in engines.items():
        over = [n for n, places in enumerate(plan[name]) if max(places) >= gpus]
        if not over:
            continue
        most = max(max(plan[name][n]) for n in over)
        text = f"the servers of '{name}' take GPUs up to {most}, a node has {gpus}"
        nodes = {node for n in over for node in engine.nodes_of(n)}
        beside = [other for other, e in engines.items() if other != name and nodes & set(e.nodes)]
        way = f"lower roles.{name}.engine.engines or tp, or give them more nodes (engine.nodes)"
        if beside and not engine.gpus:
            text += f" ({', '.join(map(repr, beside))} has servers there too)"
            keys = " and ".join(f"roles.{one}.engine.gpus" for one in (name, *beside))
            way += f"; to have roles share GPUs, name them: {keys}"
        found.append(f"{text}: {way}")
    return found
