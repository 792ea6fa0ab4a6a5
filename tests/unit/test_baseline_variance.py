"""What a baseline is worth, summed over every response of a small policy: segment_gae on exact values.

The policy writes lines: a word that is right or a slip, then perhaps one of two words that do not matter. One
slip loses the answer. Its weights are the logits before each token, one set for each place in a response that
is right so far, another where it is lost. So the noise of a gradient, E|g|^2, can be said in closed form.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from genac_megatron.algorithms.advantages import least_noise_share, segment_gae, to_tokens

LINES = 3


def responses(slip: float, idle: int) -> Iterator[tuple[float, np.ndarray, np.ndarray, float]]:
    """Every response: its chance, each token's score [T, weights], V before each line, and its outcome."""
    words = 1 + idle
    for tokens in itertools.product((0, 1), repeat=LINES * words):
        chance, right, values = 1.0, True, []
        scores = np.zeros((len(tokens), 2 * len(tokens)))
        for place, token in enumerate(tokens):
            matters = place % words == 0
            if matters:
                values.append((1 - slip) ** (LINES - place // words) if right else 0.0)
            p = slip if matters else 0.5
            scores[place, 2 * place + (not right)] = token - p
            chance *= p if token else 1 - p
            right = right and not (matters and token)
        yield chance, scores, np.array(values), float(right)


def gradients(
    slip: float, idle: int, lam: float, share: float, baseline: str = "values"
) -> tuple[np.ndarray, float]:
    """(E g, E|g|^2) of one response's gradient."""
    mean, noise = np.zeros(2 * LINES * (1 + idle)), 0.0
    for chance, scores, values, outcome in responses(slip, idle):
        if baseline == "constant":
            values = np.full(LINES, (1 - slip) ** LINES)
        (advantages,) = segment_gae(
            [torch.tensor(values)], torch.tensor([outcome], dtype=torch.float64), 1.0, lam, share
        )
        tokens = to_tokens(advantages, torch.full((LINES,), 1 + idle)).numpy()
        g = tokens @ scores
        mean, noise = mean + chance * g, noise + chance * g @ g
    return mean, float(noise)


CASES = [(lam, share) for lam in (1.0, 0.5, 0.0) for share in (1.0, 0.3, 0.0)]


@pytest.mark.parametrize("slip", [0.1, 0.5])
def test_exact_values_leave_the_gradient_as_it_is_at_every_lambda_and_share(slip: float) -> None:
    truth, _ = gradients(slip, 1, 1.0, 0.0)
    assert np.linalg.norm(truth) > 0.05
    for lam, share in CASES:
        found, _ = gradients(slip, 1, lam, share)
        assert np.abs(found - truth).max() < 1e-6, (lam, share)


def test_an_actor_that_is_unsure_gains_by_values_and_more_by_lambda_0() -> None:
    """Steps that are as often right as not: a token's score is as large whatever it is."""
    constant, prompt, credit = (
        gradients(0.5, 1, 1.0, 1.0, "constant")[1],
        gradients(0.5, 1, 1.0, 1.0)[1],
        gradients(0.5, 1, 0.0, 1.0)[1],
    )
    assert credit < 0.5 * prompt < 0.5 * constant


def test_an_actor_that_is_nearly_sure_loses_by_taking_the_whole_value_off() -> None:
    """A slip's score is (1 - p) / p times the right word's, so blame is dear and praise is cheap."""
    slip = 0.1
    constant = gradients(slip, 0, 1.0, 1.0, "constant")[1]
    whole, none = gradients(slip, 0, 0.0, 1.0)[1], gradients(slip, 0, 0.0, 0.0)[1]
    assert whole > 0.8 * constant, "the exact value, and yet it is hardly better than the mean"
    assert none < 0.25 * whole
    # One line, V after it v or 0, baseline b: s (1-s)^2 b^2 + (1-s) s^2 (v-b)^2, least at b = s v, of the
    # value (1 - s) v a share of s / (1 - s).
    shares = np.linspace(0.0, 1.0, 101)
    found = [gradients(slip, 0, 0.0, share)[1] for share in shares]
    assert shares[int(np.argmin(found))] == pytest.approx(slip / (1 - slip), abs=0.011)
    least = ((1 - slip) ** 3 + slip**3) / (slip * (1 - slip))
    assert whole / gradients(slip, 0, 0.0, slip / (1 - slip))[1] == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("idle", [0, 1])
def test_the_share_of_least_noise_is_read_off_the_sampled_tokens(idle: int) -> None:
    """Every response as often as it is sampled: the share at which the sum over all of them is least."""
    slip, parts = 0.1, []
    for chance, scores, values, outcome in responses(slip, idle):
        spread = torch.tensor(values).repeat_interleave(1 + idle)
        after = torch.tensor([*values[1:], outcome]).repeat_interleave(1 + idle)
        # One logit a token: the score's size is 1 - p of what was sampled.
        logprobs = torch.tensor(1.0 - np.abs(scores).sum(1)).log()
        parts.append((chance, after, spread, logprobs))
    counts = torch.tensor([round(chance * 1e6) for chance, *_ in parts])
    of_all = [
        torch.cat([part[i].repeat(int(n)) for part, n in zip(parts, counts // 100, strict=True)])
        for i in (1, 2, 3)
    ]
    found = least_noise_share(*of_all)
    none, half, whole = (gradients(slip, idle, 0.0, share)[1] for share in (0.0, 0.5, 1.0))
    bend = 2.0 * (none + whole - 2.0 * half)
    assert found == pytest.approx((bend - whole + none) / (2.0 * bend), abs=0.01)
    assert math.isnan(least_noise_share(torch.ones(2), torch.zeros(2), torch.zeros(2)))
    assert least_noise_share(torch.tensor([9.0]), torch.tensor([0.1]), torch.tensor([-1.0])) == 1.0


def test_words_that_do_not_matter_make_values_pay_again() -> None:
    """The more of a response's noise they make, the better are lambda 0 and a large share."""
    gains, shares = [], []
    for idle in (0, 1, 2):
        none, half, whole = (gradients(0.1, idle, 0.0, share)[1] for share in (0.0, 0.5, 1.0))
        bend = 2.0 * (none + whole - 2.0 * half)  # the noise is a square of the share
        shares.append((bend - whole + none) / (2.0 * bend))
        gains.append(gradients(0.1, idle, 1.0, 1.0, "constant")[1] / whole)
    assert gains == sorted(gains)
    assert gains[-1] > 1.5 * gains[0]
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(0.1 / 0.9, rel=1e-4)
    assert shares[-1] > 0.5
