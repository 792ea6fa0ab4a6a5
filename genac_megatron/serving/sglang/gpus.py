"""Which of the job's GPUs a role's servers run on. Not run on a GPU. No torch.

`engine.gpus` counts in CUDA_VISIBLE_DEVICES of the process that starts the servers, as CUDA does: the job may
have been given GPUs 4 to 7, in any order, by number, by UUID or as MIG instances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from genac_megatron.errors import InputError
from genac_megatron.recipe.schema import EngineConfig
from genac_megatron.recipe.servers import plan_gpus

VARIABLE = "CUDA_VISIBLE_DEVICES"
MIG = "MIG-"


def visible_gpus(environ: Mapping[str, str], count: int = 0) -> tuple[str, ...] | None:
    """The job's GPUs as CUDA_VISIBLE_DEVICES names them, in its order.

    count: how many this process sees, for where the variable is not set; 0: not known. None where neither
    tells. CUDA takes what lies before the first entry that is none, so "-1" and "NoDevFiles" are no GPU.
    """
    if VARIABLE not in environ:
        return tuple(map(str, range(count))) if count else None
    found: list[str] = []
    for entry in environ[VARIABLE].split(","):
        name = entry.strip()
        if not (name.isdecimal() or name.startswith(("GPU-", MIG))) or name in found:
            break
        found.append(name)
    # A number that the node has no GPU of is none either; of MIG instances a process counts one.
    known = count and not any(name.startswith(MIG) for name in found)
    return tuple(found[:count] if known else found)


def server_gpus(role: str, index: int, places: Sequence[int], visible: tuple[str, ...] | None) -> list[str]:
    """What CUDA_VISIBLE_DEVICES of server `index` names, in the order of its ranks.

    places: its GPUs as numbers among the job's on its node (recipe/servers.py). Raises InputError where the
    job has not got so many, one is named twice for a server, or that would need two MIG instances.
    """
    where = f"roles.{role}.engine.gpus"
    if len(set(places)) < len(places):
        raise InputError(
            f"server {role}/{index} would have GPUs {list(places)}, one of them twice",
            where=where,
            way_out="name tp different ones for each server, in order",
        )
    if visible is None:
        return list(map(str, places))
    if max(places) >= len(visible):
        has = f"{len(visible)} ({VARIABLE}={','.join(visible)})" if visible else f"none ({VARIABLE})"
        raise InputError(
            f"server {role}/{index} takes GPU {max(places)} of the job, counted from 0, and this process "
            f"sees {has}",
            where=where,
            way_out="name GPUs among those (roles may share one), lower engine.engines or engine.tp, or ask "
            "for more; a rank bound to one GPU (srun --gpu-bind, --gpus-per-task) cannot start servers on "
            "others",
        )
    named = [visible[place] for place in places]
    if len(named) > 1 and any(name.startswith(MIG) for name in named):
        raise InputError(
            f"server {role}/{index} takes {len(named)} MIG instances, and a process can use one",
            where=where,
            way_out="engine.tp: 1, or whole GPUs",
        )
    return named


def refusals(
    engines: Mapping[str, EngineConfig], node: int, visible: tuple[str, ...] | None
) -> list[InputError]:
    """Why servers of these roles cannot have the GPUs of the plan on a node; none where they can."""
    found = []
    for role, servers in plan_gpus(engines).items():
        for index, places in enumerate(servers):
            if node in engines[role].nodes_of(index):
                try:
                    server_gpus(role, index, places, visible)
                except InputError as error:
                    found.append(error)
    return found


def arguments_on(gpus: list[str]) -> tuple[str, ...]:
    """SGLang's arguments for GPUs that have no numbers: its own all-reduce fails on other names (0.5.23)."""
    plain = all(name.isdecimal() for name in gpus)
    return () if plain or len(gpus) == 1 else ("--disable-custom-all-reduce",)


def identity(name: str, uuid: str) -> str:
    """A GPU as every process of its node calls it, whatever its mask.

    name: its entry of CUDA_VISIBLE_DEVICES, which is all that is told of a MIG instance. uuid: as CUDA says,
    "" where it does not.
    """
    return name if name.startswith(MIG) or not uuid else f"GPU-{uuid.removeprefix('GPU-')}"


def ranks_on(
    servers: Mapping[str, tuple[int, tuple[str, ...]]], ranks: list[tuple[int, str]]
) -> dict[str, list[int]] | None:
    """Per server the global ranks that train on its GPUs, in order; None where one has a GPU of its own.

    servers: by name, node and GPUs (`identity`). ranks: of each rank, node and GPU.
    """
    rank_at: dict[tuple[int, str], int] = {}
    for rank, place in enumerate(ranks):
        rank_at.setdefault(place, rank)
    found = {}
    for server, (node, gpus) in servers.items():
        places = [(node, gpu) for gpu in gpus]
        if not places or not all(place in rank_at for place in places):
            return None
        found[server] = [rank_at[place] for place in places]
    return found
