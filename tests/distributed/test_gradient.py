"""`Role.gradient`: autograd's of a transformers copy, the same in data-parallel layouts, and no update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genac_megatron.errors import InputError
from tests.distributed.cases import make_role, make_samples, published, role_config, train

TEMPERATURE = 0.8


def ppo_loss() -> Any:
    from genac_megatron.algorithms.losses import make_ppo_loss
    from genac_megatron.recipe.schema import LossConfig

    return make_ppo_loss(LossConfig())


def moved(rank: int) -> Any:
    """Weights by name before, and once the gradient was taken off the flat buffer that it lies in."""
    role = make_role("actor", role_config(layout={"count": 1}), torch.distributed.get_world_size())
    before, at = published(role), 0
    flat = role.gradient(make_samples(11, 7), ppo_loss(), temperature=TEMPERATURE)
    after_pass = published(role)
    for buffer in role._buffers() if role.active else []:
        size = buffer.param_data.numel()
        buffer.param_data.sub_(flat[at : at + size])
        at += size
    assert at == flat.numel()
    return before, after_pass, published(role)


def autograd(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same loss, written out sample by sample, through transformers' model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from genac_megatron.models.registry import hf_config, shape_of

    raw = hf_config(shape_of(role_config().model, 67))
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


def test_a_gradient_is_autograds_by_name(pool: Any) -> None:
    """fp32: a weight of up to 0.5 that was moved is read to 6e-8, sums differ in order by some 1e-7."""
    before, after_pass, after = pool.run(moved)[0]
    assert all(torch.equal(before[name], after_pass[name]) for name in before), "no update"
    wanted = autograd(before)
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    assert largest > 1e-2
    for name, grad in wanted.items():
        torch.testing.assert_close(before[name] - after[name], grad, atol=5e-7, rtol=1e-4, msg=name)


def products(rank: int, layout: dict[str, Any], training: dict[str, Any]) -> Any:
    """This rank's parts' inner products of the gradients of two batches, and what training gives after it."""
    role = make_role("actor", role_config(layout=layout, training=training), 4)
    first, second = (role.gradient(make_samples(9, seed), ppo_loss()).double() for seed in (1, 2))
    again = role.gradient(make_samples(9, 1), ppo_loss()).double()
    role.begin_stage(None, 10)
    inside = role.gradient(make_samples(9, 1), ppo_loss()).double()
    found = [float(a @ b) for a, b in ((first, first), (first, second), (first, again), (first, inside))]
    return found, train(role, 2)


@pytest.mark.parametrize(
    ("layout", "training"),
    [
        ({"count": 2}, {}),
        ({"count": 4}, {}),
        ({"first_rank": 1, "count": 3}, {"distributed_optimizer": False}),
    ],
    ids=["dp2", "dp4", "dp3-replicated"],
)
def test_parts_of_ranks_are_the_whole(pool: Any, layout: dict[str, Any], training: dict[str, Any]) -> None:
    """Inner products add up to one rank's; a training step afterwards is as it would have been."""
    (wanted, trained), *_ = pool.run(products, {"count": 1}, {})
    results = pool.run(products, layout, training)
    found = [sum(one[0][i] for one in results) for i in range(4)]
    assert found == pytest.approx(wanted, rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-6)
    assert found[3] == pytest.approx(found[0], rel=1e-6), "also where an optimizer is there"
    for (loss, norm), (loss_ref, norm_ref) in zip(results[0][1], trained, strict=True):
        assert loss == pytest.approx(loss_ref, abs=1e-5)
        assert norm == pytest.approx(norm_ref, rel=1e-4)


def refused(rank: int, layout: dict[str, Any]) -> str:
    role = make_role("actor", role_config(layout=layout), 4)
    try:
        role.gradient(make_samples(3, 1), ppo_loss())
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("layout", [{"count": 2, "tp": 2}, {"count": 2, "pp": 2}], ids=["tp", "pp"])
def test_cut_weights_are_refused_on_every_rank(pool: Any, layout: dict[str, Any]) -> None:
    name = next(key for key in layout if key != "count")
    for said in pool.run(refused, layout):
        assert f"{name} 2" in said
        assert "roles.actor.layout" in said
