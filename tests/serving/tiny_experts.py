"""A tiny mixture of experts, and which experts a plain transformers forward chooses."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tiny_models import plain_model, tiny_config

from genac_megatron.serving.experts import routers

EXPERTS, TOP_K = 8, 2
CONFIG = tiny_config(
    "qwen3_moe",
    architectures=["Qwen3MoeForCausalLM"],
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    num_experts=EXPERTS,
    num_experts_per_tok=TOP_K,
    moe_intermediate_size=24,
    norm_topk_prob=True,
    decoder_sparse_step=1,
    mlp_only_layers=[],
)
MODEL = plain_model(CONFIG)


@torch.no_grad()
def plain_choices(ids: tuple[int, ...]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Sorted experts [n, layers, top-k] that a forward over `ids` chooses, and where that choice is sure.

    Two experts whose gates differ by less than rounding may be chosen either way.
    """
    found: list[torch.Tensor] = []
    hooks = [
        r.register_forward_hook(lambda _m, _i, out: found.append(out[0].softmax(-1))) for r in routers(MODEL)
    ]
    MODEL(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    gates, order = torch.stack(found, dim=1).sort(-1, descending=True)
    sure = gates[..., TOP_K - 1] - gates[..., TOP_K] > 1e-5
    return order[..., :TOP_K].sort(-1).values.numpy(), sure.numpy()


def assert_plain(ids: tuple[int, ...], experts: Any) -> None:
    wanted, sure = plain_choices(ids)
    assert experts.shape == wanted.shape
    assert sure.mean() > 0.95
    assert (np.sort(experts, -1) == wanted)[sure].all()
