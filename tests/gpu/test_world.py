"""A world over NCCL, as torchrun and srun make it, on one GPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
from genac_megatron.platform.megatron import install
install()
import torch.distributed as dist
from genac_megatron.training.layout import close_world, init_world
world = init_world(60.0)
assert (world.rank, world.size) == (0, 1)
assert "nccl" in str(dist.get_backend_config()), dist.get_backend_config()
from genac_megatron.algorithms.losses import make_sft_loss
from tests.gpu.gpu_cases import make_role, make_samples
roles = {name: make_role(name=name, dtype="bf16") for name in ("actor", "critic")}
for role in roles.values():
    role.begin_stage(None, 4)
    first, *_, last = [role.train_step(make_samples(8, 0), make_sft_loss()).stats["loss"] for _ in range(4)]
    assert last < first, (first, last)
    assert dist.get_backend(role.groups.dp) == "nccl"
box = [{"an": "object"}]
dist.broadcast_object_list(box, src=0)  # over gloo, beside NCCL
close_world()
print("done")
"""


@pytest.mark.timeout(300)
def test_two_roles_train_in_a_world_over_nccl() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environ = {
        **os.environ,
        **ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": path,
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=ROOT, env=environ, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("done")
