"""DAPO (arXiv 2503.14476): GRPO's advantages over groups that are mixed, and a penalty near the limit.

Clip-higher and the token mean are the loss's (recipe/algorithms.py).
"""

from __future__ import annotations

from torch import Tensor

from genac_megatron.algorithms.baselines.grpo import grpo


def mixed(outcomes_GN: Tensor) -> Tensor:
    """Which groups teach anything: not all outcomes alike. [G, N] -> bool [G] (eq. 11)."""
    return (outcomes_GN != outcomes_GN[:, :1]).any(1)


def overlong_penalty(lengths_GN: Tensor, limit: int, cache: int) -> Tensor:
    """What is added to the reward of a response of so many tokens (eq. 13): [G, N] -> [G, N] in [-1, 0].

    0 up to limit - cache, then down in a line to -1 at `limit`.
    """
    return ((limit - cache - lengths_GN) / cache).clamp(-1.0, 0.0)


def dapo(outcomes_GN: Tensor, penalty_GN: Tensor | None = None) -> Tensor:
    """[G, N] -> [G, N]: GRPO's advantages of rewards 2 outcome - 1 + penalty; 0 in groups that are not mixed.

    The paper's rewards are -1 and 1 (section 2.4), to which its penalty of up to -1 is in proportion. A group
    that is not mixed would be taught by length alone.
    """
    rewards_GN = 2.0 * outcomes_GN - 1.0
    if penalty_GN is not None:
        rewards_GN = rewards_GN + penalty_GN
    return grpo(rewards_GN) * mixed(outcomes_GN)[:, None]
