"""Which cores servers get, over made-up machines, and that a process that boot.py starts runs on them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron.serving.sglang.cores import (
    Topology,
    allowed_threads,
    as_list,
    deal_cores,
    job_threads,
    read_topology,
)
from genac_megatron.serving.sglang.server import Server, ServerSpec


def machine(sockets: int, cores: int, threads: int = 1, gpus: int = 0) -> Topology:
    """Numbered as Linux does: the first threads of all cores, then the second ones."""
    count = sockets * cores
    made = tuple(tuple(core + count * t for t in range(threads)) for core in range(count))
    numa = {thread: core[0] // cores for core in made for thread in core}
    return Topology(made, numa, {gpu: gpu * sockets // gpus for gpu in range(gpus)})


def test_eight_servers_get_an_eighth_of_the_node_each_near_their_gpu() -> None:
    dealt = deal_cores({f"actor/{n}": [n] for n in range(8)}, machine(2, 32, gpus=8))
    assert dealt == {f"actor/{n}": list(range(8 * n, 8 * n + 8)) for n in range(8)}


def test_the_threads_of_a_core_stay_together() -> None:
    dealt = deal_cores({"actor/0": [0], "actor/1": [1]}, machine(1, 4, threads=2, gpus=2))
    assert dealt == {"actor/0": [0, 1, 4, 5], "actor/1": [2, 3, 6, 7]}
    one = deal_cores({"actor/0": [0], "actor/1": [1]}, machine(1, 1, threads=2, gpus=2))
    assert one == {"actor/0": [0], "actor/1": [1]}, "no whole core for each"


def test_a_server_over_two_sockets_has_cores_on_both() -> None:
    dealt = deal_cores({"actor/0": [0, 1, 2, 3], "critic/0": [4, 5, 6, 7]}, machine(2, 8, gpus=8))
    assert dealt == {"actor/0": list(range(8)), "critic/0": list(range(8, 16))}
    crossed = deal_cores({"actor/0": [0, 4], "critic/0": [1, 5]}, machine(2, 2, gpus=8))
    assert crossed == {"actor/0": [0, 2], "critic/0": [1, 3]}


def test_what_is_not_known_is_split_evenly() -> None:
    whole = machine(2, 4, gpus=4)
    for topology in (Topology(whole.cores, whole.numa, {0: 0}), Topology(whole.cores, {}, whole.gpus)):
        dealt = deal_cores({f"actor/{n}": [n] for n in range(4)}, topology)
        assert list(dealt.values()) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    far = Topology(whole.cores[4:], whole.numa, whole.gpus)  # the job has cores of the second socket alone
    assert deal_cores({"actor/0": [0], "actor/1": [1]}, far) == {"actor/0": [4, 5], "actor/1": [6, 7]}


def test_fewer_cores_than_servers_are_everybodys() -> None:
    assert deal_cores({f"a/{n}": [0] for n in range(3)}, machine(1, 2)) == {
        f"a/{n}": [0, 1] for n in range(3)
    }


@given(
    st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=4), min_size=1, max_size=8),
    st.integers(1, 2),
    st.integers(1, 12),
    st.integers(1, 2),
    st.randoms(use_true_random=False),
)
def test_no_core_has_two_servers_and_all_are_the_jobs(
    servers: list[list[int]], sockets: int, cores: int, threads: int, chance
) -> None:
    whole = machine(sockets, cores, threads, 8)
    part = tuple(core for core in whole.cores if chance.random() < 0.7) or whole.cores
    topology = Topology(part, whole.numa, whole.gpus)
    dealt = deal_cores({f"s/{n}": gpus for n, gpus in enumerate(servers)}, topology)
    everything = sorted(thread for core in part for thread in core)
    used = sorted(thread for mine in dealt.values() for thread in mine)
    assert all(dealt.values())
    assert set(used) <= set(everything)
    if len(servers) <= len(everything):
        assert len(set(used)) == len(used)
    else:
        assert all(mine == everything for mine in dealt.values())


def test_the_jobs_cores_are_its_ranks_or_its_cgroups() -> None:
    masks = [{0, 1}, {2, 3}]
    assert job_threads(masks, range(64), {}) == {0, 1, 2, 3}
    assert job_threads(masks, range(8), {"SLURM_CPUS_ON_NODE": "4"}) == {0, 1, 2, 3}, "not ours alone"
    assert job_threads(masks, range(8), {"SLURM_CPUS_ON_NODE": "8"}) == set(range(8))


def test_a_narrow_mask_does_not_hide_what_is_allowed() -> None:
    before = os.sched_getaffinity(0)
    one = {min(before)}
    os.sched_setaffinity(0, one)
    try:
        assert allowed_threads() >= before
        assert os.sched_getaffinity(0) == one, "this thread's is as it was"
    finally:
        os.sched_setaffinity(0, before)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_the_kernels_files_are_read(tmp_path: Path) -> None:
    for thread in range(8):
        siblings = f"{thread % 4},{thread % 4 + 4}"
        write(tmp_path / f"devices/system/cpu/cpu{thread}/topology/thread_siblings_list", siblings)
    write(tmp_path / "devices/system/node/node0/cpulist", "0-1,4-5")
    write(tmp_path / "devices/system/node/node1/cpulist", "2-3,6-7")
    for address, node in {"0000:1b:00.0": "0", "0001:9c:00.0": "1", "0000:3d:00.0": "-1"}.items():
        write(tmp_path / f"bus/pci/devices/{address}/numa_node", node)
    gpus = {0: "0001:9c:00.0", 1: "0000:1b:00.0", 2: "0000:3d:00.0", 3: "0000:ff:00.0"}
    found = read_topology({0, 1, 2, 3, 4, 6}, gpus, tmp_path)
    assert found.cores == ((0, 4), (1,), (2, 6), (3,))
    assert found.numa == {0: 0, 1: 0, 4: 0, 5: 0, 2: 1, 3: 1, 6: 1, 7: 1}
    assert found.gpus == {0: 1, 1: 0}
    assert deal_cores({"actor/0": [0], "actor/1": [1]}, found) == {"actor/0": [2, 3, 6], "actor/1": [0, 1, 4]}


def test_where_the_kernel_tells_nothing_each_thread_is_a_core(tmp_path: Path) -> None:
    assert read_topology({3, 1}, {0: "0000:1b:00.0"}, tmp_path) == Topology(((1,), (3,)))


@pytest.mark.parametrize(
    ("threads", "text"), [([0, 1, 2, 3, 8], "0-3,8"), ([5], "5"), ([], ""), ([1, 3], "1,3"), ([1, 2], "1-2")]
)
def test_lists_are_written_as_the_kernel_does(threads: Sequence[int], text: str) -> None:
    assert as_list(threads) == text


STUB = """\
import json, os, subprocess, sys, threading

