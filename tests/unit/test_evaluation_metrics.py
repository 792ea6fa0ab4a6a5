"""The figures of metrics.py against slow references written from their definitions."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genac_megatron import metrics as m

# float64 sums of at most 40 terms of order 1: rounding stays below 40 * 2**-52 ~ 1e-14
EXACT = 1e-12
SCORES = st.sampled_from([n / 10 for n in range(11)])
BITS = st.sampled_from([0.0, 1.0])


def same(got: float, wanted: float, tolerance: float = EXACT) -> bool:
    return (math.isnan(got) and math.isnan(wanted)) or abs(got - wanted) <= tolerance


@st.composite
def judged(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    size = draw(st.integers(1, 40))
    return (
        draw(st.lists(SCORES, min_size=size, max_size=size)),
        draw(st.lists(BITS, min_size=size, max_size=size)),
    )


@given(judged())
def test_brier_and_its_constant(pair: tuple[list[float], list[float]]) -> None:
    values, outcomes = pair
    n = len(values)
    assert same(
        m.brier(values, outcomes), sum((r - v) ** 2 for v, r in zip(values, outcomes, strict=True)) / n
    )
    # no constant on a fine grid beats the best in hindsight, and the mean attains it
    best = m.brier_constant(outcomes)
    grid = [m.brier([c / 200] * n, outcomes) for c in range(201)]
    assert best <= min(grid) + EXACT
    assert same(best, m.brier([sum(outcomes) / n] * n, outcomes))


@given(judged())
def test_explained_variance_and_skill(pair: tuple[list[float], list[float]]) -> None:
    values, outcomes = map(np.array, pair)
    if outcomes.std() == 0:
        assert math.isnan(m.explained_variance(values, outcomes))
        assert math.isnan(m.skill(values, outcomes))
        return
    residual = outcomes - values
    wanted = 1 - ((residual - residual.mean()) ** 2).sum() / ((outcomes - outcomes.mean()) ** 2).sum()
    assert same(m.explained_variance(values, outcomes), wanted, 1e-10)
    # a bias is forgiven by explained variance and not by skill, by exactly bias^2 / variance
    gap = m.explained_variance(values, outcomes) - m.skill(values, outcomes)
    assert same(gap, residual.mean() ** 2 / outcomes.var(), 1e-10)


@given(st.integers(2, 6), st.integers(0, 10), st.integers(0, 10))
def test_mse_without_its_noise_is_unbiased_exactly(k: int, true: int, value: int) -> None:
    """The expectation over all K-draw outcomes, in fractions, is (v - V)^2 itself."""
    p, v = Fraction(true, 10), Fraction(value, 10)
    expected = 0.0
    for successes in range(k + 1):
        chance = math.comb(k, successes) * p**successes * (1 - p) ** (k - successes)
        expected += float(chance) * m.mse_monte_carlo(
            [float(v)], [[1.0] * successes + [0.0] * (k - successes)]
        )
    assert same(expected, float((v - p) ** 2))


def test_mse_of_the_constant_is_the_spread_of_true_values() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(200)
    drawn = [m.mse_monte_carlo_constant(rng.binomial(1, truth, (8, 200)).T) for _ in range(300)]
    # standard error of the mean of 300 draws, measured from them; 5 of it
    assert abs(np.mean(drawn) - truth.var(ddof=1)) < 5 * np.std(drawn) / math.sqrt(300)
    naive = np.mean([np.var(rng.binomial(8, truth) / 8, ddof=1) for _ in range(300)])
    assert naive - truth.var(ddof=1) > 0.015  # E[p(1-p)]/8 = 1/48: what taking the noise off is worth


def test_one_continuation_has_no_known_noise() -> None:
    with pytest.raises(ValueError, match="two continuations"):
        m.mse_monte_carlo([0.5], [[1.0]])


@given(st.lists(st.tuples(st.integers(2, 9), st.integers(0, 9)), min_size=1))
def test_the_noise_of_outcomes_0_and_1_is_that_of_a_share(counts: list[tuple[int, int]]) -> None:
    draws = [[1.0] * min(right, k) + [0.0] * (k - min(right, k)) for k, right in counts]
    for noise, row in zip(m.monte_carlo_noise(draws), draws, strict=True):
        p = sum(row) / len(row)
        assert same(float(noise), p * (1 - p) / (len(row) - 1))


@given(st.lists(st.integers(0, 10), min_size=2, max_size=3), st.integers(2, 3), st.integers(0, 10))
def test_mse_is_unbiased_exactly_for_partial_outcomes_too(levels: list[int], k: int, value: int) -> None:
    """A state's outcome is one of a few tenths, equally likely: over all K-draws, the mean is (v - V)^2."""
    outcomes = [level / 10 for level in levels]
    rows = list(itertools.product(outcomes, repeat=k))
    mean = sum(m.mse_monte_carlo([value / 10], [row]) for row in rows) / len(rows)
    assert same(mean, (value / 10 - sum(outcomes) / len(outcomes)) ** 2, 1e-9)


