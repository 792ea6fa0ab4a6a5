"""Figures of critics on a bank, and their intervals: against slow references and known truths."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from banks import K, made_bank

from genac_megatron import metrics
from genac_megatron.evaluation.bank import BankPrompt, Valued, choose_pair, from_row, to_row
from genac_megatron.evaluation.figures import SCOPES, Scored, critic_estimates, ranking, scored
from genac_megatron.evaluation.intervals import Resampled, reflected
from genac_megatron.records import Completion, Rollout


def given(values: list[float | None]) -> list[Valued]:
    return [Valued(value, 7) for value in values]


def slow_ranking(found: Scored, scope: str, margin: float) -> tuple[float, int]:
    hits, pairs = 0.0, 0
    for i, j in itertools.combinations(range(len(found.p)), 2):
        same = found.prompts[i] == found.prompts[j]
        one, other = sorted((found.response[i], found.response[j]))
        inside = {
            "between": not same,
            "prompt": same and (one, other) == (0, 1),
            "response": same and (one == -1 or one == other),
        }[scope]
        gap = found.p[j] - found.p[i]
        if inside and abs(gap) > margin:
            step = found.used[j] - found.used[i]
            hits += 0.5 if step == 0 else float((step > 0) == (gap > 0))
            pairs += 1
    return hits, pairs


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("margin", [0.0, 0.25])
def test_ranking_counts_every_pair_of_its_scope_once(scope: str, margin: float) -> None:
    rng = np.random.default_rng(3)
    bank, truth = made_bank(rng, 5)
    values = [round(float(np.clip(v + rng.normal(0, 0.3), 0, 1)), 1) for v in truth]
    found = scored(bank, given(values), 0.5)
    hits, pairs = ranking(found, Resampled(found.prompts, 10), scope, margin)
    assert (hits.sum(), pairs.sum()) == pytest.approx(slow_ranking(found, scope, margin))
    assert pairs.sum() > 0


def test_a_critic_that_knows_the_true_values_has_no_error_and_one_that_errs_has_its_own() -> None:
    """The Monte-Carlo noise, about 0.004 here, is taken off: limits are four standard errors of the mean."""
    rng = np.random.default_rng(0)
    bank, truth = made_bank(rng, 300)
    exact = critic_estimates(scored(bank, given(list(truth)), 0.5), K, 50, 0)
    assert abs(exact["mse"].value) < 4 * 0.01 / math.sqrt(len(truth))
    assert exact["explained_variance"].value == pytest.approx(1.0, abs=0.01)
    assert exact["mse_constant"].value == pytest.approx(np.var(truth), rel=0.1)
    assert exact["ranking_between_clear"].value > 0.999
    assert exact["bias"].value == pytest.approx(0.0, abs=0.01)
    shifted = critic_estimates(scored(bank, given([v / 2 for v in truth]), 0.5), K, 50, 0)
    assert shifted["mse"].value == pytest.approx(np.mean(np.square(truth)) / 4, rel=0.05)
    assert shifted["spearman"].value == pytest.approx(exact["spearman"].value)


def test_what_does_not_parse_takes_the_value_before_and_costs_the_worst_brier() -> None:
    bank, _ = made_bank(np.random.default_rng(1), 1, later=2)
    values: list[float | None] = [None, 0.2, None, 0.9, None]  # prompt state, right 1 and 2, wrong 1 and 2
    found = scored(bank, given(values), 0.35)
    assert found.used.tolist() == [0.35, 0.2, 0.2, 0.9, 0.9]
    assert [found.brier[row] for row in (0, 2, 4)] == [1.0, 1.0, 1.0]
    draws = bank[0].states[1].draws
    assert found.brier[1] == pytest.approx(np.mean([(r - 0.2) ** 2 for r in draws]))
    figures = critic_estimates(found, K, 20, 0)
    assert figures["parse_rate"].value == pytest.approx(2 / 5)
    assert figures["tokens_per_state"].value == 7
    assert math.isnan(figures["mse"].low), "one prompt says nothing of the spread between prompts"


def test_subsets_split_the_error_by_kind_and_place() -> None:
    bank, truth = made_bank(np.random.default_rng(2), 4, later=3)  # cuts 4, 8, 12 of 16
    found = scored(bank, given([0.5] * len(truth)), 0.5)
    figures = critic_estimates(found, K, 20, 0)
    error = (0.5 - found.p) ** 2 - found.noise
    states = [state for prompt in bank for state in prompt.states]
    rows = [n for n, state in enumerate(states) if state.response == 1 and state.state.cut >= 8]
    assert figures["mse_wrong_late"].value == pytest.approx(error[rows].mean())
    prompt_states = [n for n, state in enumerate(states) if state.response is None]
    assert figures["mse_prompt_state"].value == pytest.approx(error[prompt_states].mean())


def test_draws_of_clusters_are_those_of_their_rows() -> None:
    """Every fast form against the plain one, draw by draw."""
    rng = np.random.default_rng(5)
    clusters = [f"c{n}" for n in rng.integers(0, 9, 60)]
    values, weights = rng.random(60), rng.random(60)
    sample = Resampled(clusters, 40, seed=1)
    fast = sample.mean(values)
    slow = sample.any(lambda rows: float(values[rows].mean()))
    np.testing.assert_allclose(fast.draws, slow.draws)
    assert (fast.value, fast.low, fast.high) == pytest.approx((slow.value, slow.low, slow.high))
    np.testing.assert_allclose(
        sample.ratio(values, weights).draws,
        sample.any(lambda rows: float(values[rows].sum() / weights[rows].sum())).draws,
    )
    above, below = rng.random((9, 9)), rng.random((9, 9))
    times = sample.times[7]
    each = [c for c in range(sample.groups) for _ in range(int(times[c]))]
    pairs = sample.pairs(above, below).draws[7]
    assert pairs == pytest.approx(
        sum(above[a, b] for a in each for b in each) / sum(below[a, b] for a in each for b in each)
    )
    within = sample.within(above, below).draws[7]
    assert within == pytest.approx(sum(above[c, c] for c in each) / sum(below[c, c] for c in each))


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """93.7 % of 1000 percentile intervals over 100 clusters covered (95 % is their limit for many clusters).

    Of 300, three standard deviations (0.014 each) about that.
    """
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        values = np.repeat(rng.normal(0, 1, 100), 5) + rng.normal(0, 1, 500)
        sample = Resampled(np.repeat(np.arange(100), 5).tolist(), 200, seed=int(rng.integers(1 << 30)))
        found = sample.mean(values)
        hits += found.low <= 0.0 <= found.high
    assert 0.895 <= hits / 300 <= 0.98


def test_the_interval_of_a_calibrated_critics_ece_goes_down_to_nearly_nothing() -> None:
    """Draws add noise to the noise that made it: their percentiles lie above the truth, here 0, and above the
    figure itself. Reflected, the interval of 60 such banks began at 0 half the time, below half of the figure
    always; a critic that errs by 0.2 keeps its own."""
    rng = np.random.default_rng(4)
    truth = np.round(rng.random((60, 8)), 1).ravel()
    p = rng.binomial(K, truth) / K
    sample = Resampled(np.repeat(np.arange(60), 8).tolist(), 300)
    plain = sample.any(lambda rows: metrics.ece(truth[rows], p[rows]))
    found = reflected(plain)
    assert plain.low > 0.8 * plain.value
    assert plain.high > 2 * plain.value
    assert found.value == plain.value
    assert 0.0 <= found.low < 0.2 * found.value
    assert found.value <= found.high < 0.8 * plain.high
    wrong = np.clip(truth + 0.2, 0, 1)
    off = reflected(sample.any(lambda rows: metrics.ece(wrong[rows], p[rows])))
    apart = float(np.mean(wrong - truth))
    assert off.low < apart < off.high
    assert off.high - off.low < 0.1


def test_a_critics_ece_has_the_reflected_interval() -> None:
    bank, truth = made_bank(np.random.default_rng(6), 40)
    found = scored(bank, given([round(v, 1) for v in truth]), 0.5)
    ece = critic_estimates(found, K, 100, 0)["ece"]
    assert ece.low < ece.value / 2
    low, high = np.quantile(ece.draws, [0.025, 0.975])
    assert (ece.low, ece.high) == pytest.approx(
        (max(0.0, 2 * ece.value - high), max(ece.value, 2 * ece.value - low))
    )


def test_a_difference_is_paired() -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(20), 3).tolist()
    hard = np.repeat(rng.random(20), 3)
    sample = Resampled(clusters, 200)
    difference = sample.mean(hard + 0.01).minus(sample.mean(hard))
    assert (difference.low, difference.high) == pytest.approx((0.01, 0.01))


def test_a_bank_row_comes_back_as_it_was() -> None:
    bank, _ = made_bank(np.random.default_rng(0), 2)
    for number, prompt in enumerate(bank):
        assert from_row(to_row(number, prompt)) == prompt
    skipped = BankPrompt(bank[0].prompt, (0.0, 0.0), "wrong")
    assert from_row(to_row(0, skipped)) == skipped


def test_the_first_right_and_the_first_wrong_response_make_the_pair() -> None:
    bank, _ = made_bank(np.random.default_rng(0), 1)
    prompt = bank[0].prompt
    rollouts = [
        Rollout(prompt, n, Completion((), (), "stop"), "", r) for n, r in enumerate((0.2, 0.4, 0.7, 1.0))
    ]
    pair = choose_pair(rollouts)
    assert pair is not None
    assert [rollout.sample for rollout in pair] == [2, 0]
    assert choose_pair(rollouts[:2]) is None


def test_pass_shares_are_what_pass_at_k_is_the_mean_of() -> None:
    outcomes = {"a": [1.0, 0.0, 0.0, 1.0], "b": [0.0, 0.0, 0.0, 0.0], "c": [1.0, 1.0, 1.0, 1.0]}
    assert metrics.pass_shares(outcomes, 2) == pytest.approx([1 - 1 / 6, 0.0, 1.0])
    assert metrics.pass_at_k(outcomes, 2) == pytest.approx(np.mean([1 - 1 / 6, 0.0, 1.0]))
