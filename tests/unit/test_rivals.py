"""SAO, PACT and EasyPPO against loops written from their formulas (docs/method.md, section 6)."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from genac_megatron.algorithms.baselines.easyppo import spread_weights
from genac_megatron.algorithms.baselines.pact import cross_entropy, moved_targets
from genac_megatron.algorithms.baselines.sao import in_band
from genac_megatron.algorithms.losses import make_ppo_loss, make_value_loss, means
from genac_megatron.recipe.algorithms import LossConfig, SaoLoss

BAND = SaoLoss().band
assert BAND is not None


def tokens(count: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs that have moved far both ways, and a loss's fields."""
    rng = random.Random(seed)
    moved = torch.tensor([rng.uniform(-2, 3) for _ in range(count)], dtype=dtype)
    logp = torch.tensor([rng.uniform(-6, -0.01) for _ in range(count)], dtype=dtype)
    fields = {
        "weights": torch.tensor([rng.random() for _ in range(count)], dtype=dtype),
        "advantages": torch.tensor([rng.gauss(0, 1) for _ in range(count)], dtype=dtype),
        "behaviour": logp - moved,
        "old": logp - 5.0,  # nothing may look at it
    }
    return logp.requires_grad_(), fields


def test_both_bounds_are_outside_whatever_the_advantage() -> None:
    ratios = torch.tensor([0.0, 0.49, 0.5, 0.51, 1.0, 1.99, 2.0, 2.01])
    assert in_band(ratios, (0.5, 2.0)).tolist() == [False, False, False, True, True, True, False, False]


@pytest.mark.parametrize("seed", range(5))
def test_sao_is_its_formula(seed: int) -> None:
    """L = sum w f(r) A log pi, f(r) = r inside and 0 outside (section 3.1), as a gradient; no old policy."""
    logp, fields = tokens(40, seed)
    loss, stats = make_ppo_loss(SaoLoss())(logp, None, fields)
    (grad,) = torch.autograd.grad(loss, logp)
    total, low, high = 0.0, 0.0, 0.0
    now = logp.detach()
    for t in range(40):
        w, a = float(fields["weights"][t]), float(fields["advantages"][t])
        ratio = math.exp(float(now[t]) - float(fields["behaviour"][t]))
        f = ratio if BAND[0] < ratio < BAND[1] else 0.0
        assert float(grad[t]) == pytest.approx(-w * f * a, rel=1e-9, abs=1e-12)
        total -= w * f * a
        low += w * (ratio <= BAND[0])
        high += w * (ratio >= BAND[1])
    assert low > 0
    assert high > 0
    assert float(loss.detach()) == pytest.approx(total, rel=1e-9)
    assert float(stats["masked_low_share"]) == pytest.approx(low, rel=1e-9)
    assert float(stats["masked_high_share"]) == pytest.approx(high, rel=1e-9)
    assert "clip_share" not in stats
    assert float(stats["tis_clip_share"]) == 0.0  # the band is in its place
    whole = float(fields["weights"].sum())
    shown = means({key: float(value) for key, value in stats.items()}, whole)
    assert shown["masked_low_share"] == pytest.approx(low / whole)


def test_a_masked_token_leaves_the_others_their_share() -> None:
    """It still counts in the mean."""
    logp = torch.tensor([-1.0, -1.0], requires_grad=True)
    fields = {"weights": torch.tensor([0.5, 0.5]), "advantages": torch.ones(2),
              "behaviour": torch.tensor([-1.0, -9.0])}  # fmt: skip
    loss, _ = make_ppo_loss(SaoLoss())(logp, None, fields)
    assert torch.autograd.grad(loss, logp)[0].tolist() == [-0.5, 0.0]