@given(judged())
def test_reliability_and_ece(pair: tuple[list[float], list[float]]) -> None:
    values, outcomes = pair
    bins = m.reliability(values, outcomes)
    wanted = 0.0
    for n in range(11):
        inside = [i for i, v in enumerate(values) if round(10 * v) == n]
        assert bins.count[n] == len(inside)
        if not inside:
            assert math.isnan(bins.value[n])
            assert math.isnan(bins.outcome[n])
            continue
        value, outcome = (sum(x[i] for i in inside) / len(inside) for x in (values, outcomes))
        assert same(bins.value[n], value)
        assert same(bins.outcome[n], outcome)
        wanted += len(inside) / len(values) * abs(outcome - value)
    assert same(bins.ece, wanted)


def test_bins_hold_their_edges_and_refuse_what_lies_outside() -> None:
    assert m.reliability([0.0, 0.5, 1.0], [0, 0, 1], [0.0, 0.5, 1.0]).count.tolist() == [1, 2]
    with pytest.raises(ValueError, match="bins in"):
        m.reliability([1.2], [1])


def slow_ranks(values: list[float]) -> list[float]:
    return [1 + sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]


@given(judged())
def test_ranks_and_spearman(pair: tuple[list[float], list[float]]) -> None:
    values, outcomes = pair
    assert m.ranks(values).tolist() == slow_ranks(values)
    if len(set(values)) < 2 or len(set(outcomes)) < 2:
        assert math.isnan(m.spearman(values, outcomes))
    else:
        wanted = np.corrcoef(slow_ranks(values), slow_ranks(outcomes))[0, 1]
        assert same(m.spearman(values, outcomes), float(wanted), 1e-10)


@given(judged())
def test_auc_is_the_chance_that_a_success_outscores_a_failure(pair: tuple[list[float], list[float]]) -> None:
    values, outcomes = pair
    good = [v for v, r in zip(values, outcomes, strict=True) if r >= 0.5]
    bad = [v for v, r in zip(values, outcomes, strict=True) if r < 0.5]
    wins = [(g > b) + 0.5 * (g == b) for g in good for b in bad]
    assert same(m.auc(values, outcomes), sum(wins) / len(wins) if wins else math.nan)


@st.composite
def grouped(draw: st.DrawFn) -> list[tuple[float, float, int, int]]:
    row = st.tuples(SCORES, st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(0, 3), st.integers(0, 2))
    return draw(st.lists(row, min_size=1, max_size=24))


@given(grouped(), st.sampled_from(["between", "prompt", "response"]), st.sampled_from([0.0, 0.3]))
def test_ranking_accuracy(rows: list[tuple[float, float, int, int]], scope: m.Scope, margin: float) -> None:
    hits: list[float] = []
    for (v, t, p, q), (v2, t2, p2, q2) in itertools.combinations(rows, 2):
        within = {"between": p != p2, "prompt": p == p2 and q != q2, "response": (p, q) == (p2, q2)}[scope]
        if within and abs(t - t2) > margin:
            hits.append(0.5 if v == v2 else float((v > v2) == (t > t2)))
    got, pairs = m.ranking_accuracy(*map(list, zip(*rows, strict=True)), scope=scope, margin=margin)
    assert pairs == len(hits)
    assert same(got, sum(hits) / len(hits) if hits else math.nan)


def test_scopes_part_what_a_critic_knows() -> None:
    """A critic that reads only the problem ranks between prompts, and is at chance within one."""
    prompts = [p for p in range(4) for _ in range(4)]
    responses = [s for _ in range(4) for s in (0, 0, 1, 1)]
    targets = [0.2 * p + 0.05 * i for p in range(4) for i in range(4)]
    values = [0.2 * p for p in prompts]
    assert m.ranking_accuracy(values, targets, prompts, responses, "between")[0] == 1.0
    assert m.ranking_accuracy(values, targets, prompts, responses, "prompt")[0] == 0.5
    assert m.ranking_accuracy(values, targets, prompts, responses, "response")[0] == 0.5


