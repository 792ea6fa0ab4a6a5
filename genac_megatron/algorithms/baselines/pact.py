"""PACT (arXiv 2609.26355): a token's credit is what it changes of the value, V_i - V_(i-1).

With lambda 0 the actor's advantage is that credit, with lambda 1, the paper's choice, R - V_(i-1): what the
critic errs by in between then falls out. The critic is trained by cross-entropy, and after the actor, towards
the policy that this has become.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from genac_megatron.algorithms.importance import LOG_RATIO_LIMIT


def cross_entropy(logits_T: Tensor, targets_T: Tensor) -> Tensor:
    """Per token -y log v - (1 - y) log(1 - v), v = sigmoid(logit): [T], [T] -> [T]; its gradient is v - y.

    The minimum over many targets is their mean, as a square's is, also where single ones lie outside [0, 1].
    """
    return F.softplus(logits_T) - targets_T * logits_T


def moved_targets(
    targets: Sequence[Tensor], now: Sequence[Tensor], behaviour: Sequence[Tensor], cap: float
) -> tuple[list[Tensor], list[Tensor]]:
    """(targets, which tokens are trained) for a policy that has moved: B tensors [T_i] each, bool the latter.

    rho_t = exp(now - behaviour), of token t alone; the target of the value before t is rho_t R: in the mean
    that of a policy that draws t as it does now and goes on as it did. Tokens with rho_t > cap are dropped.
    now, behaviour: log-probs of the tokens after the actor's update, and as they were sampled.
    """
    moved, kept = [], []
    for target, new, old in zip(targets, now, behaviour, strict=True):
        ratio = (new.double() - old.double()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        kept.append(ratio <= cap)
        moved.append(torch.where(ratio <= cap, ratio * target.double(), target.double()).float())
    return moved, kept
