"""`Role.gradient` is autograd's of a transformers copy of the same weights, and leaves the role as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from genac_megatron.algorithms.losses import make_ppo_loss
from genac_megatron.errors import NotFinite
from genac_megatron.models.registry import hf_config, shape_of
from genac_megatron.recipe.schema import LossConfig
from genac_megatron.training.layout import init_world
from tests.distributed.cases import make_role, make_samples, published, role_config

TEMPERATURE = 0.8


def moved() -> tuple[dict[str, Tensor], ...]:
    """Weights by name before, after the pass, and with the gradient taken off the buffer that it is of."""
    role = make_role("actor", role_config(layout={"count": 1}), init_world().size)
    before, at = published(role), 0
    flat = role.gradient(make_samples(11, 7), make_ppo_loss(LossConfig()), temperature=TEMPERATURE)
    after_pass = published(role)
    for buffer in role._buffers():
        size = buffer.param_data.numel()
        buffer.param_data.sub_(flat[at : at + size])
        at += size
    assert at == flat.numel()
    return before, after_pass, published(role)


def autograd(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same loss, written out sample by sample, through transformers' model."""
    raw: dict[str, Any] = hf_config(shape_of(role_config().model, 67))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw), attn_implementation="sdpa").eval()
    missing = model.load_state_dict(weights, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"}, "tied"
    assert not missing.unexpected_keys
    loss = torch.zeros(())
    for sample in make_samples(11, 7):
        logits = model(torch.tensor([sample.tokens])).logits[0, sample.start - 1 : -1] / TEMPERATURE
        chosen = torch.tensor(sample.tokens[sample.start :])
        logp = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        weight, advantage, behaviour = (
            torch.tensor(sample.fields[name]) for name in ("weights", "advantages", "behaviour")
        )
        tis = (logp.detach() - behaviour).exp().clamp(max=2.0)
        loss = loss - (weight * tis * advantage * logp).sum()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_a_gradient_is_autograds_by_name() -> None:
    """fp32: a weight of up to 0.5 that was moved is read to 6e-8, sums differ in order by some 1e-7."""
    before, after_pass, after = moved()
    assert all(torch.equal(before[name], after_pass[name]) for name in before), "no update"
    wanted = autograd(before)
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    assert largest > 1e-2
    for name, grad in wanted.items():
        torch.testing.assert_close(before[name] - after[name], grad, atol=5e-7, rtol=1e-4, msg=name)


def test_a_gradient_that_is_not_finite_is_an_error_by_name() -> None:
    role = make_role("actor", role_config(layout={"count": 1}), init_world().size)
    samples = make_samples(11, 7)
    samples[3].fields["advantages"][0] = float("nan")
    with pytest.raises(NotFinite, match=r"actor/gradient is not finite in \d+ places"):
        role.gradient(samples, make_ppo_loss(LossConfig()), temperature=TEMPERATURE)
