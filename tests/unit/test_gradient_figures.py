"""Figures of gradient estimators against cases whose truth is known, and against plain vector sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron.evaluation.gradient_figures import (
    GradientFigures,
    Products,
    agrees,
    ratio,
)

N, D = 16, 40  # rollouts of a batch, weights


def products(chunks: Any, batches: Any, blocks: int) -> tuple[Any, Products]:
    """Inner products as the command keeps them, of gradients [R, D] and [batches, D]."""
    block_of = np.arange(len(batches)) * blocks // len(batches)
    sums = np.stack([batches[block_of == k].sum(0) for k in range(blocks)])
    kept = Products(batches @ chunks.T, (batches**2).sum(1), block_of, sums @ sums.T)
    return chunks @ chunks.T, kept


def drawn(seed: int, *, noise: float, bias: float = 0.0, scale: float = 1.0, count: int = 400) -> Any:
    """(G, reference chunks, batches): |G| = 1, isotropic noise of E|noise|^2 = noise^2, bias across G."""
    rng = np.random.default_rng(seed)
    true = np.zeros(D)
    true[0] = 1.0
    across = np.zeros(D)
    across[1] = bias
    chunks = true + 0.2 * rng.normal(size=(16, D)) / np.sqrt(D)
    batches = scale * (true + across + noise * rng.normal(size=(count, D)) / np.sqrt(D))
    return true, chunks, batches


@pytest.mark.parametrize(("noise", "bias", "scale"), [(1.0, 0.0, 1.0), (3.0, 0.0, 50.0), (2.0, 0.7, 1e-3)])
def test_known_signal_noise_and_bias_are_found(noise: float, bias: float, scale: float) -> None:
    _, chunks, batches = drawn(11, noise=noise, bias=bias, scale=scale)
    between, kept = products(chunks, batches, 20)
    found = GradientFigures(between, 20).of(kept, N)
    wanted = {"snr": 1.0 / (noise**2 + bias**2) / N, "bias": bias, "size": scale}
    for name, value in wanted.items():
        assert found[name].low <= value <= found[name].high, name
    assert found["snr"].value == pytest.approx(wanted["snr"], rel=0.15)
    # Of unit noise in D dimensions: the mean cosine is near 1 / sqrt(1 + noise^2 + bias^2).
    assert found["cosine"].value == pytest.approx(1 / np.sqrt(1 + noise**2 + bias**2), rel=0.08)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    held, agreeing, seeds = 0, 0, 40
    for seed in range(seeds):
        _, chunks, batches = drawn(seed, noise=2.0, count=100)
        between, kept = products(chunks, batches, 20)
        found = GradientFigures(between, 20, draws=200).of(kept, N)
        held += found["snr"].low <= 1 / 4.0 / N <= found["snr"].high
        agreeing += agrees(found)
    assert held >= 0.8 * seeds
    assert agreeing >= 0.9 * seeds


def test_a_bias_or_another_size_is_no_agreement() -> None:
    for bias, scale in ((0.5, 1.0), (0.0, 1.4), (0.0, 0.0)):
        _, chunks, batches = drawn(1, noise=1.0, bias=bias, scale=scale)
        between, kept = products(chunks, batches, 20)
        assert not agrees(GradientFigures(between, 20).of(kept, N)), (bias, scale)


def test_an_estimator_that_points_away_has_a_negative_figure() -> None:
    _, chunks, batches = drawn(2, noise=1.0, scale=-1.0)
    between, kept = products(chunks, batches, 20)
    found = GradientFigures(between, 20).of(kept, N)
    assert found["snr"].high < 0 > found["cosine"].high


def test_batches_without_a_gradient_count_as_no_signal() -> None:
    _, chunks, batches = drawn(4, noise=1.0, count=200)
    batches[::2] = 0.0
    between, kept = products(chunks, batches, 20)
    found = GradientFigures(between, 20).of(kept, N)
    # Half of E g at E|g|^2 / 2: rho^2 is half of 1 / 2.
    assert found["snr"].value * N == pytest.approx(0.25 / 0.75, rel=0.2)
    assert found["cosine"].value == pytest.approx(0.5 / np.sqrt(2), rel=0.1)


def test_ratios_are_paired() -> None:
    _, chunks, batches = drawn(5, noise=2.0)
    figures = GradientFigures(*((lambda b: (b, 20))(chunks @ chunks.T)))
    found = figures.of(products(chunks, batches, 20)[1], N)["snr"]
    same = ratio(found, figures.of(products(chunks, 7 * batches, 20)[1], N)["snr"])
    assert (same.value, same.low, same.high) == pytest.approx((1.0, 1.0, 1.0))


def test_the_reference_says_how_sure_it_is() -> None:
    _, chunks, _ = drawn(6, noise=1.0)
    found = GradientFigures(chunks @ chunks.T, 20).reference(8192)
    assert found["norm"].value == pytest.approx(1.0, abs=0.05)
    assert found["cosine"].value == pytest.approx(1 / np.sqrt(1 + 0.04 / 16), abs=0.01)


@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(2, 5), st.integers(1, 4))
def test_figures_are_those_of_plain_vectors(seed: int, R: int, K: int, each: int) -> None:
    rng = np.random.default_rng(seed)
    chunks, batches = rng.normal(size=(R, 5)) + 1.0, rng.normal(size=(K * each, 5)) + 1.0
    between, kept = products(chunks, batches, K)
    found = GradientFigures(between, K, draws=3).of(kept, N)
    square = np.mean([chunks[i] @ chunks[j] for i in range(R) for j in range(R) if i != j])
    block = [batches[kept.block_of == k].mean(0) for k in range(K)]
    pairs = [(i, j) for i in range(K) for j in range(K) if i != j]
    mean_square = np.mean([block[i] @ block[j] for i, j in pairs])
    along = [b @ chunks.mean(0) for b in block]
    inner = np.mean(along)
    inner_square = np.mean([along[i] * along[j] for i, j in pairs])
    if square > 0:
        assert found["size"].value == pytest.approx(inner / square)
        assert found["excess"].value == pytest.approx((mean_square - 2 * inner + square) / square)
        rho = inner_square / square / (batches**2).sum(1).mean()
        if rho < 1:
            assert found["snr"].value == pytest.approx(np.sign(inner) * rho / (1 - rho) / N)
