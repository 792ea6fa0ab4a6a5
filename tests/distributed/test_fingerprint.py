"""The digest of weights that a bank goes by: the same from every layout, another after a step."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.cases import make_role, role_config, train

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {"count": 1},
    "tp2": {"count": 2, "tp": 2},
    "pp2-vpp2": {"count": 2, "pp": 2, "vpp": 2},
    "tp2-dp2": {"count": 4, "tp": 2},
    "tp2-offset": {"first_rank": 2, "count": 2, "tp": 2},
}


def digest_case(rank: int, config: Any) -> Any:
    import torch

    from genac_megatron.publication.digest import weights_digest

    role = make_role("actor", config, torch.distributed.get_world_size())
    role.begin_stage(None, 10)
    first = weights_digest(role)
    again = weights_digest(role)
    train(role, 1)
    return first, again, weights_digest(role), weights_digest(make_role("actor", config, 4, seed=99))


def head_case(rank: int, config: Any) -> Any:
    """A scalar critic's digest covers its head: one that differs in the head alone has another."""
    import torch

    from genac_megatron.publication.digest import weights_digest

    role = make_role("critic", config, 4)
    first = weights_digest(role)
    with torch.no_grad():
        for model in role.models if role.active else ():
            for name, parameter in model.named_parameters():
                if "output_layer" in name or "value" in name:
                    parameter.add_(1.0)
    return first, weights_digest(role)


@pytest.fixture(scope="module")
def reference(pool: Any) -> tuple[str, ...]:
    return tuple(pool.run(digest_case, role_config(layout={"count": 1}))[0])


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tp1"])
def test_every_layout_has_one_digest(pool: Any, reference: tuple[str, ...], layout: str) -> None:
    """Rank 0 alone has it. A step's rounding differs between layouts, so what follows one is not compared."""
    first, again, after, other = pool.run(digest_case, role_config(layout=LAYOUTS[layout]))[0]
    assert first == again == reference[0]
    assert other == reference[3]
    assert len({first, after, other}) == 3


def test_a_scalar_heads_weights_count(pool: Any) -> None:
    config = role_config(layout={"count": 2, "tp": 2})
    config = config.model_copy(update={"model": config.model.model_copy(update={"head": "value"})})
    before, after = pool.run(head_case, config)[0]
    assert before != after
