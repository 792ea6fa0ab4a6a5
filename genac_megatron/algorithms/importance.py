"""Importance weights of states for a policy that has moved. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

# e^20: beyond any ratio that clipping or a bound lets through. Without it exp overflows and 0 * inf gives NaN
# gradients.
LOG_RATIO_LIMIT = 20.0


def tail_ratios(new: Sequence[float], old: Sequence[float], cuts: Sequence[int]) -> list[float]:
    """How much likelier the moved policy goes on from each state as the old one did: [T], [T], [N] -> [N].

    The ratio of the tokens from the cut on, exp(sum of new - old log-probs): with it an outcome of the old
    policy's response counts for the value of the new one at that state. 1 behind the last token.
    """
    sums = [0.0]
    for after, before in zip(reversed(new), reversed(old), strict=True):
        sums.append(sums[-1] + after - before)
    sums.reverse()
    return [math.exp(min(max(sums[cut], -LOG_RATIO_LIMIT), LOG_RATIO_LIMIT)) for cut in cuts]


def dropped(ratios: Sequence[Sequence[float]], limit: float) -> list[list[float | None]]:
    """The same without (None) those beyond [0, limit] (PACT, arXiv 2609.26355: 6)."""
    return [[ratio if ratio <= limit else None for ratio in row] for row in ratios]
