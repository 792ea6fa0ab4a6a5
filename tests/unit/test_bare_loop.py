"""What benchmarks compare: the FLOPs they count, against torch's own count; three loops that train alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bare import MODES, make_samples, make_step, model_flops, role_config
from genac_megatron.models.registry import shape_of
from genac_megatron.records import Sample
from genac_megatron.training.layout import init_world

SHAPE: dict[str, Any] = {
    "layers": 2, "hidden": 64, "ffn": 96, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 80,
}  # fmt: skip


def test_sequences_fill_their_packs_to_the_last_position() -> None:
    for seed in range(20):
        lengths = [len(sample.tokens) - 1 for sample in make_samples(256, 3, 80, seed)]
        assert sum(lengths) == 3 * 256
        assert min(lengths) >= 16
        assert max(lengths) <= 64 + 16


def test_flops_are_those_that_torch_counts() -> None:
    """Of a bare step. Torch counts attention's whole squares, the formula the half that causality leaves."""
    init_world()
    config = role_config(SHAPE, 128, dtype="fp32", specs="torch")
    samples = [Sample([1] * 33, 1, {"weights": [1 / 32] * 32}) for _ in range(4)]
    step = make_step("bare", config, samples)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    shape = shape_of(config.model, 80)
    attention = 6 * shape.layers * shape.q_size * 4 * 32 * 32
    assert counter.get_total_flops() == model_flops(shape, samples) + attention


def test_the_loops_train_alike() -> None:
    init_world()
    torch.manual_seed(0)
    config = role_config(SHAPE, 128, dtype="fp32", specs="torch")
    samples = make_samples(128, 2, 80)
    losses = {mode: [step(), step(), step()] for mode in MODES for step in [make_step(mode, config, samples)]}
    for mode in MODES:  # fp32 sums in another order; Adam's steps of 1e-5 hardly move the weights
        assert losses[mode] == pytest.approx(losses["bare"], abs=2e-5)
    assert losses["ours"][2] < losses["ours"][0]
