"""VAPO (arXiv 2504.05118): VC-PPO with a lambda that knows the response's length, and a likelihood term."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def length_adaptive_lambda(lengths: Sequence[int], alpha: float = 0.05) -> list[float]:
    """1 - 1 / (alpha length) of each response (section 4.2), at least 0 for those shorter than 1 / alpha."""
    return [max(0.0, 1.0 - 1.0 / (alpha * max(length, 1))) for length in lengths]


def positive_weights(
    lengths: Sequence[int],
    outcomes: Sequence[float],
    right: float = 1.0,
    summed: Callable[[float], Sequence[float]] = lambda mine: [mine],
) -> list[float]:
    """Per response, the weight of each of its tokens in the mean log-likelihood of right ones (section 4.3).

    A response is right where its outcome reaches `right` (the paper's outcomes are 0 and 1). All zeros where
    none is. summed: adds a count of these responses' tokens up over other ranks'.
    """
    (total,) = summed(
        sum(length for length, outcome in zip(lengths, outcomes, strict=True) if outcome >= right)
    )
    return [1.0 / total if outcome >= right and total else 0.0 for outcome in outcomes]