def test_scores() -> None:
    assert m.score_histogram([0.0, 0.1, 0.1, 1.0, 0.30000000000000004]).tolist() == [
        1,
        2,
        0,
        1,
        0,
        0,
        0,
        0,
        0,
        0,
        1,
    ]
    assert m.parse_rate([0.3, None, 0.0, None]) == 0.5
    assert m.entropy([0, 7, 0]) == 0.0
    assert same(m.entropy([3] * 11), math.log(11))
    assert math.isnan(m.entropy([0] * 11))
    assert math.isnan(m.parse_rate([]))


@given(st.integers(1, 7), st.data())
def test_pass_at_k_averages_over_all_draws_of_k(n: int, data: st.DataObject) -> None:
    samples = data.draw(st.lists(BITS, min_size=n, max_size=n))
    k = data.draw(st.integers(1, n))
    draws = [max(chosen) for chosen in itertools.combinations(samples, k)]
    assert same(m.pass_at_k({"a": samples}, k), sum(draws) / len(draws))


def test_avg_and_pass_weigh_prompts_alike() -> None:
    outcomes = {"a": [1.0, 1.0, 1.0, 1.0], "b": [0.0, 0.0]}
    assert m.avg_at_k(outcomes) == 0.5
    assert m.pass_at_k(outcomes, 1) == 0.5
    with pytest.raises(ValueError, match="prompt b"):
        m.pass_at_k(outcomes, 3)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1000))
def test_bootstraps_agree_and_hold_the_mean(seed: int) -> None:
    rng = np.random.default_rng(seed)
    clusters = [f"p{i}" for i in range(30) for _ in range(4)]
    values = np.repeat(rng.random(30), 4)
    quick = m.bootstrap_mean(values, clusters, draws=2000)
    slow = m.bootstrap(lambda index: float(values[index].mean()), clusters, draws=2000)
    assert quick[0] < values.mean() < quick[1]
    # the 2.5 % quantile of 2000 draws has a standard error of about 0.06 deviations; a mean of 30 has
    # deviation 0.29 / sqrt(30) = 0.053, so two such quantiles differ by 0.0045 (1 s.e.); 5 of it
    assert np.allclose(quick, slow, atol=0.0225)


def test_clusters_widen_the_interval() -> None:
    """Four copies of each prompt's value are one observation, not four."""
    values = np.repeat(np.random.default_rng(1).random(40), 4)
    clustered = np.diff(m.bootstrap_mean(values, [i // 4 for i in range(160)]))
    alone = np.diff(m.bootstrap_mean(values, list(range(160))))
    assert 1.8 < clustered / alone < 2.2  # sqrt(4) = 2, quantile noise about 4 % a side


def test_intervals_cover() -> None:
    """Of 300 experiments the 95 % interval holds the truth in about 95 %."""
    rng = np.random.default_rng(2)
    held = 0
    for i in range(300):
        chance = rng.beta(2, 2, 60)
        low, high = m.bootstrap_mean(rng.binomial(4, chance) / 4, list(range(60)), draws=400, seed=i)
        held += low <= 0.5 <= high
    assert 0.90 <= held / 300 <= 0.985  # binomial deviation 1.3 %, percentile intervals run 1 % narrow


def test_one_cluster_tells_no_spread() -> None:
    assert all(math.isnan(x) for x in m.bootstrap_mean([0.0, 1.0], ["a", "a"]))
    assert all(math.isnan(x) for x in m.bootstrap(lambda i: float(i.size), ["a"]))


def test_critic_figures_of_a_perfect_and_a_constant_critic() -> None:
    outcomes = [0.0, 1.0, 1.0, 0.0]
    prompts, responses = ["a", "a", "b", "b"], [0, 1, 0, 1]
    perfect = m.critic_figures(outcomes, outcomes, prompts, responses)
    assert perfect["brier"] == 0
    assert perfect["auc"] == 1
    assert perfect["ranking_prompt"] == 1
    assert perfect["ece"] == 0
    assert perfect["brier_constant"] == 0.25
    assert perfect["skill"] == 1
    assert perfect["explained_variance"] == 1
    assert math.isnan(perfect["mse"])
    assert math.isnan(perfect["ranking_response"])
    flat = m.critic_figures([0.5] * 4, outcomes, prompts, responses, parsed=[0.5, None, 0.5, 0.5])
    assert flat["brier"] == flat["brier_constant"]
    assert flat["auc"] == 0.5
    assert flat["score_entropy"] == 0
    assert flat["parse_rate"] == 0.75


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="2 values but 1 targets"):
        m.brier([0.1, 0.2], [1.0])
    with pytest.raises(ValueError, match="cluster ids"):
        m.bootstrap_mean([0.1, 0.2], ["a"])
