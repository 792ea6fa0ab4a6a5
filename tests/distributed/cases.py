"""What the distributed tests run on every rank: tiny roles in any layout, and what came out of them."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

SEED = 3


def repeats(cases: Iterable[str], *repeating: str) -> list[Any]:
    """Cases by name; those that others cover too are left to test-extended."""
    marks = [pytest.mark.extended]
    return [pytest.param(case, marks=marks if case in repeating else []) for case in cases]


def role_config(**overrides: Any) -> Any:
    """A tiny role: 4 layers, GQA, QK-norm (qwen3) or none (llama)."""
    from genac_megatron.recipe.schema import RoleConfig

    layout = overrides.pop("layout", {})
    training = {
        "dtype": "fp32",
        "tokens_per_microbatch": 80,  # of `train`: 3 micro-batches a step, 2 with dp 2, 1 with dp 4
        "logprob_chunk": 16,
        **overrides.pop("training", {}),
    }
    shape = {
        "layers": 4, "hidden": 32, "ffn": 64, "heads": 4, "kv_heads": 2, "head_dim": 8, "vocab": 67,
        "tie_embeddings": overrides.pop("tie", True), "init_std": 0.1, **overrides.pop("shape", {}),
    }  # fmt: skip
    return RoleConfig.model_validate(
        {
            "model": {
                "family": overrides.pop("family", "qwen3"),
                "shape": shape,
                "tokenizer": "builtin:tiny",
            },
            "layout": layout,
            "training": training,
            # eps keeps Adam from blowing the rounding of a vanishing gradient up to a whole step.
            "optimizer": {
                "lr": 5e-3,
                "eps": 1e-5,
                "clip_grad": 0.5,
                "weight_decay": 0.1,
                **overrides.pop("optimizer", {}),
            },
        }
    )


def make_role(name: str, config: Any, world: int, seed: int = SEED) -> Any:
    """Collective: a role with seeded random weights."""
    from genac_megatron.models.mapping import load_hf_into, random_weights
    from genac_megatron.models.registry import shape_of
    from genac_megatron.training.layout import Layout
    from genac_megatron.training.role import Role

    layout = Layout.from_config(name, config.layout, world)
    shape = shape_of(config.model, 67)
    role = Role(name, config, shape, layout, layout.groups())
    if role.active:
        load_hf_into(role.models, layout, shape, random_weights(shape, seed))
    return role


def make_samples(count: int, seed: int, vocab: int = 67) -> list[Any]:
    """Samples of uneven length with PPO fields; weights sum to 1 over all tokens."""
    from genac_megatron.records import Sample

    rng = random.Random(seed)
    samples = []
    for _ in range(count):
        tokens = [rng.randrange(vocab) for _ in range(rng.randint(6, 30))]
        samples.append(Sample(tokens, rng.randint(1, 4)))
    total = sum(sample.trained for sample in samples)
    for sample in samples:
        sample.fields = {
            "weights": [1 / total] * sample.trained,
            "advantages": [rng.gauss(0, 1) for _ in range(sample.trained)],
            "behaviour": [-4.0 + rng.gauss(0, 0.3) for _ in range(sample.trained)],
        }
    return samples


class Collected:
    """A sink that keeps what was published."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.version = -1

    def load_weights(
        self, version: int, tensors: Iterable[tuple[str, Tensor]], *, final: bool = True
    ) -> None:
        self.tensors |= {name: tensor.clone() for name, tensor in tensors}
        if final:
            self.version = version


def published(role: Any, bucket_bytes: int = 1 << 14) -> dict[str, Tensor]:
    """Collective: the role's weights under their Hugging Face names, by the real publication."""
    from genac_megatron.publication.publisher import Publisher

    sink = Collected()
    Publisher(role, [sink], bucket_bytes).publish(1)
    return sink.tensors


def train(role: Any, steps: int, first: int = 0) -> list[tuple[float, float]]:
    """(loss, gradient norm) of some PPO steps on seeded batches."""
    from genac_megatron.algorithms.losses import make_ppo_loss
    from genac_megatron.recipe.schema import LossConfig

    loss = make_ppo_loss(LossConfig(entropy_coef=0.01))
    figures = []
    for step in range(first, first + steps):
        result = role.train_step(make_samples(11, 100 + step), loss, temperature=0.8, with_entropy=True)
        figures.append((result.stats["loss"], result.stats["grad_norm"]))
    return figures


def train_case(rank: int, config: Any, steps: int = 3) -> Any:
    """Train a role; its figures, log-probs and weights, the same on every rank."""
    role = make_role("actor", config, torch.distributed.get_world_size())
    role.begin_stage(None, 10)
    before = role.logprobs(make_samples(7, 5), temperature=0.8)
    figures = train(role, steps)
    weights = published(role)
    return {"before": before, "figures": figures, "weights": weights}


def live_bytes() -> int:
    """Bytes of all storages that tensors of this process have, host memory apart."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.dtype != torch.uint8:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
