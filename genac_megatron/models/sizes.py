"""Sizes of tensors and numbers of parameters, from a shape's weight rules. Imports no torch."""

from __future__ import annotations

import math
from functools import cache

from genac_megatron.models.blockwise import BLOCK
from genac_megatron.models.families.base import Rule, Shape
from genac_megatron.models.registry import rules
from genac_megatron.recipe.schema import AdapterConfig

Size = tuple[int, ...]


def padded_vocab(shape: Shape, tp: int) -> int:
    """Rows of the embedding over all tensor-parallel ranks: the vocabulary rounded up to a multiple of tp."""
    return -(-shape.vocab // tp) * tp


def hf_size(name: str, shape: Shape) -> Size:
    """Size of the Hugging Face tensor `name` (a full name or a rule's template)."""
    sizes = _sizes(shape, shape.expert_ffn or 0 if ".experts." in name else shape.ffn)
    return sizes.get(".".join(name.split(".")[-2:]), (shape.hidden,))  # the rest are norms


@cache
def _sizes(shape: Shape, ffn: int) -> dict[str, Size]:
    """Last two words of a tensor's name -> its size."""
    q, kv, hidden = shape.q_size, shape.kv_size, shape.hidden
    return {
        "embed_tokens.weight": (shape.vocab, hidden),
        "lm_head.weight": (shape.vocab, hidden),
        "q_proj.weight": (q, hidden),
        "k_proj.weight": (kv, hidden),
        "v_proj.weight": (kv, hidden),
        "q_proj.bias": (q,),
        "k_proj.bias": (kv,),
        "v_proj.bias": (kv,),
        "o_proj.weight": (hidden, q),
        "q_norm.weight": (shape.head_dim,),
        "k_norm.weight": (shape.head_dim,),
        "score.weight": (1, hidden),
        "score.bias": (1,),
        "gate.weight": (shape.experts or 0, hidden),
        "gate_proj.weight": (ffn, hidden),
        "up_proj.weight": (ffn, hidden),
        "down_proj.weight": (hidden, ffn),
    }


def hf_names(shape: Shape) -> dict[str, Size]:
    """Name and size of every tensor of the Hugging Face model, in the order of its layers."""
    names: dict[str, Size] = {}
    for rule in rules(shape):
        if not rule.per_layer and rule.name.startswith("embedding"):
            names |= {name: hf_size(name, shape) for name in rule.hf}
    for layer in range(shape.layers):
        for rule in rules(shape):
            if rule.per_layer:
                names |= {name: hf_size(name, shape) for name in rule.hf_names(layer)}
    for rule in rules(shape):
        if not rule.per_layer:
            names |= {name: hf_size(name, shape) for name in rule.hf if name not in names}
    return names


def local_size(rule: Rule, shape: Shape, tp: int) -> Size:
    """Size of the parameter on each of `tp` ranks."""
    sizes = [list(hf_size(name, shape)) for name in rule.hf]
    size = [sum(s[0] for s in sizes), *sizes[0][1:]]
    if rule.padded:
        size[0] = padded_vocab(shape, tp)
    if rule.tp_axis is not None:
        size[rule.tp_axis] //= tp
    return tuple(size)


def cut_between_blocks(rule: Rule, shape: Shape, tp: int) -> bool:
    """Whether tensor parallelism cuts each of a rule's matrices between blocks of FP8 (models/blockwise.py).

    Then a rank's blocks are the whole's. Not where a rank holds a part of a key-value group.
    """
    if rule.tp_axis is None or (rule.fuse == "qkv" and tp > shape.kv_heads):
        return False
    return all(hf_size(name, shape)[rule.tp_axis] % (tp * BLOCK) == 0 for name in rule.hf)


@cache
def parameters(shape: Shape) -> int:
    """Parameters of the whole model, a tied output layer counted once."""
    return sum(math.prod(size) for size in hf_names(shape).values())


@cache
def largest_parameter(shape: Shape) -> int:
    """Numbers of the largest parameter, its Hugging Face tensors together."""
    return max(
        sum(math.prod(hf_size(name, shape)) for name in rule.hf_names(0 if rule.per_layer else None))
        for rule in rules(shape)
    )


@cache
def attention_parameters(shape: Shape, tp: int, layers: int) -> int:
    """Of `stage_parameters`, those of attention and the norm before it, which may be frozen."""
    held = (
        math.prod(local_size(rule, shape, tp))
        for rule in rules(shape)
        if rule.per_layer and (".self_attention." in rule.name or ".input_layernorm." in rule.name)
    )
    return layers * sum(held)


def adapter_parameters(shape: Shape, adapter: AdapterConfig, tp: int, layers: int) -> int:
    """Parameters of a role's adapters on one rank with `layers` layers, cut over `tp` ranks.

    Of each projection A [rank, in] and B [out, rank]: tensor parallelism cuts the one whose side it cuts.
    """
    count = 0
    for rule in rules(shape):
        for name in rule.hf if rule.per_layer and rule.name.endswith(".weight") else ():
            if name.split(".")[-2] in adapter.targets:
                out, into = hf_size(name, shape)
                count += adapter.rank * (out // tp + into if rule.tp_axis == 0 else out + into // tp)
    return layers * count


@cache
def stage_parameters(
    shape: Shape, tp: int, pp: int, stage: int, ep: int = 1, layers: int | None = None
) -> int:
    """Parameters on one rank of pipeline stage `stage` of `pp`, cut over `tp` ranks, experts over `ep`.

    layers: of that stage; None: as many as of each. The last stage of several keeps its own copy of a tied
    embedding.
    """
    first, last = stage == 0, stage == pp - 1
    here = {"embedding": first, "decoder": last, "output_layer": last and not (shape.tie and first)}
    count = 0
    for rule in rules(shape):
        held = math.prod(local_size(rule, shape, tp))
        if rule.expert is not None and rule.expert >= (shape.experts or 0) // ep:
            continue  # on another rank
        if rule.per_layer:
            count += (shape.layers // pp if layers is None else layers) * held
        elif here[rule.room]:
            count += held
    return count
