"""What the preflight's reports say: which node is bad, and why. No torch."""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genac_megatron.cluster.gpus import gpu
from genac_megatron.cluster.placement import Placement, placement
from genac_megatron.errors import EXIT_OK, InputError
from genac_megatron.recipe.schema import Recipe

SKEW_S = 2.0
TMP_GIB, SHM_GIB = 1.0, 0.06  # what libraries need at least: temporary files, shared memory of loaders
SAME = 0.99  # of a GPU's memory: drivers keep some, not always as much
BUSY_MIB = 2048  # GPU memory in use before the run: somebody else's process
Report = Mapping[str, Any]


def judge_folder(recipe: Recipe, folder: Path) -> int:
    """Print what was found, 0 where every node is fit; raises InputError naming the bad nodes."""
    nodes, ranks = _read(folder, "node-*.json"), _read(folder, "rank-*.json")
    place = placement(recipe)
    least = float(os.environ.get("GENAC_MIN_FREE_GIB", "50"))
    bandwidth = float(os.environ.get("GENAC_MIN_BUSBW", "0"))
    named = gpu(recipe.cluster.gpu).memory_gib if recipe.cluster.gpu is not None else 0.0
    faults = judge(place, nodes, ranks, least_gib=least, least_gbs=bandwidth, gpu_gib=named)
    if faults:
        raise InputError(
            "\n  ".join(["not every node is fit:", *faults]),
            where="preflight",
            way_out="exclude the node (sbatch --exclude=NODE) and tell its administrators; reports: "
            f"{folder}; GENAC_PREFLIGHT=off goes on regardless",
        )
    print(summary(nodes, ranks))
    return EXIT_OK


def _read(folder: Path, pattern: str) -> list[Report]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(pattern))]


def judge(
    place: Placement,
    nodes: Sequence[Report],
    ranks: Sequence[Report],
    *,
    least_gib: float,
    least_gbs: float,
    gpu_gib: float = 0.0,
) -> list[str]:
    """Every fault, each beginning with its node.

    least_gib: free for the run; least_gbs: bus bandwidth; gpu_gib: of each GPU, as the recipe's memory was
    worked out for.
    """
    faults = _absent(place, nodes, ranks)
    for node in nodes:
        faults += [f"{node['node']}: {text}" for text in _node(node, place, least_gib, gpu_gib)]
    faults += _versions(nodes) + _drivers(nodes) + _clocks(ranks) + _canaries(ranks)
    for rank in ranks:
        if "error" in rank:
            faults.append(f"{rank['node']}: rank {rank['rank']}: all-reduce: {rank['error']}")
        elif rank.get("right") is False:
            faults.append(f"{rank['node']}: rank {rank['rank']}: the all-reduce gave wrong numbers")
    slowest = min((rank["bus_gbs"] for rank in ranks if "bus_gbs" in rank), default=None)
    if least_gbs and slowest is not None and slowest < least_gbs:
        faults.append(f"all nodes: all-reduce at {slowest:.1f} GB/s, wanted are {least_gbs:.1f}")
    # A rank that waits for a bad node also fails: where somebody never came, that is the cause.
    causes = [fault for fault in faults if "all-reduce:" not in fault]
    return causes or faults


def _absent(place: Placement, nodes: Sequence[Report], ranks: Sequence[Report]) -> list[str]:
    names = os.environ.get("GENAC_NODE_NAMES", "").split()
    there = {rank["rank"] for rank in ranks}
    absent: Counter[str] = Counter()
    for rank in set(range(place.ranks)) - there:
        at = place.node_of(rank)
        absent[names[at] if at < len(names) else f"node {at}"] += 1
    faults = [f"{node}: {count} rank(s) did not start" for node, count in sorted(absent.items())]
    if absent:
        return faults
    reported = {node["node"] for node in nodes}
    stuck = sorted({rank["node"] for rank in ranks} - reported)
    faults += [f"{node}: it was not looked at to the end" for node in stuck]
    hung = [rank for rank in ranks if rank["state"] != "done"]
    if hung and len(hung) < len(ranks):
        faults += [f"{rank['node']}: rank {rank['rank']} hangs, {rank['state']}" for rank in hung]
    elif hung:
        faults.append("all nodes: no rank came out of the all-reduce in time")
    return faults


