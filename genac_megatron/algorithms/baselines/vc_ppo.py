"""VC-PPO (arXiv 2503.01491): the actor's lambda and the critic's are apart; the value is pre-trained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from genac_megatron.algorithms.baselines.ppo import token_gae, value_targets


def decoupled_gae(
    values: Sequence[Tensor],
    outcomes: Tensor,
    gamma: float = 1.0,
    lam_actor: float | Sequence[float] = 0.95,
    lam_critic: float = 1.0,
) -> tuple[list[Tensor], list[Tensor]]:
    """(the actor's advantages, the critic's targets), B tensors [T_i] each; lam_critic 1: the outcome."""
    advantages = token_gae(values, outcomes, gamma, lam_actor)
    targets = value_targets(values, token_gae(values, outcomes, gamma, lam_critic))
    return advantages, targets
