"""A role gives its memory back and takes it again: live bytes fall, and no byte of what it trains differs.

On a CPU the process's own storages are the device's; host memory is what is kept as plain bytes (uint8).
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from tests.distributed.cases import make_role, published, role_config, train

LITTLE = 8192  # bytes: rotary tables, steps of Adam, the last pass's figures
EXPERTS = {"family": "qwen3_moe", "shape": {"experts": 4, "experts_per_token": 2, "expert_ffn": 24}}
CASES: dict[str, dict[str, Any]] = {
    "dp2-bf16": {"layout": {"count": 2}, "training": {"dtype": "bf16"}},
    "dp2-bf16-overlap": {
        "layout": {"count": 2},
        "training": {"dtype": "bf16", "overlap_grad_reduce": True},
    },
    "dp2-bf16-replicated": {
        "layout": {"count": 2},
        "training": {"dtype": "bf16", "distributed_optimizer": False},
    },
    "tp2-fp32": {"layout": {"count": 2, "tp": 2}},
    "tp2-dp2-bf16": {"layout": {"tp": 2}, "training": {"dtype": "bf16"}},
    "tp2-fp32-replicated": {"layout": {"count": 2, "tp": 2}, "training": {"distributed_optimizer": False}},
    "pp2-vpp2-bf16": {"layout": {"count": 2, "pp": 2, "vpp": 2}, "training": {"dtype": "bf16"}},
    "ep2-bf16": {"layout": {"count": 2, "ep": 2}, "training": {"dtype": "bf16"}, **EXPERTS},
}


def live_bytes() -> int:
    """Bytes of all storages that tensors of this process have, host memory apart."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.dtype != torch.uint8:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def rest_case(rank: int, given: dict[str, Any], rests: bool) -> Any:
    without = live_bytes()
    role = make_role("actor", role_config(**given), torch.distributed.get_world_size())
    role.begin_stage(None, 10)
    figures, held = train(role, 2), []
    for step in (2, 3):
        if rests:
            whole = live_bytes()
            role.rest()
            role.rest()
            held.append((live_bytes() - without, whole - without))
            role.wake()
            role.wake()
            assert live_bytes() == whole
        figures += train(role, 1, step)
    return figures, published(role), held


@pytest.mark.parametrize("name", list(CASES))
def test_rest_gives_all_back_and_changes_no_byte(pool: Any, name: str) -> None:
    wanted = pool.run(rest_case, CASES[name], False)
    for rank, (figures, weights, held) in enumerate(pool.run(rest_case, CASES[name], True)):
        assert figures == wanted[rank][0]
        assert all(torch.equal(weights[key], weight) for key, weight in wanted[rank][1].items())
        for left, whole in held:
            assert left <= LITTLE
            if rank < CASES[name]["layout"].get("count", 4):
                assert whole > 20 * LITTLE