def _node(node: Report, place: Placement, least_gib: float, gpu_gib: float) -> list[str]:
    faults = _gpus(node["gpus"], place.gpus_per_node, gpu_gib)
    if "error" in node["versions"]:
        faults.append(f"versions: {node['versions']['error']}")
    for name, least in (("runs", least_gib), ("tmp", TMP_GIB), ("shm", SHM_GIB)):
        free = node["free_gib"].get(name)
        if free is not None and free < least:
            faults.append(f"{free:.2f} GiB free in {name}, wanted are {least:g}")
    if node["busy_ports"]:
        faults.append(f"ports in use: {', '.join(map(str, node['busy_ports']))}")
    return faults + list(node["missing"])


def _gpus(found: Any, wanted: int, gpu_gib: float) -> list[str]:
    if found is None:
        return ["no nvidia-smi"] if wanted else []
    if isinstance(found, str):
        return [found]
    faults = [] if len(found) >= wanted else [f"{len(found)} GPU(s), wanted are {wanted}"]
    for row in found:
        if row.get("job") == "no":
            continue
        errors = row.get("ecc.errors.uncorrected.volatile.total", "")
        if errors.isdecimal() and int(errors):
            faults.append(f"GPU {row['index']}: {errors} uncorrected ECC error(s)")
        total = row.get("memory.total", "")
        if wanted and total.isdecimal() and int(total) / 1024 < SAME * gpu_gib:
            has = f"GPU {row['index']}: {int(total) / 1024:.1f} GiB"
            faults.append(f"{has}, the recipe is worked out for {gpu_gib:.1f} (cluster.gpu)")
        used = row.get("memory.used", "")
        if wanted and used.isdecimal() and int(used) > BUSY_MIB:
            faults.append(f"GPU {row['index']}: {used} MiB in use by somebody else")
    return faults


def _versions(nodes: Sequence[Report]) -> list[str]:
    """Nodes whose packages differ from what most nodes have."""
    faults = []
    for name in sorted(set().union(*(node["versions"] for node in nodes)) - {"error"}):
        seen = Counter(node["versions"].get(name, "-") for node in nodes if "error" not in node["versions"])
        if len(seen) > 1:
            usual = seen.most_common(1)[0][0]
            faults += [
                f"{node['node']}: {name} {node['versions'].get(name, '-')}, elsewhere {usual}"
                for node in nodes
                if node["versions"].get(name, "-") != usual
            ]
    return faults


def _drivers(nodes: Sequence[Report]) -> list[str]:
    found = {
        n["node"]: n["gpus"][0]["driver_version"] for n in nodes if isinstance(n["gpus"], list) and n["gpus"]
    }
    if len(set(found.values())) < 2:
        return []
    usual = Counter(found.values()).most_common(1)[0][0]
    return [f"{node}: driver {has}, elsewhere {usual}" for node, has in found.items() if has != usual]


def _clocks(ranks: Sequence[Report]) -> list[str]:
    clocks: list[float] = next((rank["clocks"] for rank in ranks if rank.get("clocks")), [])
    if len(clocks) < 2:
        return []
    middle = statistics.median(clocks)
    off = {ranks[i]["node"]: clock - middle for i, clock in enumerate(clocks) if i < len(ranks)}
    return [f"{node}: its clock is {by:+.1f} s off" for node, by in off.items() if abs(by) > SKEW_S]


def _canaries(ranks: Sequence[Report]) -> list[str]:
    names = {rank["rank"]: rank["node"] for rank in ranks}
    faults = []
    for rank in ranks:
        if unseen := rank.get("unseen"):
            others = sorted({names.get(other, f"rank {other}") for other in unseen})
            faults.append(f"{rank['node']}: does not see the files of {', '.join(others)} in the run folder")
    return faults


def summary(nodes: Sequence[Report], ranks: Sequence[Report]) -> str:
    """One line on nodes that are all fit."""
    gpus = sum(len(node["gpus"]) for node in nodes if isinstance(node["gpus"], list))
    parts = [f"preflight: {len(nodes)} node(s), {len(ranks)} rank(s)", f"{gpus} GPU(s)" if gpus else "no GPU"]
    rates = [rank["bus_gbs"] for rank in ranks if "bus_gbs" in rank]
    if rates:
        parts.append(
            f"all-reduce {min(rates):.2f} GB/s over {nodes[0]['interface'] or 'an unknown interface'}"
        )
    parts.append(f"{max(rank.get('seconds', 0.0) for rank in ranks):.0f} s")
    return ", ".join(parts)
