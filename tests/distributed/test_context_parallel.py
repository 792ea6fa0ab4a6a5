"""Context parallelism: every layout with cp trains like one rank, and all that goes with a role does too."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from genac_megatron.algorithms.losses import make_sft_loss
from genac_megatron.records import Sample
from tests.distributed.cases import make_role, make_samples, published, role_config, train_case
from tests.distributed.test_adapter_layouts import adapted, adapter_case
from tests.distributed.test_checkpoint import load_case, same, save_case
from tests.distributed.test_moe import FAMILY, assert_same
from tests.distributed.test_role import LOSS, NORM, WEIGHT, alone, check, two_roles
from tests.distributed.test_routing_replay import FP32, forced_case
from tests.distributed.test_value import value_case, value_config

LAYOUTS: dict[str, dict[str, Any]] = {
    "cp2": {"count": 2, "cp": 2},
    "cp2-dp2": {"count": 4, "cp": 2},
    "tp2-cp2": {"count": 4, "tp": 2, "cp": 2},
    "tp2-cp2-no-sp": {"count": 4, "tp": 2, "cp": 2, "sequence_parallel": False},
    "pp2-vpp2-cp2": {"count": 4, "pp": 2, "vpp": 2, "cp": 2},
    "cp2-offset": {"first_rank": 1, "count": 2, "cp": 2},
    "cp4": {"count": 4, "cp": 4},  # two heads of keys and values, each there twice
    "pp2-cp2": {"count": 4, "pp": 2, "cp": 2},
}
COVERED = ("tp2-cp2-no-sp", "cp2-offset", "pp2-cp2")


@pytest.fixture(scope="module")
def reference(pool: Any) -> Any:
    """One rank, no parallelism."""
    return pool.run(train_case, role_config(layout={"count": 1}))[0]


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=[pytest.mark.extended] * (name in COVERED)) for name in LAYOUTS],
)
def test_a_layout_trains_like_one_rank(pool: Any, reference: Any, layout: str) -> None:
    for result in pool.run(train_case, role_config(layout=LAYOUTS[layout])):
        check(result, reference)


@pytest.mark.parametrize(
    "training",
    [{"recompute": "full"}, {"overlap_grad_reduce": True, "recompute": "selective"}],
    ids=["recompute", "selective-overlap"],
)
def test_a_training_option_changes_no_result(pool: Any, reference: Any, training: dict[str, Any]) -> None:
    config = role_config(layout=LAYOUTS["tp2-cp2"], training=training)
    check(pool.run(train_case, config)[0], reference)


def test_roles_with_cp_on_ranks_that_overlap(pool: Any) -> None:
    wanted = pool.run(alone, 3, 0)[0], pool.run(alone, 9, 50)[0]
    got = pool.run(two_roles, {"tp": 2, "cp": 2}, {"first_rank": 1, "count": 2, "cp": 2})[0]
    for step, both in enumerate(got[0]):
        for mine, (figures, _) in zip(both, wanted, strict=True):
            assert mine == pytest.approx(figures[step], rel=NORM, abs=LOSS)


def test_a_scalar_critic(pool: Any) -> None:
    wanted = pool.run(value_case, value_config(layout={"count": 1}))[0]
    for got in pool.run(value_case, value_config(layout=LAYOUTS["tp2-cp2"])):
        for mine, theirs in zip(got["before"], wanted["before"], strict=True):
            assert mine == pytest.approx(theirs, abs=LOSS)
        for name, weight in wanted["weights"].items():
            torch.testing.assert_close(got["weights"][name], weight, atol=WEIGHT, rtol=0, msg=name)


def test_adapters(pool: Any) -> None:
    wanted = pool.run(adapter_case, adapted({"count": 1}))[0]
    got = pool.run(adapter_case, adapted(LAYOUTS["tp2-cp2"]))[0]
    assert got["untouched"]
    assert got["digest"] == wanted["digest"]
    for (loss, norm), (loss_ref, norm_ref) in zip(got["figures"], wanted["figures"], strict=True):
        assert loss == pytest.approx(loss_ref, abs=LOSS)
        assert norm == pytest.approx(norm_ref, rel=NORM)


def test_a_checkpoint_moves_between_layouts(pool: Any, tmp_path: Path) -> None:
    layouts = ({"cp": 2, "tp": 2}, {"cp": 2, "count": 2})
    saved, after, end = pool.run(save_case, str(tmp_path), layouts, False, {})[0]
    loaded, after_load, end_load = pool.run(load_case, str(tmp_path), layouts, {})[0]
    same(loaded, saved, atol=0)
    assert after_load == after
    same(end_load, end, atol=0)
    other = ({"pp": 2}, {"first_rank": 2, "count": 2})
    loaded, after_load, end_load = pool.run(load_case, str(tmp_path), other, {})[0]
    same(loaded, saved, atol=0)
    same(end_load, end, atol=WEIGHT)


EXPERTS: dict[str, dict[str, Any]] = {
    "cp2-ep2": {"count": 2, "cp": 2, "ep": 2},
    "tp2-cp2-ep4": {"tp": 2, "cp": 2, "ep": 4},
}


@pytest.mark.parametrize("layout", EXPERTS)
def test_experts(pool: Any, layout: str) -> None:
    wanted = pool.run(train_case, role_config(layout={"count": 1}, **FAMILY), 3)[0]
    for got in pool.run(train_case, role_config(layout=EXPERTS[layout], **FAMILY), 3):
        assert_same(got, wanted)


def test_the_dispatcher_changes_no_step(pool: Any) -> None:
    wanted = pool.run(train_case, role_config(layout={"count": 1}, **FAMILY), 3)[0]
    config = role_config(layout=EXPERTS["cp2-ep2"], training={"moe_dispatcher": "allgather"}, **FAMILY)
    assert_same(pool.run(train_case, config, 3)[0], wanted)


def balanced_case(rank: int, layout: dict[str, Any]) -> Any:
    """Steps with a balancing loss over samples that need no filling, which it would count too."""
    role = make_role("actor", role_config(layout=layout, training={"moe_aux_loss": 0.1}, **FAMILY), 4)
    role.begin_stage(None, 10)
    rng = random.Random(5)
    norms = []
    for _ in range(3):
        samples = [Sample([rng.randrange(67) for _ in range(4 * n + 1)], 1) for n in (2, 7, 3, 5)]
        for sample in samples:
            sample.fields = {"weights": [1.0 / 68] * sample.trained}
        norms.append(role.train_step(samples, make_sft_loss()).stats["grad_norm"])
    return norms, published(role)


def test_balancing_is_a_figure_of_the_whole_pack(pool: Any) -> None:
    (wanted, weights), (got, mine) = (
        pool.run(balanced_case, layout)[0] for layout in ({"count": 1}, {"count": 2, "cp": 2, "ep": 2})
    )
    assert got == pytest.approx(wanted, rel=NORM)
    for name, weight in weights.items():
        torch.testing.assert_close(mine[name], weight, atol=WEIGHT, rtol=0, msg=name)


REPLAYED = [{"tp": 2, "cp": 2, "ep": 4}, {"pp": 2, "cp": 2, "ep": 2}]


@pytest.mark.parametrize("layout", REPLAYED, ids=["tp2", "pp2"])
def test_experts_are_replayed(pool: Any, layout: dict[str, Any]) -> None:
    mine, wanted, _ = pool.run(forced_case, layout)[0]
    for got, theirs in zip(mine, wanted, strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(theirs), atol=FP32, rtol=FP32)


def shared_case(rank: int) -> Any:
    """Computed tokens of samples that begin alike, with trees asked for, and those of flat packs."""
    role = make_role("actor", role_config(layout=LAYOUTS["cp2"], training={"share_prefixes": True}), 4)
    role.begin_stage(None, 10)
    one = make_samples(1, 3)[0]
    both = [Sample(one.tokens, one.start, {"weights": [0.1] * one.trained}) for _ in range(2)]
    return role.train_step(both, make_sft_loss()).stats["computed_tokens"], 2 * (len(one.tokens) - 1)


def test_packs_stay_flat(pool: Any) -> None:
    computed, flat = pool.run(shared_case)[0]
    assert computed == flat
