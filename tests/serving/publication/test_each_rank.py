"""Servers that read from the ranks they share a device with; and what publications leave open.

On a CPU, shared memory stands for CUDA IPC: ranks, handles and servers are as on GPUs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from genac_megatron.serving.sglang.fleet import Endpoint
from tests.serving.publication.fleet_cases import (
    BUCKET,
    Servers,
    client_of,
    config_of,
    gap,
    greedy,
    make_publisher,
    members,
    reference,
    small_buckets,
)

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2-pp2": {"count": 4, "tp": 2, "pp": 2},
    "dp2": {"first_rank": 1, "count": 2},
}
TIMES = 20


def each_rank_publisher(config: Any, endpoints: list[Endpoint], folder: str, seed: int) -> Any:
    """Collective: the first server is on rank 0's device, the second on those of ranks 3 and 2."""
    import torch.distributed as dist

    from genac_megatron.publication.publisher import Publisher
    from genac_megatron.publication.tensor import DeviceTensors
    from tests.distributed.cases import make_role

    role = make_role("actor", config, dist.get_world_size(), seed)
    gpus = {endpoints[0].name: [0], endpoints[1].name: [3, 2]}
    transport = DeviceTensors(role, endpoints, config.publication, gpus)
    return small_buckets(Publisher(role, transport=transport, dtype=transport.wire))


def each_rank_case(
    rank: int, config: Any, endpoints: list[Endpoint], folder: str, seed: int
) -> tuple[int, int, int]:
    publisher = each_rank_publisher(config, endpoints, folder, seed)
    publisher.publish(seed)
    publisher.publish(seed)
    publisher.close()
    transport = publisher.transport
    return len(publisher.plan), transport.handles_made, transport.handles_read


@pytest.mark.parametrize("layout", LAYOUTS)
def test_servers_hold_what_the_ranks_on_their_devices_hand_them(
    pool: Any, endpoints: list[Endpoint], tmp_path: Path, layout: str
) -> None:
    """Every publication is checked tensor by tensor, by the servers' own checksums."""
    seed = 70 + list(LAYOUTS).index(layout)
    config = config_of(LAYOUTS[layout], publication={"control_s": 30.0, "verify_every": 1})
    results = pool.run(each_rank_case, config, endpoints, str(tmp_path), seed)
    for endpoint in endpoints:
        assert gap(greedy(endpoint), reference(config, seed)) <= 1e-4
        assert client_of(endpoint).version() == str(seed)
    buckets = results[0][0]
    assert [made for _, made, _ in results] == [2 * buckets, 0, 2 * buckets, 2 * buckets]
    assert all(made == read for _, made, read in results)


def open_case(
    rank: int, config: Any, endpoints: list[Endpoint], folder: str, each_rank: bool, group: int
) -> list[Any]:
    """After each of the publications: what this rank has open, and on rank 0 what the servers have."""
    make = each_rank_publisher if each_rank else make_publisher
    publisher = small_buckets(make(config, endpoints, folder, 5), 4 * BUCKET)
    found = []
    for version in range(1, 3 + TIMES):
        publisher.publish(version)
        shared = list(Path("/dev/shm").glob(f"torch_{os.getpid()}_*"))
        held = [held_by(process) for process in members(group)] if rank == 0 else []
        found.append((len(os.listdir("/proc/self/fd")), len(shared), held))
    publisher.close()
    return found[2:]


def held_by(process: psutil.Process) -> tuple[int, int]:
    """Files that a process has open, sockets apart; how many of trainers' shared memory it has mapped."""
    links = []
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        try:
            links.append(os.readlink(entry))
        except OSError:
            continue
    maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    mapped = {line.split(maxsplit=5)[5] for line in maps if "/dev/shm/torch_" in line}
    return len([link for link in links if not link.startswith("socket:")]), len(mapped)


@pytest.mark.parametrize("way", ["each-rank", "tensor", "group", "disk"])
def test_twenty_publications_leave_nothing_open(
    pool: Any, servers: Servers, endpoints: list[Endpoint], tmp_path: Path, way: str
) -> None:
    from genac_megatron.serving.sglang.without_cuda import MAPPED

    transport = "tensor" if way == "each-rank" else way
    config = config_of(
        {"count": 4, "tp": 2, "pp": 2},
        publication={"transport": transport, "control_s": 30.0, "verify": "version"},
    )
    group = servers.running[endpoints[1].name].pid
    results = pool.run(
        open_case, config, endpoints, str(tmp_path / "w"), way == "each-rank", group, timeout=300.0
    )
    for found in results:
        files, shared = ([each[i] for each in found] for i in (0, 1))
        print(way, files[0], files[-1], shared[0], shared[-1], found[0][2], found[-1][2])
        assert max(files) <= files[0] + 1  # a connection that is closing
        assert max(shared) <= shared[0]
        for before, after in zip(found[0][2], found[-1][2], strict=True):
            assert after[0] <= before[0] + 1
            assert after[1] <= MAPPED
