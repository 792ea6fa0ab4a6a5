"""From shards to PEFT's tensors: every layout gives the role's first rank the same adapter, whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.cases import make_role
from tests.distributed.test_role import LAYOUTS
from tests.serving.publication.adapter_cases import ADAPTER, adapted, fill, part

SEED = 4


def joined_case(rank: int, config: Any) -> Any:
    """What each rank has in the end, by PEFT's names."""
    from genac_megatron.publication.adapters import AdapterJoiner, views

    role = make_role("actor", config, torch.distributed.get_world_size())
    fill(role, SEED)
    joiner = AdapterJoiner(role)
    joiner.connect()
    joiner.reserve()
    flat = joiner.join()
    return None if flat is None else {n: t.clone() for n, t in views(flat, joiner.tensors).items()}


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2-vpp2", "pp2-dp2", "tp2-pp2", "tp2-offset"])
def test_the_first_rank_has_every_tensor(pool: Any, layout: str) -> None:
    config = adapted(LAYOUTS[layout])
    first = LAYOUTS[layout].get("first_rank", 0)
    results = pool.run(joined_case, config)
    assert [rank for rank, got in enumerate(results) if got is not None] == [first]
    shape = config.model.shape
    assert len(results[first]) == shape.layers * len(config.training.adapter.targets) * 2
    for name, tensor in results[first].items():
        projection, which, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
        assert tensor.shape["AB".index(which[-1])] == ADAPTER["rank"]
        assert torch.equal(tensor, part(f"{projection}.{which[-1]}", SEED, tuple(tensor.shape)))
