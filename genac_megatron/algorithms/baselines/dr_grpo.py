"""Dr.GRPO (arXiv 2503.20783): GRPO without what biases it, the deviation and the response's own length.

The length goes from the loss: aggregate `constant` (algorithms/losses.py).
"""

from __future__ import annotations

from torch import Tensor


def dr_grpo(rewards_GN: Tensor) -> Tensor:
    """R - mean within each group: [G, N] -> [G, N]."""
    return rewards_GN - rewards_GN.mean(1, keepdim=True)
