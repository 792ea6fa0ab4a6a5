"""Which collectives a rank launches, in order, and whether all ranks' orders can meet.

    python -c "from tests.e2e.collectives import recorded; recorded('FOLDER')" run RECIPE ...

runs `genac` in this process with every collective of every process group written down, FOLDER/RANK.json.
A collective of tensors would be NCCL's on a GPU; one of objects stays gloo's there too, which blocks the
thread that calls it and nothing else.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

OPERATIONS = (
    *("allreduce", "allreduce_coalesced", "broadcast", "reduce", "barrier"),
    *("allgather", "_allgather_base", "allgather_into_tensor_coalesced", "allgather_coalesced", "gather"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "scatter"),
    *("alltoall", "alltoall_base"),
)
CALLERS = 6  # frames in which torch's functions for objects would be seen


@dataclass(frozen=True)
class Launch:
    """One collective of one rank: its group, its place among the group's, and who called it."""

    group: str
    index: int
    operation: str
    main: bool  # by the main thread
    objects: bool


def recorded(folder: str) -> None:
    """Run `genac` with this process's arguments; write what it launched when it ends."""
    import torch.distributed as dist
    from torch.distributed import ProcessGroup

    from genac_megatron.cli import main
    from genac_megatron.publication import publisher

    # As on a GPU: there a bucket is not joined while one is sent by the device's collectives as well.
    publisher.may_overlap = lambda _transport, _device: False

    launched: list[dict[str, Any]] = []
    lock = threading.Lock()
    counts: dict[str, int] = defaultdict(int)

    def watching(operation: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: Any, *rest: Any, **named: Any) -> Any:
            ranks = dist.get_process_group_ranks(group)
            if len(ranks) > 1:
                with lock:
                    key = f"{group.group_name} {ranks}"
                    launched.append(
                        {
                            "group": key,
                            "index": counts[key],
                            "operation": operation,
                            "main": threading.current_thread() is threading.main_thread(),
                            "objects": _of_objects(),
                        }
                    )
                    counts[key] += 1
            return act(group, *rest, **named)

        return call

    for operation in OPERATIONS:
        act = getattr(ProcessGroup, operation, None)
        if act is not None:
            setattr(ProcessGroup, operation, watching(operation, act))
    code = 1
    try:
        code = main(sys.argv[1:]) or 0
    finally:
        Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(launched))
    raise SystemExit(code)


def _of_objects() -> bool:
    """Whether one of torch's functions for objects is calling."""
    frame = sys._getframe(2)
    for _ in range(CALLERS):
        if frame.f_code.co_filename.endswith("distributed_c10d.py") and "object" in frame.f_code.co_name:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def read(folder: Path) -> list[list[Launch]]:
    """By rank, in the order of launching."""
    paths = sorted(folder.glob("*.json"), key=lambda path: int(path.stem))
    return [[Launch(**row) for row in json.loads(path.read_text())] for path in paths]


def unlike(ranks: Sequence[Sequence[Launch]]) -> list[str]:
    """Groups whose members did not launch the same operations in the same order."""
    by_group: dict[str, dict[int, list[str]]] = defaultdict(dict)
    for rank, launches in enumerate(ranks):
        for launch in launches:
            by_group[launch.group].setdefault(rank, []).append(launch.operation)
    found = []
    for group, orders in by_group.items():
        members = set(json.loads(group.split(" ", 1)[1]))
        if set(orders) != members or len({tuple(order) for order in orders.values()}) > 1:
            found.append(group)
    return found


def circle(ranks: Sequence[Sequence[Launch]]) -> list[tuple[str, int]]:
    """Collectives that wait for one another, were each to block what its rank launches after it; else none.

    What blocks: on one thread everything; over threads a tensor collective those of tensors after it, as
    NCCL's share the GPU. (Kahn's algorithm: what is left over has a circle in it.)
    """
    after: dict[tuple[str, int], set[tuple[str, int]]] = defaultdict(set)
    nodes: set[tuple[str, int]] = set()
    for launches in ranks:
        nodes |= {(launch.group, launch.index) for launch in launches}
        for order in _orders(launches):
            for earlier, later in pairwise(order):
                after[earlier.group, earlier.index].add((later.group, later.index))
    waiting = dict.fromkeys(nodes, 0)
    for followers in after.values():
        for node in followers:
            waiting[node] += 1
    ready = [node for node, count in waiting.items() if not count]
    while ready:
        node = ready.pop()
        del waiting[node]
        for follower in after[node]:
            waiting[follower] -= 1
            if not waiting[follower]:
                ready.append(follower)
    return sorted(waiting)


def _orders(launches: Sequence[Launch]) -> Iterator[list[Launch]]:
    yield [launch for launch in launches if launch.main]
    yield [launch for launch in launches if not launch.main]
    yield [launch for launch in launches if not launch.objects]
