"""Frozen attention (SAO's critic) on one rank; tests/distributed/test_value.py has it in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from genac_megatron.recipe.estimate import Place, memory_of
from genac_megatron.training.checkpoint import Checkpoints, load_checkpoint
from genac_megatron.training.layout import init_world
from tests.distributed.cases import make_role, make_samples
from tests.distributed.test_value import train_values, value_config


def critic(head: str = "value", seed: int = 3, **training: Any) -> Any:
    config = value_config(layout={"count": 1}, training={"frozen_attention": True, **training})
    model = config.model.model_copy(update={"head": head})
    role = make_role("critic", config.model_copy(update={"model": model}), 1, seed=seed)
    role.begin_stage(None, 10)
    return role


def weights_of(role: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in role.models[0].named_parameters()}


@pytest.mark.parametrize("distributed", [True, False])
def test_attention_stays_and_a_resumed_critic_goes_on_as_it_would(tmp_path: Path, distributed: bool) -> None:
    init_world()
    role = critic(distributed_optimizer=distributed)
    began = weights_of(role)
    frozen = {name for name in began if ".self_attention." in name or ".input_layernorm." in name}
    # 4 layers: qkv, projection, the norm before them, and one each of queries and keys
    assert len(frozen) == 20
    assert {name for name, p in role.models[0].named_parameters() if not p.requires_grad} == frozen
    held = sum(p.numel() for part in role.optimizer.param_groups for p in part["params"])
    trained = sum(weight.numel() for name, weight in began.items() if name not in frozen)
    assert trained <= held < trained + 1024  # shards are padded
    estimate = memory_of(role.config, role.shape, Place(0, 0, 0, 0), 1)
    assert (estimate.gradients, estimate.optimizer) == (4 * trained, 8 * trained)
    train_values(role, 2)
    Checkpoints(tmp_path, 2, False).save("value-00002", {"critic": role}, {})
    for name, weight in weights_of(role).items():
        assert torch.equal(weight, began[name]) == (name in frozen), name
    whole, ended = train_values(role, 2, 2), weights_of(role)
    role.rest()
    role.wake()
    assert all(torch.equal(weight, ended[name]) for name, weight in weights_of(role).items())
    again = critic(distributed_optimizer=distributed, seed=8)
    load_checkpoint(tmp_path / "value-00002", {"critic": again})
    load_checkpoint(tmp_path / "value-00002", {"critic": again}, optimizers=True)
    assert train_values(again, 2, 2) == whole
    assert all(torch.equal(weight, ended[name]) for name, weight in weights_of(again).items())


def test_a_critic_of_log_odds_gives_values() -> None:
    init_world()
    samples = make_samples(5, 5)
    plain, odds = critic("value"), critic("logit")
    for outputs, values in zip(plain.values(samples), odds.values(samples), strict=True):
        assert values == pytest.approx(torch.tensor(outputs).sigmoid().tolist())
