"""The FP8 form in which weights are served: which tensors, under which names and sizes. Imports no torch.

`engine.quantization: fp8`: every projection of every layer (attention, feed-forward, experts) is cut in
blocks of 128 x 128, each with a scale of its own; embeddings, norms, biases, routers and the output layer
stay as they are. It is the form of DeepSeek-V3's and Qwen3's FP8 checkpoints, which SGLang's `Fp8Config`
reads (quantization/fp8.py): `NAME.weight` in float8_e4m3fn and `NAME.weight_scale_inv` in fp32, whose product
the weight is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from genac_megatron.models.families.base import Shape

BLOCK = 128
SCALE = "_scale_inv"
SCALE_BYTES = 4


def in_blocks(name: str) -> bool:
    """Whether the Hugging Face tensor `name` is served in FP8."""
    return name.endswith("_proj.weight")


def scale_name(name: str) -> str:
    """The name of a weight's scales."""
    return name + SCALE


def scale_size(size: tuple[int, ...]) -> tuple[int, int]:
    """Of the scales of a weight [rows, columns]: one per block; blocks at the edges may be smaller."""
    rows, columns = size
    return -(-rows // BLOCK), -(-columns // BLOCK)


def quantization_config() -> dict[str, Any]:
    """What a model folder's config.json says of it, under "quantization_config"."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }


def served_config(hf_config: Mapping[str, Any], quantization: str) -> dict[str, Any]:
    """The config.json of a model that is served as `engine.quantization` says."""
    more = {"quantization_config": quantization_config()} if quantization == "fp8" else {}
    return {**hf_config, **more}


def cut_sides(shape: Shape, tp: int) -> dict[str, int]:
    """The sides of the matrices on one of an engine's `tp` ranks: each must be whole blocks.

    SGLang refuses fused and cut outputs and cut inputs that are not (`Fp8LinearMethod.
    validate_block_quant_shapes`), and its checksums find a block's size by dividing a row by its scales
    (`Fp8BlockComparable._infer_block_size`), so that no other input may have a part of one.
    """
    ffn = (shape.expert_ffn or 0) if shape.experts else shape.ffn
    return {
        "hidden": shape.hidden,
        "heads x head_dim": shape.q_size // tp,
        "kv_heads x head_dim": shape.kv_size // min(tp, shape.kv_heads),  # heads are repeated beyond that
        "expert_ffn" if shape.experts else "ffn": ffn // tp,
    }
