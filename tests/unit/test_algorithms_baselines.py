"""Baselines against slow references written from their formulas (method §5)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron.algorithms.advantages import segment_gae
from genac_megatron.algorithms.baselines.dapo import dapo, mixed, overlong_penalty
from genac_megatron.algorithms.baselines.dr_grpo import dr_grpo
from genac_megatron.algorithms.baselines.grpo import grpo
from genac_megatron.algorithms.baselines.ppo import token_gae, value_loss
from genac_megatron.algorithms.baselines.reinforce_pp import reinforce_pp
from genac_megatron.algorithms.baselines.rloo import rloo
from genac_megatron.algorithms.baselines.sp3o import trained_places
from genac_megatron.algorithms.baselines.vapo import length_adaptive_lambda, positive_weights
from genac_megatron.algorithms.baselines.vc_ppo import decoupled_gae
from genac_megatron.algorithms.losses import make_ppo_loss, make_value_loss, token_weights
from genac_megatron.recipe.algorithms import LossConfig

REWARDS = st.integers(2, 5).flatmap(
    lambda n: st.lists(st.lists(st.floats(0, 1), min_size=n, max_size=n), min_size=1, max_size=5)
)
# References are in float64, results in float32: 1e-5 is a few ulps of figures near 1; deviations as small as
# rounding are divided by 1e-6, which multiplies it.
CLOSE = {"rel": 1e-4, "abs": 1e-4}


@given(REWARDS)
def test_grpo_is_its_formula(rewards: list[list[float]]) -> None:
    got = grpo(torch.tensor(rewards, dtype=torch.float64)).tolist()
    for row, own in zip(got, rewards, strict=True):
        mean = sum(own) / len(own)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in own) / (len(own) - 1))
        assert row == pytest.approx([(r - mean) / (deviation + 1e-6) for r in own], **CLOSE)


@given(REWARDS)
def test_dr_grpo_and_rloo_are_their_formulas(rewards: list[list[float]]) -> None:
    table = torch.tensor(rewards, dtype=torch.float64)
    for i, own in enumerate(rewards):
        for j, r in enumerate(own):
            others = [x for k, x in enumerate(own) if k != j]
            assert rloo(table)[i, j].item() == pytest.approx(r - sum(others) / len(others), **CLOSE)
            assert dr_grpo(table)[i, j].item() == pytest.approx(r - sum(own) / len(own), **CLOSE)


def test_a_single_response_teaches_nothing() -> None:
    one = torch.tensor([[1.0], [0.0]])
    assert not grpo(one).any()
    assert not rloo(one).any()
    assert not dr_grpo(one).any()


@given(REWARDS, st.booleans(), st.randoms(use_true_random=False))
def test_reinforce_pp_whitens_over_tokens(rewards: list[list[float]], baseline: bool, rng: object) -> None:
    lengths = [[rng.randint(1, 6) for _ in row] for row in rewards]  # type: ignore[attr-defined]
    got = reinforce_pp(
        torch.tensor(rewards, dtype=torch.float64), torch.tensor(lengths), baseline=baseline
    ).flatten()
    returns, tokens = [], []
    for row, sizes in zip(rewards, lengths, strict=True):
        shift = sum(row) / len(row) if baseline else 0.0
        for r, n in zip(row, sizes, strict=True):
            returns.append(r - shift)
            tokens += [r - shift] * n
    mean = sum(tokens) / len(tokens)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in tokens) / len(tokens))
    if deviation > 1e-3:  # below that, whiten may call the batch flat
        assert got.tolist() == pytest.approx([(x - mean) / deviation for x in returns], rel=1e-3, abs=1e-3)


def test_reinforce_pp_takes_off_a_share_of_the_mean() -> None:
    """Rewards 1, 0, 0 over 1, 2 and 1 tokens, a response of no trained token: mean 1/4."""
    rewards, lengths = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1, 2], [1, 0]])
    for share in (0.0, 0.5):
        left = [1.0 - share / 4, -share / 4, -share / 4]
        size = math.sqrt((left[0] ** 2 + 2 * left[1] ** 2 + left[2] ** 2) / 4)
        found = reinforce_pp(rewards, lengths, share=share).flatten().tolist()
        assert found[:3] == pytest.approx([x / size for x in left], abs=1e-6)
    nothing = reinforce_pp(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.long), share=0.0)
    assert not nothing.any(), "no success teaches nothing"


def test_dapo_penalty_and_mixed_groups() -> None:
    lengths = torch.tensor([[50, 80, 90, 100, 120]])
    assert overlong_penalty(lengths, 100, 20).tolist() == [[0.0, 0.0, -0.5, -1.0, -1.0]]
    outcomes = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.5, 0.5]])
    assert mixed(outcomes).tolist() == [False, True, False]
    assert torch.allclose(dapo(outcomes), grpo(outcomes), atol=1e-5)  # grpo's 1e-6 beside twice the deviation


def test_dapo_weighs_its_penalty_against_rewards_of_minus_one_and_one() -> None:
    """As in the paper: a right response at the limit gets 0, a wrong short one -1."""
    outcomes, lengths = torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[100, 10, 10]])
    rewards = torch.tensor([[0.0, -1.0, 1.0]])
    assert torch.allclose(dapo(outcomes, overlong_penalty(lengths, 100, 20)), grpo(rewards))


def test_a_group_that_is_not_mixed_is_not_taught_by_its_lengths() -> None:
    outcomes, lengths = torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([[100, 10], [100, 10]])
    got = dapo(outcomes, overlong_penalty(lengths, 100, 20))
    assert not got[0].any()
    assert got[1].any()


def slow_gae(values: list[float], outcome: float, gamma: float, lam: float) -> list[float]:
    """Every advantage as its whole sum."""
    following = [gamma * v for v in values[1:]] + [outcome]
    deltas = [after - v for after, v in zip(following, values, strict=True)]
    return [
        sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(values))) for t in range(len(values))
    ]


VALUES = st.lists(st.lists(st.floats(-1, 2), min_size=1, max_size=9), min_size=1, max_size=4)


@given(VALUES, st.floats(0.5, 1), st.floats(0, 1), st.floats(0, 1))
def test_token_gae_is_the_slow_sum(
    values: list[list[float]], gamma: float, lam: float, outcome: float
) -> None:
    outcomes = torch.full((len(values),), outcome, dtype=torch.float64)
    got = token_gae([torch.tensor(v, dtype=torch.float64) for v in values], outcomes, gamma, lam)
    for row, own in zip(got, values, strict=True):
        assert row.tolist() == pytest.approx(slow_gae(own, outcome, gamma, lam), **CLOSE)


@given(VALUES, st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_token_gae_agrees_with_segments_of_one_token_and_takes_a_lambda_each(
    values: list[list[float]], lams: list[float]
) -> None:
    tensors = [torch.tensor(v, dtype=torch.float64) for v in values]
    outcomes = torch.ones(len(values), dtype=torch.float64)
    whole = token_gae(tensors, outcomes, 1.0, lams[: len(values)])
    for value, lam, row in zip(tensors, lams, whole, strict=False):
        alone = segment_gae([value], outcomes[:1], 1.0, lam)[0]
        assert torch.allclose(row, alone, atol=1e-6)  # both in float64, given as float32


def test_decoupled_gae_teaches_the_critic_the_outcome() -> None:
    values = [torch.tensor([0.2, 0.9, 0.4]), torch.tensor([0.5])]
    advantages, targets = decoupled_gae(values, torch.tensor([1.0, 0.0]), lam_actor=0.95)
    assert [t.tolist() for t in targets] == [pytest.approx([1.0] * 3), pytest.approx([0.0])]
    assert advantages[0].tolist() == pytest.approx(slow_gae([0.2, 0.9, 0.4], 1.0, 1.0, 0.95))


def test_vapo_lambda_and_positive_weights() -> None:
    assert length_adaptive_lambda([10, 20, 40, 1000]) == pytest.approx([0.0, 0.0, 0.5, 0.98])
    assert positive_weights([3, 5, 2], [1.0, 0.0, 1.0]) == pytest.approx([0.2, 0.0, 0.2])
    assert positive_weights([3], [0.0]) == [0.0]


@given(st.integers(1, 200), st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_sp3o_places_lie_in_the_response(length: int, at: list[float]) -> None:
    places = trained_places(length, at)
    assert places
    assert all(0 <= place < length for place in places)
    assert len(places) <= len(at)
    assert trained_places(100, [0.3, 0.6, 0.9]) == [30, 60, 90]


@given(st.integers(1, 200), st.lists(st.floats(0, 1), min_size=1, max_size=4), st.data())
def test_sp3o_places_at_cuts_are_the_nearest(length: int, at: list[float], data: st.DataObject) -> None:
    cuts = [0, *sorted(data.draw(st.sets(st.integers(0, length - 1))) - {0})]
    places = trained_places(length, at, cuts)
    free = trained_places(length, at)
    assert 1 <= len(places) <= len(free)
    assert set(places) <= set(cuts)
    for place in free:
        nearest = min(abs(cut - place) for cut in cuts)
        assert any(abs(cut - place) == nearest for cut in places)
    assert trained_places(100, [0.3, 0.6, 0.9], [0, 28, 35, 61, 70]) == [28, 61, 70]


def test_value_clipping_takes_the_worse_error() -> None:
    values, old, targets = (
        torch.tensor([0.9, 0.9, 0.2]),
        torch.tensor([0.0, 0.0, 0.1]),
        torch.tensor([1.0, 0.5, 0.0]),
    )
    # 0.9 is further than 0.5 from 0: the clipped value is 0.5, its errors are 0.5 and 0.
    assert value_loss(values, old, targets, 0.5).tolist() == pytest.approx([0.125, 0.08, 0.02])
    assert value_loss(values, old, targets, None).tolist() == pytest.approx([0.005, 0.08, 0.02])


def test_the_value_loss_has_no_gradient_beyond_the_clip_towards_the_target() -> None:
    values = torch.tensor([0.9], requires_grad=True)
    fields = {"weights": torch.ones(1), "targets": torch.ones(1), "old": torch.zeros(1)}
    loss, stats = make_value_loss(0.5)(values, None, fields)
    loss.backward()
    assert values.grad is not None
    assert values.grad.item() == 0.0
    assert stats["clip_share"].item() == 1.0


def test_constant_weights_ignore_lengths() -> None:
    weights = token_weights([3, 5, 0], "constant", 10)
    assert weights.tolist() == pytest.approx([1 / 20, 1 / 20, 0.0])
    with pytest.raises(ValueError, match="limit"):
        token_weights([3], "constant")


def test_the_likelihood_term_adds_the_mean_over_right_tokens() -> None:
    logp = torch.tensor([-1.0, -2.0, -3.0])
    fields = {
        "weights": torch.full((3,), 1 / 3),
        "advantages": torch.zeros(3),
        "behaviour": logp,
        "nll_weights": torch.tensor([0.5, 0.5, 0.0]),
    }
    loss, stats = make_ppo_loss(LossConfig(nll_coef=0.1))(logp, None, fields)
    assert loss.item() == pytest.approx(0.15)
    assert stats["nll"].item() == pytest.approx(1.5)
