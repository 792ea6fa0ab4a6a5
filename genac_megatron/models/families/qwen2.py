"""Qwen2 and Qwen2.5: Llama with biases on query, key and value."""

from genac_megatron.models.families.base import Family
from genac_megatron.models.families.reading import refuse

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    qk_norm=False,
    qkv_bias=True,
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32_768},
    read_extras=refuse("use_sliding_window"),
    keys=frozenset({"use_sliding_window", "sliding_window"}),
    write_extras={"use_sliding_window": False},
)
