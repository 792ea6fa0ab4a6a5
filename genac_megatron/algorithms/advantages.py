"""Advantages over segments, and their whitening. Pure: tensors in, tensors out, no communication.

Words: a response has N segments and T tokens; a batch has B responses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def segment_gae(
    values: Sequence[Tensor], outcomes: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> list[Tensor]:
    """Segment-level generalised advantage estimation (arXiv 1506.02438 with segments as steps).

    values: B tensors [N_i], V_k of the state before segment k. outcomes: [B], the reward R at the end.
    delta_k = gamma V_{k+1} - V_k, the last delta = R - V_{N-1}; A_k = sum_l (gamma lam)^l delta_{k+l}.
    Returns B tensors [N_i], float32. For gamma = 1 it equals token GAE with lambda 1 inside segments.
    A_k uses V_k and what comes after; V_k itself knows nothing of segment k.
    """
    if len(values) != len(outcomes):
        raise ValueError(f"{len(values)} responses but {len(outcomes)} outcomes")
    advantages = []
    for value, outcome in zip(values, outcomes, strict=True):
        value = value.double()
        deltas = torch.cat([gamma * value[1:], outcome.double().reshape(1)]) - value
        running = torch.zeros((), dtype=torch.float64, device=value.device)
        backwards = []
        for delta in deltas.flip(0):
            running = delta + gamma * lam * running
            backwards.append(running)
        advantages.append(torch.stack(backwards).flip(0).float())
    return advantages


def to_tokens(per_segment: Tensor, lengths: Tensor) -> Tensor:
    """Give every token its segment's figure: [N] and int lengths [N] -> [T], T = sum of lengths."""
    return torch.repeat_interleave(per_segment, lengths)


def token_moments(tokens: Tensor) -> Tensor:
    """[T] -> [3] float64: count, sum, sum of squares. Add them up over ranks before `whiten`."""
    wide = tokens.double()
    return torch.stack(
        [
            torch.tensor(float(wide.numel()), dtype=torch.float64, device=wide.device),
            wide.sum(),
            (wide**2).sum(),
        ]
    )


def whiten(tokens: Tensor, moments: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """(x - mean) / (deviation + eps) over the batch's tokens: [T] -> [T] float32.

    moments: [3], `token_moments` summed over every rank's tokens, each token once; None: of `tokens`.
    The deviation is the biased one, so that ranks need only sums. Equal figures give zeros.
    """
    if moments is None:
        moments = token_moments(tokens)
    count, total, squares = moments.double().unbind()
    mean = total / count.clamp(min=1.0)
    deviation = (squares / count.clamp(min=1.0) - mean**2).clamp(min=0.0).sqrt()
    centred = tokens.double() - mean
    # Rounding leaves equal figures an ulp apart; divided by a deviation of an ulp that would be noise.
    flat = deviation <= 1e-7 * (1.0 + mean.abs())
    return torch.where(flat, torch.zeros_like(centred), centred / (deviation + eps)).float()


def explained_variance(values: Tensor, outcomes: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R): [S], [S] -> scalar float64; 1 is perfect, 0 no better than a constant.

    0 where the outcomes do not vary: there is nothing to explain then. A constant error goes unseen.
    """
    if values.shape != outcomes.shape or values.numel() == 0:
        raise ValueError(
            f"need equally many values and outcomes, got {list(values.shape)}, {list(outcomes.shape)}"
        )
    values, outcomes = values.double(), outcomes.double()
    variance = outcomes.var(correction=0)
    if variance <= 1e-12:
        return torch.zeros((), dtype=torch.float64, device=values.device)
    return 1.0 - (outcomes - values).var(correction=0) / variance


def gated_lam(lam: float, gate: float | None, variance_explained: float | None) -> float:
    """The lambda to use: `lam` once the critic's held-out explained variance exceeds `gate`, else 1.

    With lambda 1 the advantage is R - V_k: unbiased for any critic. None as gate: always `lam`; None
    as explained variance: not measured yet. Pass the best figure so far to keep an opened gate open.
    """
    if gate is None or (variance_explained is not None and variance_explained > gate):
        return lam
    return 1.0
