"""A small model on this process's device, in any precision and with either kind of layer specs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.gpu import accuracy
from genac_megatron.algorithms.losses import make_sft_loss
from genac_megatron.models.mapping import load_hf_into, random_weights
from genac_megatron.models.registry import shape_of
from genac_megatron.recipe.schema import RoleConfig
from genac_megatron.records import Sample
from genac_megatron.training.layout import Layout
from genac_megatron.training.role import Role

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 512
# Sides are multiples of 128, the blocks of blockwise FP8; heads of 64, which cuDNN's kernels have.
SIZES: dict[str, Any] = {
    "layers": 4, "hidden": 256, "ffn": 512, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocab": VOCAB,
    "init_std": 0.05,
}  # fmt: skip


def make_role(family: str = "qwen3", name: str = "actor", seed: int = 1, **training: Any) -> Role:
    """A role of the whole world, with seeded random weights that do not depend on precision, specs or layout.

    training: its fields, and `sizes`, `engine` and `layout`, which go to other blocks.
    """
    sizes = {**SIZES, **training.pop("sizes", {})}
    blocks = {block: training.pop(block, {}) for block in ("engine", "layout")}
    config = RoleConfig.model_validate(
        {
            "model": {"family": family, "shape": sizes, "tokenizer": "none"},
            "training": {"tokens_per_microbatch": 1024, "logprob_chunk": 256, **training},
            **blocks,
            "optimizer": {"lr": 1e-3, "weight_decay": 0.0, "eps": 1e-6},
        }
    )
    layout = Layout.from_config(name, config.layout, dist.get_world_size())
    shape = shape_of(config.model, VOCAB)
    role = Role(name, config, shape, layout, layout.groups())
    load_hf_into(role.models, layout, shape, random_weights(shape, seed))
    return role


def make_samples(count: int, seed: int) -> list[Sample]:
    return accuracy.make_samples(count, seed, VOCAB)


def flat_logprobs(role: Role, seed: int = 5) -> list[float]:
    return [value for row in role.logprobs(make_samples(12, seed)) for value in row]


def curve(steps: int, **training: Any) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of some SFT steps on seeded data."""
    role = make_role(**training)
    role.begin_stage(None, steps)
    results = [role.train_step(make_samples(24, 100 + step), make_sft_loss()) for step in range(steps)]
    return [r.stats["loss"] for r in results], [r.stats["grad_norm"] for r in results]


def largest(found: list[float], wanted: list[float]) -> float:
    """The largest difference."""
    return max(abs(x - y) for x, y in zip(found, wanted, strict=True))


def mean(found: list[float], wanted: list[float]) -> float:
    """The mean absolute difference."""
    return sum(abs(x - y) for x, y in zip(found, wanted, strict=True)) / len(wanted)


def run_world(program: str, size: int, limit_s: float = 280.0) -> list[str]:
    """Run Python source in `size` ranks, as torchrun starts them; what each has printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", program],
            env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [rank.communicate(timeout=limit_s) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, errors) in zip(ranks, said, strict=True):
        assert rank.returncode == 0, errors[-3000:]
    return [out for out, _ in said]
