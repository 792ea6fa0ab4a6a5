"""Small Hugging Face folders with random weights and the built-in tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from genac_megatron.models.families.base import Shape
from genac_megatron.models.mapping import random_weights
from genac_megatron.models.registry import family, hf_config
from genac_megatron.models.sizes import hf_names
from genac_megatron.tasks.tokenizer import TINY_FOLDER, tokenizer_size


def tiny_shape(name: str = "qwen3", **changes: Any) -> Shape:
    """Three layers, a vocabulary that tensor parallelism has to pad."""
    kind = family(name)
    sizes: dict[str, Any] = {
        "layers": 3, "hidden": 48, "ffn": 96, "heads": 6, "kv_heads": 3, "head_dim": 8, "tie": False,
        "vocab": tokenizer_size("builtin:tiny"), "rope_theta": 1e4, "norm_eps": 1e-6, "max_positions": 256,
        "init_std": 0.2, "qk_norm": kind.qk_norm, "qkv_bias": kind.qkv_bias,
    }  # fmt: skip
    if kind.moe:
        sizes |= {"experts": 4, "experts_per_token": 2, "expert_ffn": 24, "norm_topk": True}
    return Shape(family=name, **sizes | changes)


def make_folder(path: Path, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Path:
    """config.json, one safetensors file, the tokenizer."""
    shutil.copytree(TINY_FOLDER, path)
    (path / "config.json").write_text(json.dumps(hf_config(shape)))
    get = random_weights(shape, 5)
    tensors = {name: get(name).to(dtype) for name in hf_names(shape)}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path
