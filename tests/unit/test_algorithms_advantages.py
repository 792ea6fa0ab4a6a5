"""Segment GAE against a token-by-token reference, causality, whitening over ranks, explained variance."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron.algorithms.advantages import (
    explained_variance,
    gated_lam,
    segment_gae,
    to_tokens,
    token_moments,
    whiten,
)

unit = st.floats(0, 1, width=32)
segments = st.lists(st.tuples(unit, st.integers(1, 6)), min_size=1, max_size=8)  # (value, tokens)


def token_gae(
    values: list[float], lengths: list[int], outcome: float, gamma: float, lam: float
) -> list[float]:
    """The textbook recursion over tokens, from the last to the first. Inside a segment gamma = lambda = 1;
    a border carries gamma and lambda. `values` has one figure per token."""
    borders = {sum(lengths[: k + 1]) - 1 for k in range(len(lengths))}
    advantages = [0.0] * len(values)
    later = 0.0
    for t in reversed(range(len(values))):
        last = t == len(values) - 1
        following = outcome if last else (gamma if t in borders else 1.0) * values[t + 1]
        decay = 0.0 if last else (gamma * lam if t in borders else 1.0)
        later = following - values[t] + decay * later
        advantages[t] = later
    return advantages


@given(st.lists(st.tuples(segments, unit), min_size=1, max_size=4), unit, unit)
def test_equals_token_gae_with_decay_at_borders_only(
    batch: list[tuple[list[tuple[float, int]], float]], gamma: float, lam: float
) -> None:
    values = [torch.tensor([v for v, _ in made]) for made, _ in batch]
    outcomes = torch.tensor([outcome for _, outcome in batch])
    found = segment_gae(values, outcomes, gamma, lam)
    for (made, outcome), per_segment in zip(batch, found, strict=True):
        lengths = [n for _, n in made]
        flat = [v for v, n in made for _ in range(n)]
        # float64 inside; 1e-6: the float32 result, of figures below 8.
        torch.testing.assert_close(
            to_tokens(per_segment, torch.tensor(lengths)),
            torch.tensor(token_gae(flat, lengths, outcome, gamma, lam)), rtol=1e-6, atol=2e-6,
        )  # fmt: skip


@given(segments, unit, unit, st.randoms(use_true_random=False))
def test_values_inside_segments_do_not_matter_to_token_gae(
    made: list[tuple[float, int]], outcome: float, lam: float, rng: object
) -> None:
    """lambda 1 inside a segment telescopes: at its first token, token GAE with *any* inner values is A_k."""
    lengths = [n for _, n in made]
    flat = [v if i == 0 else rng.random() for v, n in made for i in range(n)]  # type: ignore[attr-defined]
    slow = token_gae(flat, lengths, outcome, 1.0, lam)
    starts = [sum(lengths[:k]) for k in range(len(lengths))]
    (fast,) = segment_gae([torch.tensor([v for v, _ in made])], torch.tensor([outcome]), 1.0, lam)
    torch.testing.assert_close(fast, torch.tensor([slow[s] for s in starts]), rtol=1e-6, atol=2e-6)


@given(segments, unit)
def test_lambda_1_is_return_minus_value_and_lambda_0_one_step(
    made: list[tuple[float, int]], outcome: float
) -> None:
    values = torch.tensor([v for v, _ in made])
    (monte_carlo,) = segment_gae([values], torch.tensor([outcome]), 1.0, 1.0)
    torch.testing.assert_close(monte_carlo, outcome - values, rtol=1e-6, atol=2e-6)
    (one_step,) = segment_gae([values], torch.tensor([outcome]), 1.0, 0.0)
    torch.testing.assert_close(
        one_step, torch.cat([values[1:], torch.tensor([outcome])]) - values, rtol=1e-6, atol=1e-6
    )


@given(segments, unit, unit, unit, unit, st.data())
def test_causality(
    made: list[tuple[float, int]], outcome: float, later: float, gamma: float, lam: float, data: st.DataObject
) -> None:
    """Whatever happens from segment k on, its baseline stays V_k: A_k + V_k depends on the future alone,
    and earlier values never enter A_k."""
    values = torch.tensor([v for v, _ in made])
    k = data.draw(st.integers(0, len(values) - 1))
    own, past = values.clone(), values.clone()
    own[k] = later
    past[:k] = later
    (first,) = segment_gae([values], torch.tensor([outcome]), gamma, lam)
    (changed,) = segment_gae([own], torch.tensor([outcome]), gamma, lam)
    (earlier,) = segment_gae([past], torch.tensor([outcome]), gamma, lam)
    torch.testing.assert_close(first[k] + values[k], changed[k] + own[k], rtol=0, atol=2e-6)
    assert torch.equal(first[k:], earlier[k:])


def test_a_known_case() -> None:
    (found,) = segment_gae([torch.tensor([0.5, 0.7, 0.2])], torch.tensor([1.0]), 1.0, 0.5)
    torch.testing.assert_close(found, torch.tensor([0.2 + 0.5 * (-0.5 + 0.5 * 0.8), -0.5 + 0.5 * 0.8, 0.8]))
    with pytest.raises(ValueError, match="outcomes"):
        segment_gae([torch.tensor([0.5])], torch.tensor([1.0, 0.0]))


# --- whitening -----------------------------------------------------------------------------------


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=60), st.data())
def test_whitening_over_ranks_equals_whitening_whole(figures: list[float], data: st.DataObject) -> None:
    tokens = torch.tensor(figures)
    cut = data.draw(st.integers(0, len(figures)))
    parts = [tokens[:cut], tokens[cut:]]  # a rank may have none
    moments = token_moments(parts[0]) + token_moments(parts[1])
    joined = torch.cat([whiten(part, moments) for part in parts])
    # Sums in another order, in float64, shown as float32.
    torch.testing.assert_close(joined, whiten(tokens), rtol=1e-4, atol=1e-5)
    wide = tokens.double()
    deviation = wide.std(correction=0)
    if deviation > 1e-4:  # the sums of squares keep 1e-16 * 1e4 of a variance above 1e-8: 4 digits
        slow = (wide - wide.mean()) / (deviation + 1e-8)
        torch.testing.assert_close(joined.double(), slow, rtol=1e-3, atol=1e-3)


def test_equal_figures_whiten_to_zero() -> None:
    for figure in (0.0, 0.1, -3.3, 1e6):
        assert whiten(torch.full((1000,), figure)).abs().max() == 0.0


def test_rounding_noise_is_not_whitened_into_signal() -> None:
    figure = torch.tensor(0.3)
    noisy = torch.stack([figure, torch.nextafter(figure, torch.tensor(1.0))] * 50)
    assert whiten(noisy).abs().max() == 0.0
    assert whiten(noisy + torch.tensor([0.0, 1e-4] * 50)).abs().min() > 0.9  # what is real stays


def test_whitened_has_mean_0_and_deviation_1() -> None:
    white = whiten(torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 0.03 + 0.4)
    assert white.dtype == torch.float32
    assert abs(float(white.mean())) < 1e-5
    assert abs(float(white.std(correction=0)) - 1) < 1e-5


# --- explained variance and the gate -------------------------------------------------------------


def test_explained_variance() -> None:
    outcomes = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    assert float(explained_variance(outcomes, outcomes)) == 1.0
    assert float(explained_variance(torch.full((5,), 0.6), outcomes)) == pytest.approx(0.0)
    assert float(explained_variance(1 - outcomes, outcomes)) == pytest.approx(-3.0)
    values = torch.tensor([0.2, 0.9, 0.4, 0.1, 0.7])
    errors = [r - v for r, v in zip(outcomes.tolist(), values.tolist(), strict=True)]
    mean = sum(errors) / 5
    slow = 1 - (sum((e - mean) ** 2 for e in errors) / 5) / 0.24
    assert float(explained_variance(values, outcomes)) == pytest.approx(slow, rel=1e-6)
    assert float(explained_variance(values, torch.ones(5))) == 0.0
    with pytest.raises(ValueError):
        explained_variance(values, outcomes[:4])


def test_the_lambda_gate() -> None:
    assert gated_lam(0.95, 0.2, None) == 1.0
    assert gated_lam(0.95, 0.2, 0.2) == 1.0
    assert gated_lam(0.95, 0.2, math.nan) == 1.0
    assert gated_lam(0.95, 0.2, 0.21) == 0.95
    assert gated_lam(0.95, None, None) == 0.95
