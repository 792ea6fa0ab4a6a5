"""Reading a config.json: sizes and numbers, rope, and which keys may stand in it.

A key that nobody here knows may change what the model computes: it is refused by name, unless its value is
one that means "off". Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from genac_megatron.errors import InputError

# Keys that make the Shape.
READ = {
    "attention_dropout", "head_dim", "hidden_act", "hidden_size", "initializer_range", "intermediate_size",
    "layer_types", "max_position_embeddings", "model_type", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
    "tie_word_embeddings", "vocab_size",
}  # fmt: skip
# Keys that say nothing about what the model computes in this project's hands: transformers' bookkeeping,
# generation, classification heads, and `pretraining_tp`, which splits the same products in another way.
IGNORED = {
    "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label",
    "is_encoder_decoder", "is_llama_config", "label2id", "max_window_layers", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "torch_dtype",
    "transformers.js_config", "transformers_version", "unk_token_id", "unsloth_fixed", "unsloth_version",
    "use_cache",
}  # fmt: skip

# What Megatron's rope scaling is fixed to (Llama 3.1).
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPE_KEYS = {"rope_theta", "rope_type", "type", "factor", *LLAMA3_ROPE}


def default_head_dim(hidden: int, heads: int) -> int:
    """The head_dim of a model that names none. Raises InputError where hidden cannot be divided."""
    if hidden % heads:
        raise InputError(
            f"hidden {hidden} is not a multiple of heads {heads}", way_out="change one, or give head_dim"
        )
    return hidden // heads


def size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number; `default` where the key is missing or null."""
    if config.get(key) is None:
        if default is None:
            raise InputError(f"the key '{key}' is missing")
        return default
    if not isinstance(config[key], int) or config[key] < 1:
        raise InputError(f"'{key}' is {config[key]!r}, not a positive number")
    return int(config[key])


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number; `default` where the key is missing or null."""
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise InputError(f"the key '{key}' is missing")
    if not isinstance(value, int | float) or value <= 0:
        raise InputError(f"'{key}' is {value!r}, not a positive number")
    return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """A truth value; `default` where the key is missing or null. Raises InputError for text such as "no"."""
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, bool):
        raise InputError(f"'{key}' is {value!r}, neither true nor false", way_out="write it without quotes")
    return value


def rope(config: Mapping[str, Any]) -> tuple[float, float | None]:
    """(theta, Llama 3 scaling factor or None), as transformers 4 and 5 write them.

    transformers 5 takes rope_scaling, where there is one, in place of all of rope_parameters; other readers
    do not. Raises InputError where the two say different things.
    """
    found = [_read_rope(config, key) for key in ("rope_scaling", "rope_parameters") if config.get(key)]
    if len(found) == 2 and found[0] != found[1]:
        raise InputError(
            f"rope_scaling {config['rope_scaling']} stands beside rope_parameters "
            f"{config['rope_parameters']}, which say different things: readers differ in which they take",
            way_out="keep one of them, with its rope_theta",
        )
    return found[0] if found else _read_rope(config, "rope_parameters")


def _read_rope(config: Mapping[str, Any], key: str) -> tuple[float, float | None]:
    rope = config.get(key) or {}
    if not isinstance(rope, Mapping):
        raise InputError(f"rope scaling ({key}) is {rope!r}, not a JSON object")
    rope = {k: v for k, v in rope.items() if (k, v) != ("partial_rotary_factor", 1)}
    theta = number({**config, **rope}, "rope_theta", 10_000.0)
    if config.get("rope_theta") not in (None, theta):
        raise InputError(
            f"rope_theta is {config['rope_theta']}, in {key} {theta:g}: readers differ in which they take",
            way_out="keep one of them, or make them the same",
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    unknown = {k: v for k, v in rope.items() if k not in ROPE_KEYS and v is not None}
    if not unknown and kind == "default" and rope.get("factor") in (None, 1):
        return theta, None
    if not unknown and kind == "llama3" and all(rope.get(k) == v for k, v in LLAMA3_ROPE.items()):
        return theta, number(rope, "factor")
    fixed = ", ".join(f"{key} {value:g}" for key, value in LLAMA3_ROPE.items())
    raise InputError(
        f"rope scaling ({key}) {dict(rope)} is not one that Megatron-core can build",
        way_out=f"it builds default, and llama3 with {fixed} and any factor",
    )


def read_experts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The Shape's figures of a mixture of experts in every layer. Raises InputError on any other mixture."""
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers")
    if step != 1 or dense:
        raise InputError(f"decoder_sparse_step {step}, mlp_only_layers {dense}: some layers have no experts")
    named = "num_experts" if config.get("num_local_experts") is None else "num_local_experts"
    return {
        "experts": size(config, named),
        "experts_per_token": size(config, "num_experts_per_tok"),
        "expert_ffn": size(config, "moe_intermediate_size"),
        "norm_topk": flag(config, "norm_topk_prob"),
    }


def refuse(*options: str) -> Callable[[Mapping[str, Any]], None]:
    """A reader that raises InputError where any of these options is on."""

    def read(config: Mapping[str, Any]) -> None:
        for option in options:
            if config.get(option):
                raise InputError(f"{option}: {config[option]} is not supported")

    return read


def refuse_unknown(config: Mapping[str, Any], architecture: str, own: Collection[str]) -> None:
    """Raise InputError naming what a config has beside a causal model's keys and a family's `own`.

    architecture: the transformers class that the family is.
    """
    named = config.get("architectures")
    if named and architecture not in named:
        raise InputError(f"architectures {named} are not {architecture}")
    if config.get("attention_dropout"):
        raise InputError(f"attention_dropout {config['attention_dropout']} is not supported")
    others = sorted({str(kind) for kind in config.get("layer_types") or ()} - {"full_attention"})
    if others:
        raise InputError(f"layer_types has {', '.join(others)}: only full_attention is supported")
    if config.get("quantization_config"):
        raise InputError(
            "quantization_config: the weights are quantised", way_out="give a bf16 or fp32 folder"
        )
    unknown = {
        key: value
        for key, value in config.items()
        if value and key not in READ | IGNORED and key not in own and not key.startswith("_")
    }
    if unknown:
        shown = ", ".join(f"{key}: {value!r}" for key, value in sorted(unknown.items()))
        raise InputError(
            f"options that this project does not know: {shown}",
            way_out="where they do not change what the model computes, take them out of config.json",
        )
