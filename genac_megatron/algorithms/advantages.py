"""Advantages over segments, their baselines, and their whitening. Pure: no communication.

Words: a response has N segments and T tokens; a batch has B responses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from genac_megatron.recipe.algorithms import LamSchedule

RIGHT = 0.5  # the outcome from which a response counts as right


def segment_gae(
    values: Sequence[Tensor],
    outcomes: Tensor,
    gamma: float = 1.0,
    lam: float | Sequence[float] = 0.95,
    share: float = 1.0,
) -> list[Tensor]:
    """Segment-level generalised advantage estimation (arXiv 1506.02438 with segments as steps).

    values: B tensors [N_i], V_k of the state before segment k. outcomes: [B], the reward R at the end.
    lam: of all responses, or of each [B]. share: of V_k that is the baseline.
    delta_k = gamma V_{k+1} - V_k, the last delta = R - V_{N-1}; A_k = sum_l (gamma lam)^l delta_{k+l},
    and (1 - share) V_k more.
    Returns B tensors [N_i], float32. For gamma = 1 it equals token GAE with lambda 1 inside segments.
    A_k uses V_k and what comes after; V_k itself knows nothing of segment k.
    """
    if len(values) != len(outcomes):
        raise ValueError(f"{len(values)} responses but {len(outcomes)} outcomes")
    lams = [lam] * len(values) if isinstance(lam, float | int) else lam
    advantages = []
    for value, outcome, lam_i in zip(values, outcomes, lams, strict=True):
        value = value.double()
        deltas = torch.cat([gamma * value[1:], outcome.double().reshape(1)]) - value
        running = torch.zeros((), dtype=torch.float64, device=value.device)
        backwards = []
        for delta in deltas.flip(0):
            running = delta + gamma * lam_i * running
            backwards.append(running)
        advantages.append((torch.stack(backwards).flip(0) + (1.0 - share) * value).float())
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


def scaled(tokens: Tensor, moments: Tensor | None = None) -> Tensor:
    """x / root of the mean of x^2 over the batch's tokens: [T] -> [T] float32. Zeros stay zeros.

    moments: as for `whiten`.
    """
    wide = tokens.double()
    if moments is None:
        size = (wide**2).mean().sqrt() if wide.numel() else wide.sum()
    else:
        size = (moments[2] / moments[0].clamp(min=1.0)).sqrt()
    return (wide / torch.where(size > 0, size, 1.0)).float()


def normalised(
    tokens: Tensor, how: Literal["whiten", "centre", "scale", "none"], moments: Tensor | None = None
) -> Tensor:
    """[T] -> [T] float32: whitened over the batch's tokens, less their mean, of size 1, or as they are.

    moments: as for `whiten`.
    """
    if how == "whiten":
        return whiten(tokens, moments)
    if how == "scale":
        return scaled(tokens, moments)
    return (tokens.double() - mean_of(tokens, moments)).float() if how == "centre" else tokens.float()


def mean_of(tokens: Tensor, moments: Tensor | None) -> Tensor:
    """Of the batch's tokens, float64."""
    return tokens.double().mean() if moments is None else moments[1] / moments[0].clamp(min=1.0)


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


def gated_lam(lam: float, gate: float | None, figure: float | None, *, lower: bool = False) -> float:
    """The lambda to use: `lam` while the critic's figure exceeds `gate` (`lower`: is below it), else 1.

    With lambda 1 the advantage is R - V_k: unbiased for any critic. None as gate: always `lam`; None
    as figure: not measured yet. Pass the latest figure: a critic that has collapsed closes the gate.
    """
    if gate is None or (figure is not None and (figure < gate if lower else figure > gate)):
        return lam
    return 1.0


def scheduled_lam(schedule: LamSchedule, step: int) -> float:
    """The schedule's lambda at a step, counted from 1: `start` at step 1, `end` from step `steps` on."""
    share = 1.0 if schedule.steps == 1 else min((step - 1) / (schedule.steps - 1), 1.0)
    if schedule.shape == "cosine":
        share = (1.0 - math.cos(math.pi * share)) / 2.0
    return (1.0 - share) * schedule.start + share * schedule.end


