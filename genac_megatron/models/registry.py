"""From a recipe's model or a Hugging Face folder to a Shape, and from a Shape to everything made of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genac_megatron.errors import InputError
from genac_megatron.models.families import llama, qwen2, qwen3
from genac_megatron.models.families.base import Family, Rule, Shape
from genac_megatron.recipe.schema import ModelConfig

FAMILIES: dict[str, Family] = {f.name: f for f in (llama.FAMILY, qwen2.FAMILY, qwen3.FAMILY)}


def family(name: str) -> Family:
    """The family called `name`. Raises InputError where there is none."""
    if name not in FAMILIES:
        raise InputError(
            f"model family {name!r} is not supported", way_out=f"supported are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[name]


def shape_of(config: ModelConfig, tokenizer_vocab: int) -> Shape:
    """The Shape of a recipe's model: its folder's config.json, or its family and sizes.

    tokenizer_vocab: number of ids of the tokenizer; the model must have a row for each, and it is the
    vocabulary where the recipe names none. Raises InputError.
    """
    if config.hf is not None:
        shape = shape_from_folder(config.hf)
    elif config.family is not None and config.shape is not None:
        sizes = config.shape
        shape = Shape(
            family=config.family,
            layers=sizes.layers,
            hidden=sizes.hidden,
            ffn=sizes.ffn,
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim or sizes.hidden // sizes.heads,
            vocab=sizes.vocab or tokenizer_vocab,
            tie=sizes.tie_embeddings,
            rope_theta=sizes.rope_theta,
            norm_eps=sizes.norm_eps,
            max_positions=sizes.max_positions,
            init_std=sizes.init_std,
            qk_norm=family(config.family).qk_norm,
            qkv_bias=family(config.family).qkv_bias,
        )
    else:
        raise InputError("a model needs either hf, or family and shape", where="model")
    if shape.vocab < tokenizer_vocab:
        raise InputError(
            f"the tokenizer has {tokenizer_vocab} ids and the model only {shape.vocab} embedding rows",
            where="model",
            way_out="use the model's own tokenizer",
        )
    return shape


def shape_from_folder(folder: str | Path) -> Shape:
    """The Shape that a Hugging Face folder's config.json describes. Raises InputError naming the file."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read ({error})", where=str(path)) from error
    return shape_from_hf(config)


def shape_from_hf(config: Mapping[str, Any]) -> Shape:
    """The Shape that the content of a config.json describes. Raises InputError."""
    return family(str(config.get("model_type"))).shape_from_hf(config)


def hf_config(shape: Shape) -> dict[str, Any]:
    """The config.json content of `shape`."""
    return family(shape.family).hf_config(shape)


def rules(shape: Shape) -> tuple[Rule, ...]:
    """The weight rules of `shape`."""
    return family(shape.family).rules(shape)
