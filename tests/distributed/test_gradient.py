"""`Role.gradient` in data-parallel layouts. That it is the gradient: tests/unit/test_role_gradient.py."""

from __future__ import annotations

from typing import Any

import pytest

from genac_megatron.errors import InputError
from tests.distributed.cases import make_role, make_samples, role_config, train


def ppo_loss() -> Any:
    from genac_megatron.algorithms.losses import make_ppo_loss
    from genac_megatron.recipe.schema import LossConfig

    return make_ppo_loss(LossConfig())


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
