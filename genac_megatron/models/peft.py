"""PEFT's names for adapters: what a folder of theirs holds, and what an engine that loads adapters is sent.

One mapping for conversion and publication: which projections there are is `adapters.places`'s to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from genac_megatron.models.adapters import places
from genac_megatron.models.families.base import Shape
from genac_megatron.models.sizes import Size, hf_size
from genac_megatron.recipe.schema import AdapterConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # before the names of the model's modules


def peft_names(projection: str) -> tuple[str, str]:
    """The names of a projection's A [rank, in] and B [out, rank]."""
    return f"{PREFIX}{projection}.lora_A.weight", f"{PREFIX}{projection}.lora_B.weight"


def peft_sizes(shape: Shape, adapter: AdapterConfig, layers: Sequence[int]) -> Iterator[tuple[str, Size]]:
    """Name and size of every tensor of these (global) layers, A before B, in the order of `places`."""
    for projection in (name for place in places(shape, adapter, layers) for name in place.projections):
        out, into = hf_size(f"{projection}.weight", shape)
        a, b = peft_names(projection)
        yield a, (adapter.rank, into)
        yield b, (out, adapter.rank)


def peft_config(adapter: AdapterConfig, base: str | None) -> dict[str, Any]:
    """adapter_config.json, as PEFT and SGLang read it."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(adapter.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "inference_mode": True,
    }
