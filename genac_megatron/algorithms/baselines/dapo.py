"""DAPO (arXiv 2503.14476): GRPO's advantages over groups that are mixed, and a penalty near the limit.

Clip-higher and the token mean are the loss's (recipe/algorithms.py).
"""

from __future__ import annotations

from torch import Tensor

from genac_megatron.algorithms.baselines.grpo import grpo


def mixed(rewards_GN: Tensor) -> Tensor:
    """Which groups teach anything: not all rewards alike. [G, N] -> bool [G] (eq. 11)."""
    return (rewards_GN != rewards_GN[:, :1]).any(1)


def overlong_penalty(lengths_GN: Tensor, limit: int, cache: int) -> Tensor:
    """What is added to the reward of a response of so many tokens (eq. 13): [G, N] -> [G, N] in [-1, 0].

    0 up to limit - cache, then down in a line to -1 at `limit`.
    """
    return ((limit - cache - lengths_GN) / cache).clamp(-1.0, 0.0)


def dapo(rewards_GN: Tensor) -> Tensor:
    """[G, N] -> [G, N], as GRPO; the rewards hold the penalty already."""
    return grpo(rewards_GN)
