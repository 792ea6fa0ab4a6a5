"""A role at rest on a GPU: its memory is other processes', and it trains on to the bit. Not run on a GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from genac_megatron.algorithms.losses import make_sft_loss
from genac_megatron.platform.fp8 import RECIPES, refusal_here
from tests.gpu.gpu_cases import flat_logprobs, make_role, make_samples
from tests.gpu.test_precision import BF16, BF16_TORCH, FP32

LARGE: dict[str, Any] = {"sizes": {"hidden": 1024, "ffn": 4096, "layers": 8}}
CASES: dict[str, dict[str, Any]] = {
    "fp32": FP32,
    "bf16": BF16_TORCH,
    "replicated": BF16_TORCH | {"distributed_optimizer": False},
}
TE_CASES: dict[str, dict[str, Any]] = {
    "te": BF16,
    **{recipe: BF16 | {"fp8": recipe} for recipe in RECIPES},
    "fp8-param": BF16 | {"fp8": "blockwise", "fp8_param": True},
}


def steps(training: dict[str, Any], rests: bool) -> tuple[list[float], list[float], list[float]]:
    """Losses, log-probs, and the share of the role's memory that was left at each rest."""
    before = torch.cuda.memory_allocated()
    role = make_role(**training, **LARGE)
    role.begin_stage(None, 4)
    losses, left = [], []
    for step in range(4):
        losses.append(role.train_step(make_samples(8, step), make_sft_loss()).stats["loss"])
        if rests:
            held = torch.cuda.memory_allocated() - before
            role.rest()
            left.append((torch.cuda.memory_allocated() - before) / held)
            role.wake()
            assert torch.cuda.memory_allocated() - before <= held * 1.01
    return losses, flat_logprobs(role), left


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.te) for name in TE_CASES)])
def test_a_role_that_rests_trains_to_the_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    training = {**CASES, **TE_CASES}[name]
    if reason := refusal_here(training["fp8"]) if "fp8" in training else "":
        pytest.skip(reason)
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    losses, logprobs, left = steps(training, rests=True)
    assert (losses, logprobs) == steps(training, rests=False)[:2]
    assert max(left) < 0.03, left  # rotary tables, amax histories, cuBLAS's workspace


def test_the_driver_has_the_memory_too() -> None:
    """Other processes can take it: torch's cache keeps little of it."""
    free = torch.cuda.mem_get_info()[0]
    role = make_role(**BF16_TORCH, **LARGE)
    role.begin_stage(None, 4)
    role.train_step(make_samples(8, 0), make_sft_loss())
    taken = free - torch.cuda.mem_get_info()[0]
    role.rest()
    assert free - torch.cuda.mem_get_info()[0] < 0.2 * taken  # the context's and cuBLAS's own stay
