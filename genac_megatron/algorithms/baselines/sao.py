"""SAO (arXiv 2607.07508): one response per prompt, a scalar critic, tokens masked on both sides of a band.

Its other parts are settings: the critic's attention is frozen (`training.frozen_attention`), it has two
updates to the actor's one, and the actor's lambda is VAPO's with alpha 1.5. Its GAE skips what tools say; a
response of one turn has nothing to skip, so that it is token-level GAE (baselines/ppo.py).
"""

from __future__ import annotations

from torch import Tensor


def in_band(ratio_T: Tensor, band: tuple[float, float]) -> Tensor:
    """Which tokens are trained, whatever their advantage: low < ratio < high (section 3.1). [T] -> bool [T].

    ratio: now / behaviour, the engine's own log-prob; there is no policy in between. Ours is the mean: a
    masked token still counts in it, so that masking more takes no larger steps with the rest.
    """
    low, high = band
    return (ratio_T > low) & (ratio_T < high)
