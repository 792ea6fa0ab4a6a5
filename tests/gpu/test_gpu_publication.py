"""Weights by CUDA IPC: into a reading process, and into an SGLang server on the same GPU."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.publication import SERVER_ARGS, reader
from genac_megatron.models.blockwise import served_config
from genac_megatron.models.registry import hf_config
from genac_megatron.platform.network import spare_ports
from genac_megatron.publication.factory import fleet_publisher
from genac_megatron.publication.payload import by_handle
from genac_megatron.publication.tensor import DeviceTensors
from genac_megatron.serving.sglang.fleet import Endpoint
from genac_megatron.serving.sglang.server import PYTHON_VARIABLE, Server, ServerSpec
from tests.gpu.gpu_cases import make_role

START_S = 280.0


def test_another_process_reads_what_a_device_bucket_holds() -> None:
    flat = torch.arange(4096, device="cuda", dtype=torch.float32)
    with reader() as read:
        for value in (1.0, 2.0):  # the second time the handle is to memory that was opened before
            flat.mul_(value)
            torch.cuda.synchronize()
            raw = flat.view(torch.uint8)
            wanted = int(raw[:: raw.numel() // 64].to(torch.int64).sum())
            assert read(by_handle(flat, [("a", (4096,))]))[1] == wanted


@pytest.mark.timeout(600)
@pytest.mark.parametrize("quantization", ["off", "fp8"])
def test_a_server_on_this_gpu_holds_what_was_published(tmp_path: Path, quantization: str) -> None:
    """Each is verified tensor by tensor, by the engine's own checksums; none leaves memory behind."""
    if PYTHON_VARIABLE not in os.environ:
        pytest.skip(f"{PYTHON_VARIABLE} is not set: tools/gpu_setup.sh prints it")
    if quantization == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8: compute capability 8.9 and later have")
    engine = {"kind": "sglang", "quantization": quantization}
    role = make_role("qwen2", dtype="bf16", specs="auto", engine=engine)
    checked = role.config.publication.model_copy(update={"verify_every": 1})
    role.config = role.config.model_copy(update={"publication": checked})
    (tmp_path / "config.json").write_text(json.dumps(served_config(hf_config(role.shape), quantization)))
    spec = ServerSpec("actor/0", tmp_path, spare_ports(1)[0], device="cuda", mem_fraction=0.1,
                      max_running=4, max_tokens=2048, args=SERVER_ARGS)  # fmt: skip
    server = Server(spec, tmp_path / "server.log")
    server.start()
    try:
        server.wait_healthy(START_S)
        endpoint = Endpoint(spec.name, spec.url, spec.key, 1, "cuda")
        publisher = fleet_publisher(role, [endpoint], tmp_path / "weights", {spec.name: [0]})
        assert isinstance(publisher.transport, DeviceTensors)
        try:
            allocated = []
            for version in range(1, 21):
                publisher.publish(version)  # raises where a tensor is another
                torch.cuda.synchronize()
                allocated.append(torch.cuda.memory_allocated())
            transport = publisher.transport
            assert transport.handles_made == transport.handles_read == 20 * len(publisher.plan)
            assert len(set(allocated[1:])) == 1, allocated
        finally:
            publisher.close()
    finally:
        server.stop()
