"""GRPO (arXiv 2402.03300, eq. 3 and section 4.1.2): the group is the baseline and the scale."""

from __future__ import annotations

from torch import Tensor

EPS = 1e-6


def grpo(rewards_GN: Tensor) -> Tensor:
    """(R - mean) / (deviation + 1e-6) within each group: [G, N] -> [G, N].

    The deviation is the unbiased one (N - 1), as public implementations take it; one response: zeros.
    """
    if rewards_GN.size(1) == 1:
        return rewards_GN * 0.0
    centred_GN = rewards_GN - rewards_GN.mean(1, keepdim=True)
    return centred_GN / (rewards_GN.std(1, keepdim=True) + EPS)