# --- baselines between the critic's value and the group's mean (TETHER, arXiv 2608.16739) ---------


def others_mean(rewards: Tensor) -> Tensor:
    """The mean reward of a group's *other* responses: [n] -> [n] float64, n >= 2.

    A mean with the response's own reward in it would be a biased baseline.
    """
    if rewards.numel() < 2:
        raise ValueError("a response without others has no group baseline")
    wide = rewards.double()
    return (wide.sum() - wide) / (wide.numel() - 1)


def blend_weight(value_error: float, group_error: float, distance: float) -> float:
    """The w in [0, 1] with the least mean (R - w V - (1 - w) m)^2, from errors that were measured.

    value_error: mean (R - V)^2 of the values V; group_error: mean (R - m)^2 of the others' means m; distance:
    mean (V - m)^2. The square is a parabola in w, its foot at 1/2 + (group - value error) / (2 distance).
    1 where both are always the same.
    """
    if distance <= 0.0:
        return 1.0
    return min(max(0.5 + (group_error - value_error) / (2.0 * distance), 0.0), 1.0)


Summed = Callable[..., Sequence[float]]  # figures, each added up over ranks that have parts of a batch


def _own(*figures: float) -> Sequence[float]:
    return figures


def least_noise_share(returns: Tensor, values: Tensor, logprobs: Tensor, summed: Summed = _own) -> float:
    """The share c of the values that leaves the least sum of (return - c value)^2 |score|^2: [T] each.

    returns: an advantage and its value, so what the value is a baseline of. logprobs: of the sampled tokens;
    (1 - p)^2 is |score|^2 but for how the rest of the distribution is spread. Between tokens nothing is added
    up, which is right for lambda 0 alone. Within [0, 1]; NaN where no value is above 0 at a token that was
    not certain. Of the batch itself: a baseline chosen by it would be biased, a share that is set by what
    earlier batches said is not.
    """
    size = (1.0 - logprobs.double().exp()) ** 2
    below = float((size * values.double() ** 2).sum())
    above = float((size * values.double() * returns.double()).sum())
    above, below = summed(above, below)
    return min(max(above / below, 0.0), 1.0) if below > 1e-12 else math.nan


# --- what a batch's advantages are like ----------------------------------------------------------


def advantage_gap(advantages: Sequence[Tensor], outcomes: Sequence[float], summed: Summed = _own) -> float:
    """Mean advantage of right responses minus that of wrong ones, each response's [T] by its mean.

    NaN where all ended alike. Below 0 the actor is taught what fails.
    """
    means = [float(one.double().mean()) for one in advantages]
    right = [m for m, outcome in zip(means, outcomes, strict=True) if outcome >= RIGHT]
    wrong = [m for m, outcome in zip(means, outcomes, strict=True) if outcome < RIGHT]
    good, count, bad, others = summed(math.fsum(right), len(right), math.fsum(wrong), len(wrong))
    return good / count - bad / others if count and others else math.nan


def variance_within(advantages: Sequence[Tensor], summed: Summed = _own) -> float:
    """The share of the tokens' variance that lies within responses: B tensors [T_i] -> [0, 1].

    0: every token of a response has the same advantage: the critic gives no credit inside it. NaN where
    nothing varies.
    """
    tokens = torch.cat([torch.zeros(0, dtype=torch.float64), *(one.double() for one in advantages)])
    total, count = summed(float(tokens.sum()), len(tokens))
    whole = float(((tokens - total / max(count, 1)) ** 2).sum())
    inside = math.fsum(float(((one.double() - one.double().mean()) ** 2).sum()) for one in advantages)
    inside, whole = summed(inside, whole)
    return inside / whole if whole > 1e-12 else math.nan
