"""Which of the node's cores each server gets: near its GPUs, and none that another has. Linux. No torch.

A process inherits the mask of the one that starts it: under `srun --cpus-per-task` that is one rank's share,
and all servers of the node would run on it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SYS = Path("/sys")
ON_NODE = "SLURM_CPUS_ON_NODE"
Core = tuple[int, ...]  # the numbers of one core's hardware threads


@dataclass(frozen=True)
class Topology:
    """A node's cores as far as they are the job's, in order, and what lies near what."""

    cores: tuple[Core, ...]
    numa: Mapping[int, int] = field(default_factory=dict)  # of each hardware thread, where it is known
    gpus: Mapping[int, int] = field(default_factory=dict)  # a GPU's number among the job's -> its NUMA node


def deal_cores(servers: Mapping[str, Sequence[int]], topology: Topology) -> dict[str, list[int]]:
    """The hardware threads of each server, ascending.

    servers: the GPU of each of a server's ranks; on a CPU a number for each rank that no GPU has. Every rank
    gets an equal share of the cores of its GPU's NUMA node, or of all cores where some node is not known or
    has too few. Cores are dealt whole while there are enough. Where there are fewer hardware threads than
    servers, all have all of them.
    """
    threads = tuple((thread,) for core in topology.cores for thread in core)
    for units in (topology.cores, threads):
        for near in (True, False):
            found = _dealt(servers, units, topology, near=near)
            if found is not None:
                return {name: sorted(found[name]) for name in servers}
    return {name: sorted(thread for core in topology.cores for thread in core) for name in servers}


def _dealt(
    servers: Mapping[str, Sequence[int]], units: Sequence[Core], topology: Topology, *, near: bool
) -> dict[str, list[int]] | None:
    """The share of every server; None where a NUMA node is not known, or has fewer units than servers."""
    ranks: dict[int, list[str]] = defaultdict(list)  # NUMA node -> the server of each of its ranks
    for name, gpus in servers.items():
        for gpu in gpus:
            if near and gpu not in topology.gpus:
                return None
            ranks[topology.gpus[gpu] if near else 0].append(name)
    found: dict[str, list[int]] = defaultdict(list)
    for node, names in ranks.items():
        here = [unit for unit in units if not near or topology.numa.get(unit[0]) == node]
        if len(here) < len(names):
            names = list(dict.fromkeys(names))
        if len(here) < len(names):
            return None
        for n, name in enumerate(names):
            part = here[n * len(here) // len(names) : (n + 1) * len(here) // len(names)]
            found[name] += [thread for unit in part for thread in unit]
    return found


def job_threads(
    masks: Iterable[Collection[int]], allowed: Collection[int], environ: Mapping[str, str]
) -> set[int]:
    """The job's hardware threads on this node.

    masks: those of its ranks here. allowed: what the kernel would let a process have: the cgroup's, else the
    whole machine, which is the job's only where Slurm says that it has as many.
    """
    if environ.get(ON_NODE) == str(len(allowed)):
        return set(allowed)
    return {thread for mask in masks for thread in mask}


def allowed_threads() -> set[int]:
    """The hardware threads that this process may run on once it asks for all: its cgroup's."""
    found: set[int] = set()

    def ask() -> None:  # a mask is a thread's own
        mine = os.sched_getaffinity(0)
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, range(max(os.cpu_count() or 1, max(mine) + 1)))
        found.update(os.sched_getaffinity(0))

    thread = threading.Thread(target=ask, name="ask-cores")
    thread.start()
    thread.join()
    return found


def read_topology(threads: Collection[int], gpus: Mapping[int, str], root: Path = SYS) -> Topology:
    """What the kernel tells of these hardware threads and GPUs.

    gpus: by number among the job's, their PCI addresses, such as 0000:1b:00.0.
    """
    cpus = root / "devices/system/cpu"
    cores: dict[Core, None] = {}
    for thread in sorted(threads):
        siblings = _numbers(cpus / f"cpu{thread}/topology/thread_siblings_list") or [thread]
        cores[tuple(one for one in siblings if one in threads)] = None
    numa: dict[int, int] = {}
    for node in sorted((root / "devices/system/node").glob("node[0-9]*")):
        numa |= {thread: int(node.name.removeprefix("node")) for thread in _numbers(node / "cpulist")}
    near = {number: _text(root / f"bus/pci/devices/{address}/numa_node") for number, address in gpus.items()}
    known = {number: int(node) for number, node in near.items() if node.isdecimal()}  # -1: not known
    return Topology(tuple(cores), numa, known)


def _numbers(path: Path) -> list[int]:
    """A kernel's list of numbers, such as 0-3,8; none where it cannot be read."""
    found: list[int] = []
    for part in _text(path).split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            found += range(int(first), int(last or first) + 1)
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def as_list(threads: Sequence[int]) -> str:
    """Ascending numbers as the kernel writes them: 0-3,8."""
    parts: list[list[int]] = []
    for thread in threads:
        if parts and thread == parts[-1][-1] + 1:
            parts[-1].append(thread)
        else:
            parts.append([thread])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
