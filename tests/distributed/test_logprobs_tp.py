"""Log-probs over vocabulary shards on 2 and 4 gloo ranks, against one dense fp64 softmax."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from genac_megatron.models.logprobs import vocab_parallel_logprobs
from tests.distributed.pool import Pool

TOKENS, HIDDEN, ROWS = 37, 24, 64
# vocab 61: the last shard is padded in part; 30: at TP4 the shards hold 16, 14, 0 and 0 true rows.
CASES = [
    (tp, dtype, vocab, temperature, masked)
    for tp in (2, 4)
    for dtype, vocab, temperature, masked in (
        (torch.float32, 64, 1.0, False),
        (torch.float32, 61, 0.7, True),
        (torch.float32, 30, 1.0, False),
        (torch.bfloat16, 61, 1.0, True),
    )
]


def _inputs(dtype: torch.dtype, vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, labels, mask, and upstream gradients [2, T] of log-prob and entropy."""
    g = torch.Generator().manual_seed(vocab)
    hidden_TH = torch.randn(TOKENS, HIDDEN, generator=g).to(dtype)
    weight_VH = torch.randn(ROWS, HIDDEN, generator=g).to(dtype)
    labels_T = torch.randint(vocab, (TOKENS,), generator=g)
    mask_T = torch.rand(TOKENS, generator=g) < 0.6
    return hidden_TH, weight_VH, labels_T, mask_T, torch.randn(2, TOKENS, generator=g)


def tp_cases(rank: int) -> list[list[Tensor]]:
    """[log-prob, entropy, partial hidden gradient, weight gradient] of each case, on one of four ranks."""
    groups = {tp: dist.new_subgroups(tp)[0] for tp in (2, 4)}
    results = []
    for tp, dtype, vocab, temperature, masked in CASES:
        hidden_TH, weight_VH, labels_T, mask_T, upstream_2T = _inputs(dtype, vocab)
        hidden_TH.requires_grad_()
        shard_VH = weight_VH.chunk(tp)[rank % tp].clone().requires_grad_()
        logp_T, entropy_T = vocab_parallel_logprobs(
            hidden_TH,
            shard_VH,
            labels_T,
            tp_group=groups[tp],
            temperature=temperature,
            chunk=10,
            vocab=vocab,
            with_entropy=True,
            mask_T=mask_T if masked else None,
        )
        assert entropy_T is not None
        (logp_T @ upstream_2T[0] + entropy_T @ upstream_2T[1]).backward()
        assert hidden_TH.grad is not None
        assert shard_VH.grad is not None
        results.append([logp_T.detach(), entropy_T.detach(), hidden_TH.grad, shard_VH.grad])
    return results


@pytest.fixture(scope="module")
def results(pool: Pool) -> list[list[list[Tensor]]]:
    """[rank][case][figure]"""
    return pool.run(tp_cases)


def _dense(dtype: torch.dtype, vocab: int, temperature: float, masked: bool, exact: bool) -> list[Tensor]:
    """The same four figures in one piece: in fp64 from the rounded inputs, or in the case's own dtype."""
    hidden_TH, weight_VH, labels_T, mask_T, upstream_2T = _inputs(dtype, vocab)
    if exact:
        hidden_TH, weight_VH, upstream_2T = hidden_TH.double(), weight_VH.double(), upstream_2T.double()
    hidden_TH.requires_grad_()
    weight_VH.requires_grad_()
    logits_TV = hidden_TH @ weight_VH[:vocab].T
    logp_TV = ((logits_TV if exact else logits_TV.float()) / temperature).log_softmax(-1)
    kept_T = mask_T if masked else torch.ones_like(mask_T)
    logp_T = logp_TV.gather(1, labels_T[:, None]).squeeze(1) * kept_T
    entropy_T = -(logp_TV.exp() * logp_TV).sum(1) * kept_T
    (logp_T @ upstream_2T[0] + entropy_T @ upstream_2T[1]).backward()
    assert hidden_TH.grad is not None
    assert weight_VH.grad is not None
    return [logp_T.detach(), entropy_T.detach(), hidden_TH.grad, weight_VH.grad]


@pytest.mark.parametrize(
    "index", range(len(CASES)), ids=[f"tp{c[0]}-{c[1]}-{c[2]}".replace("torch.", "") for c in CASES]
)
def test_shards_equal_one_dense_softmax(index: int, results: list[list[list[Tensor]]]) -> None:
    tp, dtype, vocab, temperature, masked = CASES[index]
    expected = _dense(dtype, vocab, temperature, masked, exact=True)
    plain = _dense(dtype, vocab, temperature, masked, exact=False)
    for first in range(0, 4, tp):  # each TP group
        ranks = [results[rank][index] for rank in range(first, first + tp)]
        for rank in ranks:  # bit for bit the same on every rank of the group
            assert torch.equal(rank[0], ranks[0][0])
            assert torch.equal(rank[1], ranks[0][1])
        partial = [rank[2].double() for rank in ranks]
        found = [
            ranks[0][0],
            ranks[0][1],
            torch.stack(partial).sum(0),
            torch.cat([rank[3] for rank in ranks]),
        ]
        for x, y, dense in zip(found, expected, plain, strict=True):
            if dtype == torch.float32:
                # Logits reach about 20, which fp32 rounds at 1e-6; 37 tokens add up in the weight.
                torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=2e-5)
            else:
                # bf16 rounds logits, their gradient and each rank's part: about what dense bf16 loses.
                assert (x.double() - y).abs().max() <= 2 * (dense.double() - y).abs().max()
        assert not torch.equal(ranks[0][2], ranks[1][2])  # a partial sum each, not the whole


def test_tp2_and_tp4_agree(results: list[list[list[Tensor]]]) -> None:
    half = len(CASES) // 2
    for two, four, case in zip(results[0][:half], results[0][half:], CASES, strict=False):
        if case[1] == torch.float32:
            # The same fp32 figures, summed in another order.
            torch.testing.assert_close(two[:2], four[:2], rtol=1e-5, atol=5e-6)
