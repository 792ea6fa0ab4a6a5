"""REINFORCE++ (arXiv 2501.03262): no critic and no group; the batch is the baseline and the scale."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from genac_megatron.algorithms.advantages import mean_of, normalised


def reinforce_pp(
    rewards_GN: Tensor,
    lengths_GN: Tensor,
    *,
    baseline: bool = False,
    share: float = 1.0,
    moments: Callable[[Tensor], Tensor | None] = lambda tokens_T: None,
) -> Tensor:
    """Rewards whitened over the batch's tokens: [G, N], token counts [G, N] -> [G, N].

    Every token's return is its response's reward (no KL term), so a response weighs as its length.
    baseline: the group's mean is taken off first. share: of the batch's mean that is taken off; below 1 the
    root of what is left's mean square is the scale. moments: of the tokens of all ranks, where
    these are a part of the batch (`whiten`); None: of these.
    """
    returns_GN = rewards_GN - rewards_GN.mean(1, keepdim=True) if baseline else rewards_GN
    lengths_S = lengths_GN.flatten()
    tokens_T = returns_GN.flatten().repeat_interleave(lengths_S)
    moments_3 = moments(tokens_T)
    if share == 1.0 or (moments_3 is None and not len(tokens_T)):
        tokens_T = normalised(tokens_T, "whiten", moments_3)
    else:
        tokens_T = tokens_T - share * mean_of(tokens_T, moments_3)
        tokens_T = normalised(tokens_T, "scale", moments(tokens_T))
    ends_S = lengths_S.cumsum(0)
    per_response_S = tokens_T[(ends_S - 1).clamp(min=0)] if len(tokens_T) else returns_GN.flatten() * 0.0
    return per_response_S.reshape(rewards_GN.shape)
