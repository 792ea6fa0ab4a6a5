"""PPO with a scalar critic (arXiv 1707.06347, 1506.02438): generalised advantages over single tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def token_gae(
    values: Sequence[Tensor], outcomes: Tensor, gamma: float = 1.0, lam: float | Sequence[float] = 1.0
) -> list[Tensor]:
    """Advantages of every token: B tensors [T_i] of V(prefix strictly before token t), final rewards [B].

    GAE whose steps are tokens: delta_t = gamma V_{t+1} - V_t, the last delta = R - V_{T-1}. lam: one for all,
    or one per response. Returns B tensors [T_i], float32; every response has at least one token.
    """
    if not values:  # a rank may have none of a batch's responses
        return []
    lengths_B = torch.tensor([len(value) for value in values])
    value_BT = pad_sequence([value.double() for value in values], batch_first=True)
    next_BT = gamma * value_BT.roll(-1, dims=1)
    rows_B = torch.arange(len(values))
    next_BT[rows_B, lengths_B - 1] = outcomes.double()
    inside_BT = torch.arange(value_BT.size(1)) < lengths_B[:, None]
    delta_BT = (next_BT - value_BT) * inside_BT
    decay_B = gamma * torch.as_tensor(lam, dtype=torch.float64).expand(len(values))
    running_B = torch.zeros(len(values), dtype=torch.float64)
    advantage_BT = torch.empty_like(delta_BT)
    for t in range(value_BT.size(1) - 1, -1, -1):  # beyond a response's end all is 0
        running_B = delta_BT[:, t] + decay_B * running_B
        advantage_BT[:, t] = running_B
    return [row[:length].float() for row, length in zip(advantage_BT, lengths_B.tolist(), strict=True)]


def value_targets(values: Sequence[Tensor], advantages: Sequence[Tensor]) -> list[Tensor]:
    """What the critic learns: advantages by its own lambda, plus the values they were made of; [T_i] each."""
    return [value.float() + advantage for value, advantage in zip(values, advantages, strict=True)]


def value_loss(values_T: Tensor, old_T: Tensor, targets_T: Tensor, clip: float | None) -> Tensor:
    """Per token, half the squared error; with `clip`, the worse of it and that of the clipped value: [T].

    The clipped value is old +- clip: moving further from the value before the step gains nothing.
    """
    error_T = (values_T - targets_T) ** 2
    if clip is not None:
        near_T = old_T + (values_T - old_T).clamp(-clip, clip)
        error_T = torch.maximum(error_T, (near_T - targets_T) ** 2)
    return 0.5 * error_T
