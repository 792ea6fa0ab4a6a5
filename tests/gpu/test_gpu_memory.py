"""A server's share of a GPU: what SGLang makes of the fraction, and what release gives back."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.publication import SERVER_ARGS
from genac_megatron.models.registry import hf_config
from genac_megatron.recipe.memory import SERVER_GIB
from genac_megatron.recipe.schema import EngineConfig
from genac_megatron.recipe.share import GIB, Share
from genac_megatron.serving.sglang.client import ServerClient
from genac_megatron.serving.sglang.fleet import Fleet
from genac_megatron.serving.sglang.free_memory import free_bytes
from genac_megatron.serving.sglang.server import PYTHON_VARIABLE, serving_python
from tests.gpu.gpu_cases import make_role

GIB_INT = 1 << 30


def test_nvidia_smi_and_cuda_agree_on_what_is_free() -> None:
    held = torch.empty(GIB_INT, dtype=torch.uint8, device="cuda")
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    [told] = free_bytes(["0"], {"0": uuid})
    assert told == pytest.approx(torch.cuda.mem_get_info()[0], abs=0.5 * GIB)
    del held


@pytest.mark.timeout(900)
def test_a_server_has_its_share_and_gives_it_back(tmp_path: Path) -> None:
    """4 GiB for weights and cache, at the first start and at a second one beside 20 GiB of somebody else."""
    if PYTHON_VARIABLE not in os.environ:
        pytest.skip(f"{PYTHON_VARIABLE} is not set: tools/gpu_setup.sh prints it")
    role = make_role("qwen2", dtype="bf16", specs="auto", engine={"kind": "sglang"})
    config = EngineConfig.model_validate(
        {"kind": "sglang", "release": "kv_cache", "gpus": [0], "args": list(SERVER_ARGS)}
    )
    shape = role.shape
    token = 2.0 * shape.layers * shape.kv_size * 2
    share = Share("actor", 0.01 * GIB, 4 * GIB, 1024 * token, token, SERVER_GIB * GIB)
    model = tmp_path / "model"
    fleet = Fleet("actor", config, hf_config(shape), model, tmp_path, "cuda", share=share)
    fleet.start(serving_python())
    try:
        [endpoint] = fleet.ready()
        for _ in range(2):
            client = ServerClient(endpoint.url, endpoint.key, name=endpoint.name)
            tokens = int(client.info()["max_total_num_tokens"])
            assert tokens * token == pytest.approx(4 * GIB, abs=0.5 * GIB), json.dumps(client.info())[:2000]
            before = torch.cuda.mem_get_info()[0]
            client.release_memory(("kv_cache",))
            assert client.present()
            assert torch.cuda.mem_get_info()[0] - before > 0.9 * tokens * token
            client.resume_memory(("kv_cache",))
            assert client.healthy(60.0)
            client.close()
            held = torch.empty(20 * GIB_INT, dtype=torch.uint8, device="cuda")
            fleet.restart(["actor/0"], ["actor/0"])
            [endpoint] = fleet.ready()
        del held
    finally:
        fleet.close()
