"""RLOO (arXiv 2402.14740): each response's baseline is the mean of the others."""

from __future__ import annotations

from torch import Tensor


def rloo(rewards_GN: Tensor) -> Tensor:
    """R_i - mean of R_j, j != i = N / (N - 1) (R - mean): [G, N] -> [G, N]; one response: zeros."""
    count = rewards_GN.size(1)
    centred_GN = rewards_GN - rewards_GN.mean(1, keepdim=True)
    return centred_GN * (count / max(count - 1, 1))
