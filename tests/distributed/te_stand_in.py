"""A stand-in for Transformer Engine, which has no form for CPUs.

It asserts what Megatron hands to its attention, and computes from that what it is defined to compute under
context parallelism, sequence by sequence. Only te.pytorch.DotProductAttention is ours: Megatron's
TEDotProductAttention, whose base class it is, and its packed rotary embeddings are the real ones.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from genac_megatron.models.context_parallel import share_of

VERSION = "2.4.0"  # with later ones Megatron imports more of it
RECORD: dict[str, Any] = {}  # what Megatron handed over


class Gather(torch.autograd.Function):
    """Every rank's share to the whole pack; backward sums what all ranks' queries say, and cuts it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bounds: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.order = torch.cat([share_of(bounds, group.size(), r) for r in range(group.size())])
        ctx.group = group
        held = x.new_empty(len(ctx.order), *x.shape[1:])
        dist.all_gather_into_tensor(held, x.contiguous(), group=group)
        return torch.empty_like(held).index_copy_(0, ctx.order, held)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        mine = grad.new_empty(len(grad) // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(mine, grad.index_select(0, ctx.order), group=ctx.group)
        return mine, None, None


class DotProductAttention(torch.nn.Module):
    """Asserts what Transformer Engine's ring attention asks of packed sequences."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        RECORD["cp_comm_type"] = arguments["cp_comm_type"]
        self.cp_group = arguments["cp_group"]

    def set_context_parallel_group(self, *_: Any) -> None:
        raise AssertionError("only for groups that change from batch to batch")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, _mask: Any, **told: Any) -> Tensor:
        cp, rank = self.cp_group.size(), self.cp_group.rank()
        cu_seqlens = told["cu_seqlens_q"]
        assert (told["qkv_format"], told["attn_mask_type"]) == ("thd", "padding_causal")
        assert cu_seqlens.dtype == told["cu_seqlens_kv"].dtype == torch.int32
        assert told["cu_seqlens_q_padded"] is None
        assert told["cu_seqlens_kv_padded"] is None
        assert not (cu_seqlens % (2 * cp)).any(), "each sequence is a multiple of 2 cp"
        assert len(q) * cp == int(cu_seqlens[-1]), "q is this rank's share, cu_seqlens the whole pack's"
        assert told["max_seqlen_q"] == int(cu_seqlens.diff().max())
        RECORD["calls"] = RECORD.get("calls", 0) + 1
        bounds = cu_seqlens.tolist()
        k, v = (Gather.apply(x, bounds, self.cp_group) for x in (k, v))
        places = share_of(bounds, cp, rank)
        repeat = q.size(1) // k.size(1)
        k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
        parts, at = [], 0
        for begin, end in pairwise(bounds):
            count = (end - begin) // cp
            seen = torch.arange(end - begin) <= (places[at : at + count] - begin)[:, None]
            scores = torch.einsum("qhd,khd->hqk", q[at : at + count], k[begin:end]) / q.size(-1) ** 0.5
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            parts.append(torch.einsum("hqk,khd->qhd", weights, v[begin:end]))
            at += count
        return torch.cat(parts).flatten(1)


def install() -> None:
    """Put the stand-in where `transformer_engine` is imported from, and load Megatron's extension over it."""

    def module(name: str, **content: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(made).update(content)
        sys.modules[name] = made
        return made

    def any_class(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].islower():  # a module of it
            return module(f"transformer_engine.pytorch.{name}", __getattr__=any_class)
        return type(name, (torch.nn.Module,), {})

    pytorch = module(
        "transformer_engine.pytorch", DotProductAttention=DotProductAttention, __getattr__=any_class
    )
    vars(pytorch)["fp8"] = module(
        "transformer_engine.pytorch.fp8",
        FP8GlobalStateManager=type("FP8GlobalStateManager", (), {}),
        fp8_autocast=None,
        fp8_model_init=None,
    )
    recipe = module("transformer_engine.common.recipe", __getattr__=any_class)
    common = module("transformer_engine.common", recipe=recipe)
    module("transformer_engine", pytorch=pytorch, common=common, __version__=VERSION, __path__=[])
    pytorch.__path__ = common.__path__ = []
    from megatron.core import utils
    from megatron.core.extensions import transformer_engine
    from packaging.version import Version

    vars(utils).update(_te_version=Version(VERSION), HAVE_TE=True)
    importlib.reload(transformer_engine)
