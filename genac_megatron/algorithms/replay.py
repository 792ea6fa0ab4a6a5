"""Supervised samples in the batch of another loss. Pure: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from genac_megatron.algorithms.losses import Loss, Stats


def with_replay(loss: Loss, weight: float) -> Loss:
    """loss - weight * sum nll_weights * logp: cross-entropy of the batch's replayed samples is added.

    Fields: those of `loss`, all 0 on replayed tokens, and nll_weights [T], 0 on the others, whose sum over
    the global batch is 1. Stats: those of `loss`, and replay_nll, the replay's mean nats a token.
    """

    def replayed(logp: Tensor, entropy: Tensor | None, fields: Mapping[str, Tensor]) -> tuple[Tensor, Stats]:
        total, stats = loss(logp, entropy, fields)
        nll = -(fields["nll_weights"] * logp).sum()
        return total + weight * nll, {**stats, "replay_nll": nll.detach()}

    return replayed
