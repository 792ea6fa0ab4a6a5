"""EasyPPO (arXiv 2609.36802): a scalar critic's loss divided by the spread of each prompt's returns.

Its other parts are settings: `value.minibatches: 4`, and the stage's `overlong_filter`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor


def spread_weights(returns_GN: Tensor, summed: Callable[..., Sequence[float]] = lambda *mine: mine) -> Tensor:
    """What each prompt's responses weigh in the critic's loss, in the mean 1: [G, N] -> [G].

    1 / max(deviation, floor), over their mean. summed: adds figures up over ranks that have other prompts.
    The deviation is the biased one. Returns lie in [0, 1], where
    it is 1/2 at most; the floor is that over the square root of N, what N returns can tell from 0.
    """
    floor = 0.5 / math.sqrt(returns_GN.size(1))
    weights_G = 1.0 / returns_GN.double().std(1, correction=0).clamp(min=floor)
    total, count = summed(float(weights_G.sum()), len(weights_G))
    return (weights_G / (total / count)).float()
