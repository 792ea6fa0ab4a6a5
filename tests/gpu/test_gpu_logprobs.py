"""Chunked log-probs and entropies on a GPU against dense ones in fp32, with their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genac_megatron import platform
from genac_megatron.models.logprobs import vocab_parallel_logprobs

TOKENS, HIDDEN, VOCAB = 1024, 256, 151_936
# Measured on a CPU at a vocabulary of 4,096: 3e-6 in fp32, 4e-3 in BF16; a GPU sums in another order.
TOLERANCES = {torch.float32: 3e-5, torch.bfloat16: 1.5e-2}


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    device = platform.device()
    hidden = torch.randn(TOKENS, HIDDEN, device=device).to(dtype)
    weight = (torch.randn(VOCAB, HIDDEN, device=device) / math.sqrt(HIDDEN)).to(dtype)
    return hidden, weight, torch.randint(VOCAB, (TOKENS,), device=device)


def passed(dtype: torch.dtype, chunk: int | None) -> tuple[Tensor, ...]:
    """Log-probs, entropies, and the gradients of hidden states and weight; dense and fp32 without chunk."""
    hidden, weight, labels = inputs(dtype)
    if chunk is None:
        hidden, weight = hidden.float(), weight.float()
    hidden.requires_grad_()
    weight.requires_grad_()
    if chunk is None:
        table = (hidden @ weight.T).log_softmax(-1)
        logp, entropy = table.gather(1, labels[:, None])[:, 0], -(table.exp() * table).sum(-1)
    else:
        logp, found = vocab_parallel_logprobs(
            hidden, weight, labels, tp_group=None, chunk=chunk, vocab=VOCAB, with_entropy=True
        )
        assert found is not None
        entropy = found
    (logp.mean() + 0.1 * entropy.mean()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return logp.detach().float(), entropy.detach().float(), hidden.grad.float(), weight.grad.float()


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("chunk", [256, 1024])
def test_chunked_is_dense(dtype: torch.dtype, chunk: int) -> None:
    for found, wanted in zip(passed(dtype, chunk), passed(dtype, None), strict=True):
        scale = wanted.abs().max().clamp(max=1.0)
        assert (found - wanted).abs().max() < TOLERANCES[dtype] * max(float(scale), 1e-6)


def test_no_whole_logits_exist() -> None:
    hidden, weight, labels = inputs(torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        vocab_parallel_logprobs(hidden, weight, labels, tp_group=None, chunk=64, vocab=VOCAB)
    whole = TOKENS * VOCAB * 4
    assert torch.cuda.max_memory_allocated() - before < whole / 4