def run_server(args):
    found = {"main": sorted(os.sched_getaffinity(0)), "named": os.environ.get("GENAC_SERVER_CORES")}
    code = "import os; print(sorted(os.sched_getaffinity(0)))"
    found["child"] = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True).stdout)
    with open(os.environ["FOUND"], "w") as file:
        json.dump(found, file)
"""


def test_a_started_server_runs_on_its_cores_with_a_stub_of_sglang(tmp_path: Path) -> None:
    """Real processes and masks; `sglang` is a stub, which the serving environment's tests need not be."""
    package = tmp_path / "packages/sglang"
    for name, text in {
        "__init__": "",
        "launch_server": STUB,
        "srt/__init__": "",
        "srt/server_args": "def prepare_server_args(arguments): return arguments\n",
        "srt/utils": "def kill_process_tree(pid, include_parent): pass\n",
    }.items():
        write(package / f"{name}.py", text)
    core, found = max(allowed_threads()), tmp_path / "found.json"
    env = {"PYTHONPATH": str(package.parent), "FOUND": str(found)}
    spec = ServerSpec("actor/0", tmp_path, 23_456, device="cuda", env=env, cores=(core,))
    server = Server(spec, tmp_path / "log", python=Path(sys.executable))
    before = os.sched_getaffinity(0)
    other = before - {core} or before
    os.sched_setaffinity(0, {min(other)})  # as srun binds the rank that starts it
    try:
        server.start()
        for _ in range(600):
            if not server.alive():
                break
            time.sleep(0.1)
        assert json.loads(found.read_text()) == {"main": [core], "child": [core], "named": None}, (
            server.log_tail()
        )
        assert f"boot: this server runs on cores {core}" in server.log.read_text()
    finally:
        os.sched_setaffinity(0, before)
        server.stop()


def test_tensor_parallel_ranks_on_a_cpu_are_bound_within_the_servers_cores(tmp_path: Path) -> None:
    spec = ServerSpec("actor/0", tmp_path, 1, tp=2, cores=(2, 3, 6, 7))
    assert spec.environment()["SGLANG_CPU_OMP_THREADS_BIND"] == "2,3|6,7"
    assert spec.environment()["GENAC_SERVER_CORES"] == "2,3,6,7"
    assert "GENAC_SERVER_CORES" not in ServerSpec("actor/0", tmp_path, 1).environment()
