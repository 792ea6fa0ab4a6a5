"""A small model on this process's device, in any precision and with either kind of layer specs."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu import accuracy
from genac_megatron.algorithms.losses import make_sft_loss
from genac_megatron.models.mapping import load_hf_into, random_weights
from genac_megatron.models.registry import shape_of
from genac_megatron.recipe.schema import RoleConfig
from genac_megatron.records import Sample
from genac_megatron.training.layout import Layout
from genac_megatron.training.role import Role

VOCAB = 512
# Sides are multiples of 128, the blocks of blockwise FP8; heads of 64, which cuDNN's kernels have.
SIZES: dict[str, Any] = {
    "layers": 4, "hidden": 256, "ffn": 512, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocab": VOCAB,
    "init_std": 0.05,
}  # fmt: skip


def make_role(family: str = "qwen3", name: str = "actor", seed: int = 1, **training: Any) -> Role:
    """A role of this rank alone, with seeded random weights that do not depend on precision or specs."""
    sizes, engine = {**SIZES, **training.pop("sizes", {})}, training.pop("engine", {})
    config = RoleConfig.model_validate(
        {
            "model": {"family": family, "shape": sizes, "tokenizer": "none"},
            "training": {"tokens_per_microbatch": 1024, "logprob_chunk": 256, **training},
            "engine": engine,
            "optimizer": {"lr": 1e-3, "weight_decay": 0.0, "eps": 1e-6},
        }
    )
    layout = Layout.from_config(name, config.layout, 1)
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
