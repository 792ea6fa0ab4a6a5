"""A role gives its memory back and takes it again: live bytes fall, and no byte of what it trains differs.

On a CPU the process's own storages are the device's; host memory is what is kept as plain bytes (uint8).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.cases import (
    live_bytes,
    make_role,
    make_samples,
    published,
    repeats,
    role_config,
    train,
)

RUN_S = 400.0
LITTLE = 8192  # bytes: rotary tables, steps of Adam, the last pass's figures
EXPERTS = {
    "family": "qwen3_moe",
    "shape": {"experts": 4, "experts_per_token": 2, "expert_ffn": 24, "norm_topk": True},
}
CASES: dict[str, dict[str, Any]] = {
    "dp2-bf16": {"layout": {"count": 2}, "training": {"dtype": "bf16"}},
    "dp2-bf16-overlap": {
        "layout": {"count": 2},
        "training": {"dtype": "bf16", "overlap_grad_reduce": True, "overlap_param_gather": True},
    },
    "dp2-bf16-replicated": {
        "layout": {"count": 2},
        "training": {"dtype": "bf16", "distributed_optimizer": False},
    },
    "tp2-fp32": {"layout": {"count": 2, "tp": 2}},
    "tp2-dp2-bf16": {"layout": {"tp": 2}, "training": {"dtype": "bf16"}},
    "pp2-vpp2-fp32": {"layout": {"count": 2, "pp": 2, "vpp": 2}},
    "ep2-bf16": {"layout": {"count": 2, "ep": 2}, "training": {"dtype": "bf16"}, **EXPERTS},
    "tp2-fp32-replicated": {"layout": {"count": 2, "tp": 2}, "training": {"distributed_optimizer": False}},
}


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
            assert live_bytes() <= whole  # what the last pass left is gone
        figures += train(role, 1, step)
    return figures, published(role), held


@pytest.mark.parametrize("name", repeats(CASES, "dp2-bf16", "tp2-fp32", "tp2-fp32-replicated"))
def test_rest_gives_all_back_and_changes_no_byte(pool: Any, name: str) -> None:
    wanted = pool.run(rest_case, CASES[name], False, timeout=RUN_S)
    found = pool.run(rest_case, CASES[name], True, timeout=RUN_S)
    for rank, (figures, weights, held) in enumerate(found):
        assert figures == wanted[rank][0]
        assert all(torch.equal(weights[key], weight) for key, weight in wanted[rank][1].items())
        for left, whole in held:
            assert left <= LITTLE
            if rank < CASES[name]["layout"].get("count", 4):
                assert whole > 20 * LITTLE


def woken_case(rank: int, folder: str) -> Any:
    """What needs a resting role's weights wakes it: passes, publications, saves, loads, the next stage."""
    from genac_megatron.publication.publisher import Publisher, RoleSink
    from genac_megatron.training.checkpoint import Checkpoints, load_checkpoint

    config = role_config(layout={"tp": 2}, training={"dtype": "bf16"})
    role, other = (make_role(name, config, 4, seed=seed) for name, seed in (("actor", 3), ("critic", 4)))
    role.begin_stage(None, 10)
    train(role, 1)
    samples, figures = make_samples(5, 1), {}
    wanted, before = published(role), role.logprobs(samples)
    publisher = Publisher(role, [RoleSink(other)])
    checkpoints = Checkpoints(Path(folder), keep=1, asynchronous=False)

    def rests() -> None:
        for one in (role, other):
            one.rest()
            assert one.resting

    rests()
    figures["log-probs"] = role.logprobs(samples) == before
    rests()
    publisher.publish(1)
    figures["published"] = all(torch.equal(x, wanted[name]) for name, x in published(other).items())
    rests()
    checkpoints.save("ppo-00001", {"actor": role}, {})
    train(role, 1, 1)
    rests()
    load_checkpoint(Path(folder) / "ppo-00001", {"actor": role})
    rests()
    load_checkpoint(Path(folder) / "ppo-00001", {"actor": role}, optimizers=True)
    figures["loaded"] = all(torch.equal(x, wanted[name]) for name, x in published(role).items())
    rests()
    role.begin_stage(None, 10)
    figures["next stage"] = (role.resting, torch.isfinite(torch.tensor(train(role, 1))).all().item())
    return figures


def test_a_resting_role_wakes_for_whatever_needs_it(pool: Any, tmp_path: Path) -> None:
    wanted = {"log-probs": True, "published": True, "loaded": True, "next stage": (False, True)}
    assert pool.run(woken_case, str(tmp_path), timeout=RUN_S) == [wanted] * 4


def stages_case(rank: int, given: dict[str, Any], rests: bool) -> Any:
    """Bytes without a role, with one that does not train, in a stage, after it, and once it rests."""
    without = live_bytes()
    config = role_config(**given)
    role = make_role("actor", config, torch.distributed.get_world_size())
    held = [live_bytes() - without]
    role.begin_stage(None, 10)
    first = train(role, 2)
    held.append(live_bytes() - without)
    if rests:
        role.rest()
    role.end_stage()
    if rests:
        held.append(live_bytes() - without)
        role.wake()
    held.append(live_bytes() - without)
    weights = sum(p.nbytes for model in role.models for p in model.parameters())
    role.begin_stage(None, 10)
    return held, weights, (first, train(role, 2, 2), published(role))


@pytest.mark.parametrize("name", repeats(("dp2-bf16", "dp2-bf16-replicated", "tp2-fp32"), "tp2-fp32"))
def test_a_role_holds_its_weights_alone_but_in_a_stage(pool: Any, name: str) -> None:
    """Before one it has no gradients, after one neither these nor fp32 weights and moments, also where it
    rested at its end; the next stage trains the same.
    """
    found = pool.run(stages_case, CASES[name], False, timeout=RUN_S)
    rested = pool.run(stages_case, CASES[name], True, timeout=RUN_S)
    for rank, ((held, weights, trained), (held_rested, _, trained_rested)) in enumerate(
        zip(found, rested, strict=True)
    ):
        if rank < CASES[name]["layout"]["count"]:
            before, inside, after = held
            assert before <= 1.1 * weights + LITTLE  # DDP pads
            assert inside > 2.9 * weights
            assert after <= before + LITTLE
            _, _, resting, after_rest = held_rested
            assert resting <= LITTLE
            assert after_rest <= before + LITTLE
        assert trained_rested[:2] == trained[:2]
        assert all(torch.equal(trained_rested[2][key], weight) for key, weight in trained[2].items())
