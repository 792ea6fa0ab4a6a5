"""Losses over packed tokens. Pure: tensors in, tensors out.

A loss is called as `loss(logp, entropy, fields) -> (scalar, stats)`:

- logp: [T] float32, the trainer's log-prob of each token, with gradient.
- entropy: [T] float32 or None.
- fields: per token [T]. `weights` are normalised over the *global* batch (their sum over all ranks and
  micro-batches is 1 for the token mean) and 0 on padding. Then, per loss, `advantages`, `behaviour`
  (the log-probs the engine sampled with) and optionally `old` (the trainer's before the first update).
- The scalar is sum_t weights_t * loss_t; stats are scalars weighted alike. So sums over micro-batches
  and ranks are batch means, and gradients add up. Padding may hold any finite figures.
- Weights whose sum over the batch is not 1 (Dr.GRPO's) make of stats what `means` makes means again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from genac_megatron.algorithms.baselines.pact import cross_entropy
from genac_megatron.algorithms.baselines.ppo import value_loss as clipped_value_loss
from genac_megatron.algorithms.baselines.sao import in_band
from genac_megatron.algorithms.importance import LOG_RATIO_LIMIT
from genac_megatron.recipe.algorithms import CriticLossConfig, LossConfig

Stats = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor | None, Mapping[str, Tensor]], tuple[Tensor, Stats]]

# Stats that are sums of weights * figure; nll has weights of its own.
WEIGHTED = {
    "ratio", "clip_share", "dual_clip_share", "tis", "tis_clip_share", "kl_behaviour", "kl_reference",
    "entropy", "masked_low_share", "masked_high_share",
}  # fmt: skip


def token_weights(
    lengths: Tensor | Sequence[int],
    aggregate: str = "token",
    limit: int | None = None,
    whole: tuple[float, float] | None = None,
) -> Tensor:
    """The loss weight of each token of each sequence: trained lengths [B] -> [B] float32.

    `lengths` are those of the whole global batch of one optimizer step, or a part of them: then `whole` has
    the sum of all, and how many of them are not empty. `token`: 1 / sum of lengths.
    `sequence`: 1 / (number of non-empty sequences * own length). Either way the weights of all tokens
    sum to 1 (0 for an empty batch). `constant`: 1 / (number of non-empty sequences * limit), whatever the
    lengths (Dr.GRPO); `limit` is the longest that a sequence may be.
    """
    sizes = torch.as_tensor(lengths, dtype=torch.float64)
    filled = sizes > 0
    total, count = (float(sizes.sum()), float(filled.sum())) if whole is None else whole
    if aggregate == "token":
        weights = torch.full_like(sizes, 1.0) / max(total, 1.0)
    elif aggregate == "sequence":
        weights = 1.0 / (max(count, 1.0) * sizes.clamp(min=1.0))
    elif aggregate == "constant" and limit is not None:
        weights = torch.full_like(sizes, 1.0) / (max(count, 1.0) * limit)
    else:
        raise ValueError(f"aggregate is token, sequence, or constant with a limit, not {aggregate!r}")
    return torch.where(filled, weights, torch.zeros_like(weights)).float()


def means(stats: Mapping[str, float], total: float) -> dict[str, float]:
    """A batch's stats as means over its tokens; total: the sum of its tokens' weights."""
    return {key: x / total if key in WEIGHTED and total > 0 else x for key, x in stats.items()}


def make_sft_loss() -> Loss:
    """Cross-entropy: -sum weights * logp. Fields: weights. Stats: nll, entropy where given."""

    def sft_loss(logp: Tensor, entropy: Tensor | None, fields: Mapping[str, Tensor]) -> tuple[Tensor, Stats]:
        weights = fields["weights"]
        loss = -(weights * logp).sum()
        return loss, _entropy_stat({"nll": loss.detach()}, weights, entropy)

    return sft_loss


def make_ppo_loss(config: LossConfig) -> Loss:
    """PPO's clipped objective (arXiv 1707.06347) with asymmetric clip, dual clip (1912.09729) and TIS.

    ratio = exp(logp - old); s = min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), and for
    A < 0 s = max(s, dual_clip A); loss = -sum weights * tis * s - entropy_coef * sum weights * entropy.
    tis = min(exp(old - behaviour), tis_cap), detached: the engine's distribution differs from the
    trainer's. `old` defaults to logp itself, detached: the first update after a rollout.
    nll_coef: the loss gains -nll_coef * sum nll_weights * logp (VAPO's likelihood of right responses).
    kl_coef: it gains kl_coef * sum weights * (r - 1 - log r), r = reference / now: the k3 estimate of
    KL(now || reference), with its gradient (GRPO, arXiv 2402.03300, eq. 4).
    band: in the place of clip, dual clip and tis, loss = -sum weights * keep * r A, r = now / behaviour and
    keep whether r is in the band (SAO, arXiv 2607.07508); its gradient is that of keep * r A * logp, r fixed.
    Fields: weights, advantages, behaviour, old (optional), nll_weights (with nll_coef), reference (with
    kl_coef). Stats: ratio, clip_share, dual_clip_share (with a band masked_low_share, masked_high_share), nll
    and kl_reference where they are on, and those of `_mismatch_stats`.
    """

    def ppo_loss(logp: Tensor, entropy: Tensor | None, fields: Mapping[str, Tensor]) -> tuple[Tensor, Stats]:
        weights, advantages = fields["weights"], fields["advantages"]
        old = fields.get("old", logp).detach()
        cap = None if config.band is not None else config.tis_cap
        if config.band is not None:
            surrogate, stats = _banded(logp, fields["behaviour"], advantages, weights, config.band)
        else:
            surrogate, stats = _clipped(logp, old, advantages, weights, config)
        tis = _tis(old, fields["behaviour"], weights, cap)
        loss = -(weights * tis * surrogate).sum()
        if config.entropy_coef != 0.0:
            if entropy is None:
                raise ValueError("entropy_coef needs the tokens' entropy")
            loss = loss - config.entropy_coef * (weights * entropy).sum()
        more: Stats = {}
        if config.nll_coef != 0.0:
            nll = -(fields["nll_weights"] * logp).sum()
            loss = loss + config.nll_coef * nll
            more = {"nll": nll.detach()}
        if config.kl_coef != 0.0:
            r = _ratio(fields["reference"], logp, weights)
            kl = (weights * (r - 1.0 - r.log())).sum()
            loss = loss + config.kl_coef * kl
            more["kl_reference"] = kl.detach()
        stats |= _mismatch_stats(old, logp.detach(), fields["behaviour"], weights, cap)
        return loss, _entropy_stat(stats | more, weights, entropy)

    return ppo_loss


def _clipped(
    logp: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, config: LossConfig
) -> tuple[Tensor, Stats]:
    """PPO's objective per token, [T], clipped on one side by the advantage's sign; and its stats."""
    ratio = _ratio(logp, old, weights)
    surrogate = torch.minimum(
        ratio * advantages, ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high) * advantages
    )
    negative = advantages < 0
    if config.dual_clip is not None:
        surrogate = torch.where(negative, torch.maximum(surrogate, config.dual_clip * advantages), surrogate)
    with torch.no_grad():
        above = (advantages > 0) & (ratio > 1.0 + config.clip_high)
        below = negative & (ratio < 1.0 - config.clip_low)
        far = negative & (ratio > (config.dual_clip or float("inf")))
        stats = {
            "ratio": (weights * ratio).sum(),
            "clip_share": (weights * (above | below)).sum(),
            "dual_clip_share": (weights * far).sum(),
        }
    return surrogate, stats


def _banded(
    logp: Tensor, behaviour: Tensor, advantages: Tensor, weights: Tensor, band: tuple[float, float]
) -> tuple[Tensor, Stats]:
    """SAO's objective per token, [T], 0 where the ratio to the engine leaves the band; and its stats."""
    ratio = _ratio(logp, behaviour, weights)
    keep = in_band(ratio, band).detach()
    with torch.no_grad():
        stats = {
            "ratio": (weights * ratio).sum(),
            "masked_low_share": (weights * (ratio <= band[0])).sum(),
            "masked_high_share": (weights * (ratio >= band[1])).sum(),
        }
    return torch.where(keep, ratio, torch.zeros_like(ratio)) * advantages, stats


def make_reinforce_loss(config: CriticLossConfig) -> Loss:
    """REINFORCE: -sum weights * tis * advantages * logp - entropy_coef * sum weights * entropy.

    `advantages` hold the completion's weight w = R_v - b on each of its tokens.
    tis = min(exp(logp - behaviour), tis_cap), detached. Fields: weights, advantages, behaviour.
    Stats: those of `_mismatch_stats`.
    """

    def reinforce_loss(
        logp: Tensor, entropy: Tensor | None, fields: Mapping[str, Tensor]
    ) -> tuple[Tensor, Stats]:
        weights, behaviour = fields["weights"], fields["behaviour"]
        now = logp.detach()
        tis = _tis(now, behaviour, weights, config.tis_cap)
        loss = -(weights * tis * fields["advantages"] * logp).sum()
        if config.entropy_coef != 0.0:
            if entropy is None:
                raise ValueError("entropy_coef needs the tokens' entropy")
            loss = loss - config.entropy_coef * (weights * entropy).sum()
        return loss, _entropy_stat(
            _mismatch_stats(now, now, behaviour, weights, config.tis_cap), weights, entropy
        )

    return reinforce_loss


def make_value_loss(clip: float | None, *, logit: bool = False) -> Loss:
    """A scalar critic's regression (`baselines/ppo.py`). The first argument is its head's output [T].

    logit: that is the value's log-odds, trained by cross-entropy without a clip (`baselines/pact.py`); else
    it is the value. Fields: weights, targets, old. Stats: error (mean squared, of values), value, clip_share.
    """
    if logit and clip is not None:
        raise ValueError("a value is clipped under a squared error alone")

    def value_loss(
        values: Tensor, entropy: Tensor | None, fields: Mapping[str, Tensor]
    ) -> tuple[Tensor, Stats]:
        weights, targets, old = fields["weights"], fields["targets"], fields["old"]
        trained = weights != 0  # elsewhere a square may overflow, and 0 * inf is no number
        values, targets, old = (torch.where(trained, x, 0.0) for x in (values, targets, old))
        each = cross_entropy(values, targets) if logit else clipped_value_loss(values, old, targets, clip)
        loss = (weights * each).sum()
        now = values.detach().sigmoid() if logit else values.detach()
        far = (now - old).abs() > (clip if clip is not None else float("inf"))
        return loss, {
            "error": (weights * (now - targets) ** 2).sum(),
            "value": (weights * now).sum(),
            "clip_share": (weights * far).sum(),
        }

    return value_loss


def _ratio(logp: Tensor, reference: Tensor, weights: Tensor) -> Tensor:
    """exp(logp - reference), [T]; 1 where the weight is 0, so that padding makes no inf."""
    difference = torch.where(weights != 0, logp - reference, torch.zeros_like(logp))
    return difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _tis(trainer: Tensor, behaviour: Tensor, weights: Tensor, cap: float | None) -> Tensor:
    """Truncated importance sampling weight min(trainer / behaviour, cap), [T]; 1 where off.

    `trainer` must come detached: the weight is a constant to the gradient.
    """
    if cap is None:
        return torch.ones_like(trainer)
    return _ratio(trainer, behaviour, weights).clamp(max=cap)


def _mismatch_stats(
    trainer: Tensor, logp: Tensor, behaviour: Tensor, weights: Tensor, cap: float | None
) -> Stats:
    """tis (mean weight), tis_clip_share, and kl_behaviour.

    kl_behaviour is KL(behaviour || trainer now) by the k3 estimator r - 1 - log r with
    r = trainer / behaviour on tokens that behaviour sampled; it is never negative.
    """
    raw = _ratio(trainer, behaviour, weights)
    ratio = _ratio(logp, behaviour, weights)
    return {
        "tis": (weights * _tis(trainer, behaviour, weights, cap)).sum(),
        "tis_clip_share": (weights * (raw > (cap if cap is not None else float("inf")))).sum(),
        "kl_behaviour": (weights * (ratio - 1.0 - ratio.log())).sum(),
    }


def _entropy_stat(stats: Stats, weights: Tensor, entropy: Tensor | None) -> Stats:
    if entropy is not None:
        stats["entropy"] = (weights * entropy.detach()).sum()
    return stats
