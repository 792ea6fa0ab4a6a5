"""Routing replay: tokens go to the experts that an engine chose, in the log-prob pass and in the step.

An engine's router and the trainer's see hidden states that differ by rounding; where two experts are nearly
tied they choose differently, and a token's log-prob jumps. Replayed, both compute with the same experts; the
gates are still the trainer's own, over the replayed experts, and so are their gradients
(Rollout Routing Replay, arXiv 2510.11370).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from genac_megatron.errors import InputError
from genac_megatron.models.families.base import Shape
from genac_megatron.records import Sample

_ATTRIBUTE = "genac_experts"


class Replay:
    """Stands where Megatron's RouterReplay does: its router asks it for the experts of its tokens.

    Megatron's own takes one micro-batch's choices ahead of a pass and queues them for recomputation, in lists
    over all models of the process. This one is told anew before every pass of its layer, from what comes with
    the pack, so that neither the schedule's order nor another role matters; and where nothing is given (-1:
    padding, samples that no engine made) the router chooses itself.
    """

    def __init__(self) -> None:
        self.given_TK: Tensor | None = None  # int64, of this rank's tokens in this pass
        self.layer_number: int | None = None  # written by Megatron's router

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores and indices [T, top-k] of the chosen experts, from scores [T, experts]."""
        assert default_compute_topk is not None
        top, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self.given_TK is None:
            return top, own
        chosen = torch.where(self.given_TK < 0, own, self.given_TK)
        return scores.gather(1, chosen), chosen


def install(model: Any) -> None:
    """Let every router of a model chunk (RoleModel) take the experts that come with a pack."""
    for layer in model.decoder.layers:
        router = getattr(layer.mlp, "router", None)
        if router is not None:
            router.router_replay = Replay()
            layer.register_forward_pre_hook(partial(_tell, router.router_replay, model), with_kwargs=True)


def _tell(replay: Replay, model: Any, layer: Any, _args: Any, kwargs: Mapping[str, Any]) -> None:
    experts_TLK = getattr(kwargs.get("packed_seq_params"), _ATTRIBUTE, None)
    if experts_TLK is None:
        replay.given_TK = None
        return
    given_TK = experts_TLK[:, layer.layer_number - 1]
    if model.config.sequence_parallel:  # a router sees its rank's share of the positions
        tp = model.pg_collection.tp
        given_TK = given_TK.chunk(tp.size())[tp.rank()]
    replay.given_TK = given_TK.long()


def attach(packed: PackedSeqParams, experts_TLK: Tensor | None) -> PackedSeqParams:
    """`packed` with the experts [T, all layers, top-k] that its tokens are to take; None: the routers'."""
    if experts_TLK is not None:
        setattr(packed, _ATTRIBUTE, experts_TLK)
    return packed


def check_experts(samples: Mapping[int, Sample], shape: Shape) -> None:
    """Raise InputError where samples carry experts that a model of this shape does not have."""
    for index, sample in samples.items():
        if sample.experts is not None:
            need_experts(f"sample {index}", sample.experts.shape[1:], int(sample.experts.max()), shape)


def need_experts(who: str, found: tuple[int, ...], most: int, shape: Shape) -> None:
    """Raise InputError where a model of this shape does not have `who`'s experts, up to number `most`, of
    `found` layers and choices.
    """
    wanted = (shape.layers, shape.experts_per_token)
    if shape.experts is None or found != wanted or most >= shape.experts:
        raise InputError(
            f"{who} has experts up to {most} of {found} layers and choices, "
            f"the model {shape.experts} of {wanted}",
            where="routing replay",
        )
