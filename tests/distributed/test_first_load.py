"""A role's first weights: read once in all, and the same on every rank as if each had read them itself."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.cases import make_role, role_config

EXPERTS = {
    "family": "qwen3_moe",
    "shape": {"experts": 4, "experts_per_token": 2, "expert_ffn": 24, "norm_topk": True},
}
CASES: dict[str, dict[str, Any]] = {
    "tp2-dp2": {"layout": {"count": 4, "tp": 2}},
    "tp4-repeated-heads": {"layout": {"count": 4, "tp": 4}, "training": {"dtype": "bf16"}},
    "pp2-dp2-tied": {"layout": {"count": 4, "pp": 2}},
    "tp2-pp2-untied": {"layout": {"count": 4, "tp": 2, "pp": 2}, "family": "llama", "tie": False},
    "cp2-dp2": {"layout": {"count": 4, "cp": 2}},
    "tp2-ep2": {"layout": {"count": 4, "tp": 2, "ep": 2}, **EXPERTS},
    "part-of-the-world": {"layout": {"first_rank": 1, "count": 2}},
}


def loaded_case(rank: int, given: dict[str, Any]) -> Any:
    """Whether all parameters are those that this rank would have read by itself, and what it read."""
    from genac_megatron.models.mapping import random_weights
    from genac_megatron.training.first_load import load_once

    role = make_role("first", role_config(**given), 4, seed=3)
    read: Counter[str] = Counter()
    if not role.active:
        return True, read
    wanted = [parameter.detach().clone() for model in role.models for parameter in model.parameters()]
    for model in role.models:
        for parameter in model.parameters():
            parameter.data.zero_()
    get = random_weights(role.shape, 3)

    def counted(name: str) -> Tensor:
        read[name] += 1
        return get(name)

    load_once(role, counted)
    found = [parameter for model in role.models for parameter in model.parameters()]
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), read


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_read_once(pool: Any, name: str) -> None:
    results = pool.run(loaded_case, CASES[name])
    assert all(same for same, _ in results)
    read = sum((each for _, each in results), Counter[str]())
    twice = {"model.embed_tokens.weight"} if name == "pp2-dp2-tied" else set()  # the last stage has it too
    assert {tensor: times for tensor, times in read.items() if times != 1} == dict.fromkeys(twice, 2)
    readers = sum(bool(each) for _, each in results)
    tp = CASES[name]["layout"].get("tp", 1)
    whole = CASES[name]["layout"]["count"]
    assert readers == (whole if "ep" in CASES[name]["layout"] else whole // tp), "replicas take turns"


def failing_case(rank: int, lacking: str) -> tuple[str, bool]:
    from genac_megatron.errors import InputError
    from genac_megatron.models.mapping import random_weights
    from genac_megatron.training.agreement import agree
    from genac_megatron.training.first_load import load_once

    role = make_role("first", role_config(layout={"count": 4, "tp": 2}), 4)
    get = random_weights(role.shape, 3)
    alone = []

    def some(name: str) -> Tensor:
        if name == lacking:
            alone.append(name)
            raise InputError(f"tensor {name} is missing", where="folder")
        return get(name)

    try:
        agree(lambda: load_once(role, some))
    except InputError as error:
        return str(error), bool(alone)
    return "", bool(alone)


def test_a_reader_that_fails_leaves_nobody_waiting(pool: Any) -> None:
    lacking = "model.layers.2.self_attn.k_proj.weight"
    results = pool.run(failing_case, lacking)
    assert [told for told, _ in results] == [f"folder: tensor {lacking} is missing"] * 4
    assert sum(alone for _, alone in results) == 1
