"""Attention over trees on a GPU: both ways against dense attention in fp32, and a role against flat packs.

Not run on a GPU yet; bounds are BF16's, as tests/gpu/test_precision.py has them for other kernels.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from gpu_cases import VOCAB, largest, make_role, mean
from torch import Tensor

from genac_megatron import platform
from genac_megatron.algorithms.losses import make_sft_loss
from genac_megatron.models.flex_trees import block_mask, flex_trees
from genac_megatron.models.packed_attention import TreeShape
from genac_megatron.models.tree_kernels import calls_of, merged_attention
from genac_megatron.records import Sample
from genac_megatron.training.tree_packs import build_tree_pack
from genac_megatron.training.trees import forest_of, order_of

# Of values of about 1 and their gradients: BF16 has 8 bits, TF32 10.
TOLERANCES = {torch.bfloat16: 4e-2, torch.float32: 5e-3}


def nested(groups: int, seed: int) -> list[Sample]:
    """Judgements of four nested states of responses, as a critic has them."""
    rng = random.Random(seed)
    samples = []
    for _ in range(groups):
        trunk = [rng.randrange(VOCAB) for _ in range(420)]
        for cut in (90, 200, 310, 420):
            own = [rng.randrange(VOCAB) for _ in range(rng.randint(30, 60))]
            samples.append(Sample([*trunk[:cut], *own], cut + 4))
    total = sum(sample.trained for sample in samples)
    for sample in samples:
        sample.fields = {"weights": [1 / total] * sample.trained}
    return samples


def tree_shape(samples: list[Sample]) -> tuple[TreeShape, Tensor]:
    """Of one pack of them all, and which keys each query sees, dense."""
    order, members = order_of(samples), list(range(len(samples)))
    pack = build_tree_pack(samples, members, forest_of(order, members), multiple=16)
    assert pack.tree is not None
    total = len(pack.tokens_T)
    seen = torch.zeros(total, total, dtype=torch.bool)
    for a, b in zip(pack.tree.bounds, pack.tree.bounds[1:], strict=False):
        seen[a:b, a:b] = torch.ones(b - a, b - a, dtype=torch.bool).tril()
    for a, b, c, d in pack.tree.cuts:
        seen[a:b, c:d] = True
    return pack.tree, seen.to(platform.device())


def passed(attend: Any, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = attend(*leaves)
    (out.float() * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum().backward()
    return [out.detach().float(), *(x.grad.float() for x in leaves)]  # type: ignore[union-attr]


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.size(2) ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize(
    ("how", "dtype"), [("flex", torch.bfloat16), ("flex", torch.float32), ("merged", torch.bfloat16)]
)
def test_a_way_of_trees_is_dense_attention(how: str, dtype: torch.dtype) -> None:
    device = platform.device()
    for groups in (1, 3):  # of another length: FlexAttention must not be compiled for one alone
        tree, seen = tree_shape(nested(groups, groups))
        torch.manual_seed(0)
        inputs = [torch.randn(len(seen), heads, 64, device=device).to(dtype) for heads in (4, 2, 2)]
        if how == "flex":
            mask = block_mask(tree, device)
            found = passed(lambda q, k, v, m=mask: flex_trees(q, k, v, m, None), inputs)
        else:
            calls = calls_of(tree, device)
            found = passed(lambda q, k, v, c=calls: merged_attention(q, k, v, c, None), inputs)
        wanted = passed(lambda q, k, v, s=seen: dense(q, k, v, s), [x.float() for x in inputs])
        for mine, theirs in zip(found, wanted, strict=True):
            scale = float(theirs.abs().max().clamp(min=1.0))
            assert float((mine - theirs).abs().max()) < TOLERANCES[dtype] * scale


@pytest.mark.parametrize("how", ["flex", "merged"])
def test_a_role_on_trees_is_one_on_flat_packs(how: str) -> None:
    """Log-probs, loss and gradient norm, in BF16 and by whatever layers are here."""
    found: dict[str, Any] = {}
    for way in (how, "flat"):
        role = make_role(tree_attention=way, dtype="bf16", tokens_per_microbatch=4096)
        role.begin_stage(None, 4)
        counted: list[float] = []
        logprobs = role.logprobs(nested(4, 7), counted=counted.append)
        stats = role.train_step(nested(4, 8), make_sft_loss()).stats
        found[way] = [x for row in logprobs for x in row], stats, counted
    (mine, stats, computed), (theirs, flat, every) = found[how], found["flat"]
    assert computed[0] < 0.6 * every[0]
    assert largest(mine, theirs) < 0.25
    assert mean(mine, theirs) < 0.03
    assert stats["loss"] == pytest.approx(flat["loss"], rel=5e-3)
    assert stats["grad_norm"] == pytest.approx(flat["grad_norm"], rel=5e-2)
