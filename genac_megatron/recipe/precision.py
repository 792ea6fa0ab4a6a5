"""Rules of a role's precision: which FP8 settings fit one another, its layers and its layout. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from genac_megatron.errors import InputError
from genac_megatron.models.blockwise import BLOCK, cut_sides
from genac_megatron.models.families.base import Shape
from genac_megatron.recipe.pipeline import stage_layers
from genac_megatron.recipe.schema import RoleConfig

Where = Callable[[Sequence[str | int]], str]
WIDTHS = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}  # a matrix's sides: multiples of it
KEPT = ("tensorwise", "blockwise")  # recipes whose parameters may be kept in FP8


def check_precision(name: str, role: RoleConfig, shape: Shape, where: Where) -> None:
    """Raise InputError at the first FP8 setting of a role that cannot be, `where` telling its place."""
    training, place = role.training, ("roles", name, "training")

    def refuse(key: str, what: str, way_out: str) -> InputError:
        return InputError(f"'{name}' {what}", where=where((*place, key)), way_out=way_out)

    fp8, kept_bf16 = training.fp8, training.bf16_first_layers + training.bf16_last_layers
    if fp8 == "off":
        if training.fp8_param:
            raise refuse("fp8_param", "keeps its weights in fp8 and trains without it", "set fp8: blockwise")
        if kept_bf16:
            key = "bf16_first_layers" if training.bf16_first_layers else "bf16_last_layers"
            raise refuse(key, "keeps layers out of fp8 and trains without it", f"take {key} out")
        return
    if training.specs == "torch":
        raise refuse("fp8", "asks for fp8 with torch's layers, which have none", "set specs: te, or fp8: off")
    if training.dtype == "fp32":
        raise refuse("fp8", "asks for fp8 in fp32 training", "set dtype: bf16, or fp8: off")
    if fp8 == "delayed" and role.layout.tp > 1:
        # Megatron shares delayed scaling's history over groups of the whole world, not of a role: ranks that
        # gather each other's FP8 rows would have scales of their own, without an error.
        raise refuse(
            "fp8", "asks for delayed scaling with tp > 1", "set fp8: tensorwise or blockwise, or tp: 1"
        )
    if fp8 == "delayed" and kept_bf16:
        raise refuse(
            "fp8",
            "keeps layers in BF16 under delayed scaling, which cannot",
            "set fp8: tensorwise or blockwise",
        )
    for key, stage in (("bf16_first_layers", 0), ("bf16_last_layers", role.layout.pp - 1)):
        each = stage_layers(role.layout, shape.layers, stage)
        if getattr(training, key) > each:
            raise refuse(
                key,
                f"has {each} layers in a pipeline stage, fewer than stay in BF16",
                "lower it, or lower pp",
            )
    if training.fp8_param and fp8 not in KEPT:
        raise refuse("fp8_param", f"keeps its weights in fp8 under {fp8}", f"set fp8: {' or '.join(KEPT)}")
    if training.fp8_param and not training.distributed_optimizer and training.adapter is None:
        raise refuse(
            "fp8_param",
            "keeps its weights in fp8 without fp32 master weights",
            "set distributed_optimizer: true",
        )
    _check_widths(name, role, shape, where)


def check_quantization(name: str, role: RoleConfig, shape: Shape, where: Where) -> None:
    """Raise InputError where SGLang could not serve the role's weights in blocks of FP8."""
    engine, place = role.engine, ("roles", name, "engine")
    if engine.quantization == "off" or engine.kind != "sglang" or not role.served:
        return  # what an embedded engine gets is dequantized, whatever the blocks
    if engine.dtype != "bf16":
        raise InputError(
            f"the engine of '{name}' is to serve weights in FP8 with {engine.dtype} activations, which "
            "SGLang cannot",
            where=where((*place, "dtype")),
            way_out="set dtype: bf16, or quantization: off",
        )
    if shape.family == "llama":  # measured on 0.5.23: its loader renames the blocks' scales and loses them
        raise InputError(
            f"the engine of '{name}' is to serve a Llama model in blocks of FP8, whose scales "
            "SGLang's loader for Llama leaves out",
            where=where((*place, "quantization")),
            way_out="set quantization: off",
        )
    for what, size in cut_sides(shape, engine.tp).items():
        if size % BLOCK:
            raise InputError(
                f"the engine of '{name}' is to serve weights in blocks of {BLOCK} x {BLOCK}, and its model's "
                f"{what} is {size}{f' on each of {engine.tp} engine ranks' if engine.tp > 1 else ''}",
                where=where((*place, "quantization")),
                way_out="set quantization: off" + (", or lower engine.tp" if engine.tp > 1 else ""),
            )


def _check_widths(name: str, role: RoleConfig, shape: Shape, where: Where) -> None:
    """Every matrix that is multiplied in FP8 has sides of whole blocks on each tensor-parallel rank."""
    tp, width = role.layout.tp, WIDTHS[role.training.fp8]
    ffn = shape.expert_ffn if shape.experts else shape.ffn // tp
    sides = {
        "hidden": shape.hidden,
        "ffn": ffn or 0,
        "heads x head_dim": shape.q_size // tp,
        "queries, keys and values": (shape.q_size + 2 * shape.kv_size) // tp,
    }
    for what, size in sides.items():
        if size % width:
            raise InputError(
                f"fp8 {role.training.fp8} of '{name}' needs sides that are multiples of {width}: its {what} "
                f"{'on a rank ' if tp > 1 else ''}is {size}",
                where=where(("roles", name, "training", "fp8")),
                way_out="set fp8: off" + (", or lower tp" if tp > 1 else ""),
            )
