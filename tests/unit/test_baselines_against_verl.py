"""Our baselines against verl's own functions: their values are in tests/oracle/verl_values.json.

Both compute in float64; our advantages are float32 at the end: 1e-6 of figures of about 1.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genac_megatron.algorithms.advantages import whiten
from genac_megatron.algorithms.baselines.dapo import dapo, overlong_penalty
from genac_megatron.algorithms.baselines.dr_grpo import dr_grpo
from genac_megatron.algorithms.baselines.grpo import grpo
from genac_megatron.algorithms.baselines.reinforce_pp import reinforce_pp
from genac_megatron.algorithms.baselines.rloo import rloo
from genac_megatron.algorithms.baselines.vc_ppo import decoupled_gae
from genac_megatron.algorithms.losses import make_ppo_loss, make_value_loss, token_weights
from genac_megatron.recipe.algorithms import LossConfig

ORACLE = json.loads((Path(__file__).parents[1] / "oracle" / "verl_values.json").read_text())
CASES = ORACLE["cases"]
CLOSE = {"abs": 2e-6, "rel": 1e-6}


def table(case: dict[str, Any], key: str) -> Tensor:
    dtype = torch.int64 if key == "lengths" else torch.float64
    return torch.tensor(case[key], dtype=dtype).reshape(ORACLE["groups"], ORACLE["samples"])


def rows(case: dict[str, Any], key: str) -> list[Tensor]:
    """Per response, its own tokens."""
    pairs = zip(case[key], case["lengths"], strict=True)
    return [torch.tensor(row[:n], dtype=torch.float64) for row, n in pairs]


def flat(case: dict[str, Any], key: str) -> Tensor:
    return torch.cat(rows(case, key))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("key", "ours"), [("grpo", grpo), ("dr_grpo", dr_grpo), ("rloo", rloo)])
def test_group_advantages(case: dict[str, Any], key: str, ours: Any) -> None:
    got = ours(table(case, "outcomes")).flatten()
    for mine, theirs in zip(got.tolist(), rows(case, key), strict=True):
        assert theirs.tolist() == pytest.approx([mine] * len(theirs), **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_dapo_of_verls_reward_manager(case: dict[str, Any]) -> None:
    """Rewards are float32 there: 1e-5 of figures of about 1, over deviations of 0.1 and more."""
    outcomes, lengths = table(case, "outcomes"), table(case, "lengths")
    penalty = overlong_penalty(lengths, ORACLE["longest"], ORACLE["cache"])
    last = [row[n - 1] for row, n in zip(case["dapo_rewards"], case["lengths"], strict=True)]
    assert (2 * outcomes - 1 + penalty).flatten().tolist() == pytest.approx(last, abs=1e-6)
    assert penalty.any()
    got = dapo(outcomes, penalty).flatten()
    for mine, theirs in zip(got.tolist(), rows(case, "dapo"), strict=True):
        assert theirs.tolist() == pytest.approx([mine] * len(theirs), abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_kl_term_is_verls_low_variance_one(case: dict[str, Any]) -> None:
    lengths = torch.tensor(case["lengths"])
    logp, old = flat(case, "logp"), flat(case, "old")
    weights = token_weights(lengths).double().repeat_interleave(lengths)
    fields = {"weights": weights, "advantages": torch.zeros_like(old), "behaviour": old, "reference": old}
    loss, stats = make_ppo_loss(LossConfig(kl_coef=0.5))(logp, None, fields)
    wanted = (weights * flat(case, "kl")).sum().item()
    assert stats["kl_reference"].item() == pytest.approx(wanted, **CLOSE)
    assert loss.item() == pytest.approx(0.5 * wanted, **CLOSE)


def test_some_tokens_are_beyond_the_dual_clip() -> None:
    """Else the losses above would not show it."""
    far = [((flat(c, "logp") - flat(c, "old")).exp() > 3) & (flat(c, "advantages") < 0) for c in CASES]
    assert sum(int(tokens.sum()) for tokens in far) >= 3


def biased(case: dict[str, Any]) -> float:
    """verl divides by the unbiased deviation, we by the biased one, which ranks can add up."""
    tokens = sum(case["lengths"])
    return math.sqrt((tokens - 1) / tokens)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("baseline", [False, True])
def test_reinforce_pp(case: dict[str, Any], baseline: bool) -> None:
    got = reinforce_pp(table(case, "outcomes"), table(case, "lengths"), baseline=baseline).flatten()
    key = "reinforce_pp_baseline" if baseline else "reinforce_pp"
    for mine, theirs in zip(got.tolist(), rows(case, key), strict=True):
        assert (theirs / biased(case)).tolist() == pytest.approx([mine] * len(theirs), **CLOSE)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lam", [1.0, 0.95])
def test_token_gae(case: dict[str, Any], lam: float) -> None:
    outcomes = torch.tensor(case["outcomes"], dtype=torch.float64)
    advantages, targets = decoupled_gae(rows(case, "values"), outcomes, 1.0, lam, lam)
    assert torch.cat(targets).tolist() == pytest.approx(flat(case, f"returns_{lam}").tolist(), **CLOSE)
    got = whiten(torch.cat(advantages))
    theirs = flat(case, f"gae_whitened_{lam}") / biased(case)
    assert got.tolist() == pytest.approx(theirs.tolist(), abs=1e-5)  # advantages were rounded to float32


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("aggregate", "mode"),
    [("token", "token-mean"), ("sequence", "seq-mean-token-mean"), ("constant", "seq-mean-token-sum-norm")],
)
def test_the_clipped_loss_and_its_aggregates(case: dict[str, Any], aggregate: Any, mode: str) -> None:
    longest = len(case["values"][0])
    weights = token_weights(case["lengths"], aggregate, longest)
    config = LossConfig(clip_high=0.28, aggregate=aggregate, tis_cap=None)
    old = flat(case, "old")
    fields = {
        "weights": weights.double().repeat_interleave(torch.tensor(case["lengths"])),
        "advantages": flat(case, "advantages"),
        "behaviour": old,
        "old": old,
    }
    loss, _ = make_ppo_loss(config)(flat(case, "logp"), None, fields)
    assert loss.item() == pytest.approx(case[f"policy_{mode}"], **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_the_clipped_value_loss(case: dict[str, Any]) -> None:
    lengths = torch.tensor(case["lengths"])
    outcomes = torch.tensor(case["outcomes"], dtype=torch.float64)
    fields = {
        "weights": token_weights(lengths).double().repeat_interleave(lengths),
        "targets": outcomes.repeat_interleave(lengths),
        "old": flat(case, "values"),
    }
    loss, _ = make_value_loss(0.5)(flat(case, "new_values"), None, fields)
    assert loss.item() == pytest.approx(case["value_loss"], **CLOSE)