@pytest.mark.parametrize("junk", [-1e30, 3e38])
@pytest.mark.parametrize(
    "loss", [make_ppo_loss(SaoLoss()), make_value_loss(None, logit=True)], ids=["sao", "bce"]
)
def test_padding_adds_nothing_and_micro_batches_add_up(loss: object, junk: float) -> None:
    logp, fields = tokens(8, 1, torch.float32)
    fields["targets"] = fields["advantages"]
    whole, stats = loss(logp, None, fields)  # type: ignore[operator]
    (grad,) = torch.autograd.grad(whole, logp)
    pad = torch.full((3,), junk)
    padded = torch.cat([logp.detach(), pad]).requires_grad_()
    extra = {key: torch.cat([value, -pad]) for key, value in fields.items()}
    extra["weights"] = torch.cat([fields["weights"], torch.zeros(3)])
    value, more = loss(padded, None, extra)  # type: ignore[operator]
    (theirs,) = torch.autograd.grad(value, padded)
    assert torch.equal(theirs[:8], grad)
    assert not theirs[8:].any()
    torch.testing.assert_close(value, whole)
    parts = [
        loss(logp[piece], None, {k: v[piece] for k, v in fields.items()})  # type: ignore[operator]
        for piece in (slice(0, 3), slice(3, None))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    for key, figure in stats.items():
        torch.testing.assert_close(parts[0][1][key] + parts[1][1][key], figure)
        torch.testing.assert_close(more[key], figure)


def test_a_band_needs_the_unmoved_token_inside() -> None:
    for wrong in ((0.0, 1.0), (1.0, 2.0), (-0.5, 2.0), (3.0, 4.0)):
        with pytest.raises(ValueError, match="band"):
            LossConfig.model_validate({"band": wrong})


# --- PACT ----------------------------------------------------------------------------------------


def test_cross_entropy_is_its_formula_and_its_gradient_v_minus_y() -> None:
    logits = torch.tensor([-30.0, -2.0, 0.0, 1.5, 30.0], dtype=torch.float64, requires_grad=True)
    for y in (0.0, 0.3, 1.0, 4.5):
        targets = torch.full_like(logits, y).detach()
        got = cross_entropy(logits, targets)
        (grad,) = torch.autograd.grad(got.sum(), logits)
        for z, each, slope in zip(logits.tolist(), got.tolist(), grad.tolist(), strict=True):
            v = 1 / (1 + math.exp(-z))
            if abs(z) < 10:  # else log(1 - v) rounds away in this form
                assert each == pytest.approx(-y * math.log(v) - (1 - y) * math.log(1 - v))
            assert slope == pytest.approx(v - y, abs=1e-12)


def test_a_critic_of_log_odds_is_measured_as_values() -> None:
    fields = {"weights": torch.tensor([0.5, 0.5]), "targets": torch.tensor([1.0, 0.0]),
              "old": torch.tensor([0.5, 0.5])}  # fmt: skip
    loss, stats = make_value_loss(None, logit=True)(torch.zeros(2), None, fields)
    assert float(loss) == pytest.approx(math.log(2))
    assert float(stats["value"]) == 0.5
    assert float(stats["error"]) == 0.25
    with pytest.raises(ValueError, match="squared"):
        make_value_loss(0.5, logit=True)


def test_moved_targets_are_their_formula() -> None:
    rng = random.Random(2)
    lengths, cap = (1, 4, 9), 6.0
    now = [torch.tensor([rng.uniform(-6, 0) for _ in range(n)]) for n in lengths]
    behaviour = [torch.tensor([rng.uniform(-6, 0) for _ in range(n)]) for n in lengths]
    outcomes = [torch.full((n,), float(i % 2) or 0.5) for i, n in enumerate(lengths)]
    moved, kept = moved_targets(outcomes, now, behaviour, cap)
    dropped = 0
    for i, n in enumerate(lengths):
        for t in range(n):
            ratio = math.exp(float(now[i][t]) - float(behaviour[i][t]))
            assert bool(kept[i][t]) == (ratio <= cap)
            dropped += ratio > cap
            if ratio <= cap:
                assert float(moved[i][t]) == pytest.approx(ratio * float(outcomes[i][t]), rel=1e-5)
    assert 0 < dropped < sum(lengths)
    there, back = torch.tensor([0.0, -900.0]), torch.tensor([-900.0, 0.0])
    absurd, out = moved_targets([torch.ones(2)], [there], [back], cap)
    assert torch.isfinite(absurd[0]).all()
    assert out[0].tolist() == [False, True]
    assert float(absurd[0][1]) == pytest.approx(0.0, abs=1e-8)


def test_moved_targets_are_the_value_of_who_moves_for_one_token() -> None:
    """By enumeration: the old policy's mean of rho_t R is the value where token t is the new one's."""
    rng = random.Random(3)
    old = {prefix: rng.uniform(0.2, 0.8) for n in range(3) for prefix in itertools.product((0, 1), repeat=n)}
    new = {prefix: min(max(p + rng.uniform(-0.1, 0.1), 0.05), 0.95) for prefix, p in old.items()}
    reward = {leaf: float(rng.random() < 0.5) for leaf in itertools.product((0, 1), repeat=3)}

    def chance(policy: dict[tuple[int, ...], float], leaf: tuple[int, ...], t: int) -> float:
        one = policy[leaf[:t]]
        return one if leaf[t] else 1 - one

    for t in range(3):
        for prefix in itertools.product((0, 1), repeat=t):
            leaves = [leaf for leaf in reward if leaf[:t] == prefix]
            weight = [math.prod(chance(old, leaf, k) for k in range(t, 3)) for leaf in leaves]
            moved, _ = moved_targets(
                [torch.tensor([reward[leaf]]) for leaf in leaves],
                [torch.tensor([math.log(chance(new, leaf, t))]) for leaf in leaves],
                [torch.tensor([math.log(chance(old, leaf, t))]) for leaf in leaves],
                6.0,
            )
            got = sum(w * float(m) for w, m in zip(weight, moved, strict=True))
            wanted = sum(
                chance(new, leaf, t) * math.prod(chance(old, leaf, k) for k in range(t + 1, 3)) * reward[leaf]
                for leaf in leaves
            )
            assert got == pytest.approx(wanted, abs=1e-6)  # float32 targets


# --- EasyPPO -------------------------------------------------------------------------------------


def test_spread_weights_are_their_formula() -> None:
    rng = random.Random(4)
    rows = [[rng.choice((0.0, 1.0, 0.4)) for _ in range(5)] for _ in range(6)] + [[1.0] * 5]
    floor = 0.5 / math.sqrt(5)
    raw = []
    for row in rows:
        mean = sum(row) / 5
        raw.append(1 / max(math.sqrt(sum((r - mean) ** 2 for r in row) / 5), floor))
    wanted = [w * len(raw) / sum(raw) for w in raw]
    got = spread_weights(torch.tensor(rows)).tolist()
    assert got == pytest.approx(wanted, rel=1e-5)
    assert sum(got) / len(got) == pytest.approx(1.0, rel=1e-5)
    assert got[-1] == max(got)  # all alike: the least noise
    assert spread_weights(torch.tensor([[1.0], [0.0]])).tolist() == [1.0, 1.0]
