"""Losses against loops over tokens written from the formulas, their gradients, sums and padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from genac_megatron.algorithms.losses import (
    Loss,
    make_ppo_loss,
    make_reinforce_loss,
    make_sft_loss,
    make_value_loss,
    means,
    token_weights,
)
from genac_megatron.recipe.algorithms import CriticLossConfig
from genac_megatron.recipe.schema import LossConfig

configs = st.builds(
    LossConfig,
    clip_low=st.sampled_from([0.1, 0.2, 0.5]),
    clip_high=st.sampled_from([0.1, 0.28, 1.0]),
    dual_clip=st.sampled_from([None, 1.5, 3.0]),
    tis_cap=st.sampled_from([None, 0.8, 2.0]),
    entropy_coef=st.sampled_from([0.0, 0.01]),
)
# Each token: log-prob, its drift since `old`, that of old since behaviour, advantage, entropy, weight.
token = st.tuples(
    st.floats(-6, -0.01),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.floats(-3, 3),
    st.floats(0, 4),
    st.floats(0, 1),
)
rows = st.lists(token, min_size=1, max_size=12)
Rows = list[tuple[float, float, float, float, float, float]]


def tensors(made: Rows, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    logp, drift, gap, advantages, entropy, weights = torch.tensor(made, dtype=dtype).unbind(1)
    fields = {
        "weights": weights,
        "advantages": advantages,
        "old": logp - drift,
        "behaviour": logp - drift - gap,
        "targets": advantages,  # of a value loss
    }
    return logp.clone().requires_grad_(), entropy.clone().requires_grad_(), fields


def critics(config: LossConfig) -> CriticLossConfig:
    """What REINFORCE has of the same."""
    return CriticLossConfig(tis_cap=config.tis_cap, entropy_coef=config.entropy_coef)


# --- slow references, one token at a time, on plain floats ------------------------------------------


def slow_ppo(config: LossConfig, logp: float, old: float, behaviour: float, a: float) -> tuple[float, float]:
    """(loss, its derivative by logp) of one token, from the formula."""
    ratio = math.exp(logp - old)
    clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
    surrogate, slope = min((ratio * a, ratio * a), (clipped * a, ratio * a if clipped == ratio else 0.0))
    if config.dual_clip is not None and a < 0 and config.dual_clip * a > surrogate:
        surrogate, slope = config.dual_clip * a, 0.0
    tis = 1.0 if config.tis_cap is None else min(math.exp(old - behaviour), config.tis_cap)
    return -tis * surrogate, -tis * slope


def on_a_kink(config: LossConfig, made: Rows) -> bool:
    """Whether a token sits where the loss has no derivative (either one is right there)."""
    edges = [math.log(1 - config.clip_low), math.log(1 + config.clip_high), math.log(config.dual_clip or 1e9)]
    return any(abs(row[1] - edge) < 1e-6 for row in made for edge in edges) or any(
        abs(row[3]) < 1e-9 for row in made
    )


@settings(max_examples=200)
@given(rows, configs)
def test_ppo_against_the_formula(made: Rows, config: LossConfig) -> None:
    if on_a_kink(config, made):
        return
    logp, entropy, fields = tensors(made)
    loss, stats = make_ppo_loss(config)(logp, entropy, fields)
    loss.backward()
    total, bonus = 0.0, 0.0
    for t, (_, _, _, a, h, w) in enumerate(made):
        figures = [float(x[t]) for x in (logp.detach(), fields["old"], fields["behaviour"])]
        one, slope = slow_ppo(config, *figures, a)
        total += w * one
        bonus += w * h
        assert logp.grad is not None
        # float64 on both sides; 1e-9 leaves room for exp and the order of sums.
        assert float(logp.grad[t]) == pytest.approx(w * slope, rel=1e-9, abs=1e-9)
    assert float(loss.detach()) == pytest.approx(total - config.entropy_coef * bonus, rel=1e-9, abs=1e-9)
    expected = None if config.entropy_coef == 0.0 else -config.entropy_coef * fields["weights"]
    assert entropy.grad is None if expected is None else torch.allclose(entropy.grad, expected)  # type: ignore[arg-type]
    check_stats(config, made, logp.detach(), fields, stats)


def check_stats(
    config: LossConfig, made: Rows, logp: Tensor, fields: Mapping[str, Tensor], stats: Mapping[str, Tensor]
) -> None:
    slow = dict.fromkeys(
        ("ratio", "clip_share", "dual_clip_share", "tis", "tis_clip_share", "kl_behaviour", "entropy"), 0.0
    )
    for t, (_, _, _, a, h, w) in enumerate(made):
        now, old, behaviour = (float(x[t]) for x in (logp, fields["old"], fields["behaviour"]))
        ratio, mismatch = math.exp(now - old), math.exp(old - behaviour)
        slow["ratio"] += w * ratio
        slow["clip_share"] += w * (
            (a > 0 and ratio > 1 + config.clip_high) or (a < 0 and ratio < 1 - config.clip_low)
        )
        slow["dual_clip_share"] += w * (config.dual_clip is not None and a < 0 and ratio > config.dual_clip)
        slow["tis"] += w * (1.0 if config.tis_cap is None else min(mismatch, config.tis_cap))
        if config.tis_cap is not None and abs(mismatch - config.tis_cap) > 1e-9:
            slow["tis_clip_share"] += w * (mismatch > config.tis_cap)
        slow["kl_behaviour"] += w * (math.exp(now - behaviour) - 1 - (now - behaviour))
        slow["entropy"] += w * h
    assert set(stats) == set(slow)
    for name, value in slow.items():
        assert not stats[name].requires_grad
        if name != "tis_clip_share" or not any(near_cap(config, row) for row in made):
            assert float(stats[name]) == pytest.approx(value, rel=1e-9, abs=1e-9), name


def near_cap(config: LossConfig, row: tuple[float, ...]) -> bool:
    return config.tis_cap is not None and abs(math.exp(row[2]) - config.tis_cap) < 1e-6


@given(rows, configs)
def test_reinforce_against_the_formula(made: Rows, config: LossConfig) -> None:
    logp, entropy, fields = tensors(made)
    loss, stats = make_reinforce_loss(critics(config))(logp, entropy, fields)
    loss.backward()
    total = 0.0
    for t, (_, _, _, a, h, w) in enumerate(made):
        mismatch = math.exp(float(logp.detach()[t]) - float(fields["behaviour"][t]))
        tis = 1.0 if config.tis_cap is None else min(mismatch, config.tis_cap)
        total -= w * (tis * a * float(logp.detach()[t]) + config.entropy_coef * h)
        assert logp.grad is not None
        # The importance weight is a constant to the gradient.
        assert float(logp.grad[t]) == pytest.approx(-w * tis * a, rel=1e-9, abs=1e-9)
    assert float(loss.detach()) == pytest.approx(total, rel=1e-9, abs=1e-9)
    assert set(stats) == {"tis", "tis_clip_share", "kl_behaviour", "entropy"}


@given(rows)
def test_sft_is_weighted_cross_entropy(made: Rows) -> None:
    logp, _, fields = tensors(made)
    loss, stats = make_sft_loss()(logp, None, {"weights": fields["weights"]})
    loss.backward()
    assert float(loss.detach()) == float(stats["nll"]) == pytest.approx(-sum(r[5] * r[0] for r in made))
    assert logp.grad is not None
    assert torch.equal(logp.grad, -fields["weights"])
    assert set(stats) == {"nll"}


@given(rows, configs)
def test_without_old_the_first_update_is_the_policy_gradient(made: Rows, config: LossConfig) -> None:
    logp, entropy, fields = tensors(made)
    del fields["old"]
    loss, stats = make_ppo_loss(config)(logp, entropy, fields)
    loss.backward()
    assert float(stats["ratio"]) == pytest.approx(float(fields["weights"].sum()))
    assert float(stats["clip_share"]) == 0.0
    tis = torch.ones_like(logp)
    if config.tis_cap is not None:
        tis = (logp.detach() - fields["behaviour"]).exp().clamp(max=config.tis_cap)
    torch.testing.assert_close(logp.grad, -fields["weights"] * tis * fields["advantages"])


def test_gradients_numerically() -> None:
    """Finite differences on smooth points, independent of both implementations."""
    generator = torch.Generator().manual_seed(1)
    logp = torch.randn(16, generator=generator, dtype=torch.float64) - 2
    drift = torch.tensor([-0.6, -0.1, 0.05, 0.4] * 4, dtype=torch.float64)
    fields = {
        "weights": torch.full((16,), 1 / 16, dtype=torch.float64),
        "advantages": torch.randn(16, generator=generator, dtype=torch.float64),
        "old": logp - drift,
        "behaviour": logp - drift - 0.1,
    }
    entropy = torch.rand(16, generator=generator, dtype=torch.float64)
    loss = make_ppo_loss(LossConfig(entropy_coef=0.01))
    assert torch.autograd.gradcheck(
        lambda x, h: loss(x, h, fields)[0], (logp.requires_grad_(), entropy.requires_grad_())
    )


# --- sums over micro-batches and ranks; padding ------------------------------------------------------

LOSSES: dict[str, Callable[[], Loss]] = {
    "sft": make_sft_loss,
    "ppo": lambda: make_ppo_loss(LossConfig(entropy_coef=0.01)),
    "reinforce": lambda: make_reinforce_loss(CriticLossConfig(entropy_coef=0.01)),
    "value": lambda: make_value_loss(0.2),
}


@pytest.mark.parametrize("name", sorted(LOSSES))
@given(made=rows, cut=st.integers(0, 12))
def test_micro_batches_add_up(name: str, made: Rows, cut: int) -> None:
    loss = LOSSES[name]()
    logp, entropy, fields = tensors(made)
    whole, stats = loss(logp, entropy, fields)
    parts = []
    for piece in (slice(0, cut), slice(cut, None)):
        parts.append(loss(logp[piece], entropy[piece], {k: v[piece] for k, v in fields.items()}))
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    for key, value in stats.items():
        torch.testing.assert_close(parts[0][1][key] + parts[1][1][key], value)


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("junk", [0.0, -1e30, 1e30, 3e38])
def test_padding_adds_nothing(name: str, junk: float) -> None:
    loss = LOSSES[name]()
    real: Rows = [(-1.0, 0.3, 0.1, 1.5, 2.0, 0.5), (-0.5, -0.4, 0.2, -0.7, 1.0, 0.5)]
    logp, entropy, fields = tensors(real, torch.float32)
    plain, plain_stats = loss(logp, entropy, fields)
    (plain_grad,) = torch.autograd.grad(plain, logp)
    for sign in (1.0, -1.0):
        pad = torch.full((3,), junk)
        padded = torch.cat([logp.detach(), pad]).requires_grad_()
        extra = {key: torch.cat([value, -sign * pad]) for key, value in fields.items()}
        extra["weights"] = torch.cat([fields["weights"], torch.zeros(3)])
        value, stats = loss(padded, torch.cat([entropy.detach(), pad.abs()]), extra)
        (grad,) = torch.autograd.grad(value, padded)
        assert torch.equal(value, plain)
        assert torch.equal(grad[:2], plain_grad)
        assert not grad[2:].any()
        assert all(torch.equal(stats[key], plain_stats[key]) for key in plain_stats)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("drift", [-200.0, 200.0])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_absurd_ratios_stay_finite(advantage: float, drift: float, dual_clip: float | None) -> None:
    logp = torch.tensor([-201.0 + max(drift, 0.0)], requires_grad=True)
    fields = {
        "weights": torch.ones(1),
        "advantages": torch.tensor([advantage]),
        "old": logp.detach() - drift,
        "behaviour": logp.detach() + drift,
    }
    for config in (LossConfig(dual_clip=dual_clip), LossConfig(dual_clip=dual_clip, tis_cap=None)):
        for loss in (make_ppo_loss(config), make_reinforce_loss(critics(config))):
            value, stats = loss(logp, None, fields)
            (grad,) = torch.autograd.grad(value, logp)
            assert all(torch.isfinite(x).all() for x in (value, grad, *stats.values()))
            assert "entropy" not in stats


def test_an_entropy_bonus_needs_the_entropy() -> None:
    for make in (make_ppo_loss, lambda config: make_reinforce_loss(critics(config))):
        logp, _, fields = tensors([(-1.0, 0.0, 0.0, 1.0, 0.0, 1.0)])
        with pytest.raises(ValueError, match="entropy"):
            make(LossConfig(entropy_coef=0.1))(logp, None, fields)


# --- weights -------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20))
def test_token_weights(lengths: list[int]) -> None:
    token, sequence = token_weights(lengths), token_weights(torch.tensor(lengths), "sequence")
    filled = [n for n in lengths if n]
    for n, w, s in zip(lengths, token.tolist(), sequence.tolist(), strict=True):
        assert w == pytest.approx(1 / sum(filled) if n else 0.0, rel=1e-6)
        assert s == pytest.approx(1 / (len(filled) * n) if n else 0.0, rel=1e-6)
    for weights in (token, sequence):
        total = sum(n * w for n, w in zip(lengths, weights.tolist(), strict=True))
        assert total == pytest.approx(1.0 if filled else 0.0, rel=1e-6)


def test_unknown_aggregate() -> None:
    with pytest.raises(ValueError, match="token, sequence, or constant"):
        token_weights([1], "batch")


def test_the_kl_term_is_k3_to_the_reference_with_its_gradient() -> None:
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    reference = torch.tensor([-1.5, -1.0])
    fields = {
        "weights": torch.tensor([0.25, 0.75]),
        "advantages": torch.zeros(2),
        "behaviour": logp.detach(),
        "reference": reference,
    }
    loss, stats = make_ppo_loss(LossConfig(kl_coef=0.1))(logp, None, fields)
    difference = [-0.5, 1.0]
    wanted = sum(w * (math.exp(d) - 1 - d) for w, d in zip((0.25, 0.75), difference, strict=True))
    assert stats["kl_reference"].item() == pytest.approx(wanted)
    assert loss.item() == pytest.approx(0.1 * wanted)
    loss.backward()
    # d/dlogp of exp(ref - logp) - 1 - (ref - logp) = 1 - exp(ref - logp)
    slopes = [0.1 * w * (1 - math.exp(d)) for w, d in zip((0.25, 0.75), difference, strict=True)]
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx(slopes)


def test_figures_of_weights_that_do_not_sum_to_one_are_means_over_tokens() -> None:
    """Dr.GRPO divides by the longest length that there may be: lengths 10, 20, 30 of 64 sum to 0.3125."""
    lengths = torch.tensor([10, 20, 30])
    weights = token_weights(lengths, "constant", 64).repeat_interleave(lengths)
    logp = torch.full((60,), -1.0)
    fields = {"weights": weights, "advantages": torch.ones(60), "behaviour": logp}
    _, stats = make_ppo_loss(LossConfig(aggregate="constant"))(logp, torch.full((60,), 2.0), fields)
    summed = {key: float(value) for key, value in stats.items()} | {"nll": 0.7}
    found = means(summed, float(weights.sum()))
    assert summed["ratio"] == pytest.approx(0.3125)
    assert {key: found[key] for key in ("ratio", "tis", "entropy", "clip_share", "nll")} == pytest.approx(
        {"ratio": 1.0, "tis": 1.0, "entropy": 2.0, "clip_share": 0.0, "nll": 0.7}
    )
    assert means(summed, 0.0) == summed, "nothing was trained"
