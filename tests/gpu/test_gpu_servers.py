"""What servers on a GPU are given: cores near it, limits of their own; and a peak of memory that stays."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.publication import SERVER_ARGS
from genac_megatron.models.registry import hf_config
from genac_megatron.publication.memory import PeakMemory
from genac_megatron.recipe.schema import EngineConfig
from genac_megatron.serving.sglang.boot import group_members
from genac_megatron.serving.sglang.client import ServerClient
from genac_megatron.serving.sglang.cores import SYS, allowed_threads, deal_cores, read_topology
from genac_megatron.serving.sglang.fleet import Fleet
from genac_megatron.stages.served import pci_addresses
from tests.gpu.gpu_cases import make_role


def test_the_kernel_knows_every_gpus_address() -> None:
    found = pci_addresses()
    assert sorted(found) == list(range(torch.cuda.device_count()))
    assert all((SYS / "bus/pci/devices" / address / "numa_node").is_file() for address in found.values())


def test_a_publications_peak_leaves_the_allocators_alone() -> None:
    large = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    del large
    before = torch.cuda.max_memory_allocated()
    with PeakMemory() as measured:
        small = torch.empty(8 << 20, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        del small
    assert torch.cuda.max_memory_allocated() == before
    assert measured.device <= 64 << 20


@pytest.mark.timeout(600)
def test_a_server_has_its_cores_and_no_limits_of_a_cpus(tmp_path: Path) -> None:
    if "GENAC_SERVE_PYTHON" not in os.environ:
        pytest.skip("GENAC_SERVE_PYTHON is not set: tools/gpu_setup.sh prints it")
    config = EngineConfig(kind="sglang", mem_fraction=0.1, args=list(SERVER_ARGS))
    cores = deal_cores({"actor/0": [0], "actor/1": [0]}, read_topology(allowed_threads(), pci_addresses()))
    shape = make_role("qwen2", dtype="bf16", specs="auto").shape
    fleet = Fleet("actor", config, hf_config(shape), tmp_path / "model", tmp_path, "cuda", cores=cores)
    try:
        fleet.start()
        (endpoint,) = fleet.ready()
        (noted,) = json.loads((tmp_path / "model/servers.json").read_text())
        threads = [int(t) for pid in group_members(noted["pid"]) for t in os.listdir(f"/proc/{pid}/task")]
        masks = {frozenset(os.sched_getaffinity(thread)) for thread in threads}
        assert all(mask <= set(cores["actor/0"]) for mask in masks), "of the half that is the first server's"
        client = ServerClient(endpoint.url, endpoint.key)
        told = client.info()
        client.close()
        assert told["max_total_tokens"] is None
        assert told["internal_states"][0]["effective_max_running_requests_per_dp"] > 64
    finally:
        fleet.close()
